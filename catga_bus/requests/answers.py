"""Answers: where they may go, and the lanes that pack them, shared by all that a node answers."""

from collections.abc import Sequence
from functools import partial

import msgspec

from catga_bus.requests.inboxes import Inboxes
from catga_bus.requests.kept import KeptBatches
from catga_bus.transport.coalescer import Coalescer, Lane
from catga_bus.wire import Fault, Kind, Status, join_batch

_MAX_CLIENTS = 4_096
# Clients that ask; what is known of them is a cache, so forgetting it costs a check and a dictionary entry.

_encode = msgspec.msgpack.Encoder().encode


class Answers:
    """The ways back to those who ask.

    Args:
        coalescer: Packs the answers.
        inboxes: Where they may go.
        node_id: Who answers.
        kept: Where batches are kept that have left; None: nowhere.
    """

    def __init__(self, coalescer: Coalescer, inboxes: Inboxes, node_id: str, kept: KeptBatches | None = None) -> None:
        self._coalescer = coalescer
        self._inboxes = inboxes
        self._node_id = node_id
        self.kept = kept
        self._known: set[str] = set()
        self._lanes: dict[tuple[str, str], Lane] = {}

    def allow(self, inbox: str) -> bool:
        """Whether answers may be sent to this inbox."""
        if inbox in self._known:
            return True
        if not self._inboxes.allow(inbox):
            return False
        if len(self._known) >= _MAX_CLIENTS:
            self._known.clear()
            self._lanes.clear()
        self._known.add(inbox)
        return True

    def lane(self, inbox: str, type_name: str) -> Lane:
        """Return the lane of one inbox and type: a batch of answers tells the time of one handler, not of a mixture."""
        lane = self._lanes.get((inbox, type_name))
        if lane is None:
            seal = self._seal if self.kept is None else partial(self._seal_and_keep, self.kept, inbox)
            lane = self._lanes[inbox, type_name] = self._coalescer.lane(inbox, seal)
        return lane

    def fault(self, message_id: str, status: Status, fault: Fault) -> bytes:
        """Return the encoded frame of an answer that is not OK."""
        return _encode((message_id, status, fault, self._node_id))

    def _seal(self, number: int, frames: Sequence[bytes], seconds: float) -> tuple[bytes, str]:
        mean_us = int(seconds / len(frames) * 1e6)
        return join_batch(Kind.ANSWERS, (self._node_id, None, number, mean_us), frames), ""

    def _seal_and_keep(
        self, kept: KeptBatches, inbox: str, number: int, frames: Sequence[bytes], seconds: float
    ) -> tuple[bytes, str]:
        sealed = self._seal(number, frames, seconds)
        kept.keep(inbox, sealed[0])
        return sealed
