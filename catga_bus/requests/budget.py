"""Budget: how many retries a caller may make, as a function of its calls and of time."""


class RetryBudget:
    """Bounds retries to a share of all calls, so that an overload is not multiplied by those it refuses.

    A token bucket: every call adds `share` of a token, every second adds `per_second`, a retry takes one; it holds at
    most what ten seconds of the floor give.

    Args:
        now: The present instant.
        share: Retries per call.
        per_second: Retries that are always allowed.

    Source:
        The retry budget of Finagle (Twitter): 20 % of calls over 10 s and a floor of 10 per second.
    """

    __slots__ = ("_at", "_cap", "_per_second", "_share", "_tokens")

    def __init__(self, now: float, *, share: float = 0.2, per_second: float = 10.0) -> None:
        self._share = share
        self._per_second = per_second
        self._cap = per_second * 10
        self._tokens = self._cap
        self._at = now

    def calls(self, count: int) -> None:
        """Count calls made."""
        self._tokens = min(self._cap + count * self._share, self._tokens + count * self._share)

    def take(self, now: float) -> bool:
        """Take one retry; False if there is none."""
        self._tokens = max(self._tokens, min(self._cap, self._tokens + (now - self._at) * self._per_second))
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
