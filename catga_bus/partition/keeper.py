"""Keeps one partition: claims it, has its records delivered, acknowledges what is done, gives it away. The thin shell.

`protocol` says what to ask the broker, `tenure` what follows from what happens; the work does what is to be done.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from catga_bus.clock import Clock
from catga_bus.partition.broker import Broker, Owners
from catga_bus.partition.protocol import Claimed, MayClaim, Ownership, Party
from catga_bus.partition.records import Domain, Held, Mark, OwnerRecord, StaleError, Standing
from catga_bus.partition.tenure import Do, Tenure
from catga_bus.partition.work import Fence, Keeping, Work
from catga_bus.rarely import RareLog
from catga_bus.transport.jetstream import (
    Consumption,
    DeliveredMessage,
    JetStream,
    JetStreamError,
    JetStreamUnknownError,
)

log = logging.getLogger("catga_bus.partition")

IDLE: Final = 2.0
"""Seconds between two words of a server that has nothing to deliver."""

SILENCE: Final = 2.5 * IDLE
"""Seconds without a word after which the consumer is in doubt: two words were missed."""

CALM: Final = 1.0
FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 2.0
"""A partition that is in doubt again within `CALM` of its claim waits before the next, twice as long each time."""

CONFIRM_PAUSE: Final = 0.05
MAX_SILENCES: Final = 3
"""How often a server that answers questions may leave an acknowledgement without its confirmation."""


class KeeperStatistics(msgspec.Struct):
    """What has happened to the partitions of a domain in this process; counts since its start."""

    takeovers: int = 0
    """Claims on what another node, or a former life of this one, had not released."""

    claims: int = 0
    """All others that began a tenure."""

    reclaims: int = 0
    """New epochs of partitions that were owned already."""

    hand_overs: int = 0
    stale: int = 0
    """Claims, and tenures, that ended because another node owns the partition."""

    doubts: Counter[str] = msgspec.field(default_factory=Counter)
    """By their reason."""

    repeated: int = 0
    """Records that were delivered again while in hand, or after they were done; none of them ran twice."""

    killers: int = 0
    """Frames that were found to have killed their process."""


def _always(_record: object) -> bool:
    return True


class Keeper:
    """Keeps one partition of a domain, for one tenure.

    Args:
        jetstream: Where its records lie.
        owners: The bucket with the owners.
        domain: Of the partition.
        partition: Which.
        party: This node: id, incarnation, nonces, and where the revisions of a new bucket begin.
        work: Makes what is done with its records, given this keeper.
        clock: Monotonic seconds.
        may_claim: Whether the partition may be taken from whom its record names; asked after the record was read.
        on_change: Called when it stands otherwise than before.
        look: Called before anything that comes late may be taken as new: whoever watches for pauses of this process
            looks now, and calls `suspend` if there was one.
        statistics: Where to count; shared by the keepers of a domain.
    """

    def __init__(
        self,
        jetstream: JetStream,
        owners: Owners,
        domain: Domain,
        partition: int,
        party: Party,
        work: Callable[[Keeping], Work],
        *,
        clock: Clock,
        may_claim: MayClaim = _always,
        on_change: Callable[[], None] = lambda: None,
        look: Callable[[], None] = lambda: None,
        statistics: KeeperStatistics | None = None,
    ) -> None:
        self.partition = partition
        self.statistics = statistics if statistics is not None else KeeperStatistics()
        self.tenure = Tenure(domain.window)
        self.work = work(self)
        self._jetstream = jetstream
        self._domain = domain
        self._party = party
        self._ownership = Ownership(party, domain, partition)
        self._gone = asyncio.Event()
        self._broker = Broker(jetstream, owners, domain, partition, self._pull, self._gone.is_set)
        self._clock = clock
        self._may_claim = may_claim
        self._on_change = on_change
        self._look = look
        self._log = RareLog(log, clock)
        self._turn = asyncio.Lock()  # one conversation with the broker at a time
        self._consumption: Consumption | None = None
        self._number = 0  # of the consumption: what an old one delivers is not looked at
        self._granted_at = self._made_at = 0.0
        self._restless = 0
        self._silence: asyncio.TimerHandle | None = None
        self._is_takeover = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Future[None]] = set()

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def standing(self) -> Standing:
        """How it stands."""
        return self.tenure.standing

    @property
    def epoch(self) -> int:
        """The present epoch; 0 before the first claim."""
        return self.tenure.epoch

    @property
    def fence(self) -> Fence:
        """What effects carry: the partition and an epoch of this tenure, as a rule its first."""
        return Fence(self.partition, self.tenure.fence, self._domain.kind)

    @property
    def is_careful(self) -> bool:
        """Whether frames are run one at a time."""
        return self.tenure.is_careful

    @property
    def held(self) -> Held | None:
        """The record as this keeper has written it last."""
        return self.tenure.held

    # -- beginning and end -----------------------------------------------------------------------------------

    async def take(self) -> None:
        """Claim the partition, and return when it is active.

        While outcomes are unknown it goes on trying; who calls cancels it when that takes too long.

        Raises:
            StaleError: Somebody else was faster, or owns it and may not be robbed.
            JetStreamError: The server will not have it.
        """
        try:
            async with self._turn:
                claimed = await self._broker.drive(self._ownership.claim(self._may_take, self.tenure.above))
                self._grant(claimed)
        except BaseException as error:
            self.statistics.stale += isinstance(error, StaleError)
            self._end("the claim failed")
            await self._stop_pulling()
            raise
        if self._is_takeover:
            self.statistics.takeovers += 1
        else:
            self.statistics.claims += 1
        self._on_change()

    def _may_take(self, record: OwnerRecord) -> bool:
        self._is_takeover = record.state == "owned"
        return self._may_claim(record)

    def _grant(self, claimed: Claimed) -> None:
        self._granted_at = self._clock()
        self._do(self.tenure.granted(claimed))
        if self.standing is Standing.GONE:
            raise StaleError(f"partition {self.partition} was let go while it was claimed")

    async def hand_over(self, timeout: float | None = None) -> None:
        """Stop pulling, finish what has begun, confirm it, release; nothing happens if it is gone.

        Args:
            timeout: Seconds after which what still runs is left to the successor, which runs it again; None: never.
        """
        action = await self._begin_hand_over()
        if action is not Do.FINISH:
            if self.standing is Standing.DRAINING:
                await self._gone.wait()
            return
        try:
            async with asyncio.timeout(timeout):
                await self.work.finish(below=self._domain.is_log)
        except TimeoutError:
            self.work.drop()
        async with self._turn:
            await self._release()

    async def _begin_hand_over(self) -> Do:
        """Stop pulling; a claim that is under way comes to its end first."""
        while True:
            async with self._turn:
                action = self.tenure.hand_over()
                if action is Do.FINISH:
                    self._on_change()
                    await self._stop_pulling()
            if self.standing is not Standing.DOUBT:
                return action
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Let go at once, without a release. What runs ends unacknowledged."""
        self._end("closed")
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stop_pulling()
        await asyncio.gather(*self._closings)

    # -- what happens ----------------------------------------------------------------------------------------

    def doubt(self, reason: str) -> None:
        """Start nothing until the record has been read."""
        self._do(self.tenure.doubt(reason))

    def heard(self, epoch: int) -> None:
        """Another node says that it owns the partition, with this epoch."""
        self._do(self.tenure.heard(epoch))

    def reconnected(self) -> None:
        """The connection was lost and is back."""
        self._do(self.tenure.reconnected())

    def suspend(self) -> None:
        """The process was paused: start nothing until `revalidate` has found that the partition is still owned."""
        self._do(self.tenure.suspend())

    async def revalidate(self) -> None:
        """Read the record after a pause, and go on or let go."""
        if self.standing is Standing.GONE:
            return
        async with self._turn:
            pauses = self.tenure.pauses
            try:
                found = await self._broker.drive(self._ownership.read(self.epoch))
            except (StaleError, JetStreamError) as error:
                self._drop(f"the record cannot be read: {error}")
            else:
                self._do(self.tenure.reread(found, pauses))

    # -- what the work says ----------------------------------------------------------------------------------

    def done(self, sequence: int) -> None:
        """A record is done: acknowledge it."""
        reply = self.tenure.finished(sequence)
        if reply:
            self._jetstream.acknowledge(reply)
            self._refill()

    def lost(self, epoch: int = 0) -> None:
        """The store's fence refused an effect.

        Args:
            epoch: The highest that the store has seen, if it says.
        """
        self._do(self.tenure.fenced(epoch))

    async def mark(self, sequence: int, index: int) -> None:
        """Write down which frame is about to start.

        Raises:
            StaleError: The partition is somebody else's.
            JetStreamRefusedError: The server will not have it.
        """
        await self._amend(Mark(sequence, index))

    async def unmark(self) -> None:
        """Write down that the marked frame has ended."""
        await self._amend(None)

    async def _amend(self, mark: Mark | None) -> None:
        async with self._turn:
            tenure = self.tenure
            claimed, held = tenure.claimed, tenure.held
            if tenure.standing is Standing.GONE or claimed is None or held is None:
                raise StaleError(f"partition {self.partition} is not owned any more")
            try:
                tenure.held = await self._broker.drive(
                    self._ownership.amend(claimed, held, mark=mark, floor=tenure.floor if self._domain.is_log else 0)
                )
            except StaleError as error:
                self._drop(str(error))
                raise

    # -- deliveries ------------------------------------------------------------------------------------------

    async def _pull(self, consumer: str, killer: Mark | None) -> None:
        await self._stop_pulling()
        self._number = number = self._number + 1
        self.tenure.pulling(killer)
        self._made_at = self._clock()
        self._consumption = await self._jetstream.consume(
            self._domain.stream,
            consumer,
            lambda record: self._delivered(number, record),
            lambda code, text: self._said(number, code, text),
            idle=IDLE,
        )
        self._refill()
        self._listen()

    async def _stop_pulling(self) -> None:
        self._number += 1
        if self._silence is not None:
            self._silence.cancel()
        consumption, self._consumption = self._consumption, None
        if consumption is not None:
            closing = asyncio.ensure_future(consumption.close())
            self._closings.add(closing)
            closing.add_done_callback(self._closings.discard)
            await asyncio.shield(closing)  # whoever is cancelled here leaves no consumption behind

    def _refill(self) -> None:
        """Ask for as much as there is room for, once half of it has come."""
        consumption = self._consumption
        if consumption is not None:
            wanted, credit = self.work.wanted + self.tenure.returning, consumption.credit
            if credit <= wanted // 2 and wanted:
                consumption.pull(wanted - credit)

    def _delivered(self, number: int, record: DeliveredMessage) -> None:
        if number != self._number:
            return
        self._look()
        action = self.tenure.delivered(record)
        if action is Do.TAKE:
            self._take(record)
        elif action is Do.KEEP:
            self.statistics.repeated += 1
            if self.work.holds(record.sequence):
                self._refill()
            else:  # to take it now would put it behind its successors
                self._drop("the work has lost a record")
        elif action is Do.ACKNOWLEDGE:
            self.statistics.repeated += 1
            self._jetstream.acknowledge(record.reply)
            self._refill()
        else:
            self._do(action)

    def _take(self, record: DeliveredMessage) -> None:
        killer = self.tenure.killer(record.sequence)
        self.statistics.killers += killer is not None
        self.work.take(record, killer=killer)
        self._refill()

    def _said(self, number: int, code: int, text: str) -> None:
        if number == self._number:
            self._do(self.tenure.status(code, text, self._clock() - self._made_at))

    def _listen(self) -> None:
        """Look every now and then whether the server still says something."""
        consumption = self._consumption
        if consumption is not None:
            if self._clock() - max(consumption.heard_at, self._made_at) > SILENCE:
                self.doubt("the server is silent")
            self._silence = asyncio.get_running_loop().call_later(IDLE, self._listen)

    # -- actions ---------------------------------------------------------------------------------------------

    def _do(self, action: Do) -> None:
        if action is Do.RESUME:
            self.work.resume()
        elif action is Do.PAUSE:
            self.work.pause()
        elif action is Do.RECLAIM:
            self.work.pause()
            self.statistics.doubts[self.tenure.reason.partition(":")[0]] += 1
            self._spawn(self._reclaim())
            self._on_change()
        elif action is Do.DROP:
            self._drop(self.tenure.reason)
        elif action is Do.PULL:
            self._spawn(self._pull_again(self._number))

    async def _pull_again(self, number: int) -> None:
        await asyncio.sleep(FIRST_PAUSE / 5)
        if number == self._number:
            self._refill()

    async def _reclaim(self) -> None:
        await self._stop_pulling()
        async with self._turn:
            await self._rest()
            if self.standing is not Standing.DOUBT:
                return
            floor = self.tenure.floor if self._domain.is_log else 0
            try:
                self._grant(await self._broker.drive(self._ownership.reclaim(self.tenure.above, floor)))
            except (StaleError, JetStreamError) as error:
                self._drop(str(error))
                return
            self.statistics.reclaims += 1
        self._on_change()

    async def _rest(self) -> None:
        """Wait before a claim that follows hard on another, so that a lasting fault costs little."""
        is_calm = self._clock() - self._granted_at > CALM
        self._restless = 0 if is_calm else self._restless + 1
        if self._restless > 1:
            await asyncio.sleep(min(FIRST_PAUSE * 2**self._restless, LAST_PAUSE))

    async def _release(self) -> None:
        tenure = self.tenure
        claimed, held = tenure.claimed, tenure.held
        if tenure.standing is Standing.GONE or claimed is None or held is None:
            return
        await self._confirm()
        floor = tenure.floor if self._domain.is_log else 0
        try:
            await self._broker.drive(self._ownership.amend(claimed, held, floor=floor, is_released=True))
        except (StaleError, JetStreamError) as error:
            self._drop(str(error))
        else:
            self.statistics.hand_overs += 1
            self._end("handed over")
            self._on_change()

    async def _confirm(self) -> None:
        """Make sure that the server has all acknowledgements.

        That the consumer is gone changes nothing: either a successor has made its own, and the release finds out; or
        somebody has deleted it, and what was acknowledged meanwhile runs again. A server that has lost its last writes
        may know the consumer and not what it delivered: it never answers, and is not waited for.
        """
        silences = 0
        while silences < MAX_SILENCES and not self._gone.is_set() and (replies := self.tenure.unconfirmed()):
            for reply in replies[:-1]:
                self._jetstream.acknowledge(reply)
            try:
                await self._jetstream.acknowledge_confirmed(replies[-1])
            except JetStreamUnknownError:
                silences += await self._is_answering()
            else:
                return

    async def _is_answering(self) -> bool:
        """Whether the server answers questions about the consumer."""
        claimed = self.tenure.claimed
        assert claimed is not None, "a partition that is given away was claimed"
        try:
            await self._jetstream.consumer(self._domain.stream, claimed.consumer)
        except JetStreamUnknownError:
            await asyncio.sleep(CONFIRM_PAUSE)
            return False
        return True

    def _drop(self, reason: str) -> None:
        """It is another's: stop, without a word to the server."""
        self.statistics.stale += 1
        self._end(reason)
        self._log.write(
            logging.INFO, "stale", "%s: partition %d is let go: %s", self._domain.kind, self.partition, reason
        )
        self.work.drop()
        self._spawn(self._stop_pulling())
        self._on_change()

    def _end(self, reason: str) -> None:
        if not self._gone.is_set():
            self.tenure.ended(reason)
            self._gone.set()
            self.work.drop()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.write(logging.ERROR, "task", "partition %d: a task failed", self.partition, error=error)
