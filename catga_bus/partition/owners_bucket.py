"""The bucket of owners as the partitions of a node use it."""

from collections.abc import Mapping

from catga_bus.partition.owners import Holding
from catga_bus.partition.records import Domain, Held, holding_of, read_record
from catga_bus.transport.jetstream import ApiError, JetStream, JetStreamRefusedError
from catga_bus.transport.key_value import Entry, KeyValue
from catga_bus.wire import Names, owner_key


class OwnersBucket:
    """Reads and writes who owns what; `catga_bus.partition.broker.Owners` is its contract.

    Args:
        jetstream: Where it is stored.
        names: Its name.
        replicas: Of a bucket that has to be made again.
    """

    def __init__(self, jetstream: JetStream, names: Names, *, replicas: int = 1) -> None:
        self._bucket = KeyValue(jetstream, names.owners_bucket(), replicas=replicas)

    async def read(self, key: str) -> tuple[bytes | None, int]:
        """Return value and revision of a key."""
        entry = await self._bucket.read(key)
        return entry.value, entry.revision

    async def write(self, key: str, value: bytes, last: int) -> int:
        """Write if the revision is `last`; return the new one."""
        return await self._bucket.write(key, value, last)

    async def create(self, first_sequence: int) -> None:
        """Make the bucket, with revisions from `first_sequence` on."""
        await self._bucket.open(first_sequence)

    async def read_one(self, domain: Domain, partition: int) -> Holding | None:
        """Return what the record of a partition says; None if there is none."""
        try:
            return _holding(await self._bucket.read(domain.key(partition)))
        except JetStreamRefusedError as error:
            if error.code == ApiError.STREAM_NOT_FOUND:
                return None  # lost: the claim makes it again
            raise

    async def read_all(self, domain: Domain) -> Mapping[int, Holding]:
        """Return what all records of a domain say."""
        try:
            entries = await self._bucket.entries()
        except JetStreamRefusedError as error:
            if error.code == ApiError.STREAM_NOT_FOUND:
                return {}
            raise
        prefix = owner_key(domain.service, domain.kind, 0)[:-1]
        found: dict[int, Holding] = {}
        for key, entry in entries.items():
            number = key.removeprefix(prefix)
            if key.startswith(prefix) and number.isdecimal() and (holding := _holding(entry)) is not None:
                found[int(number)] = holding
        return found


def _holding(entry: Entry) -> Holding | None:
    return holding_of(Held(read_record(entry.value), entry.revision))
