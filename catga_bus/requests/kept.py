"""Kept answers: what a node has answered lately, for callers whose answer was lost on the way."""

from collections import deque
from collections.abc import Callable, Collection, Iterable

import msgspec

from catga_bus.clock import Clock

KEEP_SECONDS = 10.0
"""How long an answer is kept at least, unless there are too many bytes of them. A caller asks a second after it last
heard, and at once when its connection is back, which takes up to 0.8 s of back-off."""

_OVERHEAD = 256  # bytes of an entry beside the answer itself: id, inbox and containers


class KeptAnswers:
    """Answers by message id, for a bounded time and within a bound of bytes.

    There are two generations: what is new is put into the young one; when that is half full or old enough, it becomes
    the old one, and what was old is forgotten. So keeping an answer costs a dictionary entry, and forgetting nothing.

    Args:
        max_bytes: The most bytes of answers, with what keeping them takes; 0 keeps none.
        clock: Monotonic seconds.
    """

    def __init__(self, max_bytes: int, clock: Clock) -> None:
        self._half = max_bytes // 2
        self._clock = clock
        self._young: dict[str, tuple[str, bytes]] = {}
        self._old: dict[str, tuple[str, bytes]] = {}
        self._bytes = 0  # of the young ones
        self._turns_at = clock() + KEEP_SECONDS

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def keep(self, message_id: str, inbox: str, frame: bytes) -> None:
        """Keep an answer; one that is larger than half the bound is not kept.

        Args:
            message_id: Of the message that it answers.
            inbox: Where it went, and where alone it may go again.
            frame: The encoded answer frame.
        """
        size = len(frame) + _OVERHEAD
        if self._bytes + size > self._half or self._clock() >= self._turns_at:
            self._turn()
            if size > self._half:
                return
        self._bytes += size
        self._young[message_id] = (inbox, frame)

    def find(self, message_id: str, inbox: str) -> bytes | None:
        """Return the answer that went to an inbox, or None if it is not kept (any more)."""
        entry = self._young.get(message_id) or self._old.get(message_id)
        return entry[1] if entry is not None and entry[0] == inbox else None

    def _turn(self) -> None:
        now = self._clock()
        # After a quiet time both are too old: nobody asks that late.
        self._old = {} if now >= self._turns_at + KEEP_SECONDS else self._young
        self._young = {}
        self._bytes = 0
        self._turns_at = now + KEEP_SECONDS


class _Batch(msgspec.Struct):
    at: float
    inbox: str
    payload: bytes
    ids: frozenset[str] | None = None
    """Of the messages that it answers, once somebody has asked."""


class KeptBatches:
    """Payloads full of answers, for a bounded time and within a bound of bytes.

    For answers that nearly never are asked for again: to keep one costs what its batch does, and to look for one means
    to look through all that went to the same inbox.

    Args:
        max_bytes: The most bytes of payloads, with what keeping them takes; 0 keeps none.
        clock: Monotonic seconds.
    """

    def __init__(self, max_bytes: int, clock: Clock) -> None:
        self._most = max_bytes
        self._clock = clock
        self._batches: deque[_Batch] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def keep(self, inbox: str, payload: bytes) -> None:
        """Keep what is sent to an inbox; the oldest are forgotten for it."""
        batches, now = self._batches, self._clock()
        batches.append(_Batch(now, inbox, payload))
        self._bytes += len(payload) + _OVERHEAD
        while batches and (self._bytes > self._most or batches[0].at < now - KEEP_SECONDS):
            self._bytes -= len(batches.popleft().payload) + _OVERHEAD

    def find(
        self, inbox: str, ids: Collection[str], ids_of: Callable[[bytes], Iterable[str]]
    ) -> list[tuple[bytes, frozenset[str]]]:
        """Return the payloads that went to an inbox with answers to some of these messages, and what each answers.

        Args:
            inbox: Where they went, and where alone they may go again.
            ids: Of the messages.
            ids_of: Takes a payload apart.
        """
        found = []
        for batch in self._batches:
            if batch.inbox != inbox:
                continue
            if batch.ids is None:
                batch.ids = frozenset(ids_of(batch.payload))
            if not batch.ids.isdisjoint(ids):
                found.append((batch.payload, batch.ids))
        return found
