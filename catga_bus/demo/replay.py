"""The replay: a client that hands the flights in as commands, in the order of the schedule."""

import asyncio
import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from catga_bus.bus import Bus
from catga_bus.demo.data import Flight
from catga_bus.demo.display import Display
from catga_bus.demo.effects import EffectCounts
from catga_bus.demo.faults import Chronicle
from catga_bus.demo.latency import LatencyHistogram
from catga_bus.demo.messages import RecordFlight
from catga_bus.demo.partition_map import Owners
from catga_bus.demo.progress import Progress
from catga_bus.errors import CallError

MAX_FAILURES = 1_000
"""Commands that were not stored after which the replay gives up: what is broken is known by then."""

MAX_BACKLOG = 50_000
"""Commands that are stored and have no effect yet; over it the replay waits, so that the work queue never fills up."""

EFFECT_PATIENCE = 30.0
"""Seconds without a new effect after which the missing ones are waited for no longer."""

_POLL = 0.02  # seconds between two looks at the effect log while the end is waited for


class Replay:
    """Hands flights in, with a bounded number of them not known to be stored, and waits for their effects.

    The order of the calls is the order in the work queue, for each aircraft: the bus stores what one sender gives it
    for one partition in that order, without waiting for each.

    Args:
        bus: A started bus.
        flights: In the order of the schedule.
        rate: Commands per second; 0 hands in as fast as they are stored.
        in_flight: Most commands not known to be stored, at least 1. A server that cannot hold the rate slows the
            replay down.
        chronicle: What happens to the nodes meanwhile, and the clock.
        effects: The effects so far.
        owners: Returns who owns which partition now.
    """

    def __init__(
        self,
        bus: Bus,
        flights: Sequence[Flight],
        *,
        rate: float,
        in_flight: int,
        chronicle: Chronicle,
        effects: EffectCounts,
        owners: Callable[[], Owners],
    ) -> None:
        self.called = array("d", [math.nan]) * len(flights)
        self.stored_seconds = 0.0
        self._bus = bus
        self._flights = flights
        self._rate = rate
        self._chronicle = chronicle
        self._now = chronicle.now
        self._effects = effects
        self._owners = owners
        self._is_over = False
        self._room = asyncio.Semaphore(in_flight)
        self._waiting = 0
        self._stored = 0
        self._latency = LatencyHistogram()
        self._failures: Counter[str] = Counter()

    async def run(self, display: Display) -> Progress:
        """Hand everything in, or give up after `MAX_FAILURES`; wait for the effects, and return how it went."""
        self._chronicle.begin()
        painter = asyncio.create_task(self._paint(display))
        try:
            await self._hand_in()
            self.stored_seconds, self._is_over = self._now(), True
            await self._wait_for(self._stored)
        except ExceptionGroup as failed:
            # A bus that cannot be used tells every call the same: one of them is enough.
            raise failed.exceptions[0] from None
        finally:
            self._is_over = True
            painter.cancel()
            await asyncio.wait([painter])
        progress = self.progress()
        display.update(progress)
        return progress

    @property
    def part(self) -> float:
        """How much is handed in, 0 to 1; 1 also when the replay has given up."""
        return 1.0 if self._is_over else self._ended / len(self._flights)

    @property
    def _ended(self) -> int:
        return self._stored + self._failures.total()

    def progress(self) -> Progress:
        """Return how far the replay has come."""
        p50, p99 = self._latency.percentile(50), self._latency.percentile(99)
        return Progress(
            total=len(self._flights),
            stored=self._stored,
            failed=self._failures.total(),
            in_flight=self._waiting,
            effects=self._effects.look(),
            seconds=self._now(),
            p50_ms=None if p50 is None else p50 * 1_000,
            p99_ms=None if p99 is None else p99 * 1_000,
            per_node=self._effects.per_node,
            owners=self._owners(),
            moments=self._chronicle.moments,
        )

    @property
    def failures(self) -> dict[str, int]:
        """Commands that were not stored, by code."""
        return dict(self._failures)

    async def _hand_in(self) -> None:
        async with asyncio.TaskGroup() as calls:
            for row, flight in enumerate(self._flights):
                await self._wait_turn(row)
                if self._failures.total() >= MAX_FAILURES:
                    return
                # Tasks begin in the order in which they were made, and so do the calls.
                calls.create_task(self._store(row, flight))

    async def _wait_turn(self, row: int) -> None:
        """Wait for the instant of a flight, for a place in flight, and for room in the work queue."""
        if self._rate and (early := row / self._rate - self._now()) > 0:
            await asyncio.sleep(early)
        await self._room.acquire()
        if self._stored - self._effects.flights > MAX_BACKLOG:
            await self._wait_for(self._stored - MAX_BACKLOG)

    async def _store(self, row: int, flight: Flight) -> None:
        self._waiting += 1
        called = self.called[row] = self._now()
        try:
            await self._bus.enqueue(RecordFlight(flight.aircraft, row, flight))
        except CallError as error:
            # Not handed in again: what may lie in the queue under one id must not lie there under another.
            self._failures[error.code] += 1
        else:
            self._stored += 1
            self._latency.add(self._now() - called)
        finally:
            self._waiting -= 1
            self._room.release()

    async def _wait_for(self, flights: int) -> None:
        """Wait until so many flights have their effect, or nothing new has come for `EFFECT_PATIENCE`."""
        seen, since = self._effects.look(), self._now()
        while seen < flights and self._now() - since < EFFECT_PATIENCE:
            await asyncio.sleep(_POLL)
            if (now := self._effects.look()) > seen:
                seen, since = now, self._now()

    async def _paint(self, display: Display) -> None:
        while True:
            await asyncio.sleep(display.interval)
            display.update(self.progress())
