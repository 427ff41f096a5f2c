"""Caution: while processes die over a partition its messages run one at a time, each marked before it starts.

Those of all such partitions of a node run one at a time: every message that is marked when a process dies is taken for
the one that killed it.
"""

import asyncio
from collections.abc import Callable

from catga_bus.dispatch.failures import describe
from catga_bus.durability.working.jobs import Job
from catga_bus.durability.working.shop import Shop
from catga_bus.partition.work import Keeping

_TURN_SECONDS = 10.0
# For which a partition waits for the others of its node. A handler that hangs holds up no other partition for longer;
# a frame that runs beside it may be taken for a killer.


class Caution:
    """Starts the jobs of one partition in stream order, one by one.

    Args:
        shop: What all partitions share.
        keeping: Writes the marks.
        pick: Takes out the first job that may start; None if there is none.
        start: Starts a job that is marked, or puts it back if that may not be any more; then `ended` is due.
        put_off: Takes a job that could not be marked, and why.
    """

    def __init__(
        self,
        shop: Shop,
        keeping: Keeping,
        pick: Callable[[], Job | None],
        start: Callable[[Job], None],
        put_off: Callable[[Job, str], None],
    ) -> None:
        self._shop = shop
        self._keeping = keeping
        self._pick = pick
        self._start = start
        self._put_off = put_off
        self._current: Job | None = None
        self._has_turn = False
        self._former: list[Caution] = []  # of earlier tenures, each with a job that runs on

    def succeed(self, before: "Caution") -> None:
        """Tell the caution of an earlier tenure of the same partition when its job ends, which runs on."""
        self._former = [one for one in (*before._former, before) if one._current is not None]  # noqa: SLF001

    def step(self) -> None:
        """Go on with the next job, unless one is in hand."""
        if self._current is None and (job := self._pick()) is not None:
            self._current = job
            self._shop.spawn(self._begin(job))

    async def _begin(self, job: Job) -> None:
        await self._take_turn()
        try:
            await self._keeping.mark(job.record.sequence, job.index)
        except Exception as error:  # the keeper finds out what it means for the partition
            self._current = None
            self._end_turn()
            self._put_off(job, f"it could not be marked: {describe(error)}")
            return
        self._start(job)
        self._shop.dispatcher.wake()

    def ended(self, job: Job) -> None:
        """An attempt has ended; of any job."""
        if job is self._current:
            self._shop.spawn(self._unmark())
        for one in self._former:
            one.ended(job)

    async def _unmark(self) -> None:
        try:
            await self._keeping.unmark()
        except Exception as error:  # the next mark takes its place; in a lost partition it is another's by now
            self._shop.rare_log.warn("unmark", "a mark could not be taken back: %s", describe(error))
        self._current = None
        self._end_turn()
        self.step()
        self._shop.dispatcher.wake()

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._shop.careful_turn.acquire()
        except TimeoutError:
            return
        self._has_turn = True

    def _end_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._shop.careful_turn.release()
