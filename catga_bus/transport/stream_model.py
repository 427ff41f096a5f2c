"""One stream as nats-server keeps it: a pure model of values, without a clock, an event loop or randomness.

What is here was compared with nats-server 2.15 call by call (`catga_bus.testing.jetstream_contract`). Times are seconds
since 1970, handed in by whoever calls; they never go back.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from catga_bus.transport.jetstream import (
    EXPECTED_LAST_HEADER,
    MSG_ID_HEADER,
    ApiError,
    JetStreamRefusedError,
    PubAck,
    StoredMessage,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.schedules import ROLLUP_HEADER
from catga_bus.transport.subjects import covers

_FILE_BYTES: Final = 30
_FILE_HEADER_BYTES: Final = 4
_MEMORY_BYTES: Final = 16
# What a message costs beside subject, headers and payload (nats-server, filestore.go and memstore.go).

_SLACK: Final = 64
# Removed sequences that a list may hold beyond twice the living ones before it is made anew.

Removed = Callable[[StoredMessage], None]
"""Told of each message that leaves the stream, whatever the reason."""


class _Sequences:
    """Rising sequences with removals anywhere, both cheap: what was removed lies about until it is half of all."""

    __slots__ = ("_all", "_head", "_living")

    def __init__(self, living: Mapping[int, StoredMessage]) -> None:
        self._living = living
        self._all: list[int] = []
        self._head = 0
        # Everything before this place was removed.

    def append(self, sequence: int) -> None:
        self._all.append(sequence)

    def first(self) -> int | None:
        everything, living = self._all, self._living
        while self._head < len(everything) and everything[self._head] not in living:
            self._head += 1
        return everything[self._head] if self._head < len(everything) else None

    def last(self) -> int | None:
        while self._all and self._all[-1] not in self._living:
            self._all.pop()
        self._head = min(self._head, len(self._all))
        return self._all[-1] if self._all else None

    def tidy(self, count: int) -> None:
        if len(self._all) > 2 * count + _SLACK:
            self._all = list(self)
            self._head = 0

    def since(self, sequence: int) -> Iterator[int]:
        """Yield the living ones from `sequence` on."""
        everything = self._all
        for place in range(bisect_left(everything, sequence, self._head), len(everything)):
            if everything[place] in self._living:
                yield everything[place]

    def __iter__(self) -> Iterator[int]:
        return self.since(0)


class _Subject:
    """What lies on one subject."""

    __slots__ = ("count", "sequences", "tokens")

    def __init__(self, subject: str, living: Mapping[int, StoredMessage]) -> None:
        self.tokens = subject.split(".")
        self.sequences = _Sequences(living)
        self.count = 0


class StreamModel:
    """A stream: what it stores, what it refuses, and what it lets go.

    Args:
        config: How it behaves.
        on_removed: Told of each message that leaves it.
    """

    def __init__(self, config: StreamConfig, on_removed: Removed = lambda _: None) -> None:
        self.config = config
        self.patterns = _tokens(config)
        """Its subjects, cut into tokens."""

        self.last_sequence = max(config.first_sequence, 1) - 1
        self.bytes = 0
        self.schedules: dict[str, float] = {}
        """Instant at which the message on each of these subjects is due: the messages that wait for their time."""

        self._on_removed = on_removed
        self._was_purged = False
        self._messages: dict[int, StoredMessage] = {}
        self._order = _Sequences(self._messages)
        self._subjects: dict[str, _Subject] = {}
        self._ids: dict[str, tuple[int, float]] = {}

    # Looking.

    @property
    def first_sequence(self) -> int:
        """Of the oldest message; one more than the last if there is none, and 0 if there never was nor a purge."""
        first = self._order.first()
        if first is not None:
            return first
        return self.last_sequence + 1 if self.last_sequence or self._was_purged else 0

    def takes(self, subject: str) -> bool:
        """Return whether messages on this subject are stored here."""
        tokens = subject.split(".")
        return any(covers(pattern, tokens) for pattern in self.patterns)

    def info(self, consumers: int) -> StreamInfo:
        """Return what the server would say; the caller counts the consumers."""
        return StreamInfo(
            self.config, len(self._messages), self.bytes, self.first_sequence, self.last_sequence, consumers
        )

    def message(self, sequence: int) -> StoredMessage | None:
        """Return one message, or None."""
        return self._messages.get(sequence)

    def last(self, subject: str) -> StoredMessage | None:
        """Return the last message on a subject without wildcards, or None."""
        entry = self._subjects.get(subject)
        sequence = entry.sequences.last() if entry is not None else None
        return self._messages[sequence] if sequence is not None else None

    def last_per_subject(self, patterns: list[list[str]]) -> list[int]:
        """Return the sequences of the last message of each subject that matches, rising."""
        found = (
            entry.sequences.last()
            for entry in self._subjects.values()
            if any(covers(pattern, entry.tokens) for pattern in patterns)
        )
        return sorted(sequence for sequence in found if sequence is not None)

    def next(self, sequence: int, patterns: list[list[str]]) -> StoredMessage | None:
        """Return the first message from a sequence on that matches one of the patterns, or None."""
        for place in self._order.since(sequence):
            message = self._messages[place]
            tokens = self._subjects[message.subject].tokens
            if any(covers(pattern, tokens) for pattern in patterns):
                return message
        return None

    def since_time(self, instant: float) -> int:
        """Return the sequence of the first message stored at or after an instant; one more than the last if none."""
        for sequence in self._order:
            if self._messages[sequence].time >= instant:
                return sequence
        return self.last_sequence + 1

    def count(self, sequence: int, patterns: list[list[str]]) -> int:
        """Return how many messages from a sequence on match."""
        tokens = (self._subjects[self._messages[place].subject].tokens for place in self._order.since(sequence))
        return sum(any(covers(pattern, each) for pattern in patterns) for each in tokens)

    # Changing.

    def publish(self, now: float, subject: str, payload: bytes, headers: Mapping[str, str]) -> PubAck:
        """Store a message, or say why not; in the server's order: compare-and-set, then duplicates, then room.

        Raises:
            JetStreamRefusedError: The last sequence is another, or there is no room.
        """
        self._check_last(subject, headers)
        message_id = headers.get(MSG_ID_HEADER, "")
        if message_id:
            self._forget_ids(now)
            if message_id in self._ids:
                return PubAck(self.config.name, self._ids[message_id][0], duplicate=True)
        size = self._size(subject, payload, headers)
        if headers.get(ROLLUP_HEADER):
            self._check_rollup(headers)
        elif self.config.discard == "new" and 0 <= self.config.max_bytes < self.bytes + size - self._replaced(subject):
            raise JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded")
        sequence = self.last_sequence + 1
        message = StoredMessage(subject, sequence, payload, headers, now)
        self._store(message, size)
        if message_id:
            self._ids[message_id] = (sequence, now)
        if headers.get(ROLLUP_HEADER) == "sub":
            self.purge([subject.split(".")], keep=1)
        self._keep_limits(subject)
        return PubAck(self.config.name, sequence)

    def remove(self, sequence: int) -> bool:
        """Let one message go; return whether it was there."""
        message = self._messages.pop(sequence, None)
        if message is None:
            return False
        entry = self._subjects[message.subject]
        entry.count -= 1
        entry.sequences.tidy(entry.count)
        if not entry.count:
            del self._subjects[message.subject]
            self.schedules.pop(message.subject, None)
        self._order.tidy(len(self._messages))
        self.bytes -= self._size(message.subject, message.payload, message.headers)
        self._on_removed(message)
        return True

    def purge(self, patterns: list[list[str]], *, keep: int = 0) -> int:
        """Let all messages go that match, but the last `keep` of each subject; return how many."""
        self._was_purged = self._was_purged or [">"] in patterns
        doomed: list[int] = []
        for entry in list(self._subjects.values()):
            if any(covers(pattern, entry.tokens) for pattern in patterns):
                mine = list(entry.sequences)
                doomed += mine[: len(mine) - keep] if keep else mine
        return sum(self.remove(sequence) for sequence in sorted(doomed))

    def update(self, config: StreamConfig) -> None:
        """Take another configuration, and let go what exceeds its limits."""
        self.config = config
        self.patterns = _tokens(config)
        for subject in list(self._subjects):
            self._keep_limits(subject)

    def expire(self, now: float) -> None:
        """Let messages go that are older than `max_age`."""
        if not self.config.max_age:
            return
        while (first := self._order.first()) is not None:
            if self._messages[first].time + self.config.max_age > now:
                break
            self.remove(first)

    def next_expiry(self) -> float:
        """Return the instant at which `expire` has something to do; infinity if never."""
        first = self._order.first()
        if first is None or not self.config.max_age:
            return math.inf
        return self._messages[first].time + self.config.max_age

    # Inside.

    def _check_last(self, subject: str, headers: Mapping[str, str]) -> None:
        wanted = headers.get(EXPECTED_LAST_HEADER)
        if wanted is None:
            return
        last = self.last(subject)
        found = last.sequence if last is not None else 0
        if int(wanted) != found:
            raise JetStreamRefusedError(ApiError.WRONG_LAST_SEQUENCE, f"wrong last sequence: {found}")

    def _check_rollup(self, headers: Mapping[str, str]) -> None:
        if not self.config.allow_rollup:
            raise JetStreamRefusedError(10111, "rollup not permitted")
        if headers[ROLLUP_HEADER] != "sub":
            raise JetStreamRefusedError(10111, f'rollup value invalid: "{headers[ROLLUP_HEADER]}"')

    def _replaced(self, subject: str) -> int:
        """Return the bytes of the message that the next one on this subject would push out."""
        limit = self.config.max_messages_per_subject
        entry = self._subjects.get(subject)
        if limit <= 0 or entry is None or entry.count < limit:
            return 0
        oldest = self._messages[entry.sequences.first() or 0]
        return self._size(subject, oldest.payload, oldest.headers)

    def _store(self, message: StoredMessage, size: int) -> None:
        self.last_sequence = message.sequence
        self._messages[message.sequence] = message
        self._order.append(message.sequence)
        entry = self._subjects.get(message.subject)
        if entry is None:
            entry = self._subjects[message.subject] = _Subject(message.subject, self._messages)
        entry.sequences.append(message.sequence)
        entry.count += 1
        self.bytes += size

    def _keep_limits(self, subject: str) -> None:
        entry, limit = self._subjects.get(subject), self.config.max_messages_per_subject
        while limit > 0 and entry is not None and entry.count > limit:
            self.remove(entry.sequences.first() or 0)
        while 0 <= self.config.max_bytes < self.bytes and len(self._messages) > 1:
            self.remove(self._order.first() or 0)

    def _forget_ids(self, now: float) -> None:
        while self._ids:
            oldest = next(iter(self._ids))
            if self._ids[oldest][1] + self.config.duplicate_window > now:
                return
            del self._ids[oldest]

    def _size(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> int:
        block = 12 + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items()) if headers else 0
        size = len(subject) + block + len(payload)
        if self.config.storage == "memory":
            return size + _MEMORY_BYTES
        return size + _FILE_BYTES + (_FILE_HEADER_BYTES if headers else 0)


def _tokens(config: StreamConfig) -> list[list[str]]:
    return [subject.split(".") for subject in config.subjects]
