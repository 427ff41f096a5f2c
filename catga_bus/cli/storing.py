"""Stores commands and events for commands of the shell: by what their routes say, without their classes."""

import random
from collections.abc import Callable
from typing import Any

import msgspec

from catga_bus.codec.frames import key_as_text
from catga_bus.durability.letters.repeating import Pauses, repeat
from catga_bus.durability.letters.work_queue import record_of
from catga_bus.durability.routes.routes import Route, partitions_in, read_route
from catga_bus.errors import InvalidMessageError, NoHandlerError, Outcome
from catga_bus.partition.hashing import partition_of
from catga_bus.result import Stored
from catga_bus.transport.jetstream import JetStream, JetStreamUnknownError
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import MessageFrame, Names

_SENDER = "catga-cli"

_encode = msgspec.msgpack.Encoder().encode


class Storing(msgspec.Struct, frozen=True, kw_only=True):
    """A message that is to be stored."""

    type: str
    id: str
    body: bytes
    """MessagePack."""

    key_of: Callable[[str], Any]
    """Returns the value of the field that has the key."""

    key: str | None = None
    """In place of that."""

    timeout: float = 15.0
    """Seconds for which it is tried."""


async def find_route(jetstream: JetStream, names: Names, type_name: str, timeout: float) -> Route | None:
    """Return what is known of a type, or None if nobody handles it as a command or a durable event.

    Raises:
        JetStreamUnknownError: Nobody answers for `timeout` seconds.
    """
    return await repeat(
        lambda: read_route(KeyValue(jetstream, names.routes_bucket()), type_name),
        Pauses(random.Random()),
        seconds=timeout,
    )


async def enqueue(jetstream: JetStream, names: Names, storing: Storing) -> Stored:
    """Store a command in the work queue of the service that handles it.

    Raises:
        NoHandlerError: There is none.
        InvalidMessageError: It has no key that can be hashed.
        JetStreamRefusedError: The queue is full.
        JetStreamUnknownError: Whether it is stored is not known.
    """
    route = await find_route(jetstream, names, storing.type, storing.timeout)
    if route is None or route.kind != "command":
        what = "is an event; `catga publish` publishes it" if route is not None else "is handled by no service"
        raise NoHandlerError(f"{storing.type} {what}", outcome=Outcome.NOT_RUN)
    key = _key(storing, route.partition_by)
    partition = partition_of(storing.id if key is None else key, route.partitions)
    return await _store(jetstream, names.command(route.service, partition), storing, key)


async def publish(jetstream: JetStream, names: Names, storing: Storing, key_field: str | None) -> Stored:
    """Store a durable event in the log; raises as `enqueue` does.

    Args:
        jetstream: Has the log.
        names: The names.
        storing: The event.
        key_field: The field that has the key, if its type is partitioned.
    """
    info = await repeat(
        lambda: jetstream.stream(names.event_stream()), Pauses(random.Random()), seconds=storing.timeout
    )
    if info is None:
        raise NoHandlerError(f"there is no event log for {storing.type}", outcome=Outcome.NOT_RUN)
    key = _key(storing, key_field)
    partition = partition_of(storing.id if key is None else key, partitions_in(info.config))
    return await _store(jetstream, names.event(storing.type, partition), storing, key)


def _key(storing: Storing, field: str | None) -> str | None:
    if storing.key is not None or field is None:
        return storing.key
    try:
        value = storing.key_of(field)
    except (AttributeError, KeyError, TypeError):
        raise InvalidMessageError(
            f"{storing.type} is partitioned by {field!r}, which it does not have: add it, or give --key",
            outcome=Outcome.NOT_RUN,
        ) from None
    return None if value is None else key_as_text(value)


async def _store(jetstream: JetStream, subject: str, storing: Storing, key: str | None) -> Stored:
    frame = MessageFrame(storing.id, storing.type, key, None, 1, None, msgspec.Raw(storing.body))
    payload = record_of(_SENDER, [frame])
    ack = await repeat(
        lambda: jetstream.publish(subject, payload, message_id=f"{_SENDER}.{storing.id}"),
        Pauses(random.Random()),
        seconds=storing.timeout,
    )
    return Stored(ack.stream, ack.sequence, 0, ack.duplicate)


def body_of(json_text: bytes) -> tuple[bytes, Callable[[str], Any]]:
    """Return the MessagePack of a JSON object, and what returns its fields.

    Raises:
        InvalidMessageError: It is no object.
    """
    value = msgspec.json.decode(json_text)
    if not isinstance(value, dict):
        raise InvalidMessageError("a message is a JSON object, with a member for each field", outcome=Outcome.NOT_RUN)
    return _encode(value), value.__getitem__


async def durable_route(jetstream: JetStream, names: Names, type_name: str, timeout: float) -> Route | None:
    """Return the route of an event that is stored; None for one that is not, and where nothing is stored at all."""
    try:
        route = await find_route(jetstream, names, type_name, timeout)
    except JetStreamUnknownError:
        return None
    return route if route is not None and route.kind == "event" and route.durable else None
