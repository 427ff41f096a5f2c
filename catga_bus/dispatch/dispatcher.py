"""One delivery in: admit it, run its handler, settle it.

    arrived -> (intake bounds) -> ready -> (handler's concurrency) -> decoded -> handler -> settled

`settle` is called exactly once for each admitted delivery, whatever its handler raises, and also when the dispatcher
is closed before it could start.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from catga_bus.clock import Clock
from catga_bus.codec import explain
from catga_bus.context import Context
from catga_bus.dispatch.deliveries import Delivery, DispatcherStatistics, Slots, Station, StationStatistics
from catga_bus.dispatch.failures import describe, refused
from catga_bus.dispatch.runner import Runner
from catga_bus.errors import Code, Outcome, Refused
from catga_bus.pulse import Pulse
from catga_bus.rarely import RareLog
from catga_bus.result import Err, Ok
from catga_bus.wire import Fault, Status

log = logging.getLogger("catga_bus.dispatcher")

_CLOSING = Fault(Code.OVERLOADED, "the node is closing", retryable=True)
_STUCK = Fault(Code.OVERLOADED, "threads of the handler run on past their deadline", retryable=True)
_BEHIND = Fault(Code.OVERLOADED, "too many messages wait for the handler", retryable=True)
_LONG_SECONDS = 0.001  # of a handler that does not suspend: then the event loop has its turn before the next one
_CANCEL_SECONDS = 1.0  # for handlers to clean up after they are cancelled at the end of a drain
_SWEEP_SECONDS = 0.01  # how late a handler may be cut off at its deadline


class Dispatcher:
    """The deliveries of one node.

    Args:
        make_context: Makes the context of a delivery.
        pulse: Tells when the event loop stood still: who listens may pause.
        clock: Monotonic seconds.
        intake: The most deliveries admitted and not settled.
        intake_bytes: The most bytes of them.
    """

    def __init__(
        self,
        make_context: Callable[[Delivery], Context],
        *,
        pulse: Pulse,
        clock: Clock,
        intake: int,
        intake_bytes: int,
    ) -> None:
        self._make_context = make_context
        self._pulse = pulse
        self._clock = clock
        self._intake = intake
        self._intake_bytes = intake_bytes
        self._loop = asyncio.get_running_loop()
        self._ready: deque[Delivery] = deque()
        self._runner = Runner(
            self._ready, admit=self._may_start, run=self._run, suspended=self._suspended, finished=self._finished
        )
        self._stations: list[Station] = []
        self._slots: dict[object, Slots] = {}
        self._most_behind = intake  # deliveries of one handler that may wait; the others' places are not for it
        self._current: ContextVar[Delivery] = ContextVar("delivery")  # for who runs on behalf of a delivery
        self._log = RareLog(log, clock)
        self._is_closed = False
        self._pauses: set[str] = set()
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

    def slots(self, handler: object, concurrency: int) -> Slots:
        """Return the slots of a handler: the same ones whenever the same object asks.

        Args:
            handler: Whose slots they are.
            concurrency: How many; counts when the handler is new.
        """
        slots = self._slots.get(handler)
        if slots is None:
            slots = self._slots[handler] = Slots(concurrency, self._ready)
            self._most_behind = self._intake if len(self._slots) == 1 else max(1, self._intake // 2)
        return slots

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
                    station.slots.running,
                    len(station.slots.waiting),
                    station.ok,
                    station.refused,
                    station.failed,
                    station.slots.stuck,
                    station.seconds,
                    station.turned_away,
                )
                for station in self._stations
            ),
        )

    def runs(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether a task runs a handler, which must not wait for the handlers' end."""
        return task in self._runner.tasks

    # -- in ------------------------------------------------------------------------------------------------

    def admit(self, delivery: Delivery) -> bool:
        """Take a delivery in, or return False when the node is full. Call `wake` after the last of a batch."""
        if self._admitted >= self._intake or (
            self._admitted_bytes + delivery.size > self._intake_bytes and self._admitted
        ):
            self._busy += 1
            return False
        if delivery.lane is not None and delivery.station.slots.is_behind(self._most_behind):
            self._busy += 1
            return False
        self._admitted += 1
        self._admitted_bytes += delivery.size
        if delivery.lane is not None:
            lanes = delivery.station.slots.lanes
            behind = lanes.get(delivery.lane)
            if behind is not None:
                behind.append(delivery)
                delivery.station.slots.behind += 1
                return True
            lanes[delivery.lane] = deque()
        self._ready.append(delivery)
        return True

    def submit(self, delivery: Delivery) -> None:
        """Take a delivery in however full the node is: whoever submits bounds how many. Call `wake` after the last.

        It counts in the intake all the same, so that requests leave it room, and is settled like any other; without a
        lane of this dispatcher.
        """
        self._admitted += 1
        self._admitted_bytes += delivery.size
        self._ready.append(delivery)

    def wake(self) -> None:
        """Start what is ready."""
        self._runner.wake()

    def pause(self, reason: str) -> None:
        """Start nothing for a reason; memory stays bounded by the intake."""
        self._pauses.add(reason)
        self._runner.pause()

    def resume(self, reason: str) -> None:
        """Go on if there is no other reason to pause."""
        self._pauses.discard(reason)
        if not self._pauses:
            self._runner.resume()

    def _may_start(self, delivery: Delivery) -> bool:
        slots = delivery.station.slots
        if slots.is_open:
            return True
        if slots.is_behind(self._most_behind) and not slots.is_called(delivery):
            self._busy += 1
            self._settle(delivery, Status.BUSY, _BEHIND, 0.0)
            return False
        if slots.enter(delivery):
            return True
        self._arm()
        return False

    # -- run -----------------------------------------------------------------------------------------------

    async def _run(self, delivery: Delivery) -> None:
        station = delivery.station
        began = self._clock()
        if began > self._pulse.late_at:
            self._pulse.beat(began)
            if self._pauses:  # what is ready may be old
                self._ready.appendleft(delivery)
                return
        if began >= delivery.deadline:
            self._expire(delivery)
            return
        try:
            message = station.decode_json(delivery.body) if delivery.json else station.decode(delivery.body)
        except BaseException as error:
            self._refuse_body(delivery, error)
            if isinstance(error, KeyboardInterrupt):
                raise
            return
        if station.timeout is not None:
            delivery.deadline = min(delivery.deadline, began + station.timeout)
        status: Status
        context: Context | None = None
        try:
            if station.takes_context:
                if station.slots.threads is not None:
                    self._current.set(delivery)
                context = self._make_context(delivery)
                value = await station.entry(message, context)
            else:
                value = await station.entry(message)
            status, value = self._judged(station, value, context)
        except BaseException as error:
            status, value = self._failure(delivery, error, context)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                self._settle(delivery, status, value, self._clock() - began)
                raise
        seconds = self._clock() - began
        station.seconds += seconds
        if seconds > _LONG_SECONDS:
            self._runner.end_turn()
        self._settle(delivery, status, value, seconds)

    def _expire(self, delivery: Delivery) -> None:
        self._expired += 1
        self._settle(delivery, Status.EXPIRED, Fault(Code.TIMEOUT, "the deadline had passed"), 0.0)

    def _refuse_body(self, delivery: Delivery, error: BaseException) -> None:
        """Settle a delivery whose body is not a message; `__post_init__` of a message class can raise anything."""
        self._invalid += 1
        try:
            text = explain(error)
        except Exception:
            text = describe(error)
        self._settle(
            delivery, Status.INVALID, Fault(Code.INVALID_MESSAGE, f"{delivery.station.type_name}: {text}"), 0.0
        )

    def _judged(self, station: Station, value: Any, context: Context | None) -> tuple[Status, Any]:
        """Return status and value of what a handler returned, or of what middleware made of it."""
        kind = type(value)
        if kind is Err:
            if _is_turned_away(station, value, context):
                station.turned_away += 1
                return Status.BUSY, Fault(value.code, value.message, value.details, retryable=True)
            return self._told(station, self._checked(station, value))
        if kind is Ok:
            value = value.value
        if station.fits is not None and (complaint := station.fits(value)) is not None:
            station.failed += 1
            self._log.write(
                logging.ERROR, f"type {station.name}", "%s returned the wrong type: %s", station.name, complaint
            )
            return Status.FAILED, Fault(Code.HANDLER_ERROR, f"{station.name} returned the wrong type: {complaint}")
        station.ok += 1
        return Status.OK, value

    def _checked(self, station: Station, error: Err) -> Err:
        """Return the `Err` that counts: a handler's own is `refused`, one of middleware may stand for a failure."""
        is_failure = station.has_middleware and error.outcome is Outcome.FAILED
        if is_failure and error.code == Code.HANDLER_ERROR:
            return error
        own = refused(station.name, error.code, error.message, error.details, retryable=error.retryable)
        return error if is_failure and own.outcome is Outcome.REFUSED else own

    def _told(self, station: Station, error: Err) -> tuple[Status, Fault]:
        """Return status and fault of an `Err` that is known to be right."""
        if error.outcome is Outcome.FAILED:
            station.failed += 1
            status = Status.FAILED
        else:
            station.refused += 1
            status = Status.REFUSED
        return status, Fault(error.code, error.message, error.details, error.retryable)

    def _failure(self, delivery: Delivery, error: BaseException, context: Context | None) -> tuple[Status, Fault]:
        """Return status and fault of what a handler raised, or its middleware."""
        station = delivery.station
        if isinstance(error, Refused):
            try:
                own = refused(station.name, error.code, error.message, error.details, retryable=error.retryable)
            except Exception as broken:  # a subclass whose attributes are code
                error = broken
            else:
                return self._told(station, own)
        is_cut = delivery.cut and isinstance(error, asyncio.CancelledError)
        if is_cut and _is_unstarted(station, context):
            self._expired += 1
            return Status.EXPIRED, Fault(Code.TIMEOUT, f"the deadline passed before {station.name} was called")
        station.failed += 1
        if not isinstance(error, asyncio.CancelledError):
            return Status.FAILED, Fault(Code.HANDLER_ERROR, self.raised(station, delivery.id, error))
        if is_cut:
            return Status.FAILED, Fault(Code.TIMEOUT, f"{station.name} was cut off at its deadline")
        return Status.FAILED, Fault(Code.HANDLER_ERROR, f"{station.name} was cancelled")

    def raised(self, station: Station, message_id: str, error: BaseException) -> str:
        """Log what a handler raised, with its traceback unless it raised a moment ago; return it in words."""
        self._log.write(
            logging.ERROR,
            station.name,
            "%s raised for %s %.80r",
            station.name,
            station.type_name,
            message_id,
            error=error,
        )
        return f"{station.name} raised {describe(error)}"

    def _settle(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        try:
            delivery.settle(delivery, status, value, seconds)
        except Exception as error:
            name = delivery.station.type_name
            text = "%s %.80r could not be settled"
            self._log.write(logging.ERROR, f"settle {name}", text, name, delivery.id, error=error)
        finally:
            self._admitted -= 1
            self._admitted_bytes -= delivery.size
            if delivery.lane is not None:
                self._leave_lane(delivery, delivery.lane)
            self._note_idle()

    def _leave_lane(self, delivery: Delivery, lane: str) -> None:
        if delivery.stuck:
            delivery.station.slots.held.add(lane)  # the next one begins when the thread has ended
            self._arm()
        else:
            self._next_in_lane(delivery.station.slots, lane)

    def _next_in_lane(self, slots: Slots, lane: str) -> None:
        behind = slots.lanes[lane]
        if behind:
            slots.behind -= 1
            self._ready.append(behind.popleft())
            self._runner.wake()
        else:
            del slots.lanes[lane]

    # -- suspended ------------------------------------------------------------------------------------------

    def _suspended(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        delivery.task = task
        delivery.station.slots.take()
        self._running.add(delivery)
        self._arm()

    def _finished(self, delivery: Delivery) -> None:
        delivery.task = None
        self._running.discard(delivery)
        self._free(delivery.station.slots)
        self._note_idle()

    def keep_slot(self) -> Callable[[], None]:
        """Count a thread of the present delivery that runs on although it is no longer waited for.

        It keeps its slot, and its delivery keeps its lane, until the returned function is called.
        """
        delivery = self._current.get()
        station = delivery.station
        slots = station.slots
        delivery.stuck += 1
        slots.stuck += 1
        slots.take()
        self._log.warn(
            f"stuck {station.name}", "%s runs on in its thread past its deadline; %d stuck", station.name, slots.stuck
        )

        def ended() -> None:
            delivery.stuck -= 1
            slots.stuck -= 1
            if not delivery.stuck and delivery.lane in slots.held:
                slots.held.remove(delivery.lane)
                self._next_in_lane(slots, delivery.lane)
            self._free(slots)
            if not delivery.stuck and delivery.freed is not None:
                delivery.freed(delivery)

        return ended

    def _free(self, slots: Slots) -> None:
        slots.free()
        self._runner.wake()

    def _arm(self) -> None:
        if self._timer is None and not self._is_closed:
            self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Cut off what runs past its deadline, and settle what waited for too long."""
        self._timer = None
        now = self._clock()
        for slots in self._slots.values():
            for delivery in slots.take_expired(now):
                self._expire(delivery)
            if slots.stuck:
                for delivery in slots.take_surplus():
                    self._busy += 1
                    self._settle(delivery, Status.BUSY, _STUCK, 0.0)
        for delivery in [delivery for delivery in self._running if delivery.deadline <= now]:
            delivery.deadline = math.inf  # cancelled once; a handler that refuses to end keeps its slot
            delivery.cut = True
            if delivery.task is not None:
                delivery.task.cancel()
        if self._running or any(slots.waiting or slots.held for slots in self._slots.values()):
            self._arm()

    # -- out -----------------------------------------------------------------------------------------------

    def _note_idle(self) -> None:
        if not self._admitted and not self._running:
            self._idle.set()

    @property
    def is_running(self) -> bool:
        """Whether a handler runs: one that was suspended and has not ended."""
        return bool(self._running)

    async def wait_idle(self) -> None:
        """Wait until everything admitted is settled and nothing runs."""
        while self._admitted or self._running:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """Refuse what has not started, so that its callers go elsewhere, and cancel what runs.

        A handler may call this: it is not cancelled itself.
        """
        self.pause("closed")
        self._intake = 0
        left = list(self._ready)
        self._ready.clear()
        for slots in self._slots.values():
            left += slots.take_all()
        for delivery in left:
            self._settle(delivery, Status.BUSY, _CLOSING, 0.0)
        tasks = self._runner.tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            _, stubborn = await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
            if stubborn:
                log.error("%d handlers did not end when they were cancelled; they are left behind", len(stubborn))
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()


def _is_unstarted(station: Station, context: Context | None) -> bool:
    """Whether only middleware has seen the message."""
    return station.has_middleware and context is not None and not context.handler_started


def _is_turned_away(station: Station, error: Err, context: Context | None) -> bool:
    """Whether middleware says that this node cannot take a message now, and the handler has indeed not been called.

    The handler's own `Err` never gets here with a reserved code.
    """
    message: Any = error.message  # nothing checks what middleware makes
    is_said = error.outcome is Outcome.NOT_RUN and error.code in (Code.OVERLOADED, Code.CIRCUIT_OPEN)
    return is_said and isinstance(message, str) and _is_unstarted(station, context)
