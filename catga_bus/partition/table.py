"""The partitions of one domain in one node: keeps in step with the plan.

It reads the records once, then plans whenever something changes: claims what nobody alive holds, asks living owners for
what should be its own, hands over what it is asked for. Every claim runs by itself, so many partitions are claimed at
once. What one node tells another is only a hint: the compare-and-set of the claim decides.
"""

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from catga_bus.clock import Clock
from catga_bus.partition.owners import Holding, Incarnation
from catga_bus.partition.plan import Plan
from catga_bus.partition.planner import Decision, Peer, Planner
from catga_bus.partition.protocol import MayClaim
from catga_bus.partition.records import OwnerRecord, StaleError, Standing
from catga_bus.rarely import RareLog
from catga_bus.transport.jetstream import JetStreamError
from catga_bus.wire import Notice, NoticeVerb

log = logging.getLogger("catga_bus.partition")

ASK_AGAIN = 0.25
"""Seconds between two questions for the same partition: a heartbeat interval, in which views become one."""

TRY_AGAIN = 0.25
"""Seconds until a partition is claimed again when the claim failed."""

READ_AGAIN = 1.0
"""Seconds after which a record is read again that names a living owner who does not say so: it may have released the
partition, and the notice was lost."""


class Kept(Protocol):
    """What the table needs from the keeper of a partition."""

    @property
    def epoch(self) -> int:
        """The present epoch; 0 before the first claim."""
        ...

    @property
    def standing(self) -> Standing:
        """How it stands."""
        ...

    async def take(self) -> None:
        """Claim it; returns when it is active.

        Raises:
            StaleError: Somebody else was faster.
        """

    async def hand_over(self) -> None:
        """Finish what has begun and release; nothing happens if it is gone."""

    def doubt(self, reason: str) -> None:
        """Start nothing until the record has been read."""

    def suspend(self) -> None:
        """The process was paused: start nothing until `revalidate` has found that the partition is still owned."""

    async def revalidate(self) -> None:
        """Read the record after a pause."""

    def reconnected(self) -> None:
        """The connection is back: deliveries may be lost."""

    async def close(self) -> None:
        """Let go at once, without a release."""


class TableStatistics(msgspec.Struct, frozen=True):
    """What a node has done about the partitions of a domain; counts since its start."""

    owned: int
    claims: int
    handed_over: int
    asked: int
    """Questions to living owners."""

    stale: int
    """Claims that somebody else was faster with."""


class Table:
    """The partitions of one domain.

    Args:
        domain: `cmd` or `evt`.
        planner: Decides.
        me: Id of this node.
        incarnation: Its present life.
        peers: Returns the nodes of the service, this one included.
        routed: Returns the types that every owner should know.
        read_all: Reads all records: by partition.
        read: Reads one.
        keep: Makes the keeper of a partition, given whom it may take it from and whom to tell when it stands otherwise.
        tell: Tells another node something.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        domain: str,
        planner: Planner,
        me: str,
        incarnation: Callable[[], Incarnation],
        *,
        peers: Callable[[], Sequence[Peer]],
        routed: Callable[[], Collection[str]],
        read_all: Callable[[], Coroutine[Any, Any, Mapping[int, Holding]]],
        read: Callable[[int], Coroutine[Any, Any, Holding | None]],
        keep: Callable[[int, MayClaim, Callable[[], None]], Kept],
        tell: Callable[[str, Notice], None],
        clock: Clock,
    ) -> None:
        self.domain = domain
        self._planner = planner
        self._me = me
        self._incarnation = incarnation
        self._peers = peers
        self._routed = routed
        self._read_all = read_all
        self._read = read
        self._keep = keep
        self._tell = tell
        self._clock = clock
        self._log = RareLog(log, clock)
        self._held: dict[int, Holding] = {}
        self._kept: dict[int, Kept] = {}
        self._busy: set[int] = set()  # partitions with a claim, a question to the bucket or a hand-over under way
        self._later: dict[int, float] = {}  # when a claim that failed may be tried again
        self._asked: dict[int, float] = {}
        self._disowned: dict[int, str] = {}  # who has said of a partition that it does not work on it
        self._doubted: dict[int, float] = {}  # when a record is read again that nobody confirms
        self._unread: set[int] = set()  # claimed here in vain: whose they are only their records know
        self._plan: Plan | None = None
        self._is_leaving = self._is_suspended = False
        self._is_connected = True
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._claims = self._handed_over = self._questions = self._stale = 0

    # -- what is known ---------------------------------------------------------------------------------------

    def epochs(self) -> dict[int, int]:
        """Return the partitions that this node works on, each with its epoch."""
        return {partition: kept.epoch for partition, kept in self._kept.items() if kept.standing is Standing.ACTIVE}

    @property
    def plan(self) -> Plan | None:
        """The last plan; None before the first."""
        return self._plan

    def kept(self) -> Mapping[int, Kept]:
        """Return the keepers of this node, for looking at."""
        return self._kept

    def statistics(self) -> TableStatistics:
        """Return the counts so far."""
        return TableStatistics(len(self.epochs()), self._claims, self._handed_over, self._questions, self._stale)

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to claim."""
        self._loop_task = asyncio.create_task(self._run())

    async def wait_settled(self) -> None:
        """Wait until the first plan has been carried out: all that was planned for this node is claimed, or failed."""
        await self._settled.wait()

    def wake(self) -> None:
        """Say that something has changed."""
        self._changed.set()

    def suspend(self) -> None:
        """The process was paused: read everything again before anything goes on."""
        self._is_suspended = True
        for kept in self._kept.values():
            kept.suspend()
        self._spawn(self._revalidate())

    async def _revalidate(self) -> None:
        await asyncio.gather(*(kept.revalidate() for kept in list(self._kept.values())))
        self._is_suspended = False
        self.wake()

    def disconnected(self) -> None:
        """The connection was lost."""
        self._is_connected = False

    def reconnected(self) -> None:
        """The connection is back."""
        self._is_connected = True
        for kept in list(self._kept.values()):
            kept.reconnected()
        self.wake()

    def departed(self, node: str) -> None:
        """A node has left or died: what it held may have been released, which only the bucket knows."""
        for partition in [partition for partition, holding in self._held.items() if holding.node == node]:
            self._look_again(partition)
        self.wake()

    async def leave(self) -> None:
        """Claim nothing more; finish and release everything, and tell those who should own it next."""
        self._is_leaving = True
        heirs = self._decide().plan.owners
        await asyncio.gather(
            *(self._give_to(partition, heirs[partition] or self._me) for partition in list(self._kept))
        )

    async def close(self) -> None:
        """End; what is owned is neither finished nor released."""
        self._is_leaving = True
        tasks = {task for task in (self._loop_task, *self._tasks) if task is not None}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(kept.close() for kept in self._kept.values()))
        self._kept.clear()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.write(logging.ERROR, "task", "a task of the partitions failed", error=error)

    # -- plan ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        await self._load()
        while True:
            self._changed.clear()
            due = self._step()
            try:
                async with asyncio.timeout(max(0.01, min(due - self._clock(), _LOOK_SECONDS))):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _load(self) -> None:
        while True:
            try:
                self._held.update(await self._read_all())
            except JetStreamError as error:
                self._log.warn("load", "the owners of the partitions cannot be read yet: %s", error)
                await asyncio.sleep(TRY_AGAIN)
            else:
                return

    def _step(self) -> float:
        """Do what the plan says now; return when time alone may change it."""
        if self._is_leaving or self._is_suspended or not self._is_connected:
            return math.inf
        now = self._clock()
        decision = self._decide()
        self._plan, steps, due = decision.plan, decision.steps, decision.due
        for partition in steps.claim:
            later = self._later.get(partition, 0.0)
            if partition in self._busy:
                continue
            if now < later:
                due = min(due, later)
                continue
            self._busy.add(partition)
            self._spawn(self._claim(partition))
        for owner, partitions in steps.ask.items():
            due = min(due, self._ask(now, owner, partitions))
        self._doubt_records(now)
        for partition in steps.doubt:
            self._kept[partition].doubt("a higher epoch was heard")
        if not steps.claim and not self._busy:
            self._settled.set()
        return due

    def _decide(self) -> Decision:
        owned = {
            partition: kept.epoch for partition, kept in self._kept.items() if kept.standing is not Standing.CLAIMING
        }
        return self._planner.decide(self._clock(), self._peers(), self._held, owned, self._routed())

    def _ask(self, now: float, owner: str, partitions: Sequence[int]) -> float:
        fresh = [partition for partition in partitions if now >= self._asked.get(partition, 0.0)]
        if fresh:
            self._questions += len(fresh)
            self._asked.update(dict.fromkeys(fresh, now + ASK_AGAIN))
            self._tell(owner, Notice(self.domain, NoticeVerb.ASK, fresh))
        return min(self._asked[partition] for partition in partitions)

    def _doubt_records(self, now: float) -> None:
        """Read again what names a living owner who does not say so, and what was claimed here in vain."""
        announced = {peer.id: peer.epochs for peer in self._peers() if peer.is_live and peer.id != self._me}
        doubted = {
            partition
            for partition, holding in self._held.items()
            if holding.node in announced and partition not in announced[holding.node]
        }
        doubted |= self._unread
        self._doubted = {partition: self._doubted.get(partition, now + READ_AGAIN) for partition in doubted}
        for partition in [partition for partition, due in self._doubted.items() if now >= due]:
            del self._doubted[partition]
            self._look_again(partition)

    async def _claim(self, partition: int) -> None:
        try:
            if not await self._is_free(partition):
                return
            kept = self._kept[partition] = self._keep(
                partition, functools.partial(self._may_claim, partition), self._on_change
            )
            await kept.take()
            self._claims += 1
            self._disowned.pop(partition, None)
            self._held[partition] = Holding(self._me, kept.epoch, self._incarnation())
        except StaleError:
            self._stale += 1
            self._failed(partition)
        except JetStreamError as error:
            self._log.warn("claim", "%s: partition %d cannot be claimed: %s", self.domain, partition, error)
            self._failed(partition)
        finally:
            self._busy.discard(partition)
            self.wake()

    def _failed(self, partition: int) -> None:
        """A claim was in vain: the record may name this node all the same, and then no other one will claim it."""
        self._later[partition] = self._clock() + TRY_AGAIN
        self._unread.add(partition)
        self._forget(partition)

    async def _is_free(self, partition: int) -> bool:
        """Read the record; whether nobody alive holds it."""
        holding = await self._read(partition)
        self._unread.discard(partition)
        if holding is None:
            self._held.pop(partition, None)
            return True
        if self._is_disowned(partition, holding):
            holding = Holding(None, holding.epoch)
        self._held[partition] = holding
        return self._planner.may_be_claimed(self._clock(), holding, self._peers())

    def _may_claim(self, partition: int, record: OwnerRecord) -> bool:
        """Whether a record that a claim has just read leaves the partition to this node."""
        holding = Holding(record.node if record.state == "owned" else None, record.epoch, record.incarnation)
        if self._is_disowned(partition, holding):
            return True
        return self._planner.may_be_claimed(self._clock(), holding, self._peers())

    def _is_disowned(self, partition: int, holding: Holding) -> bool:
        """Whether the owner that a record names has said that it does not own it, and nothing else since.

        It knows nothing of a claim whose answer it never got, and of a release that the server has lost.
        """
        node = self._disowned.get(partition)
        return (
            node is not None
            and node == holding.node
            and not any(peer.id == node and partition in peer.epochs for peer in self._peers())
        )

    def _look_again(self, partition: int) -> None:
        if partition not in self._busy and partition not in self._kept:
            self._busy.add(partition)
            self._spawn(self._read_again(partition))

    async def _read_again(self, partition: int) -> None:
        try:
            await self._is_free(partition)
        except JetStreamError:
            pass  # a claim reads it again
        finally:
            self._busy.discard(partition)
            self.wake()

    def _on_change(self) -> None:
        """A keeper stands otherwise than before."""
        for partition in [partition for partition, kept in self._kept.items() if kept.standing is Standing.GONE]:
            self._forget(partition)
            self._look_again(partition)
        self.wake()

    def _forget(self, partition: int) -> None:
        kept = self._kept.pop(partition, None)
        if kept is not None:
            self._spawn(kept.close())

    # -- between nodes ---------------------------------------------------------------------------------------

    def on_notice(self, sender: str, notice: Notice) -> None:
        """Another node tells something."""
        partitions = [partition for partition in notice.partitions if partition < self._planner.partitions]
        if notice.verb == NoticeVerb.ASK:
            self._asked_by(sender, partitions)
        elif notice.verb in (NoticeVerb.GIVEN, NoticeVerb.NOT_MINE):
            for partition in partitions:
                self._asked.pop(partition, None)
                self._disowned.pop(partition, None)
                if notice.verb == NoticeVerb.NOT_MINE:
                    self._disowned[partition] = sender
                self._look_again(partition)

    def _asked_by(self, sender: str, partitions: Sequence[int]) -> None:
        plan = self._plan
        if plan is None:
            return
        foreign = [partition for partition in partitions if partition not in self._kept and partition not in self._busy]
        if foreign:
            self._tell(sender, Notice(self.domain, NoticeVerb.NOT_MINE, foreign))
        for partition in partitions:
            kept = self._kept.get(partition)
            if kept is None or kept.standing is not Standing.ACTIVE or partition in self._busy:
                continue
            if plan.agrees(partition, self._me, sender):
                self._busy.add(partition)
                self._spawn(self._give_to(partition, sender))

    async def _give_to(self, partition: int, target: str) -> None:
        try:
            kept = self._kept.get(partition)
            if kept is not None:
                await kept.hand_over()
                self._handed_over += 1
                self._kept.pop(partition, None)
                self._held[partition] = Holding(None, kept.epoch + 1)
                self._tell(target, Notice(self.domain, NoticeVerb.GIVEN, [partition]))
                await kept.close()
        finally:
            self._busy.discard(partition)
            self.wake()


_LOOK_SECONDS = 1.0  # a plan is looked at this often although nothing seems to have changed
