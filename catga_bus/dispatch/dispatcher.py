"""One delivery in: admit it, run its handler, settle it.

    arrived -> (intake bounds) -> ready -> (handler's concurrency) -> decoded -> handler -> settled

`settle` is called exactly once for each admitted delivery, whatever happens to its handler.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from catga_bus.clock import Clock
from catga_bus.codec import DECODE_ERRORS, explain
from catga_bus.context import Context
from catga_bus.dispatch.deliveries import Delivery, DispatcherStatistics, Station, StationStatistics
from catga_bus.dispatch.runner import Runner
from catga_bus.errors import RESERVED_CODES, Code, Outcome, Refused
from catga_bus.result import Err, Ok
from catga_bus.wire import Fault, Status

log = logging.getLogger("catga_bus.dispatcher")

_CANCEL_SECONDS = 1.0  # for handlers to clean up after they are cancelled at the end of a drain
_SWEEP_SECONDS = 0.01  # how late a handler may be cut off at its deadline


class Dispatcher:
    """The deliveries of one node.

    Args:
        make_context: Makes the context of a delivery.
        clock: Monotonic seconds.
        intake: The most deliveries admitted and not settled.
        intake_bytes: The most bytes of them.
    """

    def __init__(
        self,
        make_context: Callable[[Delivery], Context],
        *,
        clock: Clock,
        intake: int,
        intake_bytes: int,
    ) -> None:
        self._make_context = make_context
        self._clock = clock
        self._intake = intake
        self._intake_bytes = intake_bytes
        self._loop = asyncio.get_running_loop()
        self._ready: deque[Delivery] = deque()
        self._runner = Runner(
            self._ready, admit=self._may_start, run=self._run, suspended=self._suspended, finished=self._finished
        )
        self._stations: list[Station] = []
        self._admitted = 0
        self._admitted_bytes = 0
        self._running: set[Delivery] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._busy = self._expired = self._invalid = 0

    def add(self, station: Station) -> None:
        """Take a station into the statistics."""
        self._stations.append(station)

    def statistics(self) -> DispatcherStatistics:
        """Return the counts so far."""
        return DispatcherStatistics(
            intake=self._admitted,
            intake_bytes=self._admitted_bytes,
            running=len(self._running),
            busy=self._busy,
            expired=self._expired,
            invalid=self._invalid,
            handlers=tuple(
                StationStatistics(
                    station.name,
                    station.type_name,
                    station.running,
                    len(station.waiting),
                    station.ok,
                    station.refused,
                    station.failed,
                    station.stuck,
                    station.seconds,
                )
                for station in self._stations
            ),
        )

    # -- in ------------------------------------------------------------------------------------------------

    def admit(self, delivery: Delivery) -> bool:
        """Take a delivery in, or return False when the node is full. Call `wake` after the last of a batch."""
        if self._admitted >= self._intake or (
            self._admitted_bytes + delivery.size > self._intake_bytes and self._admitted
        ):
            self._busy += 1
            return False
        self._admitted += 1
        self._admitted_bytes += delivery.size
        if delivery.lane is not None:
            behind = delivery.station.lanes.get(delivery.lane)
            if behind is not None:
                behind.append(delivery)
                return True
            delivery.station.lanes[delivery.lane] = deque()
        self._ready.append(delivery)
        return True

    def wake(self) -> None:
        """Start what is ready."""
        self._runner.wake()

    def pause(self) -> None:
        """Start nothing, because answers cannot leave: memory stays bounded by the intake."""
        self._runner.pause()

    def resume(self) -> None:
        """Go on after a pause."""
        self._runner.resume()

    def _may_start(self, delivery: Delivery) -> bool:
        station = delivery.station
        if station.running >= station.concurrency:
            station.waiting.append(delivery)
            return False
        return True

    # -- run -----------------------------------------------------------------------------------------------

    async def _run(self, delivery: Delivery) -> None:
        station = delivery.station
        began = self._clock()
        if began >= delivery.deadline:
            self._expire(delivery)
            return
        try:
            message = station.decode_json(delivery.body) if delivery.json else station.decode(delivery.body)
        except DECODE_ERRORS as error:
            self._invalid += 1
            fault = Fault(Code.INVALID_MESSAGE, f"{station.type_name}: {explain(error)}")
            self._settle(delivery, Status.INVALID, fault, 0.0)
            return
        if station.timeout is not None:
            delivery.deadline = min(delivery.deadline, began + station.timeout)
        status: Status
        try:
            if station.takes_context:
                value = await station.entry(message, self._make_context(delivery))
            else:
                value = await station.entry(message)
            status, value = self._judged(station, value)
        except Refused as refusal:
            status, value = self._refusal(
                station, refusal.code, refusal.message, refusal.details, retryable=refusal.retryable
            )
        except asyncio.CancelledError:
            status, value = self._cancelled(delivery)
        except Exception as error:
            station.failed += 1
            status = Status.FAILED
            value = Fault(Code.HANDLER_ERROR, f"{station.name} raised {type(error).__name__}: {error}")
            log.exception("%s raised for %s %s", station.name, station.type_name, delivery.id)
        seconds = self._clock() - began
        station.seconds += seconds
        self._settle(delivery, status, value, seconds)

    def _expire(self, delivery: Delivery) -> None:
        self._expired += 1
        self._settle(delivery, Status.EXPIRED, Fault(Code.TIMEOUT, "the deadline had passed"), 0.0)

    def _judged(self, station: Station, value: Any) -> tuple[Status, Any]:
        """Return status and value of what a handler returned."""
        kind = type(value)
        if kind is Err:
            if value.outcome is Outcome.FAILED:  # middleware hands on what became of a handler that raised
                station.failed += 1
                return Status.FAILED, Fault(value.code, value.message, value.details, value.retryable)
            return self._refusal(station, value.code, value.message, value.details, retryable=value.retryable)
        if kind is Ok:
            value = value.value
        if station.fits is not None and (complaint := station.fits(value)) is not None:
            station.failed += 1
            log.error("%s returned the wrong type: %s", station.name, complaint)
            return Status.FAILED, Fault(Code.HANDLER_ERROR, f"{station.name} returned the wrong type: {complaint}")
        station.ok += 1
        return Status.OK, value

    def _refusal(
        self, station: Station, code: str, message: str, details: Any, *, retryable: bool
    ) -> tuple[Status, Fault]:
        if code in RESERVED_CODES:
            station.failed += 1
            text = f"{station.name} refused with the reserved code {code}: {message}"
            return Status.FAILED, Fault(Code.HANDLER_ERROR, text)
        station.refused += 1
        return Status.REFUSED, Fault(code, message, details, retryable)

    def _cancelled(self, delivery: Delivery) -> tuple[Status, Fault]:
        station = delivery.station
        station.failed += 1
        if delivery.cut:
            return Status.FAILED, Fault(Code.TIMEOUT, f"{station.name} was cut off at its deadline")
        return Status.FAILED, Fault(Code.HANDLER_ERROR, f"{station.name} was cancelled")

    def _settle(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        try:
            delivery.settle(delivery, status, value, seconds)
        except Exception:
            log.exception("%s %s could not be settled", delivery.station.type_name, delivery.id)
        self._admitted -= 1
        self._admitted_bytes -= delivery.size
        if delivery.lane is not None:
            self._next_in_lane(delivery.station, delivery.lane)
        self._note_idle()

    def _next_in_lane(self, station: Station, lane: str) -> None:
        behind = station.lanes[lane]
        if behind:
            self._ready.append(behind.popleft())
            self._runner.wake()
        else:
            del station.lanes[lane]

    # -- suspended ------------------------------------------------------------------------------------------

    def _suspended(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        delivery.task = task
        delivery.station.running += 1
        self._running.add(delivery)
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _finished(self, delivery: Delivery) -> None:
        delivery.task = None
        self._running.discard(delivery)
        self._free_slot(delivery.station)
        self._note_idle()

    def keep_slot(self, station: Station) -> Callable[[], None]:
        """Count a thread that runs on past its deadline; it keeps its slot until the returned function is called."""
        station.stuck += 1
        station.running += 1
        log.warning("%s runs on in its thread past its deadline; %d stuck", station.name, station.stuck)

        def ended() -> None:
            station.stuck -= 1
            self._free_slot(station)

        return ended

    def _free_slot(self, station: Station) -> None:
        station.running -= 1
        if station.waiting:
            self._ready.append(station.waiting.popleft())
            self._runner.wake()

    def _sweep(self) -> None:
        """Cut off what runs past its deadline."""
        now = self._clock()
        for station in self._stations:
            while station.waiting and station.waiting[0].deadline <= now:
                self._expire(station.waiting.popleft())
        for delivery in [delivery for delivery in self._running if delivery.deadline <= now]:
            delivery.deadline = math.inf  # cancelled once; a handler that refuses to end keeps its slot
            delivery.cut = True
            if delivery.task is not None:
                delivery.task.cancel()
        self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep) if self._running else None

    # -- out -----------------------------------------------------------------------------------------------

    def _note_idle(self) -> None:
        if not self._admitted and not self._running:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until everything admitted is settled and nothing runs."""
        while self._admitted or self._running:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """Cancel what runs and forget what waits."""
        self._runner.pause()
        tasks = self._runner.tasks
        for task in tasks:
            task.cancel()
        if tasks:
            _, stubborn = await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
            if stubborn:
                log.error("%d handlers did not end when they were cancelled; they are left behind", len(stubborn))
        if self._timer is not None:
            self._timer.cancel()
