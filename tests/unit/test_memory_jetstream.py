"""JetStream of the broker in memory where it is more than the model: loops, threads, failures and odd requests."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import Received, RecordedEvents, broker_of, eventually
from catga_bus.transport.asking import ask
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    DeliveredMessage,
    JetStream,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.memory import MemoryTransport

QUEUE = StreamConfig(name="s", subjects=("s.*",), retention="workqueue")


class Link:
    def __init__(self, transport: MemoryTransport) -> None:
        self.transport = transport
        self.jetstream: JetStream = make_jetstream(transport, monotonic)

    async def close(self) -> None:
        await self.jetstream.close()
        await self.transport.close()


async def a_link(url: str) -> Link:
    transport = MemoryTransport(ConnectionOptions(urls=(url,)), RecordedEvents())
    await transport.connect()
    return Link(transport)


@pytest.fixture
async def connect(url: str) -> AsyncIterator[Callable[[], Awaitable[Link]]]:
    async with AsyncExitStack() as stack:

        async def connect() -> Link:
            link = await a_link(url)
            stack.push_async_callback(link.close)
            return link

        yield connect


def in_a_loop_of_its_own(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run something on a new event loop in a new thread; return what it returned."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(work())))  # type: ignore[arg-type]
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive()
    return found[0]


async def test_what_is_stored_is_there_for_every_connection_until_the_last_is_closed(
    url: str, connect: Callable[[], Awaitable[Link]]
) -> None:
    one, other = await a_link(url), await a_link(url)
    await one.jetstream.create_stream(QUEUE)
    await one.jetstream.publish("s.0", b"")
    await one.close()
    assert await other.jetstream.message("s", 1) is not None
    await other.close()
    again = await connect()
    assert await again.jetstream.stream_names() == []


async def test_two_loops_in_two_threads_work_on_one_stream(url: str, connect: Callable[[], Awaitable[Link]]) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",), max_ack_pending=10_000))
    got: list[DeliveredMessage] = []
    consumption = await here.jetstream.consume("s", "c", got.append, lambda _, __: None)
    consumption.pull(2_000)

    async def publish() -> list[int]:
        link = await a_link(url)
        acks = await asyncio.gather(*(link.jetstream.publish(f"s.{n % 3}", b"%d" % n) for n in range(1_000)))
        await link.close()
        return [ack.sequence for ack in acks]

    mine = [asyncio.ensure_future(here.jetstream.publish("s.9", b"")) for _ in range(200)]
    theirs = await asyncio.to_thread(in_a_loop_of_its_own, publish)
    acks = await asyncio.gather(*mine)
    assert sorted([*theirs, *(ack.sequence for ack in acks)]) == list(range(1, 1_201))
    await eventually(lambda: len(got) == 1_200)
    assert [message.sequence for message in got] == list(range(1, 1_201))


async def test_time_goes_on_when_the_loop_that_kept_it_is_gone(
    url: str, connect: Callable[[], Awaitable[Link]]
) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",), ack_wait=0.3))

    async def publish_and_die() -> None:
        link = await a_link(url)
        puller = Received()
        await link.transport.subscribe("there", puller)
        link.transport.publish("$JS.API.CONSUMER.MSG.NEXT.s.c", b'{"batch":1,"expires":60000000000}', reply="there")
        await link.jetstream.publish("s.0", b"")
        await puller.wait(1)
        # Its loop ends without a word, and the timer of the redelivery with it.

    await asyncio.to_thread(in_a_loop_of_its_own, publish_and_die)
    got: list[DeliveredMessage] = []
    (await here.jetstream.consume("s", "c", got.append, lambda _, __: None)).pull(1)
    await eventually(lambda: got)
    assert got[0].deliveries == 2


async def test_a_stalled_broker_lets_no_time_pass(url: str, connect: Callable[[], Awaitable[Link]]) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",), ack_wait=0.05))
    got: list[DeliveredMessage] = []
    (await here.jetstream.consume("s", "c", got.append, lambda _, __: None)).pull(5)
    await here.jetstream.publish("s.0", b"")
    await eventually(lambda: got)
    broker_of(url).stall()
    await asyncio.sleep(0.2)
    assert len(got) <= 2
    stalled = len(got)
    await asyncio.sleep(0.1)
    assert len(got) == stalled
    broker_of(url).resume()
    await eventually(lambda: len(got) > stalled)


async def test_a_puller_that_listens_no_more_gets_nothing_and_loses_nothing(
    connect: Callable[[], Awaitable[Link]],
) -> None:
    here, other = await connect(), await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",)))
    gone = await other.jetstream.consume("s", "c", lambda _: None, lambda _, __: None)
    gone.pull(5)
    await other.transport.flush()
    await other.close()
    await here.jetstream.publish("s.0", b"")
    info = await here.jetstream.consumer("s", "c")
    assert info is not None
    assert (info.ack_pending, info.pending) == (0, 1)


async def test_a_broker_that_was_cut_has_forgotten_who_pulls_and_nothing_else(
    url: str, connect: Callable[[], Awaitable[Link]]
) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",)))
    got: list[DeliveredMessage] = []
    consumption = await here.jetstream.consume("s", "c", got.append, lambda _, __: None)
    consumption.pull(5)
    await here.jetstream.publish("s.0", b"a")
    await eventually(lambda: got)
    broker_of(url).cut()
    with pytest.raises(JetStreamUnknownError):
        await here.jetstream.publish("s.0", b"lost")
    broker_of(url).heal()
    await here.jetstream.publish("s.0", b"b")
    info = await here.jetstream.consumer("s", "c")
    assert info is not None
    assert (info.ack_pending, info.pending, len(got)) == (1, 1, 1)
    consumption.pull(5)
    await eventually(lambda: [message.payload for message in got] == [b"a", b"b"])


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("STREAM.CREATE.s", b"not json"),
        ("STREAM.CREATE.s", b"[]"),
        ("STREAM.CREATE.s", b"{}"),
        ("STREAM.MSG.GET.s", b"{}"),
        ("STREAM.MSG.GET", b"{}"),
        ("CONSUMER.INFO.s", b""),
        ("CONSUMER.CREATE.s.c", b'{"config":7}'),
    ],
)
async def test_a_bad_request_is_answered(connect: Callable[[], Awaitable[Link]], operation: str, body: bytes) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    reply = await ask(here.transport, f"$JS.API.{operation}", body, 5.0)
    assert reply is not None
    assert b'"err_code":10003' in reply.payload


@pytest.mark.parametrize(
    "subject", ["$JS.API.NOTHING", "$JS.API.STREAM.SOMETHING.s", "$JS.FC.x", "$JS.ACK.s.c.1.1.1.1.1"]
)
async def test_what_the_model_does_not_know_reaches_nobody(
    connect: Callable[[], Awaitable[Link]], subject: str
) -> None:
    here = await connect()
    reply = await ask(here.transport, subject, b"", 5.0)
    assert reply is not None
    assert reply.is_no_responders


@pytest.mark.parametrize("payload", [b"-NAK", b"+WPI", b"+TERM"])
async def test_what_is_no_acknowledgement_leaves_a_message_out(
    connect: Callable[[], Awaitable[Link]], payload: bytes
) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",)))
    got: list[DeliveredMessage] = []
    (await here.jetstream.consume("s", "c", got.append, lambda _, __: None)).pull(5)
    await here.jetstream.publish("s.0", b"")
    await eventually(lambda: got)
    here.transport.publish(got[0].reply, payload)
    await here.transport.flush()
    info = await here.jetstream.consumer("s", "c")
    assert info is not None
    assert info.ack_pending == 1


async def test_a_pull_that_cannot_be_read_is_a_bad_request(connect: Callable[[], Awaitable[Link]]) -> None:
    here = await connect()
    await here.jetstream.create_stream(QUEUE)
    await here.jetstream.create_consumer("s", ConsumerConfig(name="c", filters=("s.*",)))
    for body in (b"", b"x", b"{}"):
        reply = await ask(here.transport, "$JS.API.CONSUMER.MSG.NEXT.s.c", body, 5.0)
        assert reply is not None
        assert reply.headers["Status"] == "400"


async def test_a_malformed_acknowledgement_reaches_nobody(connect: Callable[[], Awaitable[Link]]) -> None:
    here = await connect()
    for subject in ("$JS.ACK.s", "$JS.ACK.s.c.1.x.1.1.1"):
        reply = await ask(here.transport, subject, b"+ACK", 5.0)
        assert reply is not None
        assert reply.is_no_responders
