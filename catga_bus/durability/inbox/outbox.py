"""The outbox: messages that were committed with an effect are published, in order, until they are known to be stored.

    unit.send(outbound) ... await unit.commit(result)        # committed together
    relay.send(fence, unit.outbound)                         # at once, in this process
    relay.take_over(fence)                                   # or by the next owner of the partition, when it claims it

Published if and only if committed; in the order of the commits for each subject and partition; a crash at any step
repeats at most what carries the same ids, which receivers recognise.

Decided: one batch per subject is on its way at a time, because a batch that failed must not be overtaken by the next.
Nothing waits for the relay: a queue that is full because of this very node could not be emptied otherwise. What it
cannot keep in memory stays in the store.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

from catga_bus.clock import Clock
from catga_bus.durability.inbox.base import FencedError, Inbox
from catga_bus.effects import Fence, Outbound
from catga_bus.errors import CatgaError
from catga_bus.rarely import RareLog
from catga_bus.resilience.retry import RetryOptions, pause_before

MAX_BATCH = 256
"""Messages of one subject that are on their way together; a record has as many at most."""

MAX_WAITING = 1_024
"""Messages of one partition that wait in memory; what is committed beyond them is read from the store when it is its
turn."""

PAUSES = RetryOptions(first=0.05, longest=5.0)
"""The pauses after a batch that failed, by default."""

_MARKED_AFTER = 0.05
# Seconds until what is stored is forgotten in the store: until then a crash publishes it again, which costs nothing but
# the publishing; sooner, each message would cost a transaction of its own.


class Source:
    """A partition whose executions send, and what of it waits in memory."""

    __slots__ = ("fence", "has_skipped", "is_behind", "is_dropped", "waiting")

    def __init__(self, fence: Fence) -> None:
        self.fence = fence
        self.waiting = 0
        self.is_dropped = False
        self.is_behind = False
        """Whether the store has more than what waits here, so that new messages must not pass it."""

        self.has_skipped = False
        """Whether messages were left to the store since it was last read."""


class Line:
    """What is to be published to one subject, in order. Pure."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Source, Outbound]] = deque()
        self._away: list[tuple[Source, Outbound]] = []
        self.failures = 0
        """Batches in a row of which something failed."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._away)

    def add(self, source: Source, outbound: Outbound) -> None:
        """Put a message at the end."""
        self._waiting.append((source, outbound))
        source.waiting += 1

    def take(self, limit: int) -> list[Outbound]:
        """Return the next batch; the last one must have been settled. Empty: there is nothing to do."""
        assert not self._away, "one batch is on its way at a time"
        while self._waiting and len(self._away) < limit:
            source, outbound = self._waiting.popleft()
            if source.is_dropped:
                source.waiting -= 1
            else:
                self._away.append((source, outbound))
        return [outbound for _, outbound in self._away]

    def settle(self, is_stored: Sequence[bool]) -> tuple[list[Outbound], bool]:
        """Say which messages of the batch are stored.

        The first that is not stored and all after it go back to the front: in doubt a message is published twice, and
        none before one that it has to follow.

        Returns:
            What is done with, and whether something failed.
        """
        away, self._away = self._away, []
        count = is_stored.index(False) if False in is_stored else len(away)
        done, back = away[:count], away[count:]
        for source, _ in done:
            source.waiting -= 1
        self._waiting.extendleft(reversed(back))
        self.failures = self.failures + 1 if back else 0
        return [outbound for _, outbound in done], bool(back)


class Relay:
    """Publishes what was committed for sending.

    Args:
        inbox: Where it is committed.
        service: Of this node.
        publish: Stores a message in its stream and returns when that is certain. Calls for one subject are stored in
            their order; if one fails, those that were made after it and are not stored yet fail, too. The same
            message may be given to it again.
        clock: Monotonic seconds.
        chance: Random numbers from 0 to 1, for pauses.
        pauses: After failures.
    """

    def __init__(
        self,
        inbox: Inbox,
        service: str,
        publish: Callable[[Outbound], Awaitable[object]],
        *,
        clock: Clock,
        chance: Callable[[], float],
        pauses: RetryOptions = PAUSES,
    ) -> None:
        self._inbox = inbox
        self._service = service
        self._publish = publish
        self._chance = chance
        self._pauses = pauses
        self._log = RareLog(logging.getLogger("catga_bus.durability"), clock)
        self._sources: dict[tuple[str, int], Source] = {}
        self._lines: dict[str, Line] = {}
        self._readers: dict[Source, asyncio.Task[None]] = {}  # one per partition that is behind
        self._working: dict[str, asyncio.Task[None]] = {}  # one per subject with something to publish
        self._stored: list[str] = []  # ids that the store may forget
        self._marking: asyncio.Task[None] | None = None
        self._waiting = 0
        self._progress = asyncio.Event()  # set whenever something was done with, and made anew
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """Messages that wait in memory for being stored in their streams."""
        return self._waiting

    @property
    def behind(self) -> int:
        """Partitions of which more waits, in the store."""
        return len(self._readers)

    def send(self, fence: Fence, outbound: Iterable[Outbound]) -> None:
        """Publish what an execution in a partition has committed; call it in the order of the commits.

        What comes with an epoch that was dropped or replaced is left to whoever owns the partition now.
        """
        key = (fence.domain, fence.partition)
        source = self._sources.get(key)
        if source is None or source.fence.epoch < fence.epoch:
            source = self._sources[key] = Source(fence)
        if source.fence != fence or source.is_dropped or self._is_closed:
            return
        for message in outbound:
            if source.is_behind or source.waiting >= MAX_WAITING:
                source.has_skipped = True
                self._fall_behind(source)
            else:
                self._add(source, message)

    def take_over(self, fence: Fence) -> None:
        """Begin to publish what former owners of a partition have committed and not published.

        Call it when the partition is claimed, before anything runs in it: what is sent from then on is published after
        that. The first look into the store raises the fence, so that nothing a former owner commits later is missed. If
        it turns out that another node owns the partition, nothing of it is published here.
        """
        self.drop(fence)
        source = self._sources[fence.domain, fence.partition] = Source(fence)
        self._fall_behind(source)

    async def flush(self, fence: Fence) -> None:
        """Return when nothing of a partition waits, and the store knows it: before the partition is handed over.

        Bound it with a time-out: what is left is published by the next owner.

        Raises:
            InboxError: The store cannot be written.
        """
        source = self._sources.get((fence.domain, fence.partition))
        if source is not None:
            await self._until(lambda: source.is_dropped or not (source.waiting or source.is_behind))
        await self._mark()

    def drop(self, fence: Fence) -> None:
        """Publish no more of a partition: it is another node's."""
        source = self._sources.get((fence.domain, fence.partition))
        if source is not None and source.fence.epoch <= fence.epoch:
            source.is_dropped = True
            self._tell()

    async def close(self) -> None:
        """Stop; what is not known to be stored is published by the next owner."""
        self._is_closed = True
        tasks = [*self._working.values(), *self._readers.values()]
        if self._marking is not None:
            tasks.append(self._marking)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tell()
        try:
            await self._mark()
        except CatgaError as error:
            self._log.warn("mark", "the outbox of %s could not be cleared: %s", self._service, error)

    def _fall_behind(self, source: Source) -> None:
        if not source.is_behind:
            source.is_behind = True
            self._readers[source] = asyncio.get_running_loop().create_task(self._catch_up(source))

    async def _catch_up(self, source: Source) -> None:
        """Publish what the store has, page after page, until there is no more."""
        failures = 0
        try:
            while True:
                await self._until(lambda: source.is_dropped or not source.waiting)
                if source.is_dropped or self._is_closed:
                    return
                try:
                    if not await self._read_page(source):
                        return
                    failures = 0
                except FencedError:
                    source.is_dropped = True
                except CatgaError as error:
                    failures += 1
                    self._log.warn("read", "the outbox of %s cannot be read: %s", self._service, error)
                    await asyncio.sleep(pause_before(failures, self._pauses, self._chance()))
        finally:
            source.is_behind = False
            del self._readers[source]
            self._tell()

    async def _read_page(self, source: Source) -> bool:
        """Take the next messages from the store; return whether there may be more."""
        source.has_skipped = False
        await self._mark()
        page = await self._inbox.unsent(self._service, source.fence, MAX_BATCH)
        for message in page:
            self._add(source, message)
        return bool(page) or source.has_skipped

    def _add(self, source: Source, message: Outbound) -> None:
        line = self._lines.get(message.subject)
        if line is None:
            line = self._lines[message.subject] = Line()
        line.add(source, message)
        self._waiting += 1
        if message.subject not in self._working:
            task = asyncio.get_running_loop().create_task(self._work(message.subject, line))
            self._working[message.subject] = task

    async def _work(self, subject: str, line: Line) -> None:
        try:
            while True:
                before = len(line)
                batch = line.take(MAX_BATCH)
                self._left(before - len(line))
                if not batch:
                    return
                await self._send_batch(subject, line, batch)
        finally:
            del self._working[subject], self._lines[subject]

    async def _send_batch(self, subject: str, line: Line, batch: list[Outbound]) -> None:
        results = await asyncio.gather(*map(self._publish, batch), return_exceptions=True)
        done, has_failed = line.settle([not isinstance(result, BaseException) for result in results])
        self._stored += [message.message_id for message in done]
        self._left(len(done))
        if done and self._marking is None:
            self._marking = asyncio.get_running_loop().create_task(self._mark_soon())
        if has_failed:
            error = next(result for result in results if isinstance(result, BaseException))
            self._log.warn("publish", "the outbox: %s is not stored yet, it is tried again: %s", subject, error)
            await asyncio.sleep(pause_before(line.failures, self._pauses, self._chance()))

    async def _mark_soon(self) -> None:
        try:
            while self._stored:
                await asyncio.sleep(_MARKED_AFTER)
                try:
                    await self._mark()
                except CatgaError as error:
                    self._log.warn("mark", "the outbox of %s cannot be cleared: %s", self._service, error)
        finally:
            self._marking = None

    async def _mark(self) -> None:
        stored, self._stored = self._stored, []
        try:
            await self._inbox.sent(self._service, stored)
        except BaseException:
            self._stored = stored + self._stored
            raise

    def _left(self, count: int) -> None:
        if count:
            self._waiting -= count
            self._tell()

    def _tell(self) -> None:
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds() and not self._is_closed:
            await self._progress.wait()
