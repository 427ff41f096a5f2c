"""Bulkhead: at most so many at a time, so that one flooded part does not take the rest down with it.

    database = Bulkhead(max_running=20, max_waiting=100)

    @bus.handler(middleware=[database])
    async def quote(request: Quote) -> Price: ...

    @bus.handler(middleware=[database])                         # shares the 20 places
    async def history(request: History) -> list[Price]: ...

Source:
    M. Nygard, "Release It!" (2007), the pattern of this name.
"""

import asyncio
from collections.abc import Hashable, Iterable
from typing import Any, Generic, TypeVar

import msgspec

from catga_bus.context import Context, Outgoing
from catga_bus.pipeline import CallNext, Result
from catga_bus.resilience.bounds import check_count
from catga_bus.resilience.limits import checked_types, over_limit

W = TypeVar("W", bound=Hashable)


class Places(Generic[W]):
    """A number of places and a bounded queue for them, first in first out. Pure.

    Somebody waits only while all places are taken: a place that is left goes to the first who waits, and not through
    the hands of a newcomer.

    Args:
        running: The most that are in.
        waiting: The most that wait.

    Attributes:
        running: Who is in, by number.
        waiting: Who waits, the first in front.
    """

    __slots__ = ("_max_running", "_max_waiting", "running", "waiting")

    def __init__(self, running: int, waiting: int) -> None:
        self._max_running = running
        self._max_waiting = waiting
        self.running = 0
        self.waiting: dict[W, None] = {}

    def enter(self) -> bool:
        """Take a place; False if there is none."""
        if self.running >= self._max_running:
            return False
        self.running += 1
        return True

    def queue(self, waiter: W) -> bool:
        """Join the queue, when `enter` has said no; False if it is full."""
        if len(self.waiting) >= self._max_waiting:
            return False
        self.waiting[waiter] = None
        return True

    def leave(self) -> W | None:
        """Leave a place; return who has it from now on, or None if it is free."""
        if self.waiting:
            heir = next(iter(self.waiting))
            del self.waiting[heir]
            return heir
        self.running -= 1
        return None

    def give_up(self, waiter: W) -> None:
        """Leave the queue; who is not in it (any more) may say so, too."""
        self.waiting.pop(waiter, None)


class BulkheadStatistics(msgspec.Struct, frozen=True):
    """What a bulkhead has done; `passed` and `refused` count since it was made."""

    running: int
    waiting: int
    passed: int
    refused: int


class Bulkhead:
    """Middleware that runs at most `max_running` messages at a time and lets at most `max_waiting` wait, in order.

    What comes beyond, or still waits at its own deadline, is answered without running: `OVERLOADED`, outcome `not_run`.
    A request that a node refuses in this way is tried at another one by its caller.

    One bulkhead may be used in several places, which then share it, on one event loop. Around a handler a message that
    waits has one of the handler's places (`concurrency`).

    Args:
        max_running: Messages at a time; 1 to 100,000.
        max_waiting: Messages that wait for a place; 0 to 1,000,000.
        only: The message classes that it is for; None means all. Others pass and are not counted.

    Raises:
        ConfigurationError: An option is out of its bounds; the text names it.
    """

    def __init__(self, *, max_running: int, max_waiting: int = 0, only: Iterable[type] | None = None) -> None:
        check_count("max_running", max_running, 1, 100_000)
        check_count("max_waiting", max_waiting, 0, 1_000_000)
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._only = checked_types("Bulkhead", only)
        self._places: Places[asyncio.Future[None]] = Places(max_running, max_waiting)
        self._passed = self._refused = 0

    def __repr__(self) -> str:
        return f"Bulkhead(max_running={self.max_running}, max_waiting={self.max_waiting})"

    async def __call__(self, message: Any, ctx: Context | Outgoing, call_next: CallNext) -> Result:
        """Run a message, now or when a place is free, or answer that there is none."""
        if self._only is not None and type(message) not in self._only:
            return await call_next(message)
        if not self._places.enter() and not await self._place(ctx.remaining):
            self._refused += 1
            places = f"{self.max_running} running and {self.max_waiting} waiting"
            return over_limit(f"the bulkhead is full: {places}", None)
        self._passed += 1
        try:
            return await call_next(message)
        finally:
            self._leave()

    def statistics(self) -> BulkheadStatistics:
        """Return where it stands and the counts so far."""
        places = self._places
        return BulkheadStatistics(places.running, len(places.waiting), self._passed, self._refused)

    async def _place(self, seconds: float) -> bool:
        """Wait for a place, behind those that wait already; False if there is none or the time is over."""
        turn = asyncio.get_running_loop().create_future()
        if not self._places.queue(turn):
            return False
        try:
            async with asyncio.timeout(seconds if seconds < _FOR_EVER else None):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave()  # cancelled in the moment in which the place came
            else:
                self._places.give_up(turn)
            if isinstance(error, TimeoutError):
                return False
            raise
        return True

    def _leave(self) -> None:
        while (heir := self._places.leave()) is not None:
            if not heir.done():
                heir.set_result(None)
                return
            # It was cancelled, and is not yet aware of it: the place goes on to the next.


_FOR_EVER = 31_536_000.0  # a year: no timer for more
