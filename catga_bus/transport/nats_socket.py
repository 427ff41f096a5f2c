"""One connection to one server: TCP, TLS, the hand-shake, bytes in and out, and its end.

Decided: an `asyncio.Protocol` rather than the client library's streams and read loop. A message
goes from the socket's callback to its sink without waking a task in between, and there is no read
loop that an exception could end behind everybody's back. The end is bounded: `abort` needs nothing
from the peer, where the library waits for it, 30 seconds with TLS and for ever without.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

from catga_bus.errors import AuthenticationError, CatgaError
from catga_bus.transport.base import Sink
from catga_bus.transport.nats_protocol import PING, PONG, Parser, ProtocolError, ServerInfo
from catga_bus.transport.nats_servers import Server

_AUTHENTICATION = re.compile(r"authorization|authentication (?!timeout)|user.*not found", re.I)
# "Authorization Violation", "User Authentication Expired", "Account Authentication Revoked", ...;
# not "Authentication Timeout", which only says that somebody was slow.


class SocketOwner(Protocol):
    """What a connection tells once its hand-shake is over; every method returns at once."""

    def on_info(self, info: ServerInfo) -> None:
        """The server described itself anew: the cluster changed, or it is about to stop."""

    def on_pong(self) -> None:
        """A PING was answered."""

    def on_err(self, text: str) -> None:
        """The server refused something, and may close the connection for it."""

    def on_data(self) -> None:
        """Something came: the server lives."""

    def on_lost(self, socket: "NatsSocket", reason: str) -> None:
        """The connection has ended, or must because what came could not be read."""

    def on_sink_error(self, subject: str, error: BaseException) -> None:
        """A sink raised."""


class NatsSocket(asyncio.Protocol):
    """One connection. Open it once; when it is lost make another.

    Args:
        owner: Who is told.
        routes: The sink of each subscription id.
        write_limit_bytes: What may wait for the peer before `wait_writable` waits.
    """

    def __init__(self, owner: SocketOwner, routes: Mapping[bytes, Sink], write_limit_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        self._owner = owner
        self._parser = Parser(self)
        self._routes = routes
        self._write_limit_bytes = write_limit_bytes
        self._transport: asyncio.Transport | None = None
        self._info: asyncio.Future[ServerInfo] = loop.create_future()
        self._welcome: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._writable: asyncio.Future[None] | None = None
        # Set while the transport's buffer is over the limit.
        self._latest_info = ServerInfo()
        self._failure: BaseException | None = None
        # The first thing that went wrong.
        self._has_greeted = False
        self._is_open = False
        # `open` has returned: from now on messages go to their sinks, and the owner is told of the rest.
        self._is_lost = False

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._is_lost

    async def open(
        self,
        server: Server,
        addresses: Sequence[str],
        *,
        tls: Callable[[], ssl.SSLContext],
        insist_on_tls: bool,
        hostname: str | None,
        greet: Callable[[ServerInfo], bytes],
    ) -> ServerInfo:
        """Connect and shake hands; bound it from outside, and `abort` if it raises.

        Args:
            server: Where to.
            addresses: What its host stands for, at least one; they are tried in turn.
            tls: Makes the context if the server or we want TLS.
            insist_on_tls: Whether a server without TLS is refused, so that nobody in between can
                talk us out of it.
            hostname: The name that the certificate must carry; the server's host if None.
            greet: Makes the CONNECT line out of the server's INFO.

        Returns:
            What the server said of itself last.

        Raises:
            AuthenticationError: The server refuses the credentials.
            CatgaError: It says something else that ends the connection.
            OSError: It cannot be reached, or TLS fails.
        """
        await self._reach(addresses, server.port)
        info = await self._info
        self._check()
        if info.tls_required or insist_on_tls:
            await self._start_tls(info, tls, hostname or server.tls_name or server.host)
        self._has_greeted = True
        self.write(greet(info) + PING)
        await self._welcome
        self._check()
        self._parser.routes = self._routes
        self._is_open = True
        return self._latest_info

    async def _reach(self, addresses: Sequence[str], port: int) -> None:
        *others, last = addresses
        for address in others:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().create_connection(lambda: self, address, port)
                return
        await asyncio.get_running_loop().create_connection(lambda: self, last, port)

    def _check(self) -> None:
        # What went wrong between a line of the server and the turn in which `open` goes on.
        if self._failure is not None:
            raise self._failure

    async def _start_tls(self, info: ServerInfo, context: Callable[[], ssl.SSLContext], hostname: str) -> None:
        if not info.tls_required and not info.tls_available:
            raise CatgaError("the server does not offer TLS, and the options ask for it")
        if not self._parser.is_idle:
            # It would be read as the beginning of what comes encrypted: somebody in between could put it there.
            raise ProtocolError("the server goes on in the clear after an INFO that asks for TLS")
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._transport = await loop.start_tls(self._transport, self, context(), server_hostname=hostname)
        self._limit_writes()

    def write(self, data: bytes) -> None:
        """Hand bytes to the transport; nothing is said if the connection is gone already."""
        if self._transport is not None and not self._is_lost:
            self._transport.write(data)

    @property
    def buffered_bytes(self) -> int:
        """Bytes that the peer has not taken yet, as far as this process knows."""
        if self._transport is None or self._is_lost:
            return 0
        return self._transport.get_write_buffer_size()

    async def wait_writable(self) -> None:
        """Wait until the buffer has shrunk well below the limit, or the connection is gone."""
        if self._writable is not None:
            await asyncio.shield(self._writable)

    @property
    def is_paused(self) -> bool:
        """Whether `wait_writable` would wait."""
        return self._writable is not None

    async def close(self, timeout: float) -> None:
        """End the connection in order, or after `timeout` seconds without asking the peer."""
        if self._transport is None:
            return
        if not self._is_lost:
            self._transport.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await asyncio.shield(self._ended)
        self.abort()
        if not self._ended.done():
            # One turn for the transport's last callback; it needs nothing from the peer.
            await asyncio.wait([self._ended], timeout=timeout)

    def abort(self) -> None:
        """End the connection at once; what it still held is lost and its owner is told nothing."""
        self._is_lost = True
        self._fail(ConnectionAbortedError("the connection was given up"))
        self._release_writers()
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without deriving from it
        self._limit_writes()

    def data_received(self, data: bytes) -> None:
        """Parse a chunk."""
        if self._is_lost:
            return
        if self._is_open:
            self._owner.on_data()
        try:
            self._parser.feed(data)
        except Exception as error:
            # Whatever it is, the place in the stream is lost with it: only a new connection helps.
            self._lose(f"what the server sent cannot be used: {describe(error)}", error)

    def pause_writing(self) -> None:
        """The buffer is over the limit."""
        if self._writable is None:
            self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The buffer has shrunk."""
        self._release_writers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note of the end."""
        if not self._ended.done():
            self._ended.set_result(None)
        error = exc or ConnectionResetError("the server closed the connection")
        self._lose(describe(error), error)

    # What the parser calls.

    def on_info(self, info: ServerInfo) -> None:
        """Begin the hand-shake with the first INFO, pass on the later ones."""
        self._latest_info = info
        if self._is_open:
            self._owner.on_info(info)
        elif not self._info.done():
            self._info.set_result(info)

    def on_ping(self) -> None:
        """Answer."""
        self.write(PONG)

    def on_pong(self) -> None:
        """End the hand-shake with the first PONG, pass on the later ones."""
        if self._is_open:
            self._owner.on_pong()
        elif not self._has_greeted:
            raise ProtocolError("a PONG before any PING")
        elif not self._welcome.done():
            self._welcome.set_result(None)

    def on_err(self, text: str) -> None:
        """Fail the hand-shake, or pass it on."""
        if self._is_open:
            self._owner.on_err(text)
        elif _AUTHENTICATION.search(text):
            self._fail(AuthenticationError(text))
        else:
            self._fail(CatgaError(text))

    def on_unrouted(self, sid: bytes) -> None:
        """Drop it: it is late for a subscription that was closed."""
        if not self._is_open:
            raise ProtocolError(f"a message for subscription {sid!r} before the hand-shake was over")

    def on_sink_error(self, subject: str, error: BaseException) -> None:
        """Pass it on."""
        self._owner.on_sink_error(subject, error)

    def _lose(self, reason: str, error: BaseException) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        self._release_writers()
        if self._transport is not None:
            self._transport.abort()
        if self._is_open:
            self._owner.on_lost(self, reason)
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        for future in (self._info, self._welcome):
            if not future.done():
                future.set_exception(error)
                # Whoever waits gets it; if nobody does, nobody needs to hear of it.
                future.exception()

    def _release_writers(self) -> None:
        if self._writable is not None:
            if not self._writable.done():
                self._writable.set_result(None)
            self._writable = None

    def _limit_writes(self) -> None:
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=self._write_limit_bytes)


def describe(error: BaseException) -> str:
    """Return what an error says, or its name if it says nothing."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    return str(error) or type(error).__name__
