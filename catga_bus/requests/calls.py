"""What a caller knows of a request type, of one call, and of what it has done: records."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from catga_bus.requests.attempts import Phase, Progress
from catga_bus.requests.peers import Address, Choice
from catga_bus.resilience.circuit_breaker import BreakerKey, Probes
from catga_bus.result import Err, Ok
from catga_bus.transport.coalescer import Lane


class Route(msgspec.Struct, eq=False):
    """What the caller knows of one request type."""

    type_name: str
    subject: str
    key_field: str | None
    idempotent: bool
    decode: Callable[[Any], Any]
    lane: Lane
    handler_seconds: float = 0.0
    """Moving mean of the time in the handler, as answers tell it."""

    directed: dict[Address, Lane] = msgspec.field(default_factory=dict)
    """Lanes to single nodes; a cache."""


class Aim(msgspec.Struct, gc=False):
    """Where a call may go that does not simply go to the queue group."""

    target: Address | None = None
    """The node that the first attempt is addressed to; None for any."""

    is_bound: bool = False
    """Whether the caller named that node: it goes to no other."""

    choice: Choice | None = None
    """Which nodes may take it; None for all."""

    probes: Probes = ()
    """The half-open breakers that it is a probe of."""


class Call(msgspec.Struct, eq=False, gc=False):
    """One request that waits for its answer.

    Not tracked by the garbage collector, which would look at every call in flight again and again: its future knows
    the waiting task, and neither knows the call, so that it is in no cycle.
    """

    id: str
    route: Route
    lane: Lane
    future: asyncio.Future[Ok[Any] | Err]
    frame: bytes
    """As first written; a later attempt is made from it, so a call is encoded once."""

    deadline: float
    """Instant of the monotonic clock."""

    due: float
    """When time itself is the next event: the deadline, or before that the instant at which silence is trouble."""

    timeout: float
    """Seconds that it had when it was made."""

    aim: Aim | None = None
    """None for a call that may simply go to the queue group, as most do."""

    batch: int = 0
    """The number of the batch that it was last written with; 0 if it was not."""

    progress: Progress | None = None
    """None while all is well: written once, not lost, and the answer not late."""

    failed_at: str | None = None
    """The last node that was silent about it, forgot it, or died with it."""

    def trouble(self) -> Progress:
        """Return the facts that decisions rest on, from the first trouble on."""
        if self.progress is None:
            self.progress = Progress(
                deadline=self.deadline,
                idempotent=self.route.idempotent,
                is_bound=self.is_bound,
                phase=Phase.SENT,
                attempt=1,
                since=self.began,
                node=self.node,
                due=self.due,
            )
        return self.progress

    def wake(self) -> None:
        """Take over when time is the next event, after `progress` has changed."""
        if self.progress is not None:
            self.due = min(self.deadline, self.progress.due)

    @property
    def node(self) -> str | None:
        """The id of the node that has it or that it was addressed to, as far as is known."""
        if self.progress is not None:
            return self.progress.node
        target = None if self.aim is None else self.aim.target
        return None if target is None else target[1]

    @property
    def began(self) -> float:
        """When it was made."""
        return self.deadline - self.timeout

    @property
    def is_bound(self) -> bool:
        """Whether the caller named a node: it goes to no other."""
        return self.aim is not None and self.aim.is_bound

    @property
    def choice(self) -> Choice | None:
        """Which nodes may take it; None for all."""
        return None if self.aim is None else self.aim.choice

    @property
    def probes(self) -> Probes:
        """The half-open breakers that it is a probe of."""
        return () if self.aim is None else self.aim.probes

    def take_probes(self, key: BreakerKey | None = None) -> Probes:
        """Return the breakers that it is a probe of, and be a probe of them no more.

        Args:
            key: The one breaker that is meant; None for all.
        """
        if self.aim is None:
            return ()
        taken = tuple(probe for probe in self.aim.probes if key is None or probe[0] == key)
        self.aim.probes = tuple(probe for probe in self.aim.probes if probe not in taken)
        return taken

    @property
    def attempts(self) -> int:
        """How often it was written."""
        return 1 if self.progress is None else self.progress.attempt


class CallerStatistics(msgspec.Struct, frozen=True):
    """What the caller has done; counts since start."""

    calls: int
    in_flight: int
    ok: int
    failed: int
    """Calls that ended as `Err`, whatever the outcome."""

    retries: int
    """Attempts after the first."""

    failovers: int
    """Of these, attempts after the silence or the death of a node."""

    asked: int
    """Times that the node which had accepted a call was asked what became of it."""

    cancels: int
    """Times that a node was told to forget a call which another one got."""

    trips: int
    """Times that a circuit breaker has opened."""

    held_back: int
    """Calls that an open circuit breaker did not let through; `calls` are without them."""

    late_answers: int
    """Answers to calls that had ended."""

    rejected: int
    """Messages on the inbox that were not answers."""
