"""What a replay has seen: so far, and in the end."""

import msgspec

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

    @property
    def done(self) -> int:
        """Requests that have ended, one way or the other."""
        return self.answered + self.failed

    @property
    def per_second(self) -> float:
        """Requests ended per second, from the start until now."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Answers of each node as a part of all, 0 to 1."""
        return {node: count / max(self.answered, 1) for node, count in sorted(self.per_node.items())}


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the replay saw."""

    progress: Progress
    """When the last request had ended."""

    failures: dict[str, int]
    """Requests that were not answered, by code."""

    announcements: int
    """Late flights that reached the departures board, each once."""

    totals: dict[str, NodeTotals | None]
    """What each node answered when it was asked; None if it did not."""
