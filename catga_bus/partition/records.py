"""What the bucket of owners says about a partition, and what the names of its consumers say."""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

from catga_bus.errors import CatgaError
from catga_bus.partition.hashing import murmur3
from catga_bus.partition.owners import Holding, Incarnation
from catga_bus.wire import MAX_COUNT, MAX_ID, Names, owner_key, partition_consumer, token

CAREFUL_FROM: Final = 2
"""Deaths at one record from which its owner runs one frame at a time: the first may be chance (a deploy, the kernel's
memory killer), a second at the same place hardly is."""


class StaleError(CatgaError):
    """Somebody else owns the partition: stop, and touch nothing of it."""


class Standing(StrEnum):
    """How a partition stands in the node that works on it."""

    CLAIMING = "claiming"
    ACTIVE = "active"
    DOUBT = "doubt"
    """Nothing starts until the record has been read."""

    DRAINING = "draining"
    GONE = "gone"


class Domain(msgspec.Struct, frozen=True, kw_only=True):
    """Partitions that are owned: the work queue of a service's commands, or its position in the event log."""

    names: Names
    service: str
    types: tuple[str, ...] = ()
    """Event types to be read from the log, at least one; empty: the work queue."""

    start: int = 1
    """Event log: the sequence at which a service without a position begins; 1: with the oldest event."""

    window: int = 1_024
    """Records that may be delivered and not acknowledged."""

    @property
    def is_log(self) -> bool:
        """Whether records stay in the stream when they are acknowledged, and the position lives in the consumer."""
        return bool(self.types)

    @property
    def kind(self) -> Literal["cmd", "evt"]:
        """How its keys in the bucket are named."""
        return "evt" if self.types else "cmd"

    @property
    def stream(self) -> str:
        """Where its records lie."""
        return self.names.event_stream() if self.types else self.names.command_stream(self.service)

    def filters(self, partition: int) -> tuple[str, ...]:
        """The subjects of a partition."""
        if not self.types:
            return (self.names.command(self.service, partition),)
        return tuple(self.names.event(each, partition) for each in self.types)

    def key(self, partition: int) -> str:
        """The key of a partition in the bucket."""
        return owner_key(self.service, self.kind, partition)


MAX_EPOCH: Final = 10**15 - 1
"""The highest epoch: milliseconds since 1970 reach it in 33,000 years. What is above is not ours."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_ID)]


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """The frame that a careful owner has begun."""

    sequence: _Count
    """Of its record."""

    index: _Count
    """Within the record, counted from 0."""


class OwnerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored for one partition, in JSON. Each write replaces it and has a fresh nonce."""

    node: _Text
    incarnation: tuple[_Count, _Count]
    nonce: _Text
    """No other write, by anybody, has the same: it tells whether a write whose outcome is unknown was done."""

    state: Literal["owned", "released"] = "owned"
    last: _Text = ""
    """Name of the consumer of this epoch; empty in the write that claims, because the name follows from it."""

    epoch: _Count = 0
    """In the write that claims: the least epoch that it may be given; in all others: the epoch."""

    floor: _Count = 0
    """Event log: everything up to this sequence is done. The consumer knows better, as long as it is there."""

    deaths: _Count = 0
    """How many owners in a row were lost while `first` was the first record that waited."""

    first: _Count = 0
    """Sequence of the first record that waited when this owner claimed; 0 if none did."""

    mark: Mark | None = None

    def is_by(self, node: str, incarnation: Incarnation) -> bool:
        """Whether one life of a node wrote it."""
        return (self.node, self.incarnation) == (node, incarnation)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(OwnerRecord).decode


class Held(msgspec.Struct, frozen=True):
    """What a read of the bucket found."""

    record: OwnerRecord | None
    """None if there is none: never was, was deleted, or cannot be understood."""

    revision: int
    """0 only if there never was one; a bucket that was lost knows of none."""

    @property
    def epoch(self) -> int:
        """The epoch that was granted last, as far as this tells.

        A claim is granted the revision of its write, or the epoch that it asks for if that is higher: so that epochs
        rise even in a bucket that somebody has made again with revisions from 1.
        """
        record = self.record
        if record is None:
            return self.revision
        return record.epoch if record.last else max(record.epoch, self.revision)


def write_record(record: OwnerRecord) -> bytes:
    """Return the value of a record."""
    return _encode(record)


def read_record(value: bytes | None) -> OwnerRecord | None:
    """Return the record that a value holds; None if it is no record, so that anybody may claim the partition."""
    if value is None:
        return None
    try:
        return _decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def holding_of(held: Held) -> Holding | None:
    """Return what a plan needs to know of a record; None if there is none."""
    record = held.record
    if record is None:
        return None
    if record.state == "released":
        return Holding(None, max(held.revision, record.epoch + 1))
    return Holding(record.node, held.epoch, record.incarnation)


# -- the names of consumers ------------------------------------------------------------------------------------


def consumer_name(service: str, partition: int, epoch: int, nonce: str) -> str:
    """Return the name of a claim's consumer.

    The nonce is in it because an epoch can come twice (a bucket that lost its last writes): two claims are then still
    two consumers.
    """
    return partition_consumer(service, partition, epoch, murmur3(nonce.encode()))


def consumer_of(service: str, partition: int, held: Held) -> str | None:
    """Return the name of the consumer that a record stands for."""
    record = held.record
    if record is None:
        return None
    return record.last or consumer_name(service, partition, held.epoch, record.nonce)


class Consumers:
    """The consumers of a service among the names in a stream.

    Args:
        service: Name of the service.
        names: Of all consumers of the stream, other people's among them.
    """

    def __init__(self, service: str, names: Iterable[str]) -> None:
        shape = re.compile(re.escape(token(service)) + r"-p(\d{1,9})-e(\d{1,15})-[0-9a-f]{8}")
        self._all = [(int(found[1]), name, int(found[2])) for name in names if (found := shape.fullmatch(name))]

    def of(self, partition: int) -> dict[str, int]:
        """Return those of a partition, each with its epoch."""
        return {name: epoch for place, name, epoch in self._all if place == partition}

    @property
    def highest_epoch(self) -> int:
        """The highest epoch of all; 0 without any."""
        return max((epoch for _, _, epoch in self._all), default=0)
