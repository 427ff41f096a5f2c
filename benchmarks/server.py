"""The NATS server that a benchmark runs against: a private one, or the one at `--url`."""

import asyncio
import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from benchmarks.errors import ServerUnreachableError, UsageError
from catga_bus.embedded import EmbeddedServer
from catga_bus.errors import CatgaError

_DEFAULT_PORT = 4222
# A server on the same continent answers within 0.2 s; three seconds is "not there".
_PROBE_SECONDS = 3.0


def _new_namespace() -> str:
    return f"bench-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that has answered."""

    url: str
    """What clients connect to; a comma-separated list is a cluster."""

    version: str
    """As the server itself says."""

    pid: int | None = None
    """Its process, where the benchmark started it."""

    namespace: str = field(default_factory=_new_namespace)
    """First token of every subject of this run: nothing else on the server is touched."""


@contextmanager
def open_server(url: str | None) -> Iterator[Server]:
    """Hold a server: the one at `url` if there is one, else a private one that ends with the block.

    Args:
        url: nats:// or tls:// addresses, separated by commas; None for a private server.

    Raises:
        UsageError: `url` is of another kind, or no private server can be started.
        ServerUnreachableError: None of the addresses answers within 3 s each.
    """
    if url is not None:
        yield Server(url, _version_at(url))
        return
    embedded = EmbeddedServer()
    with asyncio.Runner() as runner:
        try:
            runner.run(embedded.start())
        except CatgaError as error:
            raise UsageError(f"no private server: {error}; give one with --url") from error
        try:
            yield Server(embedded.url, _version_at(embedded.url), embedded.pid)
        finally:
            runner.run(embedded.stop())


def _version_at(urls: str) -> str:
    failures = []
    for url in urls.split(","):
        host, port = _address(url.strip())
        try:
            return _greeting(host, port)
        except (OSError, ValueError) as error:
            failures.append(f"{host}:{port} ({error})")
    raise ServerUnreachableError(
        f"no NATS server answers at {', '.join(failures)}; "
        f"start one (docker compose up -d), or leave --url out for a private server"
    )


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    try:
        port = parts.port or _DEFAULT_PORT
    except ValueError as error:
        raise UsageError(f"--url: {url!r} has no usable port ({error})") from error
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        raise UsageError(f"--url: {url!r} is not an address like nats://127.0.0.1:4222")
    return parts.hostname, port


def _greeting(host: str, port: int) -> str:
    """Return the version in the INFO line, the first thing that a NATS server says, TLS or not."""
    with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as connection:
        line = connection.makefile("rb").readline(65_536)
    verb, _, text = line.partition(b" ")
    if verb != b"INFO":
        raise ValueError(f"what listens there is no NATS server: it said {line[:40]!r}")
    return str(json.loads(text).get("version", "unknown"))
