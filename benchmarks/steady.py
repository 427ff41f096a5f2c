"""A steady load: so many requests per second, whether or not earlier ones were answered; or so many in flight."""

import asyncio
import time
from itertools import count

from benchmarks.outages import Call

_TICK_SECONDS = 0.0025
# The longest that a call may hang on after its timeout before it counts as one without an answer.
_GRACE_SECONDS = 5.0

HANGING = "hanging"
"""How a call ended that did not end."""


class SteadyCaller:
    """Sends orders at a fixed rate, or a fixed number at once. Sides derive from it and say what one call is."""

    def __init__(self) -> None:
        self._orders = count()
        self._calls: list[Call] = []
        self._waiting: dict[asyncio.Task[None], tuple[int, float]] = {}
        self._sending: asyncio.Task[None] | None = None

    async def call(self, order: int, timeout: float) -> str:
        """Send one order, and return how it ended: `outages.OK`, or what went wrong."""
        raise NotImplementedError

    async def begin_load(self, rate: float, seconds: float) -> None:
        """Send `rate` requests per second from now on, each with so many seconds to be answered."""
        self._sending = asyncio.create_task(self._send(rate, seconds))

    async def begin_crowd(self, in_flight: int, seconds: float) -> None:
        """Keep so many requests in flight from now on, each with so many seconds to be answered."""
        self._sending = asyncio.create_task(self._crowd(in_flight, seconds))

    async def end_load(self, seconds: float) -> list[Call]:
        """Send no more, wait for the last answers, and return all calls."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
        if self._waiting:
            await asyncio.wait(self._waiting, timeout=seconds + _GRACE_SECONDS)
        now = time.monotonic()
        self._calls += [Call(order, sent, now, HANGING) for order, sent in self._waiting.values()]
        left = list(self._waiting)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        calls, self._calls = self._calls, []
        return calls

    async def _send(self, rate: float, timeout: float) -> None:
        started = time.monotonic()
        sent = 0
        while True:
            while sent < (time.monotonic() - started) * rate:
                self._begin(timeout)
                sent += 1
            await asyncio.sleep(_TICK_SECONDS)

    async def _crowd(self, in_flight: int, timeout: float) -> None:
        room = asyncio.Semaphore(in_flight)
        while True:
            await room.acquire()
            self._begin(timeout).add_done_callback(lambda _: room.release())

    def _begin(self, timeout: float) -> "asyncio.Task[None]":
        order = next(self._orders)
        now = time.monotonic()
        task = asyncio.create_task(self._ask(order, now, timeout))
        self._waiting[task] = (order, now)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[None]") -> None:
        del self._waiting[task]

    async def _ask(self, order: int, sent: float, timeout: float) -> None:
        try:
            end = await self.call(order, timeout)
        except Exception as error:
            # Every way to end is counted, those that should not exist too.
            end = f"raised {type(error).__name__}"
        self._calls.append(Call(order, sent, time.monotonic(), end))
