"""JetStream on three servers: what is new takes a moment, and a leader that is killed leaves everybody unsure."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.asking import ask
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    DeliveredMessage,
    JetStream,
    JetStreamUnknownError,
    PubAck,
    StreamConfig,
)
from catga_bus.transport.key_value import Entry, KeyValue
from catga_bus.transport.nats_core import NatsTransport
from tests.patience import certain, pull_until
from tests.servers import NatsServer, start_cluster

pytestmark = [pytest.mark.nats, pytest.mark.slow]


class Events(RecordedEvents):
    def __init__(self) -> None:
        super().__init__()
        self.jetstream: JetStream

    def on_disconnected(self, reason: str) -> None:
        super().on_disconnected(reason)
        self.jetstream.disconnected()


@pytest.fixture
def servers(start_server: Callable[..., NatsServer]) -> list[NatsServer]:
    return start_cluster(start_server, 3, jetstream=True)


@pytest.fixture
async def transport(servers: list[NatsServer]) -> AsyncIterator[NatsTransport]:
    urls = tuple(server.url for server in servers)
    events = Events()
    transport = NatsTransport(ConnectionOptions(urls=urls, reconnect_delay=0.02), events)
    events.jetstream = make_jetstream(transport, monotonic)
    await transport.connect()
    yield transport
    await transport.close()


@pytest.fixture
async def js(transport: NatsTransport) -> AsyncIterator[JetStream]:
    events = transport._connection._events
    assert isinstance(events, Events)
    await certain(events.jetstream.account)
    yield events.jetstream
    await events.jetstream.close()


async def leader(transport: NatsTransport, servers: list[NatsServer], what: str) -> NatsServer:
    """Return who leads a stream or a consumer: `STREAM.INFO.s`, `CONSUMER.INFO.s.c`."""
    reply = await ask(transport, f"$JS.API.{what}", b"", 5.0)
    assert reply is not None
    return servers[int(msgspec.json.decode(reply.payload)["cluster"]["leader"].removeprefix("s"))]


async def test_a_new_consumer_is_pulled_from_at_once(js: JetStream) -> None:
    config = StreamConfig(name="s", subjects=("s.*",), retention="workqueue", replicas=3)
    await certain(lambda: js.create_stream(config))
    for number in range(16):
        await js.publish(f"s.{number}", b"x")
    got: list[DeliveredMessage] = []
    statuses: list[tuple[int, str]] = []

    async def claim(number: int) -> None:
        name = f"c{number}"
        await js.create_consumer("s", ConsumerConfig(name=name, filters=(f"s.{number}",)))
        consumption = await js.consume("s", name, got.append, lambda code, text: statuses.append((code, text)))
        consumption.pull(10)

    await asyncio.gather(*(claim(number) for number in range(16)))
    await eventually(lambda: len(got) == 16, 10.0)
    assert statuses == []
    for message in got:
        assert await js.acknowledge_confirmed(message.reply)
    info = await js.stream("s")
    assert info is not None
    assert info.messages == 0


async def test_a_killed_leader_loses_nothing_and_doubles_nothing(
    js: JetStream, transport: NatsTransport, servers: list[NatsServer]
) -> None:
    config = StreamConfig(name="s", subjects=("s.*",), replicas=3)
    await certain(lambda: js.create_stream(config))
    bucket = KeyValue(js, "b", replicas=3)
    await certain(bucket.open)
    assert await bucket.write("k", b"before", 0) == 1
    unknown: Counter[str] = Counter()
    acks: dict[int, PubAck] = {}

    async def publish(number: int) -> None:
        message_id = secrets.token_hex(8)
        acks[number] = await certain(
            lambda: js.publish("s.0", b"%d" % number, message_id=message_id, timeout=1.0), unknown
        )

    for number in range(100):
        await publish(number)
    assert not unknown
    doomed = await leader(transport, servers, "STREAM.INFO.s")
    waiting = [asyncio.ensure_future(publish(number)) for number in range(100, 200)]
    await asyncio.sleep(0)
    doomed.kill()
    await asyncio.gather(*waiting)
    assert unknown
    for number in range(200, 220):
        await publish(number)
    doomed.start()
    last = max(ack.sequence for ack in acks.values())
    found = [await certain(lambda place=place: js.message("s", place)) for place in range(1, last + 1)]  # type: ignore[misc]
    stored = Counter(message.payload for message in found if message is not None)
    assert stored == Counter(b"%d" % number for number in range(220))
    assert last == len({ack.sequence for ack in acks.values()}) == 220
    entry = await certain(lambda: bucket.read("k"))
    assert entry == Entry(b"before", 1)
    assert await certain(lambda: bucket.write("k", b"after", 1)) == 2


async def test_a_puller_learns_that_its_leader_is_gone(
    js: JetStream, transport: NatsTransport, servers: list[NatsServer]
) -> None:
    await certain(
        lambda: js.create_stream(StreamConfig(name="s", subjects=("s.*",), retention="workqueue", replicas=3))
    )
    await js.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",)))
    await js.publish("s.0", b"a")
    got: list[DeliveredMessage] = []
    statuses: list[int] = []
    consumption = await js.consume("s", "c", got.append, lambda code, _: statuses.append(code), idle=0.5)
    consumption.pull(10)
    await eventually(lambda: got)
    (await leader(transport, servers, "CONSUMER.INFO.s.c")).kill()
    before = monotonic()

    def knows() -> bool:
        is_silent = monotonic() - consumption.heard_at > 1.0
        return 409 in statuses or 503 in statuses or is_silent or consumption.credit == 0

    await eventually(knows, 5.0)
    assert monotonic() - before < 5.0
    await certain(lambda: js.publish("s.0", b"b", message_id="b", timeout=1.0))
    # Its owner starts over with another consumer, and gets all that was not acknowledged.
    await certain(lambda: js.delete_consumer("s", "c"))
    await certain(lambda: js.create_consumer("s", ConsumerConfig(name="d", filters=("s.*",))))
    again: list[DeliveredMessage] = []
    await consumption.close()
    fresh = await js.consume("s", "d", again.append, lambda _, __: None)
    await pull_until(fresh, 10, lambda: [message.payload for message in again] == [b"a", b"b"])


async def test_a_new_consumer_may_have_no_leader_for_a_while_and_says_so(
    js: JetStream, transport: NatsTransport, servers: list[NatsServer]
) -> None:
    """The server draws its first leader from all, one that has just died included."""
    await certain(
        lambda: js.create_stream(StreamConfig(name="s", subjects=("s.*",), retention="workqueue", replicas=3))
    )

    async def create(number: int) -> bool:
        config = ConsumerConfig(name=f"c{number}", filters=(f"s.{number}",), max_ack_pending=10)
        try:
            info = await js.create_consumer("s", config, timeout=0.5)
        except JetStreamUnknownError:
            info = await certain(lambda: js.create_consumer("s", config))
        return info.has_leader

    assert [await create(number) for number in range(5)] == [True] * 5
    (await leader(transport, servers, "STREAM.INFO.s")).kill()
    await certain(lambda: js.message("s", 1))  # the stream has a leader again
    for number in range(5, 65):
        if not await create(number):
            break
    else:
        pytest.fail("the dead server was never drawn, of 60 times")
    async with asyncio.timeout(30.0):
        while not await create(number):
            await asyncio.sleep(0.2)
