"""Results: says once more what commands have come to, to senders whose answer may be lost.

An answer is no part of a stream: it is lost with a connection, of the node or of the sender, or with the server between
them. Whoever waits then asks the owner of the partition, and gets what that has kept, or what the inbox remembers. What
is waiting or under way gets no word: it will be answered.
"""

from collections.abc import Iterable, Mapping

import msgspec

from catga_bus.codec import GateError
from catga_bus.dispatch.failures import describe
from catga_bus.durability.working.shop import Shop
from catga_bus.errors import CatgaError
from catga_bus.transport.base import Subscription, Transport
from catga_bus.wire import IdBatch, Kind

_encode = msgspec.msgpack.Encoder().encode


class Results:
    """Where a node is asked for results.

    Args:
        shop: Has the inbox and the ways back.
        transport: The connection.
        subject: Where it is asked.
    """

    def __init__(self, shop: Shop, transport: Transport, subject: str) -> None:
        self._shop = shop
        self._transport = transport
        self._subject = subject
        self._subscription: Subscription | None = None
        self._is_looking = False

    async def start(self) -> None:
        """Be asked."""
        self._subscription = await self._transport.subscribe(self._subject, self._on_query)

    async def close(self) -> None:
        """Be deaf."""
        if self._subscription is not None:
            await self._subscription.close()

    def _on_query(self, _: str, payload: bytes, __: str, ___: Mapping[str, str] | None) -> None:
        batch = self._let_in(payload)
        if batch is None or batch.head.reply is None:
            return
        inbox, missing = batch.head.reply, set(batch.frames)
        answers = self._shop.answers
        for kept, ids in [] if answers.kept is None else answers.kept.find(inbox, missing, self._ids_of):
            if self._transport.is_behind:
                return  # it is asked again
            self._shop.counts.repeated += len(missing & ids)
            missing -= ids
            self._send(inbox, kept)
        if missing and self._shop.inbox is not None and not self._is_looking:
            self._is_looking = True
            self._shop.spawn(self._look_up(inbox, sorted(missing)))

    def _let_in(self, payload: bytes) -> IdBatch | None:
        gate = self._shop.gate
        try:
            if gate.kind(payload) == Kind.STATUS:
                batch = gate.ids(payload)
                if batch.head.reply is not None and self._shop.answers.allow(batch.head.reply):
                    return batch
        except GateError as error:
            self._shop.rare_log.warn("gate", "what came on %r was not let in: %s", self._subject, error)
        return None

    def _ids_of(self, payload: bytes) -> Iterable[str]:
        return [frame.id for frame in self._shop.gate.answers(payload).frames]

    def _send(self, inbox: str, payload: bytes) -> None:
        try:
            self._transport.publish(inbox, payload)
        except CatgaError as error:
            self._shop.rare_log.warn("publish", "a batch of answers could not be sent again: %s", error)

    async def _look_up(self, inbox: str, ids: list[str]) -> None:
        shop = self._shop
        assert shop.inbox is not None
        try:
            done = await shop.inbox.find_many(shop.service, ids)
        except Exception as error:
            self._shop.rare_log.warn("lookup", "results cannot be looked up: %s", describe(error))
            return
        finally:
            self._is_looking = False
        lane = shop.answers.lane(inbox, "")
        for message_id, recorded in done.items():
            shop.counts.repeated += 1
            lane.add(_encode((message_id, recorded.status, msgspec.Raw(recorded.body), shop.node_id)))
