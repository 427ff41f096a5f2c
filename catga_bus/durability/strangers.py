"""Strangers: messages of types, and records of wire versions, that this node does not know.

Another node may: then the partition is handed to it, and until then nothing of such a record is started, nor of what is
behind it, so that all of it can go. If there is none, the others are run, and the stranger waits, holding back its key
alone, until it is a dead letter. Nothing passes a record of a newer wire version, whose keys nobody here can read.

Decided: once others of its record have been run, the stranger stays: a record cannot be divided, and to repeat the
others elsewhere would run them after what came behind them.
"""

import asyncio
from collections.abc import Callable

from catga_bus.durability.jobs import Doom, Job
from catga_bus.durability.letters import Reason
from catga_bus.durability.shop import Shop
from catga_bus.partition.lanes import Record

LOOK_SECONDS = 1.0
"""How often it is asked again whether another node knows a type."""


class Strangers:
    """The strangers in one partition.

    Args:
        shop: What all partitions share.
        unknown: Told of a type, empty for a wire version; returns whether the partition is about to be handed to a node
            that knows it.
        serve: Takes a job that need not be held any more.
        again: Takes a job that is to be served again after a pause, because of an error.
        lift: Called when what is behind the barrier may go on.

    Attributes:
        barrier: The record that nothing passes.
        held: The jobs of that record that could start, while it is held.
    """

    def __init__(
        self,
        shop: Shop,
        unknown: Callable[[str], bool],
        serve: Callable[[Job], None],
        again: Callable[[Job, str, float], None],
        lift: Callable[[], None],
    ) -> None:
        self._shop = shop
        self._unknown = unknown
        self._serve = serve
        self._again = again
        self._lift = lift
        self.barrier: Record | None = None
        self.held: list[Job] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def meet(self, record: Record) -> None:
        """Hold a record if there is a stranger in it."""
        for job in record.frames:
            if job.place is None and job.doom is None:
                self.barrier, self.held = record, []
                return

    def consider(self) -> None:
        """Let the record go if no other node takes it, or else look again later."""
        self._cancel()
        record, held = self.barrier, self.held
        if record is None or held is None:
            return
        if True in {self._unknown(one) for one in _types(record)}:  # each is told of
            self._timer = self._shop.loop.call_later(LOOK_SECONDS, self._look)
            return
        self.held = None
        if record.frames[0].message.type:
            self.barrier = None
        for job in held:
            self._serve(job)
        if self.barrier is None:
            self._lift()

    def _look(self) -> None:
        self.consider()
        self._shop.dispatcher.wake()

    def forget(self) -> None:
        """The record is done, or forgotten: nothing is behind it any more."""
        self._cancel()
        self.barrier = self.held = None

    def pause(self) -> None:
        """Ask nobody until `consider`."""
        self._cancel()

    def wait(self, job: Job) -> None:
        """Let a stranger wait, or give it up if it has waited long enough."""
        shop, name = self._shop, job.message.type
        waited = 0.0 if job.trouble is None else shop.clock() - job.trouble.since
        is_wanted = not job.record.begun and self._unknown(name)
        text = f"no node of {shop.service} handles {name}" if name else "no node reads this wire version"
        if waited >= shop.unroutable_after and not is_wanted:
            job.doom = Doom(Reason.UNROUTABLE, f"{text} for {waited:.0f} s")
            self._serve(job)
        else:
            self._again(job, text, min(LOOK_SECONDS, max(0.0, shop.unroutable_after - waited)) or LOOK_SECONDS)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _types(record: Record) -> set[str]:
    return {job.message.type for job in record.frames if job.place is None and job.doom is None}
