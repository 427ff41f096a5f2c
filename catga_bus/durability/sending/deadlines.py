"""One timer for many deadlines: it runs only while there are some, and rings when the earliest may have passed."""

import asyncio
import math
from collections.abc import Callable

from catga_bus.clock import Clock

_STEP_SECONDS = 0.01
# How late a deadline may be noticed, so that many different ones cost a hundred looks a second and no more.

_LATE_SECONDS = 0.25
# A ring that is later than this says that the loop was blocked: what came meanwhile is read before time counts. One is
# put off for that, never two in a row.


class Deadlines:
    """Calls `sweep` when a deadline may have passed.

    A deadline that is met costs nothing: it is not taken back, and the sweep that it causes finds nothing.

    Args:
        sweep: Ends what is late at the instant it is given, and returns the earliest deadline that is left, infinite
            if there is none.
        clock: Monotonic seconds, of the event loop.

    Attributes:
        due: The earliest deadline that is watched; others need no watching. For those who ask often.
    """

    def __init__(self, sweep: Callable[[float], float], clock: Clock) -> None:
        self._sweep = sweep
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.due = math.inf
        self._was_late = False

    def watch(self, deadline: float) -> None:
        """Ring when this instant has passed."""
        if deadline < self.due:
            self._ring_at(deadline)

    def close(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
        self.due = -math.inf

    def _ring_at(self, instant: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.due = instant
        self._timer = None if instant == math.inf else self._loop.call_at(instant, self._ring)

    def _ring(self) -> None:
        now = self._clock()
        was_late, self._was_late = self._was_late, now - self.due >= _LATE_SECONDS
        if self._was_late and not was_late:
            self._ring_at(now + _STEP_SECONDS)
            return
        due = self._sweep(now)
        self._ring_at(max(due, now + _STEP_SECONDS))
