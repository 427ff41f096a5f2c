"""Messages on their way into a stream: what makes the next record, and what a failed attempt means. Pure.

A sender has one `Line` for each partition, and at most one record of it that is written and not known to be stored.
So a record is written again as often as it takes without ever being overtaken, and what is sent meanwhile makes the
next one: records grow exactly when the server is slow.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, Final

import msgspec

from catga_bus.result import Stored
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    JetStreamUnreachedError,
)

MAX_RECORD_FRAMES: Final = 256
"""Frames of a record: one of them that is not done keeps all of them stored."""

MAX_RECORD_BYTES: Final = 262_144
"""Bytes of its frames, and never more than half of what the server takes; a larger frame travels alone."""

FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 0.5
"""Seconds between two attempts at a record, the first time and at most."""

WINDOW_MARGIN: Final = 5.0
"""Seconds before the end of the duplicate window after which a record is not written again: an attempt may take two."""


class Posting(msgspec.Struct, eq=False, gc=False):
    """One message on its way into a stream, and who waits for it.

    Not tracked by the garbage collector, as `requests.calls.Call`: it is in a cycle with its line only while it waits
    there, which nothing does for ever; and who awaits its future lets go of it before an error goes on, whose traceback
    has that frame.
    """

    id: str
    type_name: str
    subject: str
    frame: bytes
    deadline: float
    """Instant at which its caller has waited long enough."""

    future: Any
    """Of whoever waits: for the acceptance, or for the result if `decode` is there."""

    decode: Any = None
    """Makes a reply out of bytes; None if nobody waits for the result."""

    line: "Line | None" = None
    """Where it waits, or did."""

    is_written: bool = False
    """Whether a record with it may have reached a server."""

    is_over: bool = False
    """Whether its caller has an end: it is not written any more, but what is written stays written."""

    stored: Stored | None = None
    """Where it lies, once that is known."""

    rounds: int = 0
    """Rounds of questions that it has waited for."""

    is_ordered: bool = False
    """Whether it fails with one of its subject that was before it and fails: it is given in again behind that."""


class Record(msgspec.Struct, eq=False, gc=False):
    """What is written as one message, and the same each time."""

    id: str
    number: int
    subject: str
    postings: list[Posting]
    size: int
    """Bytes of its frames."""

    wants_answer: bool = False
    """Whether somebody waits for a result."""

    attempts: int = 0
    """Attempts that may have reached a server."""

    written_at: float = math.inf
    """Instant of the first of them."""

    payload: bytes = b""
    """As it is written; empty before the first attempt."""


class Bounds(msgspec.Struct):
    """How large a record may become."""

    frames: int = MAX_RECORD_FRAMES
    bytes: int = MAX_RECORD_BYTES


class Line:
    """The messages of one sender for one partition, in the order in which they were added.

    Attributes:
        stream: Where its records are stored.
        bounds: Of a record; may be changed at any time.
        record: The one that is written and not known to be stored; None if there is none.
        waiting: What has not been written.
        bytes: Bytes of frames here, those of the record included.
        failures: Attempts that have failed since the last success.
        trouble: How the last of them has failed; empty if none has.
        wanted: While it waits for more (see `holds`): how many messages its next record is to have; else 0.
    """

    __slots__ = (
        "_cancelled", "_numbers", "bounds", "bytes", "failures", "record", "stream", "trouble", "waiting", "wanted",
    )  # fmt: skip

    def __init__(self, stream: str, bounds: Bounds) -> None:
        self.stream = stream
        self.bounds = bounds
        self.record: Record | None = None
        self.waiting: deque[Posting] = deque()
        self.bytes = 0
        self.failures = 0
        self.trouble = ""
        self.wanted = 0
        self._numbers = 0
        self._cancelled = 0  # postings in `waiting` that nobody waits for

    def __repr__(self) -> str:
        held = 0 if self.record is None else len(self.record.postings)
        return f"<Line {self.stream}: {len(self.waiting)} waiting, {held} written>"

    def __len__(self) -> int:
        """Messages here, those of the record included."""
        return len(self.waiting) - self._cancelled + (0 if self.record is None else len(self.record.postings))

    def add(self, posting: Posting) -> None:
        """Take a message in, behind all others."""
        self.waiting.append(posting)
        self.bytes += len(posting.frame)

    def take(self, draw_id: Callable[[], str]) -> Record | None:
        """Make the next record, or return None if there is nothing to write.

        Messages of one subject that follow each other travel together; order is kept across subjects.

        Args:
            draw_id: Gives the id of a new record; random, so that nobody can store another one under it first.
        """
        assert self.record is None, "one record at a time: a second could overtake it"
        waiting, bounds = self.waiting, self.bounds
        taken: list[Posting] = []
        size = 0
        wants_answer = False
        while waiting:
            posting = waiting[0]
            if posting.is_over:
                waiting.popleft()
                self._cancelled -= 1
                continue
            if taken and (
                posting.subject != taken[0].subject
                or len(taken) >= bounds.frames
                or size + len(posting.frame) > bounds.bytes
            ):
                break
            taken.append(waiting.popleft())
            size += len(posting.frame)
            if posting.decode is not None:
                wants_answer = True
        if not taken:
            return None
        self._numbers += 1
        self.record = Record(draw_id(), self._numbers, taken[0].subject, taken, size, wants_answer)
        return self.record

    def settle(self) -> Record:
        """The record is stored, refused or given up: forget and return it."""
        record = self.record
        assert record is not None, "there is no record to settle"
        self.record = None
        self.bytes -= record.size
        return record

    def put_back(self) -> None:
        """No attempt at the record has reached a server: it is as if it had not been made."""
        record = self.record
        assert record is not None, "there is no record to put back"
        assert not record.attempts, "it may be stored: only the same record may be written again"
        self.record = None
        self._numbers -= 1
        self.waiting.extendleft(reversed(record.postings))
        self._cancelled += sum(posting.is_over for posting in record.postings)
        self.bytes -= sum(len(posting.frame) for posting in record.postings if posting.is_over)

    def cancel(self, posting: Posting) -> None:
        """Nobody waits for a message any more: it is not written if it was not; harmless if it has an end."""
        if posting.is_over:
            return
        posting.is_over = True
        if posting.stored is not None or (self.record is not None and posting in self.record.postings):
            return  # written is written
        self.bytes -= len(posting.frame)
        self._cancelled += 1
        if self._cancelled * 2 > len(self.waiting):
            self._sweep_cancelled()

    def expire(self, now: float) -> list[Posting]:
        """Take out what was not written by its deadline and return it."""
        late = [posting for posting in self.waiting if posting.deadline <= now and not posting.is_over]
        self._take_out(late)
        return [*late, *self.take_followers(late)]

    def take_followers(self, failed: Iterable[Posting]) -> list[Posting]:
        """Take out and return what must not be written because something before it has failed (`is_ordered`)."""
        subjects = {posting.subject for posting in failed if posting.is_ordered}
        if not subjects:
            return []
        found = [
            posting
            for posting in self.waiting
            if posting.is_ordered and posting.subject in subjects and not posting.is_over
        ]
        self._take_out(found)
        return found

    def _take_out(self, postings: list[Posting]) -> None:
        for posting in postings:
            posting.is_over = True
            self.bytes -= len(posting.frame)
        self._cancelled += len(postings)
        if postings:
            self._sweep_cancelled()

    def clear(self) -> list[Posting]:
        """Take out everything that was not written and return it."""
        left = [posting for posting in self.waiting if not posting.is_over]
        for posting in left:
            posting.is_over = True
            self.bytes -= len(posting.frame)
        self.waiting.clear()
        self._cancelled = 0
        return left

    def due(self) -> float:
        """Return the earliest deadline of those who wait, infinite if nobody does."""
        held = [] if self.record is None else self.record.postings
        return min(
            (posting.deadline for group in (held, self.waiting) for posting in group if not posting.is_over),
            default=math.inf,
        )

    def _sweep_cancelled(self) -> None:
        self.waiting = deque(posting for posting in self.waiting if not posting.is_over)
        self._cancelled = 0


class Next(Enum):
    """What follows from a failed attempt at a record."""

    AGAIN = auto()
    """Write the same record again: it may be stored."""

    ANEW = auto()
    """Put it back: it is not stored, and a later attempt may do better."""

    FULL = auto()
    """It is not stored and will not be: the stream is full."""

    REFUSED = auto()
    """It is not stored and will not be, for another reason."""

    TOO_LARGE = auto()
    """It is not stored and will not be: the server takes no such size."""

    GIVE_UP = auto()
    """It may be stored, and is not written again: soon the server could store it a second time."""


_NOT_NOW: Final = frozenset(
    {
        10008,  # JetStream system temporarily unavailable
        10009,  # not the leader
        ApiError.STREAM_STORE_FAILED,  # a disk, or a leader that has just lost its office
        10164,  # expected last sequence while one is in flight
        10167,  # too many requests
    }
)
_TOO_LARGE: Final = 10054
_FULL_WORDS: Final = "maximum"  # "maximum bytes exceeded", "maximum messages exceeded"


def after_failure(
    record: Record, error: JetStreamUnknownError | JetStreamRefusedError, began: float, now: float, window: float
) -> Next:
    """Decide what follows from an attempt that has not stored a record.

    A refusal is final only for a record that cannot be stored already: an earlier attempt may lie in a buffer on the
    way, and arrive when the reason for the refusal has gone. Then the same record is written again.

    Args:
        record: The record; `attempts` and `written_at` are brought up to date.
        error: How the attempt has failed.
        began: When it was made.
        now: The present instant.
        window: Seconds for which the stream recognises duplicates.
    """
    if not record.attempts:
        if isinstance(error, JetStreamRefusedError):
            return _after_refusal(error)
        if isinstance(error, JetStreamUnreachedError):
            return Next.ANEW
        record.written_at = began
    if not isinstance(error, JetStreamUnreachedError | JetStreamRefusedError):
        record.attempts += 1
    return Next.AGAIN if now < record.written_at + window - WINDOW_MARGIN else Next.GIVE_UP


def _after_refusal(error: JetStreamRefusedError) -> Next:
    if error.code == _TOO_LARGE:
        return Next.TOO_LARGE
    if error.code == ApiError.STREAM_STORE_FAILED and _FULL_WORDS in error.text:
        return Next.FULL
    return Next.ANEW if error.code in _NOT_NOW else Next.REFUSED


def pause_after(failures: int, rng: random.Random) -> float:
    """Return how long to wait before the next attempt.

        FIRST_PAUSE * 2 ** (failures - 1), at most LAST_PAUSE, less up to half of it

    Args:
        failures: Attempts that have failed in a row; at least 1.
        rng: Where the jitter comes from.
    """
    bound = min(LAST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 10))
    return bound * rng.uniform(0.5, 1.0)
