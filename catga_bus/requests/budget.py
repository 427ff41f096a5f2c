"""Budget: how many retries a caller may make, as a function of its calls and of time."""

from collections import deque

_SECONDS = 10


class RetryBudget:
    """Bounds retries to a share of all calls, so that an overload is not multiplied by those it refuses.

    Within ten seconds a caller may retry `share` of the calls that it made in them, and `per_second` times ten besides;
    and in every second it may retry `per_second` times, whatever went before. Both are counted in whole seconds.

    Args:
        now: The present instant.
        share: Retries per call.
        per_second: Retries that are always allowed.

    Source:
        The retry budget of Finagle (Twitter): 20 % of calls over 10 s and a reserve of 10 per second.
    """

    __slots__ = ("_calls", "_calls_in", "_per_second", "_second", "_share", "_taken", "_taken_in")

    def __init__(self, now: float, *, share: float = 0.2, per_second: float = 10.0) -> None:
        self._share = share
        self._per_second = per_second
        self._second = int(now)
        self._calls_in = deque([0] * _SECONDS, maxlen=_SECONDS)  # the last is the present second
        self._taken_in = deque([0] * _SECONDS, maxlen=_SECONDS)
        self._calls = self._taken = 0  # the sums of both

    def calls(self, count: int, now: float) -> None:
        """Count calls made."""
        self._move_to(now)
        self._calls += count
        self._calls_in[-1] += count

    def take(self, now: float) -> bool:
        """Take one retry; False if there is none."""
        self._move_to(now)
        in_all = self._share * self._calls + self._per_second * _SECONDS
        if self._taken + 1 > in_all and self._taken_in[-1] + 1 > self._per_second:
            return False
        self._taken += 1
        self._taken_in[-1] += 1
        return True

    def _move_to(self, now: float) -> None:
        second = int(now)
        for _ in range(min(second - self._second, _SECONDS)):
            self._calls -= self._calls_in[0]
            self._taken -= self._taken_in[0]
            self._calls_in.append(0)
            self._taken_in.append(0)
        self._second = max(second, self._second)
