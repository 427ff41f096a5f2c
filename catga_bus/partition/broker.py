"""Carries out what the ownership of a partition asks of the broker."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from catga_bus.partition.protocol import (
    CreateBucket,
    CreateConsumer,
    DeleteConsumer,
    Done,
    FindFirst,
    ListConsumers,
    Operation,
    Outcome,
    Pull,
    Read,
    ReadPosition,
    Refused,
    Steps,
    Unknown,
    Write,
)
from catga_bus.partition.records import Domain, Held, Mark, StaleError, read_record, write_record
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
)

T = TypeVar("T")

READ_PATIENCE: Final = 1.0
HASTY_READS: Final = 15
"""Seconds for which an answer to a read is waited for. While there is no leader nobody answers, and what was asked just
before there is one again is lost: the shorter, the sooner a partition goes on. After so many reads in a row without an
answer it is the server that is slow, and has the time that it takes."""

DELETE_PATIENCE: Final = 1.0
"""Seconds until a consumer is deleted once more: nobody may answer for one that had no leader and is gone."""

FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 0.5
"""Seconds between two tries while the outcome is unknown; it grows by half each time. A leader that was killed is
missed for 4 to 9 seconds: 15 to 25 tries."""


_READS: Final = (Read, FindFirst, ListConsumers, ReadPosition)


class Owners(Protocol):
    """The bucket with the owners of partitions; its reads are answered by the leader."""

    async def read(self, key: str) -> tuple[bytes | None, int]:
        """Return value and revision; None and the revision of what a delete left, None and 0 if there never was one."""
        ...

    async def write(self, key: str, value: bytes, last: int) -> int:
        """Write if the revision is `last`; return the new one."""
        ...

    async def create(self, first_sequence: int) -> None:
        """Make the bucket, with revisions from `first_sequence` on."""


class Broker:
    """Carries out operations about one partition.

    Args:
        jetstream: The stream and its consumers.
        owners: The bucket.
        domain: Of the partition.
        partition: Which.
        pull: Has a consumer's records delivered, given the frame that is known to kill.
        is_over: Whether nobody wants to know any more: then what is of unknown outcome stays so.
    """

    def __init__(
        self,
        jetstream: JetStream,
        owners: Owners,
        domain: Domain,
        partition: int,
        pull: Callable[[str, Mark | None], Awaitable[None]],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._jetstream = jetstream
        self._owners = owners
        self._domain = domain
        self._filters = domain.filters(partition)
        self._key = domain.key(partition)
        self._pull = pull
        self._is_over = is_over

    async def drive(self, steps: Steps[T]) -> T:
        """Carry a conversation through to its end; it goes on for as long as outcomes are unknown.

        Raises:
            StaleError: It is over.
        """
        outcome: Outcome | None = None
        pause = FIRST_PAUSE
        unknown = 0
        while True:
            try:
                operation = steps.send(outcome)  # type: ignore[arg-type]  # the first send takes None
            except StopIteration as end:
                value: T = end.value
                return value
            outcome = await self.perform(operation, READ_PATIENCE if unknown < HASTY_READS else None)
            if isinstance(outcome, Unknown):
                unknown += 1
                await asyncio.sleep(pause)
                if self._is_over():
                    steps.close()
                    raise StaleError(f"the partition of {self._key} was let go")
                pause = min(pause * 1.5, LAST_PAUSE)
            else:
                pause, unknown = FIRST_PAUSE, 0

    async def perform(self, operation: Operation, patience: float | None = None) -> Outcome:
        """Carry out one operation, once.

        Args:
            operation: Which.
            patience: Seconds for which an answer to a read is waited for; None: as long as is usual.
        """
        try:
            async with asyncio.timeout(patience if isinstance(operation, _READS) else None):
                return Done(await self._value(operation))
        except JetStreamRefusedError as error:
            return Refused(error.code, error.text)
        except (JetStreamUnknownError, TimeoutError):
            return Unknown()

    async def _value(self, operation: Operation) -> Any:
        stream = self._domain.stream
        match operation:
            case Read():
                value, revision = await self._owners.read(self._key)
                return Held(read_record(value), revision)
            case Write(record, last):
                return await self._owners.write(self._key, write_record(record), last)
            case CreateBucket(first_sequence):
                return await self._owners.create(first_sequence)
            case ListConsumers():
                return await self._jetstream.consumer_names(stream)
            case ReadPosition(consumer):
                return await self._position(consumer)
            case FindFirst(start):
                return await self._first(start)
            case DeleteConsumer(consumer):
                return await self._jetstream.delete_consumer(stream, consumer, timeout=DELETE_PATIENCE)
            case CreateConsumer(consumer, start, patience):
                config = self._config(consumer, start)
                return (await self._jetstream.create_consumer(stream, config, timeout=patience)).has_leader
            case Pull(consumer, killer):
                await self._pull(consumer, killer)
        return None

    def _config(self, consumer: str, start: int) -> ConsumerConfig:
        # The work queue has nothing but what waits; there the consumer's own start does not matter.
        return ConsumerConfig(
            name=consumer,
            filters=self._filters,
            max_ack_pending=self._domain.window,
            deliver="by_start_sequence" if self._domain.is_log else "all",
            start_sequence=start if self._domain.is_log else 0,
        )

    async def _position(self, consumer: str) -> int:
        info = await self._jetstream.consumer(self._domain.stream, consumer)
        if info is None:
            return 0
        # Before its first acknowledgement a consumer of a replicated stream reports a floor of 0, wherever it began.
        return max(info.ack_floor + 1, info.config.start_sequence)

    async def _first(self, start: int) -> int:
        found = await asyncio.gather(
            *(self._jetstream.next_message(self._domain.stream, subject, start) for subject in self._filters)
        )
        return min((message.sequence for message in found if message is not None), default=0)
