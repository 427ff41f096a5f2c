"""Lanes: the records of one partition taken apart, and which of their frames may run. Pure.

Frames with the same key run strictly one after another in stream order, across types and records; frames of other keys
run beside them. A record is done when all of its frames are.

    waiting -> ready -> running -> done
                  ^        |
                  `- paused'            between two attempts: it keeps its lane

A lane is the chain of its frames that are not done, by `Frame.next`; of the table only the last one is known, so that
taking a frame and ending it cost a look-up each.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, Generic, TypeVar

import msgspec

from catga_bus.transport.jetstream import DeliveredMessage
from catga_bus.wire import MessageFrame

MAX_RECORD_FRAMES: Final = 256
"""Frames of a record that is stored by the bus, at most."""

MAX_RECORD_BYTES: Final = 262_144
"""Bytes of a record that is stored by the bus, at most."""

_MAX_WANTED = 64
# Records that are asked for at once, however small the last ones were. Should they all turn out large, a partition
# holds 16 MiB and 16,384 frames for a moment. At one millisecond to the server 64 records are 64,000 a second.

_FORGET = 8  # a size seen once counts for so many records: each takes an eighth of the difference off


class State(IntEnum):
    """How far a frame has come."""

    WAITING = 0
    """Behind another one of its key."""

    READY = 1
    """The first of its key: it may start."""

    RUNNING = 2
    PAUSED = 3
    """Between two attempts."""

    DONE = 4


class Record(msgspec.Struct, eq=False):
    """A record in hand."""

    message: DeliveredMessage
    sender: str
    reply: str | None
    """The inbox of its sender, if it wants answers there."""

    frames: list[Any]
    left: int
    """Frames that are not done."""

    begun: bool = False
    """Whether one of its frames has been started."""

    lost: bool = False
    """Whether it was forgotten: what becomes of its frames is of no interest any more."""

    @property
    def sequence(self) -> int:
        """Its place in the stream."""
        return self.message.sequence


class Frame(msgspec.Struct, eq=False):
    """A frame in its lane."""

    record: Record
    index: int
    """In its record."""

    message: MessageFrame
    key: str
    """Its lane: the message's key, or its id."""

    next: Any = None
    """The frame behind it in its lane."""

    state: State = State.WAITING


F = TypeVar("F", bound=Frame)


class Lanes(Generic[F]):
    """The lanes of one partition.

    Args:
        max_frames: The window: frames in hand from which nothing more is wanted.
        max_bytes: The same in bytes of records.

    Attributes:
        records: What is in hand, by sequence, in the order in which it was taken: that of the stream.
        highest: The highest sequence of a record that was begun or done; 0 if none was.
    """

    def __init__(self, max_frames: int = 1_024, max_bytes: int = 4_194_304) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self.records: dict[int, Record] = {}
        self.highest = 0
        self._last: dict[str, F] = {}  # the last frame of each lane
        self._ghosts: set[F] = set()  # that run although their record was forgotten
        self._frames = 0
        self._bytes = 0
        self._usual_frames = MAX_RECORD_FRAMES
        self._usual_bytes = MAX_RECORD_BYTES

    def __len__(self) -> int:
        """The frames in hand that are not done."""
        return self._frames

    @property
    def bytes(self) -> int:
        """The bytes of the records in hand."""
        return self._bytes

    @property
    def is_full(self) -> bool:
        """Whether the window is."""
        return self._frames >= self._max_frames or self._bytes >= self._max_bytes

    @property
    def wanted(self) -> int:
        """For how many more records there is room, beside those in hand.

        If they are as large as the last ones were, the window is exceeded by less than one record. Before the first
        one they are taken to be as large as a record can be.
        """
        if self.is_full:
            return 0
        frames = (self._max_frames - self._frames) // self._usual_frames
        size = (self._max_bytes - self._bytes) // self._usual_bytes
        return max(1, min(frames, size, _MAX_WANTED))

    def take(self, record: Record) -> list[F]:
        """Take a record, which lies behind all in hand, whatever its sequence; return what may start at once."""
        self.records[record.message.sequence] = record
        self._count(record)
        last = self._last
        ready: list[F] = []
        for frame in record.frames:
            before = last.get(frame.key)
            last[frame.key] = frame
            if before is None:
                frame.state = State.READY
                ready.append(frame)
            else:
                before.next = frame
        return ready

    def _count(self, record: Record) -> None:
        frames, size = len(record.frames), len(record.message.payload)
        self._frames += frames
        self._bytes += size
        self._usual_frames = _usual(self._usual_frames, frames)
        self._usual_bytes = _usual(self._usual_bytes, size)

    def begin(self, frame: F) -> None:
        """A frame starts."""
        frame.state = State.RUNNING
        record = frame.record
        if not record.begun:
            record.begun = True
            self.highest = max(self.highest, record.message.sequence)

    def end(self, frame: F) -> F | None:
        """A frame is done, or one of a forgotten record has ended; return the one that may start now.

        The record is done, and not in hand any more, when its `left` is 0.
        """
        record = frame.record
        if record.lost:
            if frame not in self._ghosts:
                return None  # it did not run when it was forgotten
            self._ghosts.remove(frame)
            return self._leave(frame)
        self._frames -= 1
        record.left -= 1
        if not record.left:
            self.close(record)
        return self._leave(frame)

    def _leave(self, frame: F) -> F | None:
        frame.state = State.DONE
        following: F | None = frame.next
        if following is None:
            del self._last[frame.key]
            return None
        frame.next = None
        following.state = State.READY
        return following

    def close(self, record: Record) -> None:
        """Let a record go, all of whose frames are done."""
        del self.records[record.message.sequence]
        self._bytes -= len(record.message.payload)
        self.highest = max(self.highest, record.message.sequence)
        record.frames = []  # they know their record: without this only the garbage collector could part them

    def undone(self) -> Iterator[F]:
        """The frames in hand that are not done, in stream order."""
        for record in self.records.values():
            for frame in record.frames:
                if frame.state is not State.DONE:
                    yield frame

    def finish(self, *, below: bool) -> list[F]:
        """Forget what has not begun and is not waited for; return its frames.

        A record has begun when one of its frames has. It is kept, and with it all records that have a frame in front of
        one of its own, and those which these wait for, and so on.

        Args:
            below: Whether what lies below the highest record begun or done is kept as well.
        """
        kept: set[int] = set()
        needed: set[str] = set()
        for sequence in reversed(self.records):  # a frame waits only for frames of its own and of earlier records
            record = self.records[sequence]
            keys = {frame.key for frame in record.frames if frame.state is not State.DONE}
            if record.begun or (below and sequence < self.highest) or not needed.isdisjoint(keys):
                kept.add(sequence)
                needed |= keys
        return self._forget(kept)

    def drop(self) -> list[F]:
        """Forget everything; return its frames. What runs keeps its lane until it ends."""
        return self._forget(set())

    def inherit(self, before: "Lanes[F]") -> list[F]:
        """Take the lanes over that are held by what still runs of forgotten records elsewhere; return its frames.

        Args:
            before: From which everything has been dropped. These lanes are empty.
        """
        self._ghosts, before._ghosts = before._ghosts, set()  # noqa: SLF001 - the same class
        self._last, before._last = before._last, {}  # noqa: SLF001 - the same class
        return list(self._ghosts)

    def _forget(self, kept: set[int]) -> list[F]:
        """Forget all records but those of some sequences, and link the lanes anew."""
        forgotten = list(self.undone())
        records, self.records = self.records, {}
        self._last.clear()
        self._frames = self._bytes = 0
        for sequence, record in records.items():
            if sequence not in kept:
                record.lost = True
        self._ghosts.update(frame for frame in forgotten if frame.record.lost and frame.state is State.RUNNING)
        for ghost in self._ghosts:
            ghost.next = None
            self._last[ghost.key] = ghost
        for frame in forgotten:
            if not frame.record.lost:
                self._link(frame)
        for sequence, record in records.items():
            if sequence in kept:
                self.records[sequence] = record
                self._bytes += len(record.message.payload)
        return [frame for frame in forgotten if frame.record.lost]

    def _link(self, frame: F) -> None:
        frame.next = None
        before = self._last.get(frame.key)
        if before is not None:
            before.next = frame
        self._last[frame.key] = frame
        self._frames += 1


def _usual(usual: int, seen: int) -> int:
    """Return the size to expect: at once the larger one, and slowly a smaller one."""
    if seen >= usual:
        return max(1, seen)
    return max(1, usual - max(1, (usual - seen) // _FORGET))
