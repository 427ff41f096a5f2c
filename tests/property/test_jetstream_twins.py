"""The broker in memory and nats-server, side by side: whatever is done to both, both say and deliver the same."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.base import ConnectionOptions, Transport
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    Consumption,
    DeliveredMessage,
    JetStream,
    JetStreamRefusedError,
    StreamConfig,
)
from catga_bus.transport.memory import MemoryTransport
from catga_bus.transport.nats_core import NatsTransport
from tests.servers import NatsServer

SUBJECTS = ("s.0", "s.1", "s.2")
FILTERS = (("s.0",), ("s.1",), ("s.0", "s.1"), ("s.*",), ("s.2",))
STEPS = 150
ROOM = 12
PATIENCE = 2.0


@dataclass
class Side:
    """One of the two, and what it has delivered by consumer."""

    jetstream: JetStream
    transport: Transport
    delivered: dict[str, list[DeliveredMessage]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    consumptions: dict[str, Consumption] = field(default_factory=dict)

    async def consume(self, name: str) -> None:
        messages: list[DeliveredMessage] = []
        statuses: list[int] = []
        self.delivered[name], self.statuses[name] = messages, statuses
        self.consumptions[name] = await self.jetstream.consume(
            "s", name, messages.append, lambda code, _: statuses.append(code), idle=60.0
        )

    def credits(self) -> dict[str, int]:
        return {name: consumption.credit for name, consumption in self.consumptions.items()}

    def seen(self) -> dict[str, list[tuple[Any, ...]]]:
        return {
            name: [
                (each.subject, each.payload, each.headers, each.sequence, each.consumer_sequence, each.deliveries)
                for each in messages
            ]
            for name, messages in self.delivered.items()
        }


async def outcome(call: Any) -> Any:
    """Return what came of a call, without what cannot be the same."""
    try:
        return await call
    except JetStreamRefusedError as error:
        return error.code, error.text


async def view(side: Side) -> Any:
    """Return all that can be looked at."""
    stream = await side.jetstream.stream("s")
    assert stream is not None
    names = await side.jetstream.consumer_names("s")
    consumers = []
    for name in names:
        info = await side.jetstream.consumer("s", name)
        assert info is not None
        consumers.append((name, info.ack_floor, info.delivered, info.ack_pending, info.pending))
    return stream.messages, stream.bytes, stream.first_sequence, stream.last_sequence, consumers


class Script:
    """Draws what is done next; everything it draws is the same for both."""

    def __init__(self, rng: random.Random, memory: Side, server: Side) -> None:
        self.rng = rng
        self.memory = memory
        self.server = server
        self.made = 0
        self.log: list[str] = []

    async def both(self, what: str, call: Callable[[Side], Any]) -> Any:
        self.log.append(what)
        mine, its = await outcome(call(self.memory)), await outcome(call(self.server))
        if mine != its:
            raise AssertionError(f"memory {mine}, server {its} after {self.log[-60:]}")
        return mine

    async def publish(self) -> None:
        subject, payload = self.rng.choice(SUBJECTS), b"%d" % self.rng.randrange(1_000)
        message_id = self.rng.choice(["", "", f"id{self.rng.randrange(20)}"])
        expected = self.rng.choice([None, None, 0, self.rng.randrange(40)])

        async def call(side: Side) -> Any:
            ack = await side.jetstream.publish(subject, payload, message_id=message_id, expected_last=expected)
            return ack.sequence, ack.duplicate

        await self.both(f"publish {subject} id={message_id} last={expected}", call)

    async def publish_many(self) -> None:
        for _ in range(4):
            await self.publish()

    async def create(self) -> None:
        self.made += 1
        name, filters = f"c{self.made}", self.rng.choice(FILTERS)
        config = ConsumerConfig(name=name, filters=filters, max_ack_pending=self.rng.choice([1, 3, 100]))

        async def call(side: Side) -> Any:
            await side.jetstream.create_consumer("s", config)

        if await self.both(f"create {name} {filters} {config.max_ack_pending}", call) is None:
            for side in (self.memory, self.server):
                await side.consume(name)

    async def delete(self) -> None:
        if names := list(self.memory.delivered):
            name = self.rng.choice(names)
            await self.both(f"delete {name}", lambda side: side.jetstream.delete_consumer("s", name))

    async def pull(self) -> None:
        names = await self.memory.jetstream.consumer_names("s")
        if names:
            name, batch = self.rng.choice(names), self.rng.randrange(1, 6)
            self.log.append(f"pull {name} {batch}")
            for side in (self.memory, self.server):
                side.consumptions[name].pull(batch)

    async def acknowledge(self) -> None:
        delivered = [
            (name, place) for name, messages in self.memory.delivered.items() for place in range(len(messages))
        ]
        if delivered:
            name, place = self.rng.choice(delivered[-8:])

            def call(side: Side) -> Any:
                return side.jetstream.acknowledge_confirmed(side.delivered[name][place].reply)

            await self.both(f"acknowledge {name} {place}", call)

    async def purge(self) -> None:
        # Not of one subject: a consumer that reads more than is purged finds out little by little on the server.
        subject = self.rng.choice(["s.*", ""])
        await self.both(f"purge {subject}", lambda side: side.jetstream.purge("s", subject=subject))

    async def erase(self) -> None:
        sequence = self.rng.randrange(1, 60)
        await self.both(f"erase {sequence}", lambda side: side.jetstream.delete_message("s", sequence))

    async def run(self) -> None:
        actions = [
            *([self.publish_many] * 4),
            *([self.pull] * 6),
            *([self.acknowledge] * 8),
            *([self.create] * 3),
            *([self.delete] * 1),
            self.purge,
            self.erase,
        ]
        for _ in range(STEPS):
            await self.rng.choice(actions)()
            await self.settle()

    async def settle(self) -> None:
        await self.memory.transport.flush()
        await self.server.transport.flush()
        try:
            await eventually(lambda: self.memory.seen() == self.server.seen(), PATIENCE, what="the same deliveries")
        except AssertionError as error:
            mine, its = self.memory.seen(), self.server.seen()
            differing = {name: (mine[name], its[name]) for name in mine if mine[name] != its[name]}
            raise AssertionError(f"memory and server delivered {differing} after {self.log[-60:]}") from error
        mine = await view(self.memory)
        deadline = monotonic() + PATIENCE
        while mine != (its := await view(self.server)) and monotonic() < deadline:
            # The server counts what is pending on the way, and now and then behind.
            await asyncio.sleep(0.01)
        if mine != its:
            raise AssertionError(f"memory {mine}, server {its} after {self.log[-60:]}")
        await eventually(lambda: self.memory.credits() == self.server.credits(), PATIENCE, what="the same credit")


@pytest.fixture
async def sides(start_server: Callable[..., NatsServer]) -> AsyncIterator[tuple[Side, Side]]:
    server = start_server(jetstream=True)
    async with AsyncExitStack() as stack:
        made = []
        memory_options = ConnectionOptions(urls=(f"memory://{secrets.token_hex(4)}",))
        for transport in (
            MemoryTransport(memory_options, RecordedEvents()),
            NatsTransport(ConnectionOptions(urls=(server.url,)), RecordedEvents()),
        ):
            await transport.connect()
            stack.push_async_callback(transport.close)
            jetstream = make_jetstream(transport, monotonic)
            stack.push_async_callback(jetstream.close)
            made.append(Side(jetstream, transport))
        yield made[0], made[1]


@pytest.mark.nats
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {"retention": "workqueue"},
        {"retention": "workqueue", "discard": "new", "max_bytes": ROOM * 40},
        {"retention": "limits"},
        {"retention": "limits", "max_bytes": ROOM * 40, "storage": "memory"},
        {"retention": "limits", "max_messages_per_subject": 3},
    ],
    ids=["queue", "small queue", "log", "small log", "short log"],
)
async def test_both_say_and_deliver_the_same(sides: tuple[Side, Side], options: dict[str, Any], seed: int) -> None:
    memory, server = sides
    config = StreamConfig(name="s", subjects=("s.*",), **options)
    for side in sides:
        await side.jetstream.create_stream(config)
    async with asyncio.timeout(60.0):
        await Script(random.Random(seed), memory, server).run()
