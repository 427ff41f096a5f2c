"""The faults of a replay: what befalls which node when (pure), and the record of what happened."""

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from catga_bus.clock import Clock, monotonic

KILL_AT = 0.15
"""Part of the replay after which a node is killed."""

FREEZE_AT = 0.4
"""Part of the replay after which another node is frozen."""

ROLL_AT = 0.7
"""Part of the replay after which a node is rolled, as a deployment does."""

REPLACE_AFTER = 1.0
"""Seconds from the kill to the start of the replacement: about what an orchestrator takes."""

FREEZE_SECONDS = 3.0
"""Seconds from the freeze to the thaw."""

ROLL_PATIENCE = 30.0
"""Seconds that the rolled node has to finish; a bus gives itself 25."""

MAX_MOMENTS = 1_000
# Chosen: a run has about a dozen; a node whose status flaps for minutes must not fill the memory.


class What(StrEnum):
    """What can be said of a node at one moment."""

    KILLED = "killed"
    STARTED = "started"
    READY = "ready"
    FROZEN = "frozen"
    THAWED = "thawed"
    ROLLED = "rolled"
    ENDED = "ended"

    # What the replay's own bus says of it.
    ONLINE = "online"
    SUSPECT = "suspect"
    FAULTED = "faulted"
    DRAINING = "draining"
    LEFT = "left"

    @property
    def is_seen(self) -> bool:
        """Whether this is how the replay's own bus sees the node."""
        return self in _SEEN


_DONE = frozenset({What.KILLED, What.STARTED, What.READY, What.FROZEN, What.THAWED, What.ROLLED, What.ENDED})
_SEEN = frozenset({What.ONLINE, What.SUSPECT, What.FAULTED, What.DRAINING, What.LEFT})

NOTICED = frozenset({What.SUSPECT, What.FAULTED, What.DRAINING, What.LEFT})
"""Views in which a node is given nothing new."""

GONE = frozenset({What.FAULTED, What.LEFT})
"""Views in which a node counts as dead."""


class Moment(msgspec.Struct, frozen=True):
    """What happened to one node, and when."""

    at: float
    """Seconds since the replay began."""

    node: str
    what: What

    def __str__(self) -> str:
        return f"{self.at:.2f} s: {self.node} {_SENTENCES.get(self.what, f'is seen as {self.what}')}"


_SENTENCES = {
    What.KILLED: "is killed (SIGKILL)",
    What.STARTED: "is started in its place",
    What.READY: "answers",
    What.FROZEN: "is frozen (SIGSTOP)",
    What.THAWED: "is thawed (SIGCONT)",
    What.ROLLED: "is told to leave (SIGTERM)",
    What.ENDED: "has ended",
}


class Chronicle:
    """The moments of one replay, and the clock that they are told by.

    Args:
        clock: Where the time comes from.
        tell: Is given each moment when it is written down.
    """

    def __init__(self, clock: Clock = monotonic, tell: Callable[[Moment], None] = lambda _: None) -> None:
        self._clock = clock
        self._tell = tell
        self._started = clock()
        self._moments: list[Moment] = []

    @property
    def began(self) -> float:
        """Instant of the beginning, on the clock."""
        return self._started

    def begin(self) -> None:
        """Count the seconds from now on."""
        self._started = self._clock()

    def now(self) -> float:
        """Return the seconds since the beginning."""
        return self._clock() - self._started

    @property
    def moments(self) -> tuple[Moment, ...]:
        """What has happened so far, in the order in which it was written down."""
        return tuple(self._moments)

    def add(self, node: str, what: What, at: float | None = None) -> None:
        """Write down what happened to a node, unless there are `MAX_MOMENTS` already.

        Args:
            node: Id of the node.
            what: What happened.
            at: Seconds since the beginning; now if None.
        """
        if len(self._moments) == MAX_MOMENTS:
            return
        moment = Moment(self.now() if at is None else at, node, what)
        self._moments.append(moment)
        self._tell(moment)

    def see(self, node: str, status: str) -> None:
        """Write down how a bus sees a node, if that is news; a node that was never doubted is online."""
        what = What(status)
        seen = [moment.what for moment in self._moments if moment.node == node and moment.what.is_seen]
        if what != (seen[-1] if seen else What.ONLINE):
            self.add(node, what)


def first(moments: Sequence[Moment], node: str, *what: What, since: float = 0.0) -> float | None:
    """Return when one of these things first happened to a node; None if it did not.

    Args:
        moments: What has happened.
        node: Id of the node.
        what: What to look for.
        since: What happened before this moment does not count.
    """
    return next((one.at for one in moments if one.node == node and one.what in what and one.at >= since), None)


def state_of(node: str, moments: Sequence[Moment]) -> str:
    """Return what there is to say of a node now: what was done to it last, and how it is seen; "" if nothing."""
    own = [moment for moment in moments if moment.node == node]
    done = [f"{one.what} at {one.at:.1f} s" for one in own if one.what in _DONE]
    seen = [f"seen as {one.what}" for one in own if one.what.is_seen]
    return ", ".join([*done[-1:], *seen[-1:]])


class Act(StrEnum):
    """What the plan can ask for."""

    KILL = "kill"
    REPLACE = "replace"
    FREEZE = "freeze"
    THAW = "thaw"
    ROLL = "roll"
    SUCCEED = "succeed"


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which node is killed, which one is frozen, which one is rolled, and who takes whose place."""

    killed: str
    replacement: str
    frozen: str
    rolled: str
    successor: str
    spares: int
    """Nodes that are neither killed nor frozen; if there are none, the freeze waits for the replacement."""

    def due(self, part: float, now: float, moments: Sequence[Moment]) -> list[Act]:
        """Return what has to be done now.

        A fault begins only while the replay runs; what has begun is brought to its end in any case. The roll waits
        until the other faults are mended: a deployment begins with a healthy service.

        Args:
            part: How much of the replay is done, 0 to 1; 1 when it has ended.
            now: Seconds since the replay began.
            moments: What has happened so far.
        """
        killed = first(moments, self.killed, What.KILLED)
        started = first(moments, self.replacement, What.STARTED)
        is_ready = first(moments, self.replacement, What.READY) is not None
        frozen = first(moments, self.frozen, What.FROZEN)
        is_thawed = first(moments, self.frozen, What.THAWED) is not None
        rolled = first(moments, self.rolled, What.ROLLED)
        acts = []
        if killed is None and KILL_AT <= part < 1:
            acts.append(Act.KILL)
        if killed is not None and started is None and now >= killed + REPLACE_AFTER:
            acts.append(Act.REPLACE)
        if frozen is None and FREEZE_AT <= part < 1 and (self.spares or is_ready):
            acts.append(Act.FREEZE)
        if frozen is not None and not is_thawed and now >= frozen + FREEZE_SECONDS:
            acts.append(Act.THAW)
        if rolled is None and ROLL_AT <= part < 1 and is_ready and is_thawed:
            acts.append(Act.ROLL)
        if rolled is not None and self._waits_for_successor(moments):
            has_ended = first(moments, self.rolled, What.ENDED) is not None
            if has_ended or now >= rolled + ROLL_PATIENCE:
                acts.append(Act.SUCCEED)
        return acts

    def _waits_for_successor(self, moments: Sequence[Moment]) -> bool:
        is_rolled = first(moments, self.rolled, What.ROLLED) is not None
        return is_rolled and first(moments, self.successor, What.STARTED) is None

    def is_open(self, moments: Sequence[Moment]) -> bool:
        """Whether a fault has begun and its end is still to come: the start of another node, or a thaw."""
        is_killed = first(moments, self.killed, What.KILLED) is not None
        is_frozen = first(moments, self.frozen, What.FROZEN) is not None
        return (
            (is_killed and first(moments, self.replacement, What.STARTED) is None)
            or (is_frozen and first(moments, self.frozen, What.THAWED) is None)
            or self._waits_for_successor(moments)
        )

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that something happens to."""
        return self.killed, self.replacement, self.frozen, self.rolled, self.successor


def plan_faults(nodes: Sequence[str], replacement: str, successor: str) -> FaultPlan:
    """Choose whom the faults befall.

    Of two nodes none is left that nothing has happened to, and one that was frozen a moment ago owns nothing that it
    could hand over; so the replacement is rolled.

    Args:
        nodes: Ids of the nodes, at least two.
        replacement: Id of the node that takes the place of the killed one.
        successor: Id of the node that takes the place of the rolled one.
    """
    return FaultPlan(
        killed=nodes[1],
        replacement=replacement,
        frozen=nodes[2 % len(nodes)],
        rolled=nodes[0] if len(nodes) > 2 else replacement,
        successor=successor,
        spares=len(nodes) - 2,
    )


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the faults of a replay came to: the facts that a verdict needs."""

    plan: FaultPlan
    moments: tuple[Moment, ...]
    exit_code: int | None
    """How the process of the killed node ended, negative for a signal; None if it was alive at the end."""

    was_stopped: bool
    """Whether the system said that the frozen process stood still, just before it was thawed."""

    rolled_exit_code: int | None
    """How the process of the rolled node ended: 0 if it left nothing unfinished; None if it was alive at the end."""
