"""What a dispatcher works on: deliveries, the stations that take them, the slots they run in, and their counts."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from catga_bus.dispatch.threads import HandlerThreads
from catga_bus.effects import Stake
from catga_bus.wire import Status

_MAX_BEHIND_STUCK = 16
# Events that may wait for a thread that runs on past its deadline. Nothing else ends their waiting, so without a
# bound one such thread would fill the intake of all handlers. 64 of them (the default concurrency), each with a
# lane of its own, take 1,024 places of the default intake of 4,096.


class Delivery(msgspec.Struct, eq=False):
    """One attempt to handle one message."""

    station: "Station"
    id: str
    key: str | None
    attempt: int
    trace: str | None
    sender: str
    body: Any
    """The encoded message; decoded when its turn comes."""

    size: int
    """Bytes that it counts for in the intake."""

    deadline: float
    settle: "Settle"
    target: Any = None
    """Where the answer goes; known to `settle`."""

    lane: str | None = None
    """Deliveries of one handler with the same lane run one after the other."""

    json: bool = False
    """Whether the body is JSON."""

    task: asyncio.Task[None] | None = None
    cut: bool = False
    """Whether its deadline passed while it ran."""

    stuck: int = 0
    """Threads that run on for it although it was cut off."""

    stake: Stake | None = None
    """What its context has besides, if its message is stored."""

    freed: "Callable[[Delivery], None] | None" = None
    """Called when the last thread that ran on for it has ended."""


class Settle(Protocol):
    """Ends a delivery: sends its answer, if it wants one."""

    def __call__(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        """Settle a delivery.

        Args:
            delivery: Which one.
            status: How it ended.
            value: The handler's value if OK, else a `Fault`.
            seconds: How long the handler took.
        """


class Slots:
    """The executions that one handler may have at once, shared by all of its message types, and who waits for one.

    Only an execution that suspends takes a slot: one that does not is over before the next can begin.

    Who waits is called one at a time, to the front of what is ready; whoever was called and starts calls the next.
    So those that wait start in order, before later ones, and however the one before them ends.

    Args:
        concurrency: The most executions at once.
        ready: Where who is called goes.

    Attributes:
        is_open: Whether a delivery may start without a look at the rest: there is room, and nobody waits.
        running: Slots that are taken.
        stuck: Threads that run on past their deadline; each keeps its slot.
        waiting: Who waits, in order.
        behind: Deliveries that wait in lanes, behind one that is ready, waiting or running.
        lanes: Lanes with a delivery that is ready, waiting or running: its successors.
        held: Lanes whose last delivery is settled while its thread runs on.
        threads: The handler's, if it needs some.
    """

    __slots__ = (
        "_called", "_ready", "_soonest", "behind", "concurrency", "held", "is_open", "lanes", "running", "stuck",
        "threads", "waiting",
    )  # fmt: skip

    def __init__(self, concurrency: int, ready: deque[Delivery]) -> None:
        self.concurrency = concurrency
        self.is_open = True
        self.running = 0
        self.stuck = 0
        self.behind = 0
        self.waiting: deque[Delivery] = deque()
        self.lanes: dict[str, deque[Delivery]] = {}
        self.held: set[str] = set()
        self.threads: HandlerThreads | None = None
        self._ready = ready
        self._called: Delivery | None = None
        self._soonest = math.inf  # no deadline among those that wait is before this

    def is_behind(self, most: int) -> bool:
        """Whether as many wait as may."""
        return len(self.waiting) + self.behind >= most

    def is_called(self, delivery: Delivery) -> bool:
        """Whether it was its turn among those that wait."""
        return delivery is self._called

    def enter(self, delivery: Delivery) -> bool:
        """Return whether a delivery may start although the slots are not open; if not, it waits from now on."""
        if delivery is not self._called:
            self.waiting.append(delivery)
        else:
            self._called = None
            if self.running < self.concurrency:
                self._call()
                return True
            self.waiting.appendleft(delivery)
        self._soonest = min(self._soonest, delivery.deadline)
        return False

    def take(self) -> None:
        """Take a slot."""
        self.running += 1
        if self.running >= self.concurrency:
            self.is_open = False

    def free(self) -> None:
        """Give a slot back; who waits may have become ready."""
        self.running -= 1
        if self.running < self.concurrency and self._called is None:
            self._call()

    def _call(self) -> None:
        if self.waiting:
            self._called = self.waiting.popleft()
            self._ready.appendleft(self._called)
        else:
            self.is_open = True

    def take_expired(self, now: float) -> list[Delivery]:
        """Take out and return those that wait and whose deadline has passed."""
        if now < self._soonest:
            return []
        expired = [delivery for delivery in self.waiting if delivery.deadline <= now]
        self.waiting = deque(delivery for delivery in self.waiting if delivery.deadline > now)
        self._soonest = min((delivery.deadline for delivery in self.waiting), default=math.inf)
        return expired

    def take_surplus(self) -> list[Delivery]:
        """Take out and return the youngest events of those that nothing but a stuck thread can let go on.

        Those that are left come to at most 16 for the handler and 16 for each lane that a thread holds.
        """
        surplus: list[Delivery] = []
        for lane in self.held:
            behind = self.lanes[lane]
            while len(behind) > _MAX_BEHIND_STUCK:
                surplus.append(behind.pop())
                self.behind -= 1
                surplus[-1].lane = None  # it leaves nobody behind
        if self.stuck >= self.concurrency:
            events = [delivery for delivery in self.waiting if delivery.deadline == math.inf]
            for delivery in events[_MAX_BEHIND_STUCK:]:
                self.waiting.remove(delivery)
                surplus.append(delivery)
        return surplus

    def take_all(self) -> list[Delivery]:
        """Take out and return all that have not started and are not ready."""
        everything = list(self.waiting)
        self.waiting.clear()
        self._called = None
        for behind in self.lanes.values():
            for delivery in behind:
                delivery.lane = None
            everything.extend(behind)
            behind.clear()
        self.behind = 0
        return everything


class Station:
    """A handler at work on one message type in one node.

    Args:
        name: The handler's name, for logs.
        type_name: The message type on the wire.
        decode: From MessagePack to the message.
        decode_json: From JSON to the message.
        entry: Takes message and context, returns the handler's value or a result.
        takes_context: Whether `entry` wants the context.
        has_middleware: Whether `entry` returns what middleware made of the handler's value.
        slots: The handler's, shared with its other stations.
        timeout: The most seconds of one execution, or None for the message's deadline alone.
        fits: Whether a value is what the message promises; None when anything goes.
    """

    __slots__ = (
        "decode", "decode_json", "entry", "failed", "fits", "has_middleware", "name", "ok", "refused", "seconds",
        "slots", "takes_context", "timeout", "turned_away", "type_name",
    )  # fmt: skip

    def __init__(
        self,
        *,
        name: str,
        type_name: str,
        decode: Callable[[Any], Any],
        decode_json: Callable[[Any], Any],
        entry: Callable[..., Awaitable[Any]],
        takes_context: bool,
        has_middleware: bool,
        slots: Slots,
        timeout: float | None,
        fits: Callable[[Any], str | None] | None,
    ) -> None:
        self.name = name
        self.type_name = type_name
        self.decode = decode
        self.decode_json = decode_json
        self.entry = entry
        self.takes_context = takes_context
        self.has_middleware = has_middleware
        self.slots = slots
        self.timeout = timeout
        self.fits = fits
        self.ok = self.refused = self.failed = self.turned_away = 0
        self.seconds = 0.0  # in the handler, all executions together


class StationStatistics(msgspec.Struct, frozen=True):
    """What one handler has done with one message type; counts since start.

    `running`, `waiting` and `stuck` are of the handler: the same for each of its types.
    """

    handler: str
    type_name: str
    running: int
    """Executions that hold one of the handler's slots; stuck threads are among them."""

    waiting: int
    """Deliveries that wait for a slot."""

    ok: int
    refused: int
    failed: int
    stuck: int
    """Threads that run on past their deadline."""

    seconds: float
    """Time in the handler, all executions together."""

    turned_away: int
    """Messages that middleware answered as more than this node can take now, before the handler was called."""


class DispatcherStatistics(msgspec.Struct, frozen=True):
    """What is in the node, and what it has turned away; counts since start."""

    intake: int
    """Deliveries that are admitted and not settled."""

    intake_bytes: int
    running: int
    busy: int
    """Deliveries refused because the intake was full."""

    expired: int
    """Deliveries whose deadline had passed before they could start."""

    invalid: int
    """Deliveries whose body did not fit their type."""

    handlers: tuple[StationStatistics, ...]
