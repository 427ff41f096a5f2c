"""The heartbeat: says several times a second that this node lives, from a thread that a blocked loop does not block.

Decided: a thread with a connection of its own. Beats from the loop that runs handlers stop when a handler blocks it,
and a busy node would be taken for a dead one. Beats from the thread go on and say how late the loop is.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from catga_bus.clock import Clock, utc_now
from catga_bus.cluster.allowance import Allowance
from catga_bus.cluster.beats import BeatWriter, Identity, Report
from catga_bus.cluster.records import Incarnation, NodeLoad, NodeStatus
from catga_bus.errors import CatgaError
from catga_bus.pulse import Pulse
from catga_bus.transport.base import Subscription, Transport, TransportEvents
from catga_bus.vitals import Vitals
from catga_bus.wire import Names

ROLL_CALLS_PER_SECOND = 100.0
"""Roll calls that a node answers, after a burst of 256: as many nodes may start at once, and know it from the first."""

LEAVE_SECONDS = 0.5
"""How long the last beat may take to reach the server. Leaving is over within a second whatever the server does."""

_log = logging.getLogger("catga_bus.cluster")


class Heart(Protocol):
    """What says that this node lives. Its methods belong to the event loop of the node.

    Attributes:
        report: How the node is; replaced by its loop, sent with the next beat.
        interval: Seconds between beats; may be changed.
    """

    report: Report
    interval: float

    @property
    def sent(self) -> int:
        """Beats sent so far, answers to pings included."""
        ...

    async def start(self, identity: Identity, incarnation: Incarnation) -> None:
        """Begin to beat and to answer pings; the first beat is sent before it returns.

        Raises:
            CatgaError: There is no connection to beat on.
        """

    def tell(self, status: NodeStatus) -> None:
        """Change the status, and beat at once."""

    async def stop(self) -> None:
        """Say good-bye and beat no more, within a second."""


class Gauge:
    """How a node is at the moment of a beat: what its loop reported, how late the loop is, what the process costs.

    Args:
        pulse: Measures the loop.
        vitals: Measures the process.
        clock: Monotonic seconds.
        stall_timeout: Seconds after which a loop that is late makes the node not ready.
    """

    def __init__(self, pulse: Pulse, vitals: Vitals, clock: Clock, stall_timeout: float) -> None:
        self._pulse = pulse
        self._vitals = vitals
        self._clock = clock
        self._stall_timeout = stall_timeout

    def stall(self) -> tuple[float, bool]:
        """Return how late the loop has been since the last call, in seconds, and whether it keeps up now."""
        present = self._pulse.stall(self._clock())
        return max(present, self._pulse.take_longest()), present <= self._stall_timeout

    def load(self, report: Report) -> NodeLoad:
        """Return how busy the node is."""
        signs = self._vitals.read()
        return NodeLoad(report.in_flight, report.intake, report.handled, signs.cpu, signs.resident_bytes or 0)


class Beacon:
    """Beats on the event loop that it was made on, over a transport that is connected.

    Args:
        transport: Carries the beats; its owner closes it.
        names: The subjects.
        gauge: How the node is.
        allow: Whether an answer may go to a subject.
        interval: Seconds between beats.
    """

    def __init__(
        self, transport: Transport, names: Names, gauge: Gauge, allow: Callable[[str], bool], interval: float
    ) -> None:
        self.report = Report()
        self.interval = interval
        self.sent = 0
        self._transport = transport
        self._names = names
        self._gauge = gauge
        self._allow = allow
        self._loop = asyncio.get_running_loop()
        self._status = NodeStatus.ONLINE
        self._stall = 0.0
        self._is_in_time = True
        self._load = NodeLoad()
        self._timer: asyncio.TimerHandle | None = None
        self._pings: list[Subscription] = []
        self._roll_calls = Allowance(self._loop.time(), ROLL_CALLS_PER_SECOND)
        self._subject = ""
        self._is_mute = False
        self._writer: BeatWriter

    async def start(self, identity: Identity, incarnation: Incarnation) -> None:
        """Begin to beat and to answer pings."""
        self._writer = BeatWriter(identity, incarnation)
        self._subject = self._names.heartbeat(identity.id)
        self._load = self._gauge.load(self.report)
        ping = self._names.node_ping(identity.service, identity.id)
        self._pings.append(await self._transport.subscribe(ping, self._on_ping))
        self._pings.append(await self._transport.subscribe(self._names.roll_call(), self._on_roll_call))
        await self._transport.flush(LEAVE_SECONDS)  # who hears the first beat may ask at once
        self._beat_on()

    def tell(self, status: NodeStatus) -> None:
        """Change the status, and beat at once."""
        self._status = status
        self.beat()

    def beat(self) -> None:
        """Beat now; the regular beats go on as before."""
        if self._subject:
            self._publish(self._subject)

    def denied(self, subject: str) -> None:
        """The server refuses a subject. Who may not beat answers no roll call: the others would miss its beats."""
        self._is_mute = self._is_mute or subject == self._subject

    async def stop(self) -> None:
        """Answer no more pings, and say good-bye: who hears it asks, and finds nobody."""
        if self._timer is not None:
            self._timer.cancel()
        for subscription in self._pings:
            await subscription.close()
        self.tell(NodeStatus.LEFT)
        self._subject = ""
        if self._transport.is_connected:
            with contextlib.suppress(CatgaError):
                await self._transport.flush(LEAVE_SECONDS)

    def _beat_on(self) -> None:
        self._timer = self._loop.call_later(self.interval, self._beat_on)
        self._stall, self._is_in_time = self._gauge.stall()
        self._load = self._gauge.load(self.report)
        self.beat()

    def _on_ping(self, _: str, __: bytes, reply: str, ___: Mapping[str, str] | None) -> None:
        if self._allow(reply) and not self._transport.is_behind:
            self._publish(reply)

    def _on_roll_call(self, _: str, __: bytes, reply: str, ___: Mapping[str, str] | None) -> None:
        if self._is_mute or self._transport.is_behind or not self._allow(reply):
            return
        if self._roll_calls.take(self._loop.time()):
            self._publish(reply)

    def _publish(self, subject: str) -> None:
        report = self.report
        load = self._load
        payload = self._writer.write(
            self._status,
            report,
            is_ready=report.is_ready and self._is_in_time and self._status is NodeStatus.ONLINE,
            interval=self.interval,
            stall=self._stall,
            load=NodeLoad(report.in_flight, report.intake, report.handled, load.cpu, load.memory_bytes),
            utc_ms=int(utc_now().timestamp() * 1000),
        )
        try:
            self._transport.publish(subject, payload)
        except CatgaError:
            return  # without a connection there is nobody to hear it, and the next one is soon
        self.sent += 1  # before anybody can have heard it
        self._transport.push()


class HeartThread:
    """Runs a `Beacon` in a thread with an event loop and a connection of its own.

    The thread ends by itself when the event loop of the node was closed without stopping it.

    Args:
        connect: Makes the transport, given who is told of it; called in the thread.
        make: Makes the beacon on a transport that is connected; called in the thread.
        interval: Seconds between beats.
    """

    def __init__(
        self,
        connect: Callable[[TransportEvents], Transport],
        make: Callable[[Transport], Beacon],
        interval: float,
    ) -> None:
        self._connect = connect
        self._make = make
        self._report = Report()
        self._interval = interval
        self._owner = asyncio.get_running_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beacon: Beacon | None = None
        self._thread: threading.Thread | None = None
        self._started: asyncio.Future[None] = self._owner.create_future()
        self._ended: asyncio.Future[None] = self._owner.create_future()
        self._is_stopping = self._has_begun = False
        self._stop: asyncio.Event
        self._life: asyncio.Task[None] | None = None

    @property
    def report(self) -> Report:
        """How the node is."""
        return self._report

    @report.setter
    def report(self, report: Report) -> None:
        self._report = report
        if self._beacon is not None:
            self._beacon.report = report

    @property
    def interval(self) -> float:
        """Seconds between beats."""
        return self._interval

    @interval.setter
    def interval(self, interval: float) -> None:
        self._interval = interval
        if self._beacon is not None:
            self._beacon.interval = interval

    @property
    def sent(self) -> int:
        """Beats sent so far."""
        return self._beacon.sent if self._beacon is not None else 0

    async def start(self, identity: Identity, incarnation: Incarnation) -> None:
        """Start the thread; see `Heart`."""
        live = self._live(identity, incarnation)
        self._thread = threading.Thread(target=self._run, args=(live,), name="catga-beats", daemon=True)
        self._thread.start()
        await asyncio.shield(self._started)

    def tell(self, status: NodeStatus) -> None:
        """Change the status, and beat at once."""
        if self._loop is not None and self._beacon is not None:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(self._beacon.tell, status)

    async def stop(self) -> None:
        """Say good-bye and end the thread."""
        if self._thread is None:
            return
        self._is_stopping = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._halt)
        await asyncio.shield(self._ended)
        self._thread.join()
        if self._started.done() and not self._started.cancelled():
            self._started.exception()  # whoever waited for the start has it

    # -- in the thread -------------------------------------------------------------------------------------

    def _run(self, live: Coroutine[Any, Any, None]) -> None:
        error: BaseException | None = None
        try:
            with asyncio.Runner() as runner:
                self._stop = asyncio.Event()
                self._loop = runner.get_loop()
                runner.run(live)
        except BaseException as raised:
            error = raised
            if self._started.done():
                _log.exception("the thread that sends the heartbeats ended; others will take this node for dead")
        finally:
            self._tell_owner(self._started, error)
            self._tell_owner(self._ended, None)

    def _tell_owner(self, future: "asyncio.Future[None]", error: BaseException | None) -> None:
        def tell() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            elif isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)

        with contextlib.suppress(RuntimeError):  # its loop was closed
            self._owner.call_soon_threadsafe(tell)

    def _halt(self) -> None:
        """End the life: with a good-bye if it has begun, else at once."""
        self._stop.set()
        if not self._has_begun and self._life is not None:
            self._life.cancel()

    async def _live(self, identity: Identity, incarnation: Incarnation) -> None:
        self._life = asyncio.current_task()
        if self._is_stopping:
            return
        transport = self._connect(_HeartEvents(self))
        try:
            await transport.connect()
            self._beacon = beacon = self._make(transport)
            beacon.report, beacon.interval = self._report, self._interval
            await beacon.start(identity, incarnation)
            self._has_begun = True
            self._tell_owner(self._started, None)
            while not self._owner.is_closed():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._stop.wait()
                        break
            await beacon.stop()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_SECONDS / 2):
                    await transport.close()

    def denied(self, subject: str) -> None:
        """The server refuses a subject; in the thread."""
        if self._beacon is not None:
            self._beacon.denied(subject)

    def beat(self) -> None:
        """Beat now; in the thread."""
        if self._beacon is not None:
            self._beacon.beat()


class _HeartEvents:
    """Beats as soon as the connection is back, and knows what is refused; the transport logs what happens to it."""

    def __init__(self, heart: HeartThread) -> None:
        self._heart = heart

    def on_disconnected(self, reason: str) -> None:
        """The transport has logged it."""

    def on_reconnected(self, url: str) -> None:
        """The connection is back."""
        del url
        self._heart.beat()

    def on_denied(self, subject: str, text: str) -> None:
        """The server refuses a subject; the transport has logged it."""
        del text
        self._heart.denied(subject)

    def on_error(self, text: str) -> None:
        """The transport has logged it."""
