"""Gathers what `catga partitions` shows: records of owners, consumers, and what waits. Reads only."""

import asyncio
import random
from collections.abc import Iterable
from contextlib import aclosing
from typing import Final, NamedTuple, get_args

from catga_bus.cli.partitions_view import Domain, Moves, PartitionRow, Place, Waiting, ordered, row_of
from catga_bus.cli.streams_view import kind_of
from catga_bus.cluster.records import NodeInfo
from catga_bus.durability.letters.log_reader import Range
from catga_bus.durability.routes.routes import PARTITIONS_KEY
from catga_bus.partition.hashing import MAX_PARTITIONS
from catga_bus.partition.records import Held, consumer_of, read_record
from catga_bus.transport.jetstream import JetStream, StoredMessage
from catga_bus.wire import Names, token

_SIDE_BY_SIDE: Final = 32
# Questions to the server at a time: as many as it answers in a millisecond or two.

_DOMAINS: Final = get_args(Domain)


class _Queue(NamedTuple):
    """The work queue of a service."""

    stream: str
    subjects: str
    """A pattern that ends with a wildcard for the partition."""

    def subject(self, partition: int) -> str:
        return f"{self.subjects.removesuffix('*')}{partition}"


class PartitionFacts:
    """All partitions of a namespace, looked at again and again.

    Args:
        jetstream: Has the records and the streams.
        names: The names.
        service: Only partitions of this service, by its token; all if empty.
    """

    def __init__(self, jetstream: JetStream, names: Names, service: str = "") -> None:
        self._jetstream = jetstream
        self._names = names
        self._service = service
        self._held: dict[Place, Held] = {}
        self._read_through = 0
        self._created = ""
        self._queues: dict[str, _Queue] = {}
        self._services: dict[str, str] = {}
        # Names by token, of those that were heard: consumers are named after them. A plain name is its token.
        self._moves = Moves()
        self._limit = asyncio.Semaphore(_SIDE_BY_SIDE)

    async def rows(self, nodes: Iterable[NodeInfo], now_utc: float) -> list[PartitionRow]:
        """Look, and return one row for each partition.

        Args:
            nodes: The nodes that are heard.
            now_utc: Seconds since 1970.
        """
        await self._read_records()
        by_id = {node.id: node for node in nodes}
        self._services |= {token(node.service): node.service for node in by_id.values()}
        places = await self._places()
        waiting = await asyncio.gather(*(self._waiting(place) for place in places))
        return ordered(
            row_of(
                place,
                self._held.get(place),
                one,
                by_id,
                now_utc=now_utc,
                moves=self._moves.observe(place, self._held.get(place)),
            )
            for place, one in zip(places, waiting, strict=True)
        )

    async def _read_records(self) -> None:
        """Read what was written to the bucket since the last look."""
        bucket = self._names.owners_bucket()
        stream = f"KV_{bucket}"
        info = await self._jetstream.stream(stream)
        created = "" if info is None else str(info.raw.get("created", ""))
        if info is None or info.last_sequence < self._read_through or created != self._created:
            self._held.clear()  # it is gone, or was made again
            self._read_through, self._created = 0, created
        if info is None or not info.messages:
            return
        root = f"$KV.{bucket}."
        reading = Range(
            self._jetstream,
            stream,
            (f"{root}>",),
            start_sequence=self._read_through + 1,
            through=info.last_sequence,
            rng=random.Random(),
        )
        async with aclosing(reading.read()) as messages:
            async for message in messages:
                place = place_of(message.subject.removeprefix(root))
                if place is not None:
                    is_marker = bool(message.headers and message.headers.get("KV-Operation"))
                    record = None if is_marker else read_record(message.payload)
                    self._held[place] = Held(record, message.sequence)
        self._read_through = info.last_sequence

    async def _places(self) -> list[Place]:
        """Return all partitions: those that have records, and those that their stream says there are."""
        found = set(self._held)
        log = await self._jetstream.stream(self._names.event_stream())
        log_size = 0 if log is None else _partitions(log.config.metadata.get(PARTITIONS_KEY, ""))
        for stream in await self._jetstream.stream_names():
            kind = kind_of(stream, self._names)
            if kind is None or kind[0] != "commands":
                continue
            info = await self._jetstream.stream(stream)
            if info is not None:
                self._queues[kind[1]] = _Queue(stream, info.config.subjects[0])
                size = _partitions(info.config.metadata.get(PARTITIONS_KEY, ""))
                found |= {(kind[1], "cmd", partition) for partition in range(size)}
        for service in {service for service, domain, _ in found if domain == "evt"}:
            found |= {(service, "evt", partition) for partition in range(log_size)}
        return sorted(place for place in found if self._service in ("", place[0]))

    async def _waiting(self, place: Place) -> Waiting:
        async with self._limit:
            held = self._held.get(place)
            service = self._services.get(place[0], place[0])
            name = consumer_of(service, place[2], held) if held is not None else None
            queue = self._queues.get(place[0]) if place[1] == "cmd" else None
            stream = self._names.event_stream() if place[1] == "evt" else queue.stream if queue is not None else ""
            info = await self._jetstream.consumer(stream, name) if name and stream else None
            if queue is not None:  # what is acknowledged is gone from it: the first that lies there waits
                first = await self._first(stream, (queue.subject(place[2]),), 1)
            elif info is not None and info.pending + info.ack_pending:
                first = await self._first(stream, info.config.filters, info.ack_floor + 1)
            else:
                first = None
            oldest = None if first is None else first.time
            if info is None:
                is_empty = queue is not None and first is None
                return Waiting(0 if is_empty else None, 0 if is_empty else None, oldest, has_consumer=False)
            return Waiting(info.pending + info.ack_pending, info.ack_pending, oldest, has_consumer=True)

    async def _first(self, stream: str, filters: Iterable[str], sequence: int) -> StoredMessage | None:
        found = [await self._jetstream.next_message(stream, subject, sequence) for subject in filters]
        return min((one for one in found if one is not None), key=lambda one: one.sequence, default=None)


def place_of(key: str) -> Place | None:
    """Return the partition that a key of the owners' bucket stands for; None if it stands for none."""
    service, _, rest = key.partition(".")
    domain, _, number = rest.partition(".")
    if domain not in _DOMAINS or not (number.isascii() and number.isdigit()) or not service:
        return None
    return service, domain, int(number)  # type: ignore[return-value]  # it is one of them


def _partitions(text: str) -> int:
    return min(int(text), MAX_PARTITIONS) if text.isascii() and text.isdigit() else 0
