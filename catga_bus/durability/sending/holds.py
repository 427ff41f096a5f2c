"""Lines that wait a moment before their next record, so that it is larger.

A record costs the sender, the server and the owner of its partition about as much as thirty messages, and a line
writes its next one as soon as the last is stored. Where many calls wait, records are then small: what they wait for
comes a few at a time, and whoever gets it sends again. So a line with many messages on their way waits until half as
many are gathered, or two milliseconds, which is little beside the time that so many take.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from catga_bus.clock import Clock
from catga_bus.durability.sending.postings import Line

LEAST: Final = 4
"""Messages that are worth waiting for. So a caller with fewer than eight on their way for each line never waits."""

MOST: Final = 128
"""Half of the frames that a record may have."""

SECONDS: Final = 0.002
"""How long a line waits, at most, and a turn of the timer."""


def worth_waiting_for(on_way: int, lines: int) -> int:
    """Return how many messages are to be gathered for a record; 0 if it is not to wait.

    Args:
        on_way: Messages whose callers wait, for a result or until they are stored.
        lines: Among how many lines they are.
    """
    wanted = on_way // (2 * lines)
    return min(wanted, MOST) if wanted >= LEAST else 0


class Holds:
    """The lines that wait, first come first.

    Args:
        release: Called with a line whose time is over and in which something waits; its `wanted` is 0 again.
        clock: Monotonic seconds, of the event loop.
    """

    def __init__(self, release: Callable[[Line], None], clock: Clock) -> None:
        self._release = release
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._until: dict[Line, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def lines(self) -> list[Line]:
        """Return those that wait."""
        return list(self._until)

    def hold(self, line: Line, wanted: int) -> None:
        """Have a line wait for so many messages."""
        line.wanted = wanted
        self._until[line] = self._clock() + SECONDS
        if self._timer is None:
            self._timer = self._loop.call_later(SECONDS, self._ring)

    def end(self, line: Line) -> None:
        """A line waits no more."""
        line.wanted = 0
        self._until.pop(line, None)

    def end_all(self) -> None:
        """Release every line now."""
        for line in self.lines():
            self._let_go(line)

    def close(self) -> None:
        """Release nothing more by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        self._timer = None
        now = self._clock()
        for line, until in list(self._until.items()):
            if until > now:
                self._timer = self._loop.call_at(until, self._ring)
                return
            self._let_go(line)

    def _let_go(self, line: Line) -> None:
        self.end(line)
        if line.waiting:
            self._release(line)
