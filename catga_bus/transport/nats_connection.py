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
import logging
import random
import re
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

from catga_bus.clock import monotonic
from catga_bus.errors import BusStateError, DisconnectedError, Outcome
from catga_bus.rarely import RareLog
from catga_bus.transport.base import ConnectionOptions, Sink, TransportEvents
from catga_bus.transport.nats_dialer import Dialed, Dialer
from catga_bus.transport.nats_protocol import CRLF, PING, ServerInfo, encode_subscribe, encode_unsubscribe
from catga_bus.transport.nats_servers import Server, redacted
from catga_bus.transport.nats_socket import NatsSocket

_MAX_SILENT_PINGS: Final = 2
# Missed answers in a row that make a connection lost.

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


_HANGS_UP_WITHIN: Final = 1.0
# A loss within this many seconds of a refusal is the refusal's doing. The server hangs up at once; longer would blame
# a loss on a refusal that it survived.

_log = logging.getLogger("catga_bus.transport")


class State(Enum):
    """Where a connection stands."""

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    ENDING = "ending"
    """Nothing new is taken; what waits is still written."""

    ENDED = "ended"


class NatsConnection:
    """Connected to a cluster or coming back to it, from `open` to `end`.

    Args:
        options: How to reach and convince a server.
        events: Who is told; what it raises is logged.
        rng: Draws the jitter and the order of the servers.
    """

    def __init__(self, options: ConnectionOptions, events: TransportEvents, rng: random.Random) -> None:
        self.state = State.NEW
        self.max_payload = ServerInfo().max_payload
        """Bytes; the default of nats-server until a server has said what it takes."""

        self.tls_required = False
        """Whether the server takes no connection in the clear."""

        self.sink_errors = 0
        """Messages whose sink raised."""

        self._last_sid = 0
        self._options = options
        self._events = events
        self._rng = rng
        self._rare_log = RareLog(_log, monotonic)
        # By subscription id, as the server writes it: the sink, and the SUB line that asks for it.
        self._routes: dict[bytes, Sink] = {}
        self._interests: dict[bytes, bytes] = {}
        # What the next push hands to the socket, in order.
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._is_push_due = False
        # One entry per PING on its way, oldest first.
        self._answers: deque[asyncio.Future[bool]] = deque()
        self._silent_pings = 0
        self._ping_timer: asyncio.TimerHandle | None = None
        self._connected_at = 0.0
        self._refusal = ""
        self._refused_at = 0.0
        # The bound of `open` while it runs, so that `end` can cut it short.
        self._opening: asyncio.Timeout | None = None
        self._return_task: asyncio.Task[None] | None = None
        self._end_task: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._socket: NatsSocket | None = None
        # Set by `open`.
        self._loop: asyncio.AbstractEventLoop
        self._dialer: Dialer

    # Opening.

    async def open(self) -> None:
        """Connect within `connect_timeout`, trying every seed; afterwards come back for ever.

        One that failed or was cancelled may be tried again.

        Raises:
            DisconnectedError: No server took us in time; the text says why for each.
            AuthenticationError: A server refused the credentials.
            ConfigurationError: An address or a file cannot be used.
            BusStateError: It was opened before, or was ended meanwhile.
        """
        if self.state is not State.NEW:
            raise BusStateError("the transport connects once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._dialer = Dialer(self._options, self._rng, self._rare_log, self._make_socket)
        self.state = State.CONNECTING
        try:
            async with asyncio.timeout(self._options.connect_timeout) as self._opening:
                self._adopt(await self._dialer.first())
        except TimeoutError:
            self._check_not_ended()
            raise self._not_in_time() from None
        finally:
            self._opening = None
            if self.state is State.CONNECTING:
                self.state = State.NEW

    def _make_socket(self) -> NatsSocket:
        return NatsSocket(self, self._routes, self._options.write_limit_bytes)

    def _check_not_ended(self) -> None:
        if self.state is State.ENDED:
            raise BusStateError("the transport was closed while it was connecting")

    def _not_in_time(self) -> DisconnectedError:
        reasons = self._dialer.reasons
        tried = ", ".join(
            f"{seed.url} ({reasons.get(seed.url, 'no answer in time')})" for seed in self._dialer.pool.seeds
        )
        return DisconnectedError(
            f"no NATS server could be used within {self._options.connect_timeout} s: {tried}", outcome=Outcome.NOT_RUN
        )

    def _adopt(self, dialed: Dialed) -> None:
        """Make a connection the one in use; no suspension in here, so nobody sees a half-made one."""
        if self.state is State.ENDED:
            dialed.socket.abort()
        self._check_not_ended()
        self._socket, self._server, info = dialed
        self.state = State.CONNECTED
        self._connected_at = self._loop.time()
        self.on_info(info)
        for line in self._interests.values():
            self.write(line)
        self.push()
        self._ping_timer = self._loop.call_later(self._options.ping_interval, self._ping_if_silent)
        _log.info(
            "%s: connected to %s (server %s, version %s)",
            self._options.name,
            self.url,
            info.server_name,
            info.version,
        )

    # Losing the connection, and coming back.

    def lose(self, reason: str) -> None:
        """Give the connection up and come back; the one end of every connection but the last."""
        if not self._has_connection:
            return
        self._let_go()
        if self.state is State.ENDING:
            self.state = State.ENDED
            return
        self.state = State.RECONNECTING
        if self._refusal and self._loop.time() - self._refused_at < _HANGS_UP_WITHIN:
            reason = f"{self._refusal} ({reason})"
        self._refusal = ""
        _log.warning("%s: lost the connection to %s: %s", self._options.name, self.url, reason)
        if self._return_task is None or self._return_task.done():
            self._return_task = self._loop.create_task(self._come_back())
            self._tell(self._events.on_disconnected, reason)
        # Else it was lost before the owner was told that it is back, and the task goes on.

    def _let_go(self) -> None:
        """Leave nothing of the connection behind that waits for something."""
        if self._socket is not None:
            self._socket.abort()
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        # Nothing crosses a reconnect: what was published late would be done late.
        self._pending.clear()
        self._pending_bytes = 0
        self._silent_pings = 0
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_result(False)

    async def _come_back(self) -> None:
        lost_at = self._loop.time()
        while self.state is State.RECONNECTING:
            lived = self._loop.time() - self._connected_at
            self._adopt(await self._dialer.again(self._server, lived))
            # Told only when the server has taken every interest: what anybody sends from then on arrives.
            await self._send_ping()
        if self.is_usable:
            _log.info("%s: back at %s after %.3f s", self._options.name, self.url, self._loop.time() - lost_at)
            self._tell(self._events.on_reconnected, self.url)

    # Ending.

    async def end(self) -> None:
        """Send what waits, then end everything, within 2 seconds. Ending twice is fine.

        Cancelled, it ends everything at once.
        """
        if self._end_task is None:
            # From here on `put` is refused, but what waits is still written.
            self.state = State.ENDING if self.state is State.CONNECTED else State.ENDED
            self._routes.clear()
            self._interests.clear()
            if self._opening is not None and not self._opening.expired():
                self._opening.reschedule(self._loop.time())
            self._end_task = asyncio.get_running_loop().create_task(self._finish())
        try:
            await asyncio.wait([self._end_task])
        except asyncio.CancelledError:
            self._end_task.cancel()
            await asyncio.wait([self._end_task])
            raise

    async def _finish(self) -> None:
        try:
            if self.state is State.ENDING:
                with contextlib.suppress(DisconnectedError):
                    await self.ping(_GOODBYE_TIMEOUT)
            self.state = State.ENDED
            if self._return_task is not None:
                self._return_task.cancel()
                await asyncio.gather(self._return_task, return_exceptions=True)
            if self._socket is not None:
                await self._socket.close(_HANG_UP_TIMEOUT)
        finally:
            self.state = State.ENDED
            self._let_go()

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
        try:
            async with asyncio.timeout(timeout):
                is_answered = await self._send_ping()
        except TimeoutError:
            raise DisconnectedError(f"cannot flush: {self.url} has not answered within {timeout} s") from None
        if not is_answered:
            raise DisconnectedError(f"cannot flush: the connection to {self.url} was lost")

    def _send_ping(self) -> "asyncio.Future[bool]":
        """Return what becomes True with the PONG, or False when the connection is lost."""
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._answers.append(answer)
        self.write(PING)
        self.push()
        return answer

    def _ping_if_silent(self) -> None:
        if self._silent_pings >= _MAX_SILENT_PINGS:
            self.lose(f"stale connection: {_MAX_SILENT_PINGS} pings were not answered")
            return
        self._silent_pings += 1
        self._send_ping()
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
        if self._routes.pop(sid, None) is not None:
            self.end_interest(sid)

    def end_interest(self, sid: bytes) -> None:
        """Ask the server for no more; what comes still goes to the sink. A second time does nothing."""
        if self._interests.pop(sid, None) is not None:
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
            if not answer.done():
                answer.set_result(True)

    def on_info(self, info: ServerInfo) -> None:
        """Take note of the limits, of the cluster's servers, and of a server that will stop."""
        self.max_payload = info.max_payload
        self.tls_required = info.tls_required
        if self._server is not None and info.connect_urls:
            self._dialer.pool.learn(info.connect_urls, self._server)
        if info.ldm:
            _log.warning("%s: %s is in lame duck mode: it will end this connection", self._options.name, self.url)

    def on_err(self, text: str) -> None:
        """Report what the server refuses; if it hangs up for it, the loss will name this reason."""
        denied = _DENIED.search(text)
        if denied:
            subject = _ESCAPED.sub(r"\1", denied[1])
            self._rare_log.warn(f"denied {subject}", "%s: %s says: %s", self._options.name, self.url, text)
            self._tell(self._events.on_denied, subject, text)
            return
        self._refusal, self._refused_at = text, self._loop.time()
        self._rare_log.warn(text, "%s: %s says: %s", self._options.name, self.url, text)
        self._tell(self._events.on_error, f"{self.url} says: {text}")

    def on_lost(self, socket: NatsSocket, reason: str) -> None:
        """Come back, if it is the connection in use that was lost."""
        if socket is self._socket:
            self.lose(reason)

    def on_sink_error(self, subject: str, error: BaseException) -> None:
        """Count and log it; the message is gone."""
        self.sink_errors += 1
        text = "%s: the sink of %r raised; the message is skipped"
        self._rare_log.write(logging.ERROR, "sink", text, self._options.name, subject, error=error)

    def _tell(self, method: Callable[..., None], *args: str) -> None:
        try:
            method(*args)
        except Exception as error:
            text = "%s: %s raised"
            self._rare_log.write(logging.ERROR, "events", text, self._options.name, method.__name__, error=error)
