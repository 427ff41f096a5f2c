"""Finding a server that takes us: rounds through the cluster, the hand-shake, and the pauses in between."""

import asyncio
import json
import logging
import random
from collections.abc import Callable
from typing import Final, NamedTuple

from catga_bus.errors import AuthenticationError, ConfigurationError
from catga_bus.rarely import RareLog
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_credentials import connect_fields, tls_context, wants_tls
from catga_bus.transport.nats_names import NameLookup
from catga_bus.transport.nats_protocol import ServerInfo
from catga_bus.transport.nats_servers import Server, ServerPool
from catga_bus.transport.nats_socket import NatsSocket, describe
from catga_bus.version import __version__

_MAX_DELAY: Final = 0.8
# Longest pause between two rounds through the servers, in seconds: so a client is back within a second of its server. A
# thousand clients of a server that is gone make up to 2,500 attempts a second to connect, which the kernel refuses.

_STABLE_SECONDS: Final = 2.0
# A connection that lived this long was a good one: the next loss starts with the short delay again.

_ATTEMPT_TIMEOUT: Final = 1.0
# Bound of the first attempts to come back, per server, in seconds; doubles per round up to
# `connect_timeout`. A frozen server accepts and says nothing, so it costs this much per round.


class Dialed(NamedTuple):
    """A connection whose hand-shake is over, and whose it is."""

    socket: NatsSocket
    server: Server
    info: ServerInfo


class Dialer:
    """Goes through the servers until one takes us.

    Args:
        options: How to reach and convince a server.
        rng: Draws the jitter and the order of the servers.
        log: Says, once in a while, why a server did not take us.
        make_socket: Returns a new socket; whoever gets a `Dialed` owns the one in it.

    Raises:
        ConfigurationError: An address or a file of the options cannot be used.

    Attributes:
        pool: The servers that there are.
        reasons: By address, why it did not take us when it was last tried.
    """

    def __init__(
        self, options: ConnectionOptions, rng: random.Random, log: RareLog, make_socket: Callable[[], NatsSocket]
    ) -> None:
        self.pool = ServerPool(options.urls, rng)
        self.reasons: dict[str, str] = {}
        self._options = options
        self._rng = rng
        self._log = log
        self._make_socket = make_socket
        self._names = NameLookup()
        self._delay = options.reconnect_delay
        # What cannot work is found here, once, and not as one more reason why nobody answers.
        connect_fields(options, self.pool.seeds[0], "probe")
        if wants_tls(options):
            tls_context(options)

    async def first(self) -> Dialed:
        """Return the first connection; to be bounded from outside.

        Raises:
            AuthenticationError: A server refuses the credentials.
            ConfigurationError: A file of the options cannot be used.
        """
        # Every seed gets its turn, also when the ones before it accept and say nothing.
        bound = 0.9 * self._options.connect_timeout / len(self.pool.seeds)
        return await self._dial(bound, None, is_first=True)

    async def again(self, last: Server | None, lived: float) -> Dialed:
        """Return the next connection, however long it takes.

        Args:
            last: The server whose connection was lost; it is tried after the others.
            lived: Seconds that the lost connection has lasted.
        """
        if lived >= _STABLE_SECONDS:
            self._delay = self._options.reconnect_delay
        await self._pause()
        return await self._dial(min(_ATTEMPT_TIMEOUT, self._options.connect_timeout), last, is_first=False)

    async def _dial(self, bound: float, last: Server | None, *, is_first: bool) -> Dialed:
        self.reasons.clear()
        while True:
            for server in self.pool.round(last):
                try:
                    async with asyncio.timeout(bound):
                        return await self._shake_hands(server)
                except AuthenticationError as error:
                    if is_first:
                        raise AuthenticationError(f"{server.url} refuses the credentials: {error}") from None
                    self._note(server, error)
                except ConfigurationError as error:
                    if is_first:
                        raise
                    self._note(server, error)
                except Exception as error:
                    # Refused, unknown host, bad certificate, silence, nonsense: the next one.
                    self._note(server, error)
            await self._pause()
            bound = min(2 * bound, self._options.connect_timeout)

    def _note(self, server: Server, error: Exception) -> None:
        self.reasons[server.url] = reason = describe(error)
        self._log.write(
            logging.WARNING, server.url, "%s: cannot connect to %s: %s", self._options.name, server.url, reason
        )

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.5 * self._delay, self._delay))
        self._delay = min(2 * self._delay, max(_MAX_DELAY, self._options.reconnect_delay))

    async def _shake_hands(self, server: Server) -> Dialed:
        addresses = await self._names.addresses(server.host, server.port)
        socket = self._make_socket()
        try:
            info = await socket.open(
                server,
                addresses,
                tls=lambda: tls_context(self._options),
                insist_on_tls=server.tls or wants_tls(self._options),
                hostname=self._options.tls_hostname,
                greet=lambda info: self._greeting(server, info),
            )
        except BaseException:
            socket.abort()
            raise
        return Dialed(socket, server, info)

    def _greeting(self, server: Server, info: ServerInfo) -> bytes:
        fields = {
            "verbose": False,
            "pedantic": False,
            "echo": True,
            "lang": "python3",
            "version": __version__,
            "protocol": 1,
            "name": self._options.name,
            "headers": info.headers,
            "no_responders": info.headers,
            "tls_required": server.tls or wants_tls(self._options),
            **connect_fields(self._options, server, info.nonce),
        }
        return b"CONNECT %b\r\n" % json.dumps(fields).encode()
