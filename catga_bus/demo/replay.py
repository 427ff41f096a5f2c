"""The replay: a client that sends all flights, and a board that shows what is announced meanwhile."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence

from catga_bus.bus import Bus
from catga_bus.demo.data import Flight
from catga_bus.demo.display import Display
from catga_bus.demo.failover import CallTimes
from catga_bus.demo.faults import Chronicle
from catga_bus.demo.latency import LatencyHistogram
from catga_bus.demo.messages import FlightDelayed, RecordFlight
from catga_bus.demo.progress import Progress
from catga_bus.result import Err, Ok

MAX_FAILURES = 1_000
"""Failed requests after which the replay gives up: what is broken is known by then."""


class DeparturesBoard:
    """Another service: shows late departures as they are announced.

    Args:
        bus: A bus that is not started yet.
        expected: How many late flights there are.
    """

    def __init__(self, bus: Bus, expected: int) -> None:
        self._rows: set[int] = set()
        self._is_complete = asyncio.Event()

        @bus.handler
        async def show(event: FlightDelayed) -> None:
            self._rows.add(event.row)
            if len(self._rows) >= expected:
                self._is_complete.set()

        if not expected:
            self._is_complete.set()

    @property
    def flights(self) -> int:
        """Late flights shown, each once."""
        return len(self._rows)

    async def wait_complete(self, timeout: float) -> None:
        """Wait until every late flight has been shown, for at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_complete.wait(), timeout)


class Replay:
    """Sends flights in the order of the file, with a bounded number in flight.

    Args:
        bus: A started bus.
        flights: What to send.
        rate: Requests per second; 0 sends as fast as answers come.
        in_flight: Most requests without an answer, at least 1. A server that cannot hold the rate
            slows the replay down.
        chronicle: What happens to the nodes meanwhile, and the clock.
    """

    def __init__(
        self,
        bus: Bus,
        flights: Sequence[Flight],
        *,
        rate: float,
        in_flight: int,
        chronicle: Chronicle,
    ) -> None:
        self.times = CallTimes()
        self._bus = bus
        self._flights = flights
        self._rate = rate
        self._chronicle = chronicle
        self._now = chronicle.now
        self._is_over = False
        self._senders = min(in_flight, len(flights))
        self._next = iter(enumerate(flights))
        self._waiting = 0
        self._latency = LatencyHistogram()
        self._per_node: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    async def run(self, display: Display) -> Progress:
        """Send everything, or give up after `MAX_FAILURES`, and return how it went."""
        self._chronicle.begin()
        painter = asyncio.create_task(self._paint(display))
        try:
            # One task per place in flight rather than per request: bounded without a semaphore.
            async with asyncio.TaskGroup() as senders:
                for _ in range(self._senders):
                    senders.create_task(self._send_next())
        except ExceptionGroup as failed:
            # A bus that cannot be used tells every sender the same: one of them is enough.
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
        """How much of the replay is done, 0 to 1; 1 also when it has given up."""
        return 1.0 if self._is_over else (self._per_node.total() + self._failures.total()) / len(self._flights)

    def progress(self) -> Progress:
        """Return how far the replay has come."""
        p50, p99 = self._latency.percentile(50), self._latency.percentile(99)
        return Progress(
            total=len(self._flights),
            answered=self._per_node.total(),
            failed=self._failures.total(),
            in_flight=self._waiting,
            seconds=self._now(),
            p50_ms=None if p50 is None else p50 * 1_000,
            p99_ms=None if p99 is None else p99 * 1_000,
            per_node=dict(self._per_node),
            moments=self._chronicle.moments,
        )

    @property
    def failures(self) -> dict[str, int]:
        """Requests that were not answered, by code."""
        return dict(self._failures)

    async def _send_next(self) -> None:
        for row, flight in self._next:  # shared by all senders: each takes the next row of the file
            if self._failures.total() >= MAX_FAILURES:
                return
            if self._rate:
                await asyncio.sleep(row / self._rate - self._now())
            await self._send(row, flight)

    async def _send(self, row: int, flight: Flight) -> None:
        self._waiting += 1
        sent = self._now()
        result = await self._bus.send(RecordFlight(row, flight))
        self._waiting -= 1
        match result:
            case Ok(answer):
                answered = self._now()
                self._latency.add(answered - sent)
                self.times.add(sent, answered)
                self._per_node[answer.node] += 1
            case Err(code):
                # Not sent again: what has run under one id must not run under another.
                self._failures[code] += 1

    async def _paint(self, display: Display) -> None:
        while True:
            await asyncio.sleep(display.interval)
            display.update(self.progress())
