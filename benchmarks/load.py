"""The load that every side carries: the same request, as many in flight, counted the same way."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, takewhile

from benchmarks.statistics import percentile

SKU = "sku-" + "7" * 32
"""Brings the typed request to 64 bytes of MessagePack, the size of the bare side's payload."""

QUANTITY = 7
PRICE_CENTS = 3
TOTAL_CENTS = QUANTITY * PRICE_CENTS
"""What the handler of every typed side computes, and its caller checks."""

REQUEST_TIMEOUT = 30.0
"""Seconds that a caller waits for one answer; a time-out so means that something is broken."""


class WrongAnswerError(Exception):
    """An answer came that does not belong to its request; what was measured counts for nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one measurement saw."""

    requests: int
    seconds: float
    p50_microseconds: float | None = None
    """Of one request at a time; None where more than one was in flight."""

    p99_microseconds: float | None = None
    """Of one request at a time; None where more than one was in flight."""

    @property
    def requests_per_second(self) -> float:
        """Throughput over the whole measurement, start and end included."""
        return self.requests / self.seconds


class LoadClient:
    """A caller under load. Sides derive from it and say what one call is."""

    def __init__(self) -> None:
        self.orders = count()

    async def call(self) -> None:
        """Send one request, wait for its answer and check it."""
        raise NotImplementedError

    async def calibrate(self, in_flight: int, seconds: float) -> float:
        """Warm up for `seconds` and return the requests per second seen meanwhile."""
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, over.set)
        started = time.perf_counter()
        # The first calls are made in any case: a process that had to wait for its turn finds the time over at once.
        until_over = chain(range(in_flight), takewhile(lambda _: not over.is_set(), count()))
        done = await self._keep_in_flight(in_flight, until_over)
        return done / (time.perf_counter() - started)

    async def measure(self, in_flight: int, requests: int) -> Run:
        """Send `requests`, always `in_flight` of them at once while there are any left.

        One at a time, each is timed by itself as well.
        """
        started = time.perf_counter()
        if in_flight == 1:
            latencies = await self._one_at_a_time(requests)
            seconds = time.perf_counter() - started
            p50, p99 = (percentile(latencies, share) * 1e6 for share in (0.5, 0.99))
            return Run(requests, seconds, p50, p99)
        await self._keep_in_flight(in_flight, iter(range(requests)))
        return Run(requests, time.perf_counter() - started)

    async def _one_at_a_time(self, requests: int) -> list[float]:
        latencies = []
        for _ in range(requests):
            started = time.perf_counter()
            await self.call()
            latencies.append(time.perf_counter() - started)
        return latencies

    async def _keep_in_flight(self, in_flight: int, budget: Iterator[object]) -> int:
        """Work off `budget`, shared by `in_flight` tasks; return how many calls were made."""

        async def work() -> int:
            done = 0
            for _ in budget:
                await self.call()
                done += 1
            return done

        try:
            async with asyncio.TaskGroup() as group:
                workers = [group.create_task(work()) for _ in range(in_flight)]
        except ExceptionGroup as failures:
            # One failed call ends the measurement, and its siblings say nothing new.
            raise failures.exceptions[0] from None
        return sum(worker.result() for worker in workers)
