"""What a replay has seen: so far, and in the end."""

from collections.abc import Sequence

import msgspec

from catga_bus.demo.faults import FaultRecord, Moment, state_of
from catga_bus.demo.messages import NodeTotals
from catga_bus.demo.partition_map import Owners


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a replay has come."""

    total: int
    """Flights to hand in."""

    stored: int
    """Commands that the server has accepted."""

    failed: int
    """Commands that it has not."""

    in_flight: int
    """Commands of which that is not known yet."""

    effects: int
    """Flights that have their effect."""

    seconds: float
    """Since the first command."""

    p50_ms: float | None
    p99_ms: float | None
    """From the call until the command was stored; None before the first."""

    per_node: dict[str, int]
    """Effects of each node."""

    owners: Owners = ()
    """Who owns which partition."""

    moments: tuple[Moment, ...] = ()
    """What has happened to the nodes."""

    @property
    def is_over(self) -> bool:
        """Whether every flight has its effect."""
        return self.effects >= self.total

    @property
    def waiting(self) -> int:
        """Commands that are stored and have no effect yet."""
        return max(0, self.stored - self.effects)

    @property
    def per_second(self) -> float:
        """Effects per second, from the start until now."""
        return self.effects / self.seconds if self.seconds > 0 else 0.0

    @property
    def nodes(self) -> list[str]:
        """Nodes that had effects, or that something has happened to; sorted by id."""
        return sorted({*self.per_node, *(moment.node for moment in self.moments)})

    @property
    def shares(self) -> dict[str, float]:
        """Effects of each node as a part of all, 0 to 1."""
        return {node: self.per_node.get(node, 0) / max(self.effects, 1) for node in self.nodes}

    @property
    def states(self) -> dict[str, str]:
        """What there is to say of each node now; of a node that nothing has happened to, ""."""
        return {node: state_of(node, self.moments) for node in self.nodes}


def effect_rates(before: Progress, now: Progress) -> dict[str, float]:
    """Return how many effects each node had per second between two looks at one replay.

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
    """When the last flight had its effect, or was waited for no longer."""

    began: float
    """Instant of the beginning, on the monotonic clock."""

    called: Sequence[float]
    """When each flight was handed in, in seconds since the beginning, by row; NaN: it was not."""

    stored_seconds: float
    """From the beginning until the last command had been stored."""

    failures: dict[str, int]
    """Commands that were not stored, by code."""

    shown: list[tuple[int, str]]
    """Row and aircraft of the late flights on the departures board, in the order in which they were committed."""

    totals: dict[str, NodeTotals | None]
    """What each node answered when it was asked; None if it did not, as a killed one cannot."""

    faults: FaultRecord | None = None
    """What was done to the nodes; None if nothing was."""
