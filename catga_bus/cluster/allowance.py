"""Allowance: how often a node does what any stranger can make it do. A burst, and then so many times a second."""

BURST = 256
"""At once: a node that starts in a cluster of two hundred asks, and is told by, all of them in one round trip."""


class Allowance:
    """Takes from a bucket that holds `BURST` and fills slowly.

    Args:
        now: The present instant.
        per_second: How fast it fills.
    """

    __slots__ = ("_at", "_left", "_per_second")

    def __init__(self, now: float, per_second: float) -> None:
        self._at = now
        self._left = float(BURST)
        self._per_second = per_second

    def take(self, now: float) -> bool:
        """Whether there is one left now; if so it is taken."""
        self._left = min(float(BURST), self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
