"""How much may wait for the streams, and the queue of those who wait for room."""

import asyncio
from collections import deque
from typing import Final

from catga_bus.durability.sending.postings import Line
from catga_bus.errors import Code, Outcome, OverloadedError

MAX_FRAMES: Final = 65_536
"""Messages that are not known to be stored, of all lines together."""

MAX_LINE_FRAMES: Final = 16_384
"""Of one line: a partition that stands still leaves room for the others."""

MAX_BYTES: Final = 67_108_864
MAX_LINE_BYTES: Final = 16_777_216
"""Their bytes."""

MAX_CALLERS: Final = 65_536
"""Callers that wait for room; more are refused at once."""


class Room:
    """Counts what waits, and lets callers in as they came.

    Args:
        frames: Bound of messages.
        bytes_: Bound of their bytes.
        line_frames: Bound of messages of one line.
        line_bytes: Bound of their bytes.

    Attributes:
        frames: Messages that wait.
        bytes: Their bytes.
    """

    def __init__(
        self,
        frames: int = MAX_FRAMES,
        bytes_: int = MAX_BYTES,
        line_frames: int = MAX_LINE_FRAMES,
        line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._frames = frames
        self._bytes = bytes_
        self._line_frames = line_frames
        self._line_bytes = line_bytes
        self.frames = 0
        self.bytes = 0
        self._callers: dict[Line, deque[asyncio.Future[None]]] = {}
        self._count = 0
        self._granted: dict[Line, int] = {}  # callers let in that have not taken their room yet

    def has(self, line: Line) -> bool:
        """Whether a message for a line may be taken in now, before all who wait."""
        if self._count and (line in self._callers or line in self._granted):
            return False
        return (  # as `_fits`, which is not called because every message asks
            self.frames < self._frames
            and self.bytes < self._bytes
            and len(line.waiting) < self._line_frames
            and line.bytes < self._line_bytes
        )

    def _fits(self, line: Line) -> bool:
        return (
            self.frames < self._frames
            and self.bytes < self._bytes
            and len(line.waiting) < self._line_frames
            and line.bytes < self._line_bytes
        )

    def take(self, size: int) -> None:
        """A message is taken in."""
        self.frames += 1
        self.bytes += size

    def give(self, frames: int, size: int) -> None:
        """Messages wait no more."""
        self.frames -= frames
        self.bytes -= size
        if self._callers:
            self._let_in()

    async def wait(self, line: Line, timeout: float) -> None:
        """Wait for room, in turn; whoever returns from here takes it before anything else is awaited.

        Raises:
            OverloadedError: Too many wait, or there was no room within `timeout` seconds.
        """
        if self._count >= MAX_CALLERS:
            raise self._refusal(line, f"{self._count:,} callers wait already")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._callers.setdefault(line, deque()).append(turn)
        self._count += 1
        self._let_in()
        try:
            async with asyncio.timeout(timeout):
                await turn
        except TimeoutError:
            raise self._refusal(line, f"there was no room for {timeout:.3g} s") from None
        finally:
            self._leave(line, turn)

    def close(self) -> None:
        """Let in who waits: what they want to send is refused elsewhere."""
        for turns in self._callers.values():
            for turn in turns:
                if not turn.done():
                    turn.set_result(None)
        self._callers.clear()

    def _refusal(self, line: Line, why: str) -> OverloadedError:
        text = (
            f"{len(line):,} messages ({line.bytes:,} bytes) wait for a partition of {line.stream}, {self.frames:,} "
            f"({self.bytes:,} bytes) in all, and {why}; send more slowly"
        )
        return OverloadedError(text, code=str(Code.OVERLOADED), outcome=Outcome.NOT_RUN, retryable=True)

    def _leave(self, line: Line, turn: "asyncio.Future[None]") -> None:
        self._count -= 1
        if turn.done() and not turn.cancelled():
            self._granted[line] = self._granted.get(line, 1) - 1
            if self._granted[line] <= 0:
                del self._granted[line]
        elif turns := self._callers.get(line):
            turns.remove(turn)
            if not turns:
                del self._callers[line]
        if self._callers and not self._granted:
            self._let_in()

    def _let_in(self) -> None:
        """Let in who fits, a few at a time: what they take is known only when they have taken it."""
        free = _AT_ONCE - sum(self._granted.values())
        for line in list(self._callers):
            turns = self._callers[line]
            while turns and free > 0 and self._fits(line):
                turn = turns.popleft()
                if not turn.done():
                    turn.set_result(None)
                    self._granted[line] = self._granted.get(line, 0) + 1
                    free -= 1
            if not turns:
                del self._callers[line]


_AT_ONCE = 256
# The bounds may be exceeded by so many messages.
