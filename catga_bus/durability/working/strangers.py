"""Strangers: messages of types, and records of wire versions, that this node does not know.

Another node may: then the partition is handed to it, and until then nothing of such a record is started, nor of what is
behind it, so that all of it can go. If that does not happen soon, the others are run, and the stranger waits, holding
back its key alone. It is a dead letter after `unroutable_after` if no node knows it then, or if the partition cannot be
handed over because of it. Nothing passes a record of a newer wire version, whose keys nobody here can read.

Decided: once others of its record have been run, the stranger stays: a record cannot be divided, and to repeat the
others elsewhere would run them after what came behind them.
"""

import asyncio
import math
from collections.abc import Callable

from catga_bus.durability.letters.letters import Reason
from catga_bus.durability.working.jobs import Doom, Job
from catga_bus.durability.working.shop import Shop
from catga_bus.partition.lanes import Record

LOOK_SECONDS = 1.0
"""How often it is asked again whether another node knows a type."""

HOLD_SECONDS = 5.0
"""How long a record is held for a hand-over, which takes far less than a second when it comes; and for twelve times as
long none is held again when it did not come: nodes that know different types may have split the partitions."""


class Strangers:
    """The strangers in one partition.

    Args:
        shop: What all partitions share.
        unknown: Told of a type, empty for a wire version; returns whether the partition is about to be handed to a node
            that knows it.
        serve: Takes a job that need not be held any more.
        again: Takes a job that is to be served again after a pause, because of an error.
        lift: Called when what is behind the barrier may go on.
        may_move: Whether a hand-over would begin only now; while one is under way it waits for this partition's work.

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
        may_move: Callable[[], bool],
    ) -> None:
        self._shop = shop
        self._unknown = unknown
        self._serve = serve
        self._again = again
        self._lift = lift
        self._may_move = may_move
        self.barrier: Record | None = None
        self.held: list[Job] | None = None
        self._held_since = self._holds_again_at = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    def meet(self, record: Record) -> None:
        """Hold a record if there is a stranger in it."""
        for job in record.frames:
            if job.place is None and job.doom is None:
                self.barrier, self.held = record, []
                self._held_since = math.inf
                return

    def consider(self) -> None:
        """Let the record go if no other node takes it soon, or else look again later."""
        self._cancel()
        record, held = self.barrier, self.held
        if record is None or held is None:
            return
        now = self._shop.clock()
        self._held_since = min(self._held_since, now)
        is_wanted = True in {self._unknown(one) for one in _types(record)}  # each is told of
        if is_wanted and now >= self._holds_again_at:
            if now < self._held_since + HOLD_SECONDS:
                self._timer = self._shop.loop.call_later(LOOK_SECONDS, self._look)
                return
            self._holds_again_at = now + 12 * HOLD_SECONDS
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
        is_wanted = self._unknown(name) and self._may_move()
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
