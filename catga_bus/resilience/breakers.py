"""The breakers of one caller, by what they guard: made on the first failure, and until then successes are counted."""

import math
from collections.abc import Callable

from catga_bus.resilience.bounds import check_count
from catga_bus.resilience.circuit_breaker import (
    ORDINARY,
    BreakerChange,
    BreakerKey,
    BreakerOptions,
    BreakerStatistics,
    CircuitBreaker,
    Window,
)

_MAX_BREAKERS = 1_024
# Chosen: 5 types at each of 200 nodes, the largest cluster that is aimed at; a megabyte of memory, and
# another one for the successes of what has no breaker.


class Breakers:
    """A bounded table of breakers.

    When it is full, a new one takes the place of the closed one whose last failure is the longest ago; if none is
    closed, of the one that is half-open or due to be for the longest time. One that has still to stay open is never
    given up: if all have, what fails newly is not guarded, and counted in `unguarded`.

    Successes are counted from the start, so that a few failures after many successes are a small share of them. They
    are known of as many keys without a breaker as there may be breakers; of more, those that came first are forgotten.

    Args:
        options: Of each breaker.
        on_change: Told of every change of state of each.
        limit: The most breakers; 1 to 1,000,000.

    Attributes:
        by_key: The breakers: what has failed lately.
        open_keys: What is guarded by a breaker that is not closed. While it is empty every call may pass.
        trips: How often any of them has opened.
        unguarded: Failures that found the table full of open breakers.

    Raises:
        ConfigurationError: The limit is out of its bounds.
    """

    def __init__(
        self,
        options: BreakerOptions,
        *,
        on_change: Callable[[BreakerChange], None] | None = None,
        limit: int = _MAX_BREAKERS,
    ) -> None:
        check_count("limit", limit, 1, 1_000_000)
        self._options = options
        self._on_change = on_change
        self._limit = limit
        self.by_key: dict[BreakerKey, CircuitBreaker] = {}  # in the order of their last failures
        self._calm: dict[BreakerKey, Window] = {}  # of what has no breaker
        self.open_keys: set[BreakerKey] = set()
        self.trips = 0
        self.unguarded = 0

    def allow(self, key: BreakerKey, now: float) -> int | None:
        """Decide about one call, as `CircuitBreaker.allow` does; what has no breaker may pass."""
        breaker = self.by_key.get(key)
        return ORDINARY if breaker is None else breaker.allow(now)

    def succeeded(self, key: BreakerKey, now: float, count: int = 1) -> None:
        """Count successes."""
        breaker = self.by_key.get(key) if self.by_key else None  # mostly there is none, and this comes with each batch
        window = self._calm.get(key) if breaker is None else breaker.window
        if window is None:
            window = Window(self._options.window, self._options.buckets, now)
            self._keep(key, window)
        if now >= window.ends:
            window.advance(now)
        window.total_successes += count

    def failed(self, key: BreakerKey, now: float, count: int = 1, *, admitted: float = math.inf) -> None:
        """Count failures; the first one makes the breaker.

        Args:
            key: What has failed.
            now: The present instant.
            count: How many.
            admitted: When the calls were made, as in `CircuitBreaker.record`.
        """
        breaker = self.by_key.pop(key, None)
        if breaker is None:
            if len(self.by_key) >= self._limit and not self._make_room(now):
                self.unguarded += count
                return
            known = self._calm.pop(key, None)
            breaker = CircuitBreaker(self._options, now, key=key, on_change=self._changed, window=known)
        self.by_key[key] = breaker  # last in the order
        breaker.record(now, 0, count, admitted=admitted)

    def end_probe(self, key: BreakerKey, probe: int, now: float, *, succeeded: bool | None) -> None:
        """Say how a probe ended, as `CircuitBreaker.end_probe` does; a breaker that was given up needs no answer."""
        breaker = self.by_key.get(key)
        if breaker is not None:
            breaker.end_probe(probe, now, succeeded=succeeded)

    def forget_quiet(self, now: float) -> None:
        """Drop what has nothing left to remember; for a look every few seconds."""
        for key in [key for key, breaker in self.by_key.items() if breaker.is_quiet(now)]:
            self._keep(key, self.by_key.pop(key).window)
        for key, window in list(self._calm.items()):
            window.advance(now)
            if not window.successes:
                del self._calm[key]

    def statistics(self, now: float) -> list[BreakerStatistics]:
        """Return a snapshot of each, in the order of their last failures."""
        return [breaker.snapshot(now) for breaker in self.by_key.values()]

    def last_changes(self) -> list[BreakerChange]:
        """Return the last change of each that is not closed."""
        changes = [breaker.last_change for breaker in self.by_key.values() if not breaker.is_closed]
        return [change for change in changes if change is not None]

    def _keep(self, key: BreakerKey, window: Window) -> None:
        if len(self._calm) >= self._limit:
            del self._calm[next(iter(self._calm))]
        self._calm[key] = window

    def _make_room(self, now: float) -> bool:
        key = next((key for key, breaker in self.by_key.items() if breaker.is_closed), None)
        if key is None:
            ready = [key for key, breaker in self.by_key.items() if breaker.half_open_at <= now]
            key = min(ready, key=lambda one: self.by_key[one].half_open_at, default=None)
        if key is None:
            return False
        self.by_key[key].give_up(now)
        del self.by_key[key]
        return True

    def _changed(self, change: BreakerChange) -> None:
        key = (change.type_name, change.node)
        if self.by_key[key].is_closed:
            self.open_keys.discard(key)
        else:
            self.open_keys.add(key)
        self.trips += change.open_seconds > 0.0
        if self._on_change is not None:
            self._on_change(change)
