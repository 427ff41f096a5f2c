"""The work of the simulation: handlers that take time, fail now and then, and write to a store that checks fences.

Its contract is `catga_bus.partition.work.Work`. Order comes from the product's lanes, effects go to its store.
"""

import asyncio
import contextlib
from typing import Any, Protocol

import msgspec

from catga_bus.durability.inbox.base import FencedError
from catga_bus.effects import Fence
from catga_bus.errors import CatgaError
from catga_bus.partition.lanes import Frame, Lanes, Record
from catga_bus.partition.work import Keeping
from catga_bus.transport.jetstream import DeliveredMessage
from catga_bus.wire import MessageFrame
from tests.ownership.process import Process
from tests.ownership.store import Store

FAILED = 0.02
"""Seconds until what failed is tried again."""


class Job(Frame):
    """A message at work."""

    is_doomed: bool = False
    fence: Fence | None = None


class Told(Protocol):
    """Who is told of what happens."""

    def begun(self, work: "Work", job: Job) -> None:
        """A handler starts."""

    def effected(self, work: "Work", job: Job) -> None:
        """An effect was accepted."""

    def buried(self, work: "Work", job: Job) -> None:
        """A dead letter was stored."""


class Habits(Protocol):
    """How handlers behave."""

    killers: set[str]
    """Messages that kill their process, by id."""

    store: Store
    told: Told
    window: int

    def duration(self) -> float:
        """Return how long a handler takes, in seconds."""
        ...

    def fails(self) -> bool:
        """Return whether it fails."""
        ...


def frames_of(payload: bytes) -> list[tuple[str, str]]:
    """Return key and id of the messages of a record: `key-number` each, with blanks between."""
    return [(each.rpartition("-")[0], each) for each in payload.decode().split()]


class Work:
    """The work of one tenure.

    Args:
        process: Where it is done.
        habits: How.
        keeping: The keeper.
        look: Looks whether the process was paused.
    """

    def __init__(self, process: Process, habits: Habits, keeping: Keeping, look: Any) -> None:
        self.process = process
        self.keeping = keeping
        self._habits = habits
        self._look = look
        self._lanes: Lanes[Job] = Lanes(max_frames=habits.window)
        self._ready: list[Job] = []
        self._current: Job | None = None  # the one that is marked
        self._running = 0
        self._is_open = self._is_finishing = False
        self._emptied = asyncio.Event()

    # -- what the keeper asks --------------------------------------------------------------------------------

    @property
    def wanted(self) -> int:
        """For how many more records there is room."""
        return 0 if self._is_finishing else min(self._lanes.wanted, self._habits.window)

    @property
    def highest(self) -> int:
        """The highest sequence begun or done."""
        return self._lanes.highest

    def holds(self, sequence: int) -> bool:
        """Whether a record is in hand."""
        return sequence in self._lanes.records

    def take(self, record: DeliveredMessage, *, killer: int | None = None) -> None:
        """Take a record."""
        if self._is_finishing:
            return
        held = Record(record, "sender", None, [], 0)
        for index, (key, message_id) in enumerate(frames_of(record.payload)):
            message = MessageFrame(message_id, "Debit", key, None, 1, None, msgspec.Raw(b"\xc0"))
            held.frames.append(Job(held, index, message, key, is_doomed=killer == index))
        held.left = len(held.frames)
        self._ready += self._lanes.take(held)
        self._go()

    def pause(self) -> None:
        """Start nothing more."""
        self._is_open = False

    def resume(self) -> None:
        """Go on."""
        self._is_open = True
        self._go()

    async def finish(self, *, below: bool) -> None:
        """Finish what has begun."""
        self._is_finishing = True
        self._let_go(self._lanes.finish(below=below))
        while self._lanes.records:
            self._emptied.clear()
            await self._emptied.wait()
        self._is_finishing = False
        self.pause()

    def drop(self) -> None:
        """Forget everything."""
        self.pause()
        self._let_go(self._lanes.drop())
        self._is_finishing = False
        self._emptied.set()

    def _let_go(self, jobs: list[Job]) -> None:
        self._ready = [job for job in self._ready if not job.record.lost]

    # -- jobs ------------------------------------------------------------------------------------------------

    def _go(self) -> None:
        if not self._is_open:
            return
        if self.keeping.is_careful:
            if self._current is None and not self._running and self._ready:
                job = min(self._ready, key=lambda each: (each.record.sequence, each.index))
                self._ready.remove(job)
                self._current = job
                self.process.spawn(self._run_marked(job))
            return
        ready, self._ready = self._ready, []
        for job in ready:
            self._running += 1
            self.process.spawn(self._run(job))

    async def _run_marked(self, job: Job) -> None:
        try:
            await self.keeping.mark(job.record.sequence, job.index)
        except CatgaError:
            await self._put_off(job)
        else:
            self._running += 1
            await self._run(job)
            with contextlib.suppress(CatgaError):  # the next mark takes its place
                await self.keeping.unmark()
        self._current = None
        self._go()

    async def _put_off(self, job: Job) -> None:
        await asyncio.sleep(FAILED)
        if not job.record.lost:
            self._ready.append(job)
            self._go()

    async def _run(self, job: Job) -> None:
        await self.process.point("begin")
        self._look()
        if job.record.lost or not self._is_open:
            self._running -= 1
            if not job.record.lost:
                self._ready.append(job)
                self._go()
            return
        self._lanes.begin(job)
        job.fence = self.keeping.fence
        is_done = await self._execute(job)
        self._running -= 1
        if is_done or job.record.lost:
            self._end(job)
        else:
            await self._put_off(job)

    async def _execute(self, job: Job) -> bool:
        """Run a job; return whether it is done."""
        habits, message_id = self._habits, job.message.id
        assert job.fence is not None
        if job.is_doomed:
            habits.told.buried(self, job)
            await self.process.point("buried")
            return True
        if habits.store.find(message_id):
            return True
        habits.told.begun(self, job)
        if message_id in habits.killers:
            self.process.kill()
            self.process.reach("killer")
        await asyncio.sleep(habits.duration())
        if habits.fails():
            return False
        return await self._commit(job)

    async def _commit(self, job: Job) -> bool:
        assert job.fence is not None
        await self.process.point("before commit")
        outcome = self._habits.store.commit(job.message.id, job.fence)
        if isinstance(outcome, FencedError):
            if not job.record.lost and self.keeping.fence.epoch <= job.fence.epoch:
                self.keeping.lost()
            return False
        if outcome:
            self._habits.told.effected(self, job)
        await self.process.point("after commit")
        return True

    def _end(self, job: Job) -> None:
        record = job.record
        following = self._lanes.end(job)
        if following is not None:
            self._ready.append(following)
        if not record.left and not record.lost:
            self.keeping.done(record.sequence)
            if not self._lanes.records:
                self._emptied.set()
        self._go()
