"""The writing side of streams: packs postings into records, and writes each until it is known what became of it."""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Sequence

import msgspec

from catga_bus.clock import Clock
from catga_bus.durability.sending import endings
from catga_bus.durability.sending.deadlines import Deadlines
from catga_bus.durability.sending.holds import Holds, worth_waiting_for
from catga_bus.durability.sending.postings import (
    MAX_RECORD_BYTES,
    Bounds,
    Line,
    Next,
    Posting,
    Record,
    after_failure,
    pause_after,
)
from catga_bus.durability.sending.room import Room
from catga_bus.errors import CatgaError, Code, Outcome, TooLargeError
from catga_bus.rarely import RareLog
from catga_bus.result import Stored
from catga_bus.transport.base import Transport
from catga_bus.transport.jetstream import (
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
    JetStreamUnreachedError,
    PubAck,
)
from catga_bus.wire import Kind, join_batch

_ATTEMPT_SECONDS = 2.0
# After which an attempt without an answer is made again. A server answers in a millisecond; in a cluster that has lost
# its leader each attempt is lost, so that this bounds how late the new one is noticed. Half of it costs twice the
# writing while a server is busy.

_SWEEP_SECONDS_PER_MESSAGE = 2e-6
# Looking at one that waits takes about 50 ns: a few percent of a core at most, however many deadlines pass.

_LOOK_EVERY = 8
# Failures in a row between two looks whether the stream is there at all: with pauses of half a second, four seconds.

_FIRST_LOOK = 2


class WriterStatistics(msgspec.Struct, frozen=True):
    """What was written into streams; counts since start."""

    records: int
    """Records that are stored."""

    messages: int
    """Messages in them."""

    retries: int
    """Attempts after the first at a record."""

    refused: int
    """Messages that were not taken, because the stream was full or for another reason of the server's."""

    abandoned: int
    """Messages of records of which it was never known whether they are stored."""

    waiting: int
    """Messages that are not known to be stored, now."""

    waiting_bytes: int


class Writer:
    """Writes postings into streams, those of each line in order.

    Args:
        transport: The connection.
        jetstream: The streams.
        room: How much may wait.
        unanswered: Tells of how many commands the result is awaited.
        sender: Id of this node, for the heads of records.
        reply: Where answers go.
        window: Seconds for which the streams recognise duplicates.
        draw_id: Gives ids of records: random, so that nobody can store another record under one first.
        clock: Monotonic seconds.
        rng: Jitter of the pauses.
    """

    def __init__(
        self,
        transport: Transport,
        jetstream: JetStream,
        room: Room,
        *,
        unanswered: Callable[[], int],
        sender: str,
        reply: str,
        window: float,
        draw_id: Callable[[], str],
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._jetstream = jetstream
        self._room = room
        self._unanswered = unanswered
        self._sender = sender
        self._reply = reply
        self._window = window
        self._draw_id = draw_id
        self._clock = clock
        self._rng = rng
        self._log = RareLog(logging.getLogger("catga_bus.durability"), clock)
        self._loop = asyncio.get_running_loop()
        self._bounds = Bounds(bytes=min(MAX_RECORD_BYTES, transport.max_payload // 2))
        self._lines: dict[tuple[str, int], Line] = {}
        self._working: dict[Line, asyncio.Task[None]] = {}  # lines with something to write; each task ends by itself
        self._holds = Holds(self._start, clock)
        self._denied: set[str] = set()  # subjects, since the connection came up
        self._nudge = asyncio.Event()  # set when it is worth trying again at once
        self._deadlines = Deadlines(self._end_late, clock)
        self._records = self._messages = self._retries = self._refused = self._abandoned = 0

    def line(self, stream: str, partition: int) -> Line:
        """Return the line of a partition."""
        line = self._lines.get((stream, partition))
        if line is None:
            line = self._lines[stream, partition] = Line(stream, self._bounds)
        return line

    def post(self, line: Line, posting: Posting) -> None:
        """Write a message as soon as it is its turn; its future is resolved in any case."""
        posting.line = line
        line.add(posting)
        room = self._room  # as `Room.take`, which is not called because every message comes here
        room.frames += 1
        room.bytes += len(posting.frame)
        if line not in self._working and len(line.waiting) >= line.wanted:
            self._start(line)
        if posting.deadline < self._deadlines.due:
            self._deadlines.watch(posting.deadline)

    def cancel(self, posting: Posting) -> None:
        """Whoever waited does no more: what was not written is not. Without effect if it has an end."""
        line = posting.line
        if posting.is_over or line is None:
            return
        before = line.bytes
        count = len(line)
        line.cancel(posting)
        self._room.give(count - len(line), before - line.bytes)

    def statistics(self) -> WriterStatistics:
        """Return the counts so far."""
        return WriterStatistics(
            records=self._records,
            messages=self._messages,
            retries=self._retries,
            refused=self._refused,
            abandoned=self._abandoned,
            waiting=self._room.frames,
            waiting_bytes=self._room.bytes,
        )

    # -- connection ----------------------------------------------------------------------------------------

    def reconnected(self) -> None:
        """The connection is back: try again now, within what this server takes."""
        self._bounds.bytes = min(MAX_RECORD_BYTES, self._transport.max_payload // 2)
        self._denied.clear()
        self._nudge.set()

    def denied(self, subject: str) -> None:
        """The server refuses a subject: end what waits for it."""
        self._denied.add(subject)
        for line in self._busy():
            held = [] if line.record is None else line.record.postings
            for posting in [*held, *line.waiting]:
                if posting.subject == subject and not posting.is_over:
                    self.cancel(posting)
                    endings.not_permitted(posting, subject)
        self._nudge.set()

    async def wait_idle(self) -> None:
        """Wait until nothing is left to write."""
        while True:
            self._holds.end_all()  # a line that has written may wait for more once again
            if not self._working:
                return
            await asyncio.wait(set(self._working.values()))

    async def close(self) -> None:
        """End what still waits; from then on nothing is taken."""
        self._deadlines.close()
        self._holds.close()
        self._room.close()
        tasks = list(self._working.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for line in self._lines.values():
            self._end_all(line, "the bus was closed before it was stored")

    # -- writing -------------------------------------------------------------------------------------------

    def _busy(self) -> list[Line]:
        """Return the lines in which something waits."""
        return [*self._working, *self._holds.lines()]

    def _start(self, line: Line) -> None:
        """Work on a line on which nobody works."""
        if line.wanted:
            self._holds.end(line)
        # The first step of the task comes after this turn of the loop: what it adds travels together.
        self._working[line] = self._loop.create_task(self._work(line))

    async def _work(self, line: Line) -> None:
        try:
            while True:
                if self._transport.is_behind:  # before a record is taken: what waits here can still be taken back
                    await self._transport.wait_writable()
                record = line.record or line.take(self._draw_id)
                if record is None:
                    break
                await self._attempt(line, record)
                if line.record is None and self._is_held(line):
                    break
        except Exception as error:  # nobody awaits this task before the end
            self._log.write(logging.ERROR, "broken", "%r cannot be written any more", line, error=error)
            self._end_all(line, f"it could not be written: {error!r}")
        finally:
            del self._working[line]

    def _is_held(self, line: Line) -> bool:
        """Have a line wait before its next record, if that is worth it."""
        on_way = max(self._unanswered(), self._room.frames)  # what waits to be stored may be in both
        wanted = worth_waiting_for(on_way, len(self._lines))
        if len(line.waiting) >= wanted:
            return False
        self._holds.hold(line, wanted)
        return True

    async def _attempt(self, line: Line, record: Record) -> None:
        if not self._transport.is_connected:
            await self._failed(line, record, JetStreamUnreachedError("there is no connection"), self._clock())
            return
        if not record.payload:
            record.payload = self._sealed(record)
        for posting in record.postings:
            posting.is_written = True
        self._retries += record.attempts > 0
        began = self._clock()
        try:
            ack = await self._jetstream.publish(
                record.subject, record.payload, message_id=record.id, timeout=_ATTEMPT_SECONDS
            )
        except (JetStreamUnknownError, JetStreamRefusedError) as error:
            await self._failed(line, record, error, began)
        except asyncio.CancelledError:
            record.attempts += 1  # it may have been written
            raise
        except CatgaError as error:
            code = Code.TOO_LARGE if isinstance(error, TooLargeError) else Code.DISCONNECTED
            self._refuse(line, code, str(error))
        else:
            if ack.duplicate and not record.attempts:
                self._alarm(line, record)
            else:
                self._stored(line, ack)

    def _sealed(self, record: Record) -> bytes:
        reply = self._reply if record.wants_answer else None
        frames = [posting.frame for posting in record.postings]
        return join_batch(Kind.MESSAGES, (self._sender, reply, record.number), frames)

    def _stored(self, line: Line, ack: PubAck) -> None:
        record = line.settle()
        line.failures, line.trouble = 0, ""
        self._records += 1
        self._messages += len(record.postings)
        self._room.give(len(record.postings), record.size)
        for index, posting in enumerate(record.postings):
            posting.stored = stored = Stored(ack.stream, ack.sequence, index, ack.duplicate)
            if posting.decode is None and not posting.is_over:
                posting.is_over = True
                if not posting.future.done():
                    posting.future.set_result(stored)

    def _alarm(self, line: Line, record: Record) -> None:
        """Somebody has stored something else under the id of this record, which was drawn at random: draw another."""
        self._log.write(
            logging.ERROR,
            "duplicate",
            "stream %s holds another record under the id %s, which was drawn just now: somebody forges record ids, or "
            "the random numbers of this machine are none. It is stored under another id.",
            line.stream,
            record.id,
        )
        self._put_back(line)

    async def _failed(
        self, line: Line, record: Record, error: JetStreamUnknownError | JetStreamRefusedError, began: float
    ) -> None:
        if record.subject in self._denied:
            self._refuse(line, Code.DISCONNECTED, f"the server does not permit {record.subject!r}")
            return
        what = after_failure(record, error, began, self._clock(), self._window)
        if what is Next.AGAIN or what is Next.ANEW:
            line.failures += 1
            line.trouble = str(error)
            if what is Next.ANEW:
                self._put_back(line)
            if isinstance(error, JetStreamUnreachedError) and await self._is_missing(line):
                self._lose(line)
                return
            await self._pause(line)
        elif what is Next.GIVE_UP:
            self._give_up(line)
        elif what is Next.TOO_LARGE:
            self._refuse(line, Code.TOO_LARGE, f"the stream {line.stream} takes no such size: {error}")
        elif what is Next.FULL:
            self._refuse(line, Code.OVERLOADED, f"the stream {line.stream} is full: {error}")
        else:
            self._refuse(line, Code.OVERLOADED, f"the stream {line.stream} has refused it: {error}")

    def _put_back(self, line: Line) -> None:
        record = line.record
        assert record is not None, "there is a record while an attempt fails"
        for posting in record.postings:
            posting.is_written = False
        over = [posting for posting in record.postings if posting.is_over]
        line.put_back()
        self._room.give(len(over), sum(len(posting.frame) for posting in over))

    async def _is_missing(self, line: Line) -> bool:
        if not self._transport.is_connected or line.failures % _LOOK_EVERY != _FIRST_LOOK:
            return False
        try:
            return await self._jetstream.stream(line.stream) is None
        except CatgaError:
            return False

    def _lose(self, line: Line) -> None:
        text = f"there is no stream {line.stream}: start a node of the service, or create it with `catga streams apply`"
        if line.record is not None:
            self._refuse(line, Code.NO_HANDLER, text)
        self._fail_waiting(line, Code.NO_HANDLER, text)

    def _give_up(self, line: Line) -> None:
        text = f"whether the stream {line.stream} has it could not be found out"
        record = line.settle()
        self._abandoned += len(record.postings)
        self._room.give(len(record.postings), record.size)
        _fail(record.postings, Code.TIMEOUT, Outcome.UNKNOWN, text)
        self._fail_waiting(line, Code.TIMEOUT, f"the stream {line.stream} has not answered for {self._window:g} s")

    def _refuse(self, line: Line, code: Code, text: str) -> None:
        record = line.settle()
        line.failures, line.trouble = 0, ""
        self._refused += len(record.postings)
        self._room.give(len(record.postings), record.size)
        outcome = Outcome.UNKNOWN if record.attempts else Outcome.NOT_RUN
        _fail(record.postings, code, outcome, text)
        size = line.bytes
        followers = line.take_followers(record.postings)
        self._room.give(len(followers), size - line.bytes)
        _fail(followers, code, Outcome.NOT_RUN, f"what was to be stored before it is not: {text}")

    def _end_all(self, line: Line, text: str) -> None:
        if line.record is not None:
            self._refuse(line, Code.DISCONNECTED, text)
        self._fail_waiting(line, Code.DISCONNECTED, text)

    def _fail_waiting(self, line: Line, code: Code, text: str) -> None:
        count, size = len(line), line.bytes
        left = line.clear()
        self._room.give(count - len(line), size - line.bytes)
        _fail(left, code, Outcome.NOT_RUN, text)

    async def _pause(self, line: Line) -> None:
        self._nudge.clear()
        try:
            async with asyncio.timeout(pause_after(line.failures, self._rng)):
                await self._nudge.wait()
        except TimeoutError:
            pass

    # -- time ----------------------------------------------------------------------------------------------

    def _end_late(self, now: float) -> float:
        due = math.inf
        for line in self._busy():
            size = line.bytes
            late = line.expire(now)
            self._room.give(len(late), size - line.bytes)
            for posting in late:
                endings.late(posting, is_connected=self._transport.is_connected, trouble=line.trouble)
            if line.record is not None:
                for posting in line.record.postings:
                    if posting.deadline <= now and posting.decode is None and not posting.is_over:
                        endings.late(posting, is_connected=self._transport.is_connected, trouble=line.trouble)
            due = min(due, line.due())
        return max(due, now + self._room.frames * _SWEEP_SECONDS_PER_MESSAGE)


def _fail(postings: Sequence[Posting], code: Code, outcome: Outcome, text: str) -> None:
    for posting in postings:
        endings.fail(posting, code, outcome, text)
