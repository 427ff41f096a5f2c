"""Replays a time range of the event log to one service: its frames are put on the service's work queue.

Decided: events keep their ids unless they are asked to run again. A service whose inbox has done an event answers from
its mark, so a replay fills in what the service has missed, or what a store that was lost no longer knows, and nothing
is done twice. `again` gives each event the id `<id>~<replay>`: then all of them run, once for each name of a replay,
and what they send has new ids as well. A service without an inbox runs all of them either way.

Records have ids of the replay's name and their place in the log. A replay that is cut off and goes on under its name,
from the place that it had come to, stores nothing twice within the two minutes that the server remembers.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from hashlib import blake2b
from typing import Final

import msgspec

from catga_bus.codec import Gate, GateError
from catga_bus.durability.letters.log_reader import Range
from catga_bus.durability.letters.work_queue import BATCH_BYTES, BATCH_RECORDS, Queued, WorkQueue, record_of
from catga_bus.errors import CatgaError, InvalidMessageError
from catga_bus.partition.hashing import partition_of
from catga_bus.transport.jetstream import DeliveredMessage, JetStream
from catga_bus.wire import MAX_ID, Kind, MessageFrame, Names

MAX_NAME: Final = 32
"""Characters of the name of a replay; it is part of ids."""


class ReplayPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is replayed."""

    name: str
    """Of this replay, 1 to `MAX_NAME` characters: the same name goes on with the same replay."""

    types: tuple[str, ...]
    """Names of event types."""

    start_utc: float
    """Seconds since 1970; by the clock of the server that stored the events, as is `until_utc`."""

    until_utc: float
    start_sequence: int = 0
    """Where to go on in the log; 0 to begin by `start_utc`."""

    again: bool = False
    """Whether events run again that the service has done."""


class ReplayProgress(msgspec.Struct, frozen=True):
    """How far a replay is."""

    events: int
    """That were put on the work queue."""

    records: int
    """Of the log that were read."""

    unreadable: int
    """Records of the log, or events in them, that cannot be replayed."""

    sequence: int
    """Of the last record of the log whose events are stored; 0 before the first."""

    utc: float
    """When that was stored: seconds since 1970."""


async def replay(
    jetstream: JetStream,
    names: Names,
    queue: WorkQueue,
    plan: ReplayPlan,
    on_progress: Callable[[ReplayProgress], None] = lambda _: None,
) -> ReplayProgress:
    """Put the events of a range on a work queue, in the order of the log.

    It ends at the last event that lies in the log when it begins, whatever `until_utc` says. It waits while more than
    half of the queue is filled.

    Args:
        jetstream: Has the log and the queue.
        names: The names.
        queue: Of the service.
        plan: What.
        on_progress: Told after every few records; its `sequence` is where to go on after a failure.

    Raises:
        CatgaError: The log cannot be read, or the queue cannot be written.
    """
    progress = ReplayProgress(0, 0, 0, 0, 0.0)
    gate = Gate()
    batch: list[Queued] = []
    async with aclosing(await _read(jetstream, names, plan)) as messages:
        async for message in messages:
            if message.time > plan.until_utc:
                break
            records, events, unreadable = records_of(message, plan, queue.partitions, gate)
            batch += records
            progress = ReplayProgress(
                progress.events + events,
                progress.records + 1,
                progress.unreadable + unreadable,
                message.sequence,
                message.time,
            )
            if len(batch) >= BATCH_RECORDS or sum(len(record.payload) for record in batch) >= BATCH_BYTES:
                await _put(queue, batch)
                on_progress(progress)
    await _put(queue, batch)
    on_progress(progress)
    return progress


async def _put(queue: WorkQueue, batch: list[Queued]) -> None:
    await queue.wait_for_room()
    await queue.put_all(batch)
    batch.clear()


async def _read(jetstream: JetStream, names: Names, plan: ReplayPlan) -> AsyncGenerator[DeliveredMessage, None]:
    stream = names.event_stream()
    info = await jetstream.stream(stream)
    if info is None:
        raise CatgaError(f"there is no event log: stream {stream} does not exist")
    filters = tuple(dict.fromkeys(names.events_of(name) for name in plan.types))
    reading = Range(
        jetstream,
        stream,
        filters,
        through=info.last_sequence if info.messages else 0,
        start_sequence=plan.start_sequence,
        start_utc=plan.start_utc,
    )
    return reading.read()


def records_of(
    message: DeliveredMessage, plan: ReplayPlan, partitions: int, gate: Gate
) -> tuple[list[Queued], int, int]:
    """Return what is put on the work queue for one record of the log. Pure.

    Args:
        message: The record.
        plan: What is replayed.
        partitions: P of the work queue.
        gate: Judges what was stored.

    Returns:
        A record for each partition that its events belong to, the number of events, and how many cannot be replayed.
    """
    try:
        if gate.kind(message.payload) != Kind.MESSAGES:
            return [], 0, 1
        batch = gate.messages(message.payload)
    except GateError:
        return [], 0, 1
    parts: dict[int, list[MessageFrame]] = {}
    events = unreadable = 0
    for frame in batch.frames:
        if frame.type not in plan.types:
            continue  # of another type whose token is the same
        try:
            partition = partition_of(frame.id if frame.key is None else frame.key, partitions)
        except InvalidMessageError:
            unreadable += 1
            continue
        parts.setdefault(partition, []).append(_renamed(frame, plan) if plan.again else frame)
        events += 1
    records = [
        Queued(
            partition,
            record_of(batch.head.sender, frames),
            f"{plan.name}.{message.sequence}.{partition}",
        )
        for partition, frames in parts.items()
    ]
    return records, events, unreadable


def _renamed(frame: MessageFrame, plan: ReplayPlan) -> MessageFrame:
    """Give an event an id of this replay, so that nobody has done it."""
    ending = f"~{plan.name}"
    name = frame.id
    if len(name) + len(ending) > MAX_ID:
        name = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return msgspec.structs.replace(frame, id=name + ending)
