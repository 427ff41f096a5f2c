"""What a replay has seen: so far, and in the end."""

import msgspec

from catga_bus.demo.failover import CallTimes
from catga_bus.demo.faults import FaultRecord, Moment, state_of
from catga_bus.demo.messages import NodeTotals


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a replay has come."""

    total: int
    """Requests to send in all."""

    answered: int
    failed: int
    in_flight: int
    seconds: float
    """Since the first request."""

    p50_ms: float | None
    p99_ms: float | None
    """Of the answers so far; None before the first."""

    per_node: dict[str, int]
    """Answers of each node."""

    moments: tuple[Moment, ...] = ()
    """What has happened to the nodes."""

    @property
    def done(self) -> int:
        """Requests that have ended, one way or the other."""
        return self.answered + self.failed

    @property
    def per_second(self) -> float:
        """Requests ended per second, from the start until now."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def nodes(self) -> list[str]:
        """Nodes that have answered, or that something has happened to; sorted by id."""
        return sorted({*self.per_node, *(moment.node for moment in self.moments)})

    @property
    def shares(self) -> dict[str, float]:
        """Answers of each node as a part of all, 0 to 1."""
        return {node: self.per_node.get(node, 0) / max(self.answered, 1) for node in self.nodes}

    @property
    def states(self) -> dict[str, str]:
        """What there is to say of each node now; of a node that nothing has happened to, ""."""
        return {node: state_of(node, self.moments) for node in self.nodes}


def answer_rates(before: Progress, now: Progress) -> dict[str, float]:
    """Return how many requests each node has answered per second between two looks at one replay.

    Args:
        before: The earlier look.
        now: The later look.
    """
    passed = now.seconds - before.seconds
    if passed <= 0:
        return dict.fromkeys(now.nodes, 0.0)
    return {node: (now.per_node.get(node, 0) - before.per_node.get(node, 0)) / passed for node in now.nodes}


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the replay saw."""

    progress: Progress
    """When the last request had ended."""

    failures: dict[str, int]
    """Requests that were not answered, by code."""

    announcements: int
    """Late flights that reached the departures board, each once."""

    totals: dict[str, NodeTotals | None]
    """What each node answered when it was asked; None if it did not, as a killed one cannot."""

    times: CallTimes
    """When each answered request was sent and answered."""

    faults: FaultRecord | None = None
    """What was done to the nodes; None if nothing was."""
