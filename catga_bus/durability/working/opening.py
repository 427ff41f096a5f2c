"""Opening: from the bytes of a stored record to the jobs in it, whatever the bytes are."""

import msgspec

from catga_bus.codec import GateError
from catga_bus.durability.inbox.addresses import is_too_old
from catga_bus.durability.letters.letters import Reason
from catga_bus.durability.working.jobs import Doom, Hands, Job
from catga_bus.durability.working.shop import Shop
from catga_bus.partition.lanes import Record
from catga_bus.transport.jetstream import DeliveredMessage
from catga_bus.wire import PREFIX, VERSION, Kind, MessageBatch, MessageFrame, token


def open_record(shop: Shop, hands: Hands, message: DeliveredMessage, *, stream: str, by_type: bool) -> Record:
    """Return a record with its jobs.

    One that cannot be read has a single job, which stands for the whole of it and is doomed; one of a newer wire
    version a job without a place.

    Args:
        shop: What is handled here.
        hands: Through which its jobs pass.
        message: The record.
        stream: Where it lies.
        by_type: Whether its subject names the type of all of its frames.
    """
    try:
        batch = _batch(shop, message.payload)
    except GateError as error:
        is_newer = message.payload[:1] == PREFIX[:1] and message.payload[1:2] > bytes((VERSION,))
        return _closed(hands, message, stream, None if is_newer else Doom(Reason.UNDECODABLE, str(error)))
    head = batch.head
    reply = head.reply if head.reply is not None and shop.answers.allow(head.reply) else None
    record = Record(message, head.sender, reply, [], len(batch.frames))
    places = shop.places
    record.frames = [
        Job(
            record,
            index,
            frame,
            frame.id if frame.key is None else frame.key,
            hands=hands,
            place=places.get(frame.type),
        )
        for index, frame in enumerate(batch.frames)
    ]
    if by_type:
        _check_types(record)
    if shop.inbox is not None and is_too_old(shop.inbox, message.time, shop.utc()):
        for job in record.frames:
            text = f"it may have been done and forgotten: the inbox remembers for {shop.inbox.retention:,.0f} s"
            job.doom = Doom(Reason.EXPIRED, text)
    return record


def _batch(shop: Shop, payload: bytes) -> MessageBatch:
    kind = shop.gate.kind(payload)
    if kind != Kind.MESSAGES:
        raise GateError(f"a payload of kind {kind}, not of messages")
    return shop.gate.messages(payload)


def _closed(hands: Hands, message: DeliveredMessage, stream: str, doom: Doom | None) -> Record:
    """Return a record that cannot be read, as one job."""
    name = f"{stream}.{message.sequence}"
    frame = MessageFrame(name, "", None, None, 1, None, msgspec.Raw(message.payload))
    record = Record(message, "", None, [], 1)
    record.frames = [Job(record, 0, frame, name, hands=hands, doom=doom)]
    return record


def _check_types(record: Record) -> None:
    """Doom what is not of the type that its subject names: the server's permissions are about subjects."""
    named = record.message.subject.split(".")[-2]
    for job in record.frames:
        own = job.place.token if job.place is not None else token(job.message.type)
        if own != named:
            job.doom = Doom(Reason.INVALID, f"type {job.message.type!r} on a subject of {named!r}")
