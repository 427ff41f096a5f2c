"""Notices: telling callers that this node has what it has not answered yet."""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from catga_bus.clock import Clock

NOTICE_SECONDS = 0.02
"""How long a batch may go unanswered before its caller is told that it has arrived, give or take a quarter. Most
answers are faster, also those of a node that is at its limit with a thousand requests in hand (5 to 10 ms, measured),
and a caller waits many times as long before it asks another node."""


class Notices:
    """Watches batches that have arrived, and tells of those that are not answered in time. Once each.

    Args:
        running: What has arrived and is not answered; looked at, never changed.
        tell: Told of an inbox and the ids that it has to be told of.
        clock: Monotonic seconds.
    """

    def __init__(self, running: Collection[str], tell: Callable[[str, list[str]], None], clock: Clock) -> None:
        self._running = running
        self._tell = tell
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[float, str, Sequence[Any]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, now: float, inbox: str, frames: Sequence[Any]) -> None:
        """Note that a batch has arrived.

        Args:
            now: The present instant.
            inbox: Where its answers go.
            frames: Its messages; their `id` is looked at when the time is over.
        """
        self._arrived.append((now + NOTICE_SECONDS, inbox, frames))
        if self._timer is None:
            self._timer = self._loop.call_later(NOTICE_SECONDS, self._look)

    def close(self) -> None:
        """Watch no more."""
        self._arrived.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now = self._clock() + _EARLY
        arrived, running = self._arrived, self._running
        while arrived and arrived[0][0] <= now:
            _, inbox, frames = arrived.popleft()
            ids = [frame.id for frame in frames if frame.id in running]
            if ids:
                self._tell(inbox, ids)
        self._timer = self._loop.call_later(NOTICE_SECONDS, self._look) if arrived else None


_EARLY = NOTICE_SECONDS / 4  # a timer for each batch would cost more than telling of some a little early
