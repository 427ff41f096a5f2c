"""Jobs: the frames of stored records at work, and the benches of the handlers that take them."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from catga_bus.dispatch.deliveries import Delivery, Station
from catga_bus.dispatch.failures import describe
from catga_bus.durability.inbox.base import Unit
from catga_bus.durability.letters.letters import Reason
from catga_bus.effects import Fence
from catga_bus.handlers.registry import HandlerOptions
from catga_bus.partition.lanes import Frame, State
from catga_bus.wire import token

_MOST_AHEAD = 64
# Jobs that a handler may have at the dispatcher beside those that it can run at once, at most: enough for one turn of
# the runner, which is as many. What is there already is started ahead of other partitions.


class Doom(NamedTuple):
    """Why a message becomes a dead letter without being run."""

    reason: Reason
    error: str


class Trouble(msgspec.Struct):
    """Why a job has not gone through at once."""

    since: float
    """When it first did not: monotonic seconds."""

    error: str
    failures: int = 0
    """Attempts that failed."""

    delays: int = 0
    """Times that it was put off without having been started."""


class Hands(Protocol):
    """What a job passes through: the worker of its partition."""

    def begin(self, job: "Job") -> None:
        """The dispatcher starts a job."""

    def attempt_ended(self, job: "Job") -> None:
        """An attempt has ended, or did not begin, whatever comes of it."""

    def recalled(self, job: "Job") -> None:
        """The dispatcher has given a job back that was recalled."""

    def again(self, job: "Job", error: str, seconds: float) -> None:
        """A job is to be started again after a pause, because of an error; its key is held."""

    def done(self, job: "Job") -> None:
        """A job is done, or that of a forgotten record has ended: its key is free."""


class Job(Frame, kw_only=True):
    """A frame of a stored record on its way through a handler."""

    hands: Hands
    """Whose it is; of a job of a forgotten record whoever has its key."""

    place: "Place | None" = None
    """Who takes it; None if nobody here knows its type."""

    delivery: Delivery | None = None
    """While it is with the dispatcher."""

    unit: Unit | None = None
    """Its present attempt in the inbox."""

    fence: Fence | None = None
    """Of that unit."""

    doom: Doom | None = None
    trouble: Trouble | None = None
    fault: str = ""
    """Why it could not begin, through no fault of its own."""

    is_known_new: bool = False
    """Whether the inbox has said that it is not done."""

    @property
    def attempt(self) -> int:
        """The present attempt, or the next one; the first is 1."""
        return 1 if self.trouble is None else self.trouble.failures + 1


class Queue:
    """The jobs of one partition that may start and wait for one bench.

    Args:
        start: Starts a job, for which the bench has made room.

    Attributes:
        is_listed: Whether the bench knows that something waits here.
        is_open: Whether jobs may be started.
    """

    __slots__ = ("is_listed", "is_open", "jobs", "start")

    def __init__(self, start: Callable[[Job], None]) -> None:
        self.start = start
        self.jobs: deque[Job] = deque()
        self.is_listed = False
        self.is_open = False

    def next(self) -> Job | None:
        """Take out the next job that may start."""
        while self.is_open and self.jobs:
            job = self.jobs.popleft()
            if job.state is State.READY and not job.record.lost:
                return job
        return None


class Bench:
    """One handler in this node, and how much of what is stored it has at the dispatcher, for all partitions together.

    Partitions take turns: one job each.

    Args:
        options: Of the handler.

    Attributes:
        limit: The most jobs at the dispatcher: twice the concurrency, and at most 64 more than that.
        out: Jobs that are there, or on their way to it.
        waiting: The queues in which something waits, the next one in front. Empty while there is room.
    """

    __slots__ = ("limit", "options", "out", "waiting")

    def __init__(self, options: HandlerOptions) -> None:
        self.options = options
        self.limit = options.concurrency + min(options.concurrency, _MOST_AHEAD)
        self.out = 0
        self.waiting: deque[Queue] = deque()

    def list(self, queue: Queue) -> None:
        """Note that something waits in a queue."""
        if not queue.is_listed:
            queue.is_listed = True
            self.waiting.append(queue)

    def refill(self) -> None:
        """Start what waits, as long as there is room."""
        waiting = self.waiting
        while waiting and self.out < self.limit:
            queue = waiting.popleft()
            job = queue.next()
            if job is None:
                queue.is_listed = False
                continue
            if queue.jobs:
                waiting.append(queue)
            else:
                queue.is_listed = False
            self.out += 1
            queue.start(job)


class Place:
    """One message type at its bench.

    Args:
        station: The handler for this type. The body of its deliveries is the job from now on.
        bench: The handler's.
    """

    __slots__ = ("_decode", "bench", "station", "token")

    def __init__(self, station: Station, bench: Bench) -> None:
        self.station = station
        self.bench = bench
        self.token = token(station.type_name)
        self._decode = station.decode
        station.decode = self._open

    def _open(self, job: Job) -> Any:
        """Begin a job, and return its message. The dispatcher decodes what it starts, and starts what it decodes."""
        try:
            job.hands.begin(job)
        except Exception as error:
            job.fault = describe(error)  # else the dispatcher's word for it would be that the body is wrong
            raise
        return self._decode(job.message.body)
