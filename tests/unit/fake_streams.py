"""A JetStream of a few lines whose publish does what a test says: the rest of the seam is not there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from catga_bus.transport.jetstream import JetStreamUnknownError, PubAck, StoredMessage, StreamConfig, StreamInfo
from catga_bus.wire import MessageBatch, MessageFrame

_decode = msgspec.msgpack.Decoder(MessageBatch).decode

Act = Callable[["FakeStreams", str], Awaitable[None]]
"""Awaited before a publish is stored, with its message id; what it raises is what the publish raises."""


class FakeStreams:
    """Streams that store what is published, by the first two tokens after the namespace.

    Attributes:
        stored: What was stored, in order: subject, id and payload.
        act: What happens before each publish; None for nothing.
        written: Ids in the order in which they were written, attempts included.
        in_flight: Publishes that have begun and not ended, by subject.
        most_in_flight: The most of one subject at a time.
    """

    def __init__(self) -> None:
        self.stored: list[StoredMessage] = []
        self.act: Act | None = None
        self.act_after: Act | None = None
        self.written: list[str] = []
        self.in_flight: dict[str, int] = {}
        self.most_in_flight = 0
        self.kv: dict[str, StoredMessage] = {}
        self.streams: dict[str, StreamConfig] = {}
        self.reads = 0

    async def publish(
        self, subject: str, payload: bytes, *, message_id: str = "", timeout: float = 2.0, **_: Any
    ) -> PubAck:
        self.written.append(message_id)
        self.in_flight[subject] = self.in_flight.get(subject, 0) + 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight[subject])
        try:
            await asyncio.sleep(0)
            if self.act is not None:
                await self.act(self, message_id)
            for message in self.stored:
                if message.headers["id"] == message_id:
                    ack = PubAck("s", message.sequence, duplicate=True)
                    break
            else:
                ack = PubAck("s", len(self.stored) + 1)
                self.stored.append(StoredMessage(subject, ack.sequence, payload, {"id": message_id}, 0.0))
            if self.act_after is not None:
                await self.act_after(self, message_id)
            return ack
        finally:
            self.in_flight[subject] -= 1

    async def stream(self, name: str) -> StreamInfo | None:
        config = self.streams.get(name)
        return None if config is None else StreamInfo(config, 0, 0, 0, 0, 0)

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        self.reads += 1
        if self.act is not None and stream.startswith("KV_"):
            await self.act(self, "kv")
        return self.kv.get(subject)

    def frames(self) -> list[MessageFrame]:
        """Return all frames that are stored, in order."""
        return [frame for message in self.stored for frame in batch(message.payload).frames]


def batch(payload: bytes) -> MessageBatch:
    """Return what a record holds."""
    return _decode(payload[2:])


async def lost(_: FakeStreams, __: str) -> None:
    """Have the answer never come."""
    raise JetStreamUnknownError("no answer")
