"""Puts messages on a service's work queue once more: dead letters that are retried, events that are replayed.

A service handles what lies in its work queue by the type in the frame, whether that is a command or an event. So this
is how a message reaches one service alone: other services do not see its queue.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec

from catga_bus.durability.letters.repeating import Pauses, repeat
from catga_bus.errors import CatgaError, ConfigurationError
from catga_bus.transport.jetstream import JetStream, PubAck
from catga_bus.wire import Kind, MessageFrame, Names, join_batch

PATIENCE = 15.0
"""Seconds for which a record is stored again while its outcome is unknown: longer than a change of leaders takes."""

BATCH_RECORDS = 64
BATCH_BYTES = 4_194_304
"""What is read before it is put: in memory at a time."""

_FULL_SHARE = 0.5
# Of the queue's bytes: what is put on it a second time leaves the other half to what comes for the first time.

_ROOM_SECONDS = 0.5

_encode = msgspec.msgpack.Encoder().encode


class Queued(msgspec.Struct, frozen=True):
    """A record that is to be stored, and what follows."""

    partition: int
    payload: bytes
    message_id: str
    """Of the record: two with the same one within the stream's window are stored once."""

    then: Callable[[], Awaitable[object]] | None = None
    """Called when it is stored, before the next one of the partition is."""


class WorkQueue:
    """The work queue of one service.

    Args:
        jetstream: Stores the records.
        names: The names.
        service: Whose.
        partitions: P of its stream.
        rng: Draws the pauses between attempts.
    """

    def __init__(
        self, jetstream: JetStream, names: Names, service: str, partitions: int, *, rng: random.Random | None = None
    ) -> None:
        if partitions < 1:
            raise ConfigurationError(f"a work queue has at least 1 partition, got {partitions}")
        self.service = service
        self.stream = names.command_stream(service)
        self.partitions = partitions
        self._jetstream = jetstream
        self._names = names
        self._rng = random.Random() if rng is None else rng

    async def put(self, partition: int, payload: bytes, message_id: str) -> PubAck:
        """Store one record; repeated with the same id while its outcome is unknown.

        Raises:
            JetStreamRefusedError: The queue is full, or there is none.
            JetStreamUnknownError: Nobody knows after `PATIENCE` seconds.
        """
        subject = self._names.command(self.service, partition)
        return await repeat(
            lambda: self._jetstream.publish(subject, payload, message_id=message_id),
            Pauses(self._rng),
            seconds=PATIENCE,
        )

    async def put_all(self, records: Sequence[Queued]) -> None:
        """Store records: those of one partition one after another, those of different ones side by side.

        When one fails, those behind it in its partition are not stored, and the others are.

        Raises:
            CatgaError: Of the first that failed; when this is raised nothing is on its way any more.
        """
        queues: dict[int, list[Queued]] = defaultdict(list)
        for record in records:
            queues[record.partition].append(record)
        ends = await asyncio.gather(*map(self._put_in_order, queues.values()), return_exceptions=True)
        for end in ends:
            if end is not None:
                raise end

    async def _put_in_order(self, records: Iterable[Queued]) -> None:
        for record in records:
            await self.put(record.partition, record.payload, record.message_id)
            if record.then is not None:
                await record.then()

    async def wait_for_room(self) -> None:
        """Return when at most half of the queue is filled.

        Raises:
            CatgaError: There is no such queue.
        """
        while True:
            info = await repeat(lambda: self._jetstream.stream(self.stream), Pauses(self._rng), seconds=PATIENCE)
            if info is None:
                raise CatgaError(f"service {self.service} has no work queue: stream {self.stream} does not exist")
            limit = info.config.max_bytes
            if limit <= 0 or info.bytes <= _FULL_SHARE * limit:
                return
            await asyncio.sleep(_ROOM_SECONDS)


def record_of(sender: str, frames: Iterable[MessageFrame]) -> bytes:
    """Return a record whose frames nobody waits for.

    Args:
        sender: Who sent them at first.
        frames: Their messages, in order.
    """
    again = (msgspec.structs.replace(frame, remaining_ms=None, attempt=1) for frame in frames)
    return join_batch(Kind.MESSAGES, (sender, None, 0), [_encode(frame) for frame in again])
