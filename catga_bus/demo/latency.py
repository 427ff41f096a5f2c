"""Latencies counted in constant memory, so that percentiles so far are cheap at any moment."""

import math
from itertools import accumulate

_GROWTH = 1.02  # width of a bucket: a percentile is off by 1 % at most
_LOWEST_US = 1.0
_BUCKETS = 1 + math.ceil(math.log(1e9, _GROWTH))  # up to 1,000 seconds; what is above lands in the last


class LatencyHistogram:
    """Counts durations in buckets that grow by 2 %, from 1 microsecond to 1,000 seconds.

    Example:
        >>> histogram = LatencyHistogram()
        >>> for milliseconds in range(1, 101):
        ...     histogram.add(milliseconds / 1_000)
        >>> 0.049 < histogram.percentile(50) < 0.051
        True
    """

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._total = 0
        self.longest: float | None = None
        """The longest duration, in seconds; None before the first."""

    def add(self, seconds: float) -> None:
        """Count one duration."""
        microseconds = max(seconds * 1e6, _LOWEST_US)
        bucket = min(int(math.log(microseconds) / math.log(_GROWTH)), _BUCKETS - 1)
        self._counts[bucket] += 1
        self._total += 1
        self.longest = seconds if self.longest is None else max(self.longest, seconds)

    def percentile(self, percent: float) -> float | None:
        """Return the seconds that `percent` of the durations do not exceed; None before the first.

        Args:
            percent: Above 0, at most 100.
        """
        if not self._total:
            return None
        rank = math.ceil(self._total * percent / 100)
        for bucket, seen in enumerate(accumulate(self._counts)):
            if seen >= rank:
                return float(_LOWEST_US * _GROWTH ** (bucket + 0.5) / 1e6)
        raise ValueError(f"percent must be above 0 and at most 100, got {percent!r}")
