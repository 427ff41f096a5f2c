"""Watching: whoever follows changes has a bounded queue of them, and is told when it missed some."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Watcher(Generic[T]):
    """An asynchronous iterator of changes. It ends when the bus is closed.

    It begins with the present state. When more than `max_pending` changes wait, they are dropped; the next one then
    says how many were missed, and after it the present state comes again.

    Args:
        present: Returns the present state, as changes.
        missed: Makes the change that says how many were missed.
        max_pending: Changes that may wait.
    """

    def __init__(self, present: Callable[[], Iterable[T]], missed: Callable[[int], T], max_pending: int) -> None:
        self._present = present
        self._make_missed = missed
        self._max_pending = max_pending
        self._queue: deque[T] = deque(present())
        self._wake = asyncio.Event()
        self._is_ended = False
        self._missed = 0
        self.total_missed = 0
        """Changes dropped so far."""

    def push(self, change: T) -> None:
        """Queue a change."""
        if self._missed:
            self._drop(1)
        elif len(self._queue) >= self._max_pending:
            self._drop(len(self._queue) + 1)
            self._queue.clear()
        else:
            self._queue.append(change)
        self._wake.set()

    def _drop(self, count: int) -> None:
        self._missed += count
        self.total_missed += count

    def end(self) -> None:
        """Let the iteration end after what waits."""
        self._is_ended = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while True:
            if self._missed:
                missed, self._missed = self._missed, 0
                self._queue.extend(self._present())
                return self._make_missed(missed)
            if self._queue:
                return self._queue.popleft()
            if self._is_ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
