"""The connection that comes back for ever: opening, losing, returning, pings, interests and the order of bytes.

It replaces the part of nats-py 2.16 between the library's calls and the socket, because of what that does when
things go wrong (each has a test that shows the library failing):

1. A silent peer is waited for while closing: reconnecting took 30 seconds with TLS, for ever with unsent data. Here a
   lost connection is aborted.
2. A PONG that comes after its `flush` gave up ended the read loop, with `is_connected` still True.
3. So did any other exception while reading. Here whatever goes wrong ends in `lose`.
4. Headers were not counted towards `max_payload`; the server's error then closed the client for good.
5. So did every other error of the server: an expired user, a subject over 4 KiB. Here an error of the server is
   reported, and if the server hangs up for it the connection comes back.
6. The first connect went on for ever over a dead address, an unreadable file or a bad TLS set-up.
7. PING overtook what was published before it, so a `flush` proved nothing about that.
8. Credentials in a seed's URL were not used for the servers that the cluster names.
9. A server without TLS was talked to in the clear although TLS was asked for.
"""

import asyncio
import contextlib
import json
import logging
import random
import re
from collections import deque
from collections.abc import Callable
from enum import Enum
from importlib.metadata import version
from typing import Any, Final

from catga_bus.errors import (
    AuthenticationError,
    BusStateError,
    CatgaError,
    ConfigurationError,
    DisconnectedError,
    Outcome,
)
from catga_bus.transport.base import ConnectionOptions, Sink, TransportEvents
from catga_bus.transport.nats_credentials import connect_fields, tls_context, wants_tls
from catga_bus.transport.nats_log import ConnectionLog
from catga_bus.transport.nats_protocol import CRLF, PING, encode_subscribe, encode_unsubscribe
from catga_bus.transport.nats_servers import Server, ServerPool, redacted
from catga_bus.transport.nats_socket import NatsSocket, describe

_MAX_DELAY: Final = 2.0
# Longest pause between two rounds through the servers, in seconds.

_STABLE_SECONDS: Final = 2.0
# A connection that lived this long was a good one: the next loss starts with the short delay again.

_MAX_SILENT_PINGS: Final = 2
# Missed answers in a row that make a connection lost.

_ATTEMPT_TIMEOUT: Final = 1.0
# Bound of the first attempts to come back, per server, in seconds; doubles per round up to
# `connect_timeout`. A frozen server accepts and says nothing, so it costs this much per round.

_GOODBYE_TIMEOUT: Final = 1.5
_HANG_UP_TIMEOUT: Final = 0.2
# Together with one more hang-up they stay below the 2 seconds that closing may take.

_PUSH_BYTES: Final = 262_144
# What is pending is handed to the socket at this size without waiting for the end of the turn, so
# that the server works while a long turn goes on. Chosen: at this size the copy costs less than
# the system call; a tenth of it doubles the calls, ten times more only holds memory.

_DENIED = re.compile(r'permissions violation for (?:publish|subscription)[^"]*"((?:[^"\\]|\\.)*)"', re.I)
# Publish to "a.b" | Publish with Reply of "a.b" to "c" | Subscription to "a.b" using queue "q"

_ESCAPED = re.compile(r"\\(.)")
# The server quotes as Go does: a quote or a backslash in a subject comes with a backslash before it.


class State(Enum):
    """Where a connection stands."""

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    ENDING = "ending"
    """Nothing new is taken; what waits is still written."""

    ENDED = "ended"


_OVER: Final = (State.ENDING, State.ENDED)


class NatsConnection:
    """Connected to a cluster or coming back to it, from `open` to `end`.

    Args:
        options: How to reach and convince a server.
        events: Who is told; what it raises is logged.
        rng: Draws the jitter and the order of the servers.
    """

    def __init__(self, options: ConnectionOptions, events: TransportEvents, rng: random.Random) -> None:
        self.state = State.NEW
        self.max_payload = 1_048_576
        """Bytes; the default of nats-server until a server has said what it takes."""

        self.sink_errors = 0
        """Messages whose sink raised."""

        self._last_sid = 0
        self._options = options
        self._events = events
        self._rng = rng
        # By subscription id, as the server writes it: the sink, and the SUB line that asks for it.
        self._routes: dict[bytes, Sink] = {}
        self._interests: dict[bytes, bytes] = {}
        # What the next push hands to the socket, in order.
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._is_push_due = False
        # One entry per PING on its way, oldest first; the future of whoever waits for its PONG.
        self._answers: deque[asyncio.Future[bool] | None] = deque()
        self._silent_pings = 0
        self._ping_timer: asyncio.TimerHandle | None = None
        self._delay = options.reconnect_delay
        self._connected_at = 0.0
        self._last_refusal = ""
        self._return_task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._socket: NatsSocket | None = None
        # Set by `open`.
        self._loop: asyncio.AbstractEventLoop
        self._log: ConnectionLog
        self._pool: ServerPool

    # Opening.

    async def open(self) -> None:
        """Connect within `connect_timeout`, trying every seed; afterwards come back for ever.

        Raises:
            DisconnectedError: No server took us in time; the text says why for each.
            AuthenticationError: A server refused the credentials.
            ConfigurationError: An address or a file cannot be used.
            BusStateError: It was opened before.
        """
        if self.state is not State.NEW:
            raise BusStateError("the transport connects once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._log = ConnectionLog(self._options.name, self._loop.time)
        self._pool = ServerPool(self._options.urls, self._rng)
        # What cannot work is found here, once, and not as one more reason why nobody answers.
        connect_fields(self._options, self._pool.seeds[0], "probe")
        if wants_tls(self._options):
            tls_context(self._options)
        self.state = State.CONNECTING
        reasons: dict[str, str] = {}
        timeout = self._options.connect_timeout
        # Every seed gets its turn, also when the ones before it accept and say nothing.
        bound = 0.9 * timeout / len(self._pool.seeds)
        try:
            async with asyncio.timeout(timeout):
                await self._find_server(bound, reasons, is_first=True)
        except TimeoutError:
            for seed in self._pool.seeds:
                reasons.setdefault(seed.url, describe(TimeoutError()))
            tried = ", ".join(f"{url} ({reason})" for url, reason in reasons.items())
            raise DisconnectedError(
                f"no NATS server could be used within {timeout} s: {tried}", outcome=Outcome.NOT_RUN
            ) from None
        finally:
            if self.state is State.CONNECTING:
                self.state = State.NEW

    async def _find_server(self, bound: float, reasons: dict[str, str], *, is_first: bool) -> None:
        """Go through the servers until one takes us; `reasons` says why the others did not."""
        while True:
            for server in self._pool.round(self._server):
                if self.state in _OVER:
                    raise BusStateError("the transport was closed while it was connecting")
                try:
                    async with asyncio.timeout(bound):
                        await self._shake_hands(server)
                except (AuthenticationError, ConfigurationError) as error:
                    if is_first:
                        raise self._named(error, server) from None
                    reasons[server.url] = describe(error)
                except Exception as error:
                    # Refused, unknown host, bad certificate, silence, nonsense: the next one.
                    reasons[server.url] = describe(error)
                else:
                    return
                self._log.write_rarely(
                    logging.WARNING,
                    f"cannot connect to {server.url}",
                    "cannot connect to %s: %s",
                    server.url,
                    reasons[server.url],
                )
            await self._pause()
            bound = min(2 * bound, self._options.connect_timeout)

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.5 * self._delay, self._delay))
        self._delay = min(2 * self._delay, max(_MAX_DELAY, self._options.reconnect_delay))

    def _named(self, error: CatgaError, server: Server) -> CatgaError:
        if isinstance(error, AuthenticationError):
            return AuthenticationError(f"{server.url} refuses the credentials: {error}")
        return error

    async def _shake_hands(self, server: Server) -> None:
        socket = NatsSocket(self, self._routes, self._options.write_limit_bytes)
        try:
            info = await socket.open(
                server,
                tls=lambda: tls_context(self._options),
                insist_on_tls=server.tls or wants_tls(self._options),
                hostname=self._options.tls_hostname,
                greet=lambda info: self._greeting(server, info),
            )
        except BaseException:
            socket.abort()
            raise
        if socket.is_lost or self.state in _OVER:
            socket.abort()
            raise ConnectionResetError("the connection was lost at once")
        # No suspension from here on: nobody sees a half-made connection.
        self._socket = socket
        self._server = server
        self.state = State.CONNECTED
        self._connected_at = self._loop.time()
        self.on_info(info)
        self._resubscribe()
        self._ping_timer = self._loop.call_later(self._options.ping_interval, self._ping_if_silent)
        self._log.write(
            logging.INFO,
            "connected to %s (server %s, version %s)",
            server.url,
            info.get("server_name", "?"),
            info.get("version", "?"),
        )

    def _greeting(self, server: Server, info: dict[str, Any]) -> bytes:
        has_headers = bool(info.get("headers"))
        fields = {
            "verbose": False,
            "pedantic": False,
            "echo": True,
            "lang": "python3",
            "version": version("catga-bus"),
            "protocol": 1,
            "name": self._options.name,
            "headers": has_headers,
            "no_responders": has_headers,
            "tls_required": server.tls or wants_tls(self._options),
            **connect_fields(self._options, server, info.get("nonce")),
        }
        return b"CONNECT %b\r\n" % json.dumps(fields).encode()

    def _resubscribe(self) -> None:
        for line in self._interests.values():
            self.write(line)
        self.push()

    # Losing the connection, and coming back.

    def lose(self, reason: str) -> None:
        """Give the connection up and come back; the one end of every connection but the last."""
        if not self._has_connection:
            return
        assert self._socket is not None
        self._socket.abort()
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        self._drop_pending()
        if self._last_refusal:
            reason = f"{self._last_refusal} ({reason})"
            self._last_refusal = ""
        if self.state is State.ENDING:
            self.state = State.ENDED
            return
        self.state = State.RECONNECTING
        if self._loop.time() - self._connected_at >= _STABLE_SECONDS:
            self._delay = self._options.reconnect_delay
        self._log.write(logging.WARNING, "lost the connection to %s: %s", self.url, reason)
        self._tell(self._events.on_disconnected, reason)
        self._return_task = self._loop.create_task(self._come_back())

    def _drop_pending(self) -> None:
        # Nothing crosses a reconnect: what was published late would be done late.
        self._pending.clear()
        self._pending_bytes = 0
        self._silent_pings = 0
        while self._answers:
            answer = self._answers.popleft()
            if answer is not None and not answer.done():
                answer.set_result(False)

    async def _come_back(self) -> None:
        lost_at = self._loop.time()
        await self._pause()
        bound = min(_ATTEMPT_TIMEOUT, self._options.connect_timeout)
        await self._find_server(bound, {}, is_first=False)
        self._log.write(logging.INFO, "back at %s after %.3f s", self.url, self._loop.time() - lost_at)
        self._tell(self._events.on_reconnected, self.url)

    # Ending.

    async def end(self) -> None:
        """Send what waits, then end everything, within 2 seconds. Ending twice is fine."""
        self._routes.clear()
        self._interests.clear()
        if self.state is State.CONNECTED:
            # From here on `put` is refused, but what waits is still written.
            self.state = State.ENDING
            with contextlib.suppress(DisconnectedError):
                await self.ping(_GOODBYE_TIMEOUT)
        self.state = State.ENDED
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        self._drop_pending()
        if self._return_task is not None:
            self._return_task.cancel()
            await asyncio.gather(self._return_task, return_exceptions=True)
        if self._socket is not None:
            await self._socket.close(_HANG_UP_TIMEOUT)

    # Sending. Everything that leaves goes through `_pending` and `push`, in the order it came.

    @property
    def is_usable(self) -> bool:
        """Whether a message would be taken now."""
        return self.state is State.CONNECTED

    @property
    def is_alive(self) -> bool:
        """Whether interests are kept: there is a connection, or there will be one again."""
        return self.state in (State.CONNECTED, State.RECONNECTING)

    @property
    def _has_connection(self) -> bool:
        return self.state in (State.CONNECTED, State.ENDING)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait here and in the socket's buffer."""
        buffered = self._socket.buffered_bytes if self._socket is not None else 0
        return self._pending_bytes + buffered

    @property
    def url(self) -> str:
        """The server in use, or the last one; the first seed before that."""
        if self._server is not None:
            return self._server.url
        return redacted(self._options.urls[0]) if self._options.urls else ""

    def put(self, head: bytes, payload: bytes) -> None:
        """Send one message; the caller has seen that `is_usable`.

        Args:
            head: What `Encoder` made of its subject and size.
            payload: Not changed until the end of this turn.
        """
        self._pending += (head, payload, CRLF)
        size = self._pending_bytes + len(head) + len(payload) + 2
        self._pending_bytes = size
        if size >= _PUSH_BYTES:
            self.push()
        elif not self._is_push_due:
            self._is_push_due = True
            self._loop.call_soon(self._push_at_end_of_turn)

    def push(self) -> None:
        """Hand everything pending to the socket."""
        pending = self._pending
        if pending and self._socket is not None:
            data = b"".join(pending)
            pending.clear()
            self._pending_bytes = 0
            self._socket.write(data)

    def _push_at_end_of_turn(self) -> None:
        self._is_push_due = False
        self.push()

    def write(self, line: bytes) -> None:
        """Send a control line with the next push, if there is a connection to send it on.

        Without one there is nothing to remember: the next connection begins with every interest.
        """
        if self._has_connection:
            self._pending.append(line)
            self._pending_bytes += len(line)

    async def wait_writable(self, limit_bytes: int) -> None:
        """Wait until at most `limit_bytes` wait, or the connection is gone."""
        socket = self._socket
        self.push()
        while socket is not None and not socket.is_lost and socket.buffered_bytes > limit_bytes:
            if socket.is_paused:
                await socket.wait_writable()
            else:
                # The loop writes at the end of its turn and only then says whether it must wait.
                await asyncio.sleep(0)

    async def ping(self, timeout: float) -> None:
        """Wait until the server has handled everything sent so far.

        A PONG that comes too late finds nobody and harms nobody.

        Raises:
            DisconnectedError: There is no connection, it was lost, or `timeout` seconds passed.
        """
        if not self._has_connection:
            raise DisconnectedError(f"cannot flush: not connected to {self.url}", outcome=Outcome.NOT_RUN)
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._send_ping_for(answer)
        try:
            async with asyncio.timeout(timeout):
                is_answered = await answer
        except TimeoutError:
            raise DisconnectedError(f"cannot flush: {self.url} has not answered within {timeout} s") from None
        if not is_answered:
            raise DisconnectedError(f"cannot flush: the connection to {self.url} was lost")

    def _send_ping_for(self, answer: "asyncio.Future[bool] | None") -> None:
        self._answers.append(answer)
        self.write(PING)
        self.push()

    def _ping_if_silent(self) -> None:
        if self._silent_pings >= _MAX_SILENT_PINGS:
            self.lose(f"stale connection: {_MAX_SILENT_PINGS} pings were not answered")
            return
        self._silent_pings += 1
        self._send_ping_for(None)
        self._ping_timer = self._loop.call_later(self._options.ping_interval, self._ping_if_silent)

    # Interests.

    def add_route(self, subject: str, queue: str, sink: Sink) -> bytes:
        """Express interest in a subject, now and after every reconnect.

        Returns:
            The subscription's id, for `remove_route`.
        """
        self._last_sid += 1
        sid = b"%d" % self._last_sid
        self._routes[sid] = sink
        self._interests[sid] = line = encode_subscribe(subject, queue, self._last_sid)
        self.write(line)
        self.push()
        return sid

    def remove_route(self, sid: bytes) -> None:
        """End an interest; its sink is not called again. A second time does nothing."""
        if self._routes.pop(sid, None) is None:
            return
        del self._interests[sid]
        self.write(encode_unsubscribe(int(sid)))
        self.push()

    # What the socket tells.

    def on_data(self) -> None:
        """The server lives: the missed pings so far do not count."""
        self._silent_pings = 0

    def on_pong(self) -> None:
        """Answer whoever waits for the oldest PING."""
        if self._answers:
            answer = self._answers.popleft()
            if answer is not None and not answer.done():
                answer.set_result(True)

    def on_info(self, info: dict[str, Any]) -> None:
        """Take note of the limits, of the cluster's servers, and of a server that will stop."""
        self.max_payload = int(info.get("max_payload", self.max_payload))
        if self._server is not None and info.get("connect_urls"):
            self._pool.learn(info["connect_urls"], self._server)
        if info.get("ldm"):
            self._log.write(logging.WARNING, "%s is in lame duck mode: it will close this connection", self.url)

    def on_err(self, text: str) -> None:
        """Report what the server refuses; if it hangs up for it, the loss will name this reason."""
        denied = _DENIED.search(text)
        if denied:
            subject = _ESCAPED.sub(r"\1", denied[1])
            self._log.write_rarely(logging.WARNING, f"denied {subject}", "%s: %s", self.url, text)
            self._tell(self._events.on_denied, subject, text)
            return
        self._last_refusal = text
        self._log.write_rarely(logging.WARNING, text, "%s says: %s", self.url, text)
        self._tell(self._events.on_error, f"{self.url} says: {text}")

    def on_lost(self, socket: NatsSocket, reason: str) -> None:
        """Come back, if it is the connection in use that was lost."""
        if socket is self._socket:
            self.lose(reason)

    def on_sink_error(self, subject: str, error: BaseException) -> None:
        """Count and log it; the message is gone."""
        self.sink_errors += 1
        self._log.write_rarely(
            logging.ERROR,
            "sink",
            "the sink of %r raised; the message is skipped",
            subject,
            error=error,
        )

    def on_unrouted(self, sid: bytes, subject: bytes, reply: bytes, payload: bytes, headers: bytes) -> None:
        """Drop it: it is late for a subscription that was closed."""

    def _tell(self, method: Callable[..., None], *args: str) -> None:
        try:
            method(*args)
        except Exception as error:
            self._log.write_rarely(logging.ERROR, "events", "%s raised", method.__name__, error=error)
