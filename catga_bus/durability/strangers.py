"""Strangers: messages of types, and records of wire versions, that this node does not know.

Another node may: then the partition is handed to it, and until then nothing of such a record is started, so that all of
it can go. If there is none, its other messages are run, and the stranger waits, holding back its key alone, until it is
a dead letter.

Decided: once others of its record have been run, the stranger stays: a record cannot be divided, and to repeat the
others elsewhere would run them after what came behind them.
"""

import asyncio
from collections.abc import Callable
from typing import Any

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

    Attributes:
        held: The records of which nothing is started, each with its jobs that could.
    """

    def __init__(
        self,
        shop: Shop,
        unknown: Callable[[str], bool],
        serve: Callable[[Job], None],
        again: Callable[[Job, str, float], None],
    ) -> None:
        self._shop = shop
        self._unknown = unknown
        self._serve = serve
        self._again = again
        self.held: dict[Record, list[Job]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def meet(self, record: Record) -> None:
        """Hold a record that has a stranger in it."""
        if any(job.place is None and job.doom is None for job in record.frames):
            self.held[record] = []

    def consider(self) -> None:
        """Let the records go that no other node takes; look again later."""
        self.cancel()
        for record in list(self.held):
            if record.lost:
                del self.held[record]
            elif True not in {self._unknown(one) for one in _types(record)}:  # each is told of
                for job in self.held.pop(record):
                    self._serve(job)
        if self.held:
            self._timer = self._shop.loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self.consider()
        self._shop.dispatcher.wake()

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

    def cancel(self) -> None:
        """Look no more until `consider`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _types(record: Record) -> set[Any]:
    return {job.message.type for job in record.frames if job.place is None and job.doom is None}
