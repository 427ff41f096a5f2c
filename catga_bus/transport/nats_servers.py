"""Which servers there are: the seeds from the options and those that the cluster names."""

import ipaddress
import random
import re
from collections.abc import Iterable, Sequence
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from catga_bus.errors import ConfigurationError

DEFAULT_PORT = 4222

_TLS_BY_SCHEME = {"nats": False, "tls": True}


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Server(msgspec.Struct, frozen=True):
    """The address of one server and what its URL says about reaching it."""

    host: str
    port: int
    tls: bool = False
    """Whether the URL insists on TLS (`tls://`)."""

    user: str | None = None
    """From the URL; a token where `password` is None."""

    password: str | None = None
    tls_name: str | None = None
    """The host name of the seed that named this server by its IP address; its certificate carries that name."""

    @property
    def url(self) -> str:
        """The address without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'nats'}://{host}:{self.port}"


def parse_server(url: str) -> Server:
    """Read the address of a server.

    Args:
        url: `nats://host:port` or `tls://host:port`; the scheme may be left out, the port is 4222
            unless it says otherwise. `user:password@` or `token@` may stand before the host, with
            `%XX` for characters that mean something in a URL.

    Raises:
        ConfigurationError: It cannot be used; the text holds the address without its credentials.

    Example:
        >>> parse_server("example.org").url
        'nats://example.org:4222'
    """
    shown = redacted(url)
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
    except ValueError:
        # Neither its text nor itself: both quote what may be a password.
        raise ConfigurationError(f"address {shown!r} cannot be read; write nats://host:port") from None
    if parts.scheme not in _TLS_BY_SCHEME:
        raise ConfigurationError(f"address {shown!r}: the scheme must be nats:// or tls://, not {parts.scheme}://")
    if "," in parts.netloc.rpartition("@")[2] or ("," in parts.netloc and parts.netloc.count("@") > 1):
        raise ConfigurationError(f"address {shown!r} holds a comma; give each server by itself")
    port = _port_of(parts, shown)
    if not parts.hostname or " " in parts.hostname:
        raise ConfigurationError(f"address {shown!r} has no host that can be used; write nats://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigurationError(f"address {shown!r} must end after the port")
    return Server(
        host=parts.hostname,
        port=port,
        tls=_TLS_BY_SCHEME[parts.scheme],
        user=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
    )


def _port_of(parts: SplitResult, shown: str) -> int:
    try:
        return parts.port if parts.port is not None else DEFAULT_PORT
    except ValueError:
        raise ConfigurationError(f"address {shown!r}: the port is not 1 to 65535") from None


def redacted(url: str) -> str:
    """Return an address, however broken, without what may be credentials."""
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme else 0
    return url[:start] + url[start:].rpartition("@")[2]


class ServerPool:
    """The servers to try, in rounds.

    Seeds stay for ever; the others are those that the last server to speak of its cluster named.

    Args:
        seeds: The addresses of the options.
        rng: Shuffles each round, so that clients spread over the cluster.

    Raises:
        ConfigurationError: There is no seed, or one cannot be read.
    """

    def __init__(self, seeds: Sequence[str], rng: random.Random) -> None:
        if not seeds:
            raise ConfigurationError("urls is empty; name at least one server, nats://host:port")
        self.seeds = tuple(parse_server(url) for url in seeds)
        self._discovered: tuple[Server, ...] = ()
        self._rng = rng

    def round(self, last: Server | None = None) -> list[Server]:
        """Return every server once, in random order.

        Args:
            last: The server whose connection was lost; it comes at the end.
        """
        servers = [*self.seeds, *self._discovered]
        self._rng.shuffle(servers)
        if last is not None:
            servers.sort(key=lambda server: (server.host, server.port) == (last.host, last.port))
        return servers

    def learn(self, addresses: Iterable[str], source: Server) -> None:
        """Take note of the servers that a server names.

        They are reached as `source` was: with its TLS, its certificate name and its credentials,
        since a cluster has one of each.

        Args:
            addresses: `host:port` each; what cannot be read is left out.
            source: The server that named them.
        """
        tls_name = source.tls_name or (None if _is_ip(source.host) else source.host)
        known = {(seed.host, seed.port) for seed in self.seeds}
        found: dict[tuple[str, int], Server] = {}
        for address in addresses:
            try:
                named = parse_server(address)
            except ConfigurationError:
                continue
            if (named.host, named.port) in known:
                continue
            found[named.host, named.port] = Server(
                host=named.host,
                port=named.port,
                tls=source.tls,
                user=source.user,
                password=source.password,
                tls_name=tls_name if _is_ip(named.host) else None,
            )
        self._discovered = tuple(found.values())


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
