"""Watching the nodes: each watcher has a bounded queue, and is told when it missed something."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Self

from catga_bus.cluster.records import ChangeKind, NodeChange, NodeInfo


class Watcher:
    """An asynchronous iterator of changes. It ends when the bus is closed.

    It begins with `joined` for every node that is known. When more than `max_pending` changes wait, they are dropped;
    the next one is then `missed`, and after it every node that is known comes as `joined` again.

    Args:
        present: Returns the nodes that are known.
        max_pending: Changes that may wait.
    """

    def __init__(self, present: Callable[[], Iterable[NodeInfo]], max_pending: int) -> None:
        self._present = present
        self._max_pending = max_pending
        self._queue: deque[NodeChange] = deque(NodeChange(ChangeKind.JOINED, info) for info in present())
        self._wake = asyncio.Event()
        self._is_ended = False
        self._missed = 0
        self.total_missed = 0
        """Changes dropped so far."""

    def push(self, change: NodeChange) -> None:
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

    async def __anext__(self) -> NodeChange:
        while True:
            if self._missed:
                missed, self._missed = self._missed, 0
                self._queue.extend(NodeChange(ChangeKind.JOINED, info) for info in self._present())
                return NodeChange(ChangeKind.MISSED, None, missed)
            if self._queue:
                return self._queue.popleft()
            if self._is_ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
