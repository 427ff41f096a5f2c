"""Pulse: how late the event loop is. Ticks on the loop, and can be read from any thread."""

import asyncio
from collections.abc import Callable

from catga_bus.clock import Clock

TICK = 0.05
"""Seconds between ticks: 20 wake-ups a second cost a tenth of a percent of a core."""

GAP = 0.25
"""Seconds for which a loop may be late before what it finds is taken as old: a frozen process that goes on, a handler
that blocks. Longer than a pause of the garbage collector, as long as a caller waits before it asks another node."""


class Pulse:
    """Measures how late an event loop is.

    A loop that was blocked runs what is ready in an order of its own, so the tick may come before or after what
    arrived meanwhile. Whoever takes in what may be old therefore asks first: `if now > pulse.late_at: pulse.beat(now)`.

    Args:
        clock: Monotonic seconds.
        on_gap: Called on the loop, with the length of the gap in seconds, once the loop goes on after more than `GAP`.

    Attributes:
        last: Instant of the last tick.
        late_at: Instant after which the loop has had a gap, unless it ticks before.
    """

    def __init__(self, clock: Clock, on_gap: Callable[[float], None]) -> None:
        self.last = clock()
        self.late_at = self.last + TICK + GAP
        self._clock = clock
        self._on_gap = on_gap
        self._longest = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to tick on the running loop."""
        self.last = self._clock()
        self.late_at = self.last + TICK + GAP
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    def stop(self) -> None:
        """Tick no more."""
        if self._timer is not None:
            self._timer.cancel()

    def stall(self, now: float) -> float:
        """Return for how many seconds the loop is overdue; 0.0 while it is in time. From any thread."""
        return max(0.0, now - self.last - 2 * TICK)

    def take_longest(self) -> float:
        """Return the longest delay in seconds since this was last called. From any thread; it may miss one."""
        longest, self._longest = self._longest, 0.0
        return longest

    def beat(self, now: float) -> None:
        """Note that the loop runs at the instant `now`, and tell of the gap if there was one."""
        late = now - self.last - TICK
        self.last = now
        self.late_at = now + TICK + GAP
        self._longest = max(self._longest, late)
        if late > GAP:
            self._on_gap(late)

    def _tick(self) -> None:
        self.beat(self._clock())
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)
