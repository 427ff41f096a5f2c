"""Troubles: the jobs of one partition that did not go through at once, and when each is started again."""

import asyncio
from collections.abc import Callable

from catga_bus.durability.working.jobs import Job, Trouble
from catga_bus.durability.working.shop import Shop, WaitingKey
from catga_bus.partition.lanes import State
from catga_bus.partition.work import Keeping


class Troubles:
    """What waits between two attempts, and the keys that are held back by it.

    Args:
        shop: What all partitions share.
        keeping: The keeper of this one.
        stream: Where its records lie.
        due: Takes a job that may start again.
    """

    def __init__(self, shop: Shop, keeping: Keeping, stream: str, due: Callable[[Job], None]) -> None:
        self._shop = shop
        self._keeping = keeping
        self._stream = stream
        self._take_back = due
        self._timers: dict[Job, asyncio.TimerHandle] = {}
        self._troubled: dict[Job, None] = {}  # since the longest time first

    def __len__(self) -> int:
        """The keys that are held back."""
        return len(self._troubled)

    @property
    def is_waiting(self) -> bool:
        """Whether a job waits for its time."""
        return bool(self._timers)

    def put_off(self, job: Job, error: str, seconds: float) -> None:
        """Have a job started again after a pause, because of an error."""
        if job.trouble is None:
            job.trouble = Trouble(self._shop.clock(), error)
            self._troubled[job] = None
        else:
            job.trouble.error = error
        job.state = State.PAUSED
        self._timers[job] = self._shop.loop.call_later(seconds, self._due, job)

    def _due(self, job: Job) -> None:
        del self._timers[job]
        job.state = State.READY
        self._take_back(job)
        self._shop.dispatcher.wake()

    def leave(self, job: Job) -> None:
        """Forget a job: it is done, or its record is."""
        self._troubled.pop(job, None)
        timer = self._timers.pop(job, None)
        if timer is not None:
            timer.cancel()

    def oldest(self) -> WaitingKey | None:
        """Return the key that has waited longest."""
        for job in self._troubled:
            trouble = job.trouble
            assert trouble is not None
            return WaitingKey(
                self._keeping.fence.partition,
                self._stream,
                job.key,
                job.message.type,
                job.message.id,
                self._shop.clock() - trouble.since,
                trouble.failures,
                trouble.error,
            )
        return None

    def say_full(self) -> None:
        """Say which key the partition waits for, now that its window is full."""
        one = self.oldest()
        if one is not None:
            self._shop.rare_log.warn(
                f"full {one.stream} {one.partition}",
                "partition %d of %s waits for key %.80r: %s %.80r does not go through since %.0f s "
                "(%d attempts failed): %s",
                one.partition,
                one.stream,
                one.key,
                one.type_name,
                one.message_id,
                one.seconds,
                one.failures,
                one.error,
            )
