"""What the scripts of JetStream's contract work with: connections, consumers at work, and questions asked again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Final, TypeVar

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing.carrier import Carrier, RecordedEvents
from catga_bus.testing.waiting import eventually
from catga_bus.transport.base import Transport
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    Consumption,
    DeliveredMessage,
    JetStream,
    JetStreamRefusedError,
    StreamConfig,
)

QUEUE: Final = StreamConfig(name="s", subjects=("s.*",), retention="workqueue")
LOG: Final = StreamConfig(name="s", subjects=("s.*",))

T = TypeVar("T")


class Puller:
    """A consumer at work, and what it got."""

    def __init__(self) -> None:
        self.messages: list[DeliveredMessage] = []
        self.statuses: list[tuple[int, str]] = []
        self.consumption: Consumption

    def on_status(self, code: int, text: str) -> None:
        """Keep one status."""
        self.statuses.append((code, text))

    @property
    def payloads(self) -> list[bytes]:
        """What came, in order."""
        return [message.payload for message in self.messages]

    @property
    def sequences(self) -> list[int]:
        """Which, in order."""
        return [message.sequence for message in self.messages]

    async def wait(self, count: int) -> list[DeliveredMessage]:
        """Wait for so many messages."""
        await eventually(lambda: len(self.messages) >= count, what=f"{count} messages, got {self.payloads}")
        return self.messages

    async def status(self, code: int) -> str:
        """Wait for a status of this code; return its words."""

        def words() -> list[str]:
            return [text for each, text in self.statuses if each == code]

        return (await eventually(words, what=f"status {code}"))[0]


class Client:
    """A connection with JetStream on it."""

    def __init__(self, transport: Transport, jetstream: JetStream, events: RecordedEvents) -> None:
        self.events = events
        self.transport = transport
        self.jetstream = jetstream

    async def pull(self, consumer: str, batch: int, *, stream: str = "s", idle: float = 5.0) -> Puller:
        """Start a consumer at work."""
        puller = Puller()
        puller.consumption = await self.jetstream.consume(
            stream, consumer, puller.messages.append, puller.on_status, idle=idle
        )
        puller.consumption.pull(batch)
        return puller

    async def fill(self, *messages: str) -> None:
        """Store messages given as `subject` or `subject=payload`."""
        for message in messages:
            subject, _, payload = message.partition("=")
            await self.jetstream.publish(subject, payload.encode())

    async def queue(self, *filters: str, name: str = "c", **options: Any) -> None:
        """Make a consumer."""
        await self.jetstream.create_consumer("s", consumer_of(name, *filters, **options))

    async def is_empty(self) -> bool:
        """Return whether the stream holds nothing."""
        there = await self.jetstream.stream("s")
        return there is not None and there.messages == 0

    async def wait_floor(self, floor: int, pending: int) -> None:
        """Wait until a consumer's floor is this, and so much pending above it."""

        async def is_there() -> bool:
            return await self.floor() == (floor, pending)

        await until(is_there)

    async def floor(self, name: str = "c") -> tuple[int, int]:
        """Return the acknowledgement floor of a consumer, and what is pending above it."""
        info = await self.jetstream.consumer("s", name)
        assert info is not None
        return info.ack_floor, info.ack_pending


def consumer_of(name: str, *filters: str, **options: Any) -> ConsumerConfig:
    """Return the configuration of a consumer, of `s.0` by default."""
    return ConsumerConfig(name=name, filters=filters or ("s.0",), **options)


async def refused(call: Awaitable[object]) -> JetStreamRefusedError:
    """Return the refusal that a call has to end with."""
    with pytest.raises(JetStreamRefusedError) as caught:
        await call
    return caught.value


async def until(condition: Callable[[], Awaitable[bool]], timeout: float = 10.0) -> None:
    """Ask again and again until the answer is yes."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - it is the server that is asked
            await asyncio.sleep(0.02)


async def found(call: Callable[[], Awaitable[T | None]], timeout: float = 5.0) -> T:
    """Ask again and again until the answer is not None."""
    async with asyncio.timeout(timeout):
        while (value := await call()) is None:  # noqa: ASYNC110 - it is the server that is asked
            await asyncio.sleep(0.02)
    return value


class JetStreamScripts:
    """What every part of the contract starts from. The class that inherits gives the fixtures of the servers."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    @pytest.fixture
    def carrier(self) -> Carrier:
        """A server of the test's own, empty, with JetStream; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `carrier`")

    @pytest.fixture
    def no_jetstream(self) -> Carrier:
        """A server without JetStream; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `no_jetstream`")

    @pytest.fixture
    async def clients(self) -> AsyncIterator[AsyncExitStack]:
        """What has to be closed at the end."""
        async with AsyncExitStack() as stack:
            yield stack

    async def client(self, carrier: Carrier, clients: AsyncExitStack) -> Client:
        """Return a new connection."""
        transport, events = await carrier.connect()
        jetstream = make_jetstream(transport, monotonic)

        def lost(reason: str) -> None:
            events.disconnected.append(reason)
            jetstream.disconnected()

        events.on_disconnected = lost  # type: ignore[method-assign]
        clients.push_async_callback(jetstream.close)
        return Client(transport, jetstream, events)

    @pytest.fixture
    async def bus(self, carrier: Carrier, clients: AsyncExitStack) -> Client:
        """A connection to the server."""
        return await self.client(carrier, clients)

    @pytest.fixture
    def js(self, bus: Client) -> JetStream:
        """JetStream on that connection."""
        return bus.jetstream
