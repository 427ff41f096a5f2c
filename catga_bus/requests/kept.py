"""Kept answers: what a node has answered lately, for callers whose answer was lost on the way."""

from catga_bus.clock import Clock

KEEP_SECONDS = 10.0
"""How long an answer is kept. A caller asks a second after it last heard, and at once when its connection is back,
which takes up to 2 s of back-off."""

_OVERHEAD = 256  # bytes of an entry beside the answer itself: id, inbox and containers


class KeptAnswers:
    """Answers by message id, for a bounded time and within a bound of bytes; the oldest go first.

    Args:
        max_bytes: The most bytes of answers, with what keeping them takes; 0 keeps none.
        clock: Monotonic seconds.
    """

    def __init__(self, max_bytes: int, clock: Clock) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._bytes = 0
        self._answers: dict[str, tuple[float, str, bytes]] = {}  # in the order in which they were kept

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, message_id: str, inbox: str, frame: bytes) -> None:
        """Keep an answer; one that is larger than the bound is not kept.

        Args:
            message_id: Of the message that it answers.
            inbox: Where it went, and where alone it may go again.
            frame: The encoded answer frame.
        """
        now = self._clock()
        self._forget(message_id)
        self._answers[message_id] = (now + KEEP_SECONDS, inbox, frame)
        self._bytes += len(frame) + _OVERHEAD
        while self._answers and (self._bytes > self._max_bytes or self._oldest_ends() <= now):
            self._forget(next(iter(self._answers)))

    def find(self, message_id: str, inbox: str) -> bytes | None:
        """Return the answer that went to an inbox, or None if it is not kept (any more)."""
        entry = self._answers.get(message_id)
        if entry is None or entry[1] != inbox or entry[0] <= self._clock():
            return None
        return entry[2]

    def _oldest_ends(self) -> float:
        return next(iter(self._answers.values()))[0]

    def _forget(self, message_id: str) -> None:
        entry = self._answers.pop(message_id, None)
        if entry is not None:
            self._bytes -= len(entry[2]) + _OVERHEAD
