"""The arithmetic of the benchmarks: percentiles, medians with spread, ratios per round, verdicts.

Pure: no clock, no files, no processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the lowest and the highest value that it stands for."""

    median: float
    low: float
    high: float


class Verdict(StrEnum):
    """How a measured value compares with its target."""

    AIM = "aim reached"
    REACHED = "reached"
    MISSED = "not reached"


@dataclass(frozen=True, slots=True)
class Target:
    """What a value should be: at least what is required, better still what is aimed at."""

    required: float
    """The value that must be met; meeting it exactly counts."""

    aim: float | None = None
    """The better value hoped for; None if there is none."""

    higher_is_better: bool = True
    """False for latencies, memory and the like."""

    def verdict(self, value: float) -> Verdict:
        """Return how `value` compares.

        Example:
            >>> Target(2.5, aim=5.0).verdict(3.1).value
            'reached'
        """
        if self.aim is not None and self._meets(value, self.aim):
            return Verdict.AIM
        return Verdict.REACHED if self._meets(value, self.required) else Verdict.MISSED

    def _meets(self, value: float, bound: float) -> bool:
        return value >= bound if self.higher_is_better else value <= bound


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of `values` that at least `share` of them do not exceed (nearest rank).

    Nearest rank returns a value that was really measured, where interpolation would invent one.

    Args:
        values: At least one value, in any order.
        share: Between 0 and 1; 0.5 is the median's rank, 0.99 the 99th percentile.

    Raises:
        ValueError: `values` is empty or `share` is outside 0 to 1.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5)
        2.0
    """
    if not values:
        raise ValueError("a percentile needs at least one value, got none")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]


def spread(values: Sequence[float]) -> Spread:
    """Return the median of `values` with their lowest and highest.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("a spread needs at least one value, got none")
    return Spread(median(values), min(values), max(values))


def ratio_by_round(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Divide round by round, then take the median of the quotients.

    Both values of a round were measured seconds apart, so what the machine did to one it did to the
    other; dividing the medians of all rounds would lose that.

    Args:
        numerators: One value per round.
        denominators: The values of the same rounds, in the same order; none is zero.

    Raises:
        ValueError: The two differ in length, or are empty.
    """
    return spread([over / under for over, under in zip(numerators, denominators, strict=True)])


def growth_percent(first: float, last: float) -> float:
    """Return by how many percent `last` exceeds `first`; negative if it is smaller.

    Raises:
        ValueError: `first` is not positive.
    """
    if first <= 0:
        raise ValueError(f"growth needs a positive first value, got {first}")
    return (last - first) / first * 100


def requests_for(rate: float, seconds: float, *, in_flight: int) -> int:
    """Return how many requests last about `seconds` at `rate` requests per second.

    Never below four per request in flight: with fewer, the start and the end, when not all are in
    flight, would be most of the measurement.

    Raises:
        ValueError: `rate` or `seconds` is not positive, or `in_flight` is below 1.
    """
    if rate <= 0 or seconds <= 0 or in_flight < 1:
        raise ValueError(
            f"rate and seconds must be positive and in_flight at least 1, got {rate}, {seconds} and {in_flight}"
        )
    return max(4 * in_flight, round(rate * seconds))
