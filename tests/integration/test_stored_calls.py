"""Commands and events from caller to stream and back, on a real server and on the broker in memory."""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import Command, Err, Event, Ok
from catga_bus.clock import monotonic
from catga_bus.codec import Gate
from catga_bus.config import checked_config
from catga_bus.durability.routes.announcing import Announcer
from catga_bus.durability.routes.routes import Route, Routes, schema_hash
from catga_bus.durability.sending.schedule import Mover
from catga_bus.durability.sending.sender import Sender
from catga_bus.durability.streams.streams import Streams
from catga_bus.errors import (
    CallError,
    ConfigurationError,
    NoHandlerError,
    Outcome,
    OverloadedError,
    PermissionDeniedError,
)
from catga_bus.partition.hashing import partition_of
from catga_bus.testing import eventually
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream, make_transport
from catga_bus.transport.jetstream import ConsumerConfig, DeliveredMessage, JetStream
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import Kind, MessageFrame, Names, Status, join_batch
from tests.patience import certain, pull_until
from tests.servers import NatsServer, start_cluster
from tests.unit.fake_streams import batch

NAMES = Names("t")
P = 8


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int


class Credit(Command[int], partition_by="account"):
    account: str


class Debited(Event, partition_by="account"):
    account: str
    cents: int


class Node:
    """A connection with all that calls and their routes need, and a hand that answers what is stored."""

    def __init__(self, *urls: str, **options: Any) -> None:
        user = {name: options.pop(name) for name in ("user", "password") if name in options}
        self.transport = make_transport(ConnectionOptions(urls=urls, reconnect_delay=0.02, **user), self)
        self.config = checked_config(None, {"namespace": "t", "partitions": P, **options})
        self.types: set[str] = {"Debit", "Credit"}
        self.others: list[set[str]] = []
        self.denied: list[str] = []
        self.moving: asyncio.Task[None] | None = None
        self.js: JetStream
        self.sender: Sender

    def on_disconnected(self, _: str) -> None:
        self.js.disconnected()

    def on_reconnected(self, _: str) -> None:
        self.sender.reconnected()

    def on_denied(self, subject: str, _: str) -> None:
        self.denied.append(subject)
        self.sender.denied(subject)

    def on_error(self, text: str) -> None:
        del text

    async def start(self) -> "Node":
        await self.transport.connect()
        self.js = make_jetstream(self.transport, monotonic)
        self.routes = Routes(self.js, NAMES, monotonic)
        self.routes.listen_on(self.transport)
        rng = random.Random()
        self.sender = Sender(self.transport, self.js, self.routes, Gate(), NAMES, sender="n", clock=monotonic, rng=rng)
        await self.sender.start()
        self.streams = Streams(self.js, NAMES, "billing", self.config, monotonic)
        self.announcer = Announcer(
            self.js,
            KeyValue(self.js, NAMES.routes_bucket()),
            "billing",
            [route_of(cls) for cls in (Debit, Credit)],
            lambda: [self.types, *self.others],
            monotonic,
        )
        self.mover = Mover(self.js, NAMES, "billing", monotonic, rng)
        return self

    async def serve(self) -> "Node":
        """Make streams and routes."""
        await self.streams.ensure(commands=True, events=True)
        await self.announcer.tend()
        return self

    async def stop(self) -> None:
        if self.moving is not None:
            self.moving.cancel()
            await asyncio.wait({self.moving})
        await self.sender.close()
        await self.routes.close()
        await self.js.close()
        await self.transport.close()

    async def stored(self, stream: str) -> list[tuple[str, MessageFrame]]:
        """Return what lies in a stream, with its subjects."""
        reader = ConsumerConfig(name="reader", filters=(">",), max_ack_pending=1_000_000)
        await certain(lambda: self.js.create_consumer(stream, reader))
        # What a consumer says of itself may be old when it is asked for twice.
        left = (await certain(lambda: self.js.stream(stream))).messages
        found: list[tuple[str, MessageFrame]] = []

        def take(message: DeliveredMessage) -> None:
            nonlocal left
            left -= 1
            found.extend((message.subject, frame) for frame in batch(message.payload).frames)

        consumption = await self.js.consume(stream, "reader", take, lambda *_: None)
        if left:
            await pull_until(consumption, left, lambda: not left)
        await consumption.close()
        await certain(lambda: self.js.delete_consumer(stream, "reader"))
        return found

    async def handle(self, answer: Callable[[MessageFrame], tuple[Status, Any]]) -> None:
        """Answer all commands that come, as an owner of every partition would."""
        config = ConsumerConfig(name="all", filters=(NAMES.commands("billing"),))
        await self.js.create_consumer("t-cmd-billing", config)

        def take(message: DeliveredMessage) -> None:
            record = batch(message.payload)
            frames = []
            for frame in record.frames:
                status, body = answer(frame)
                frames.append(msgspec.msgpack.encode((frame.id, int(status), body, "n")))
            if record.head.reply is not None:
                self.transport.publish(record.head.reply, join_batch(Kind.ANSWERS, ("n", None, 0, 0), frames))
            self.js.acknowledge(message.reply)
            consumption.pull(1)

        consumption = await self.js.consume("t-cmd-billing", "all", take, lambda *_: None)
        consumption.pull(64)


def route_of(cls: Any, **changes: Any) -> Route:
    options = cls.__catga__
    route = Route(options.type_name, "command", "billing", P, options.partition_by, True, schema_hash(cls))
    return msgspec.structs.replace(route, **changes)


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid4().hex}"
    start: Callable[..., NatsServer] = request.getfixturevalue("start_server")
    return start(jetstream=True).url


@pytest.fixture
async def start_node() -> AsyncIterator[Callable[..., Any]]:
    nodes: list[Node] = []

    async def start(*urls: str, **options: Any) -> Node:
        nodes.append(await Node(*urls, **options).start())
        return nodes[-1]

    yield start
    for node in nodes:
        await node.stop()


async def becomes(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask again and again until something holds."""
    deadline = monotonic() + 10.0
    while not await condition():
        assert monotonic() < deadline, f"not within 10 s: {what}"
        await asyncio.sleep(0.01)


# -- there and back ----------------------------------------------------------------------------------------


async def test_commands_are_stored_in_order_and_answered(url: str, start_node: Callable[..., Any]) -> None:
    node = await (await start_node(url)).serve()
    caller = await start_node(url)
    seen: dict[str, list[int]] = defaultdict(list)

    def answer(frame: MessageFrame) -> tuple[Status, Any]:
        debit = msgspec.msgpack.decode(frame.body, type=Debit)
        seen[debit.account].append(debit.cents)
        if debit.cents == 13:
            return Status.REFUSED, ("UNLUCKY", "no", {"cents": 13}, False)
        return Status.OK, debit.cents * 2

    await node.handle(answer)
    calls = [(f"a{n % 5}", n // 5) for n in range(100)]

    results = await asyncio.gather(
        *(caller.sender.send(Debit(*call), f"m{n}", timeout=10.0) for n, call in enumerate(calls))
    )

    assert seen == {f"a{n}": list(range(20)) for n in range(5)}
    for (_, cents), result in zip(calls, results, strict=True):
        if cents == 13:
            assert isinstance(result, Err)
            assert (result.code, result.details, result.outcome) == ("UNLUCKY", {"cents": 13}, Outcome.REFUSED)
        else:
            assert result == Ok(cents * 2)
    await becomes(lambda: _is_empty(node, "t-cmd-billing"), "everything is acknowledged")


async def test_enqueue_says_where_a_command_lies(url: str, start_node: Callable[..., Any]) -> None:
    node = await (await start_node(url)).serve()

    first = await node.sender.enqueue(Debit("a", 0), "m0", timeout=5.0)
    rest = await asyncio.gather(*(node.sender.enqueue(Debit("a", n), f"m{n}", timeout=5.0) for n in range(1, 4)))

    assert [(one.stream, one.sequence, one.index, one.duplicate) for one in [first, *rest]] == [
        ("t-cmd-billing", 1, 0, False),
        ("t-cmd-billing", 2, 0, False),
        ("t-cmd-billing", 2, 1, False),
        ("t-cmd-billing", 2, 2, False),
    ]
    subject = f"t.cmd.billing.{partition_of('a', P)}"
    assert [(where, frame.id) for where, frame in await node.stored("t-cmd-billing")] == [
        (subject, f"m{n}") for n in range(4)
    ]


async def test_events_lie_in_the_log(url: str, start_node: Callable[..., Any]) -> None:
    node = await (await start_node(url)).serve()

    stored = await node.sender.publish(Debited("a", 1), "e1", timeout=5.0)

    assert stored.stream == "t-evt"
    assert [(where, frame.id, frame.key) for where, frame in await node.stored("t-evt")] == [
        (f"t.evt.Debited.{partition_of('a', P)}", "e1", "a")
    ]


async def fill(node: Node, key: str) -> tuple[int, OverloadedError]:
    """Enqueue until the work queue is full; return how many went in, and what the next one was told."""
    for accepted in range(1_000):
        try:
            await node.sender.enqueue(Debit(key, accepted), f"m{accepted}", timeout=30.0)
        except OverloadedError as error:
            return accepted, error
    raise AssertionError("the work queue never was full")


async def test_a_full_work_queue_refuses_and_takes_again_when_it_has_room(
    url: str, start_node: Callable[..., Any]
) -> None:
    node = await (await start_node(url, command_max_bytes=65_536)).serve()
    key = "x" * 1_000

    accepted, error = await fill(node, key)

    assert "t-cmd-billing is full" in str(error)
    assert error.outcome is Outcome.NOT_RUN
    result = await node.sender.send(Debit(key, 0), "s", timeout=30.0)
    assert isinstance(result, Err)
    assert (result.code, result.outcome, result.retryable) == ("OVERLOADED", Outcome.NOT_RUN, True)
    assert len(await node.stored("t-cmd-billing")) == accepted > 10
    await node.js.purge("t-cmd-billing")
    await node.sender.enqueue(Debit(key, 0), "later", timeout=5.0)


async def test_a_work_queue_that_is_deleted_is_named(url: str, start_node: Callable[..., Any]) -> None:
    node = await (await start_node(url)).serve()
    await node.sender.enqueue(Debit("a", 1), "m1", timeout=5.0)
    await node.js.delete_stream("t-cmd-billing")

    with pytest.raises(NoHandlerError, match="there is no stream t-cmd-billing") as caught:
        await node.sender.enqueue(Debit("a", 2), "m2", timeout=30.0)

    assert caught.value.outcome is Outcome.NOT_RUN


# -- routes ------------------------------------------------------------------------------------------------


async def call(node: Node, message: Any = None) -> bool:
    """Return whether a command is taken."""
    try:
        await node.sender.enqueue(message or Debit("a", 1), uuid4().hex, timeout=5.0)
    except NoHandlerError:
        return False
    return True


async def test_a_new_type_is_routed_when_every_node_announces_it(url: str, start_node: Callable[..., Any]) -> None:
    node = await start_node(url)
    node.others = [{"Credit"}]
    await node.serve()

    assert not await call(node)
    assert await call(node, Credit("a"))
    node.others = []
    await node.announcer.tend()
    await becomes(lambda: call(node), "the route is seen")


async def test_a_removed_type_is_refused_while_the_old_nodes_still_live(
    url: str, start_node: Callable[..., Any]
) -> None:
    node = await (await start_node(url)).serve()
    caller = await start_node(url)
    assert await call(caller)

    node.others = [{"Credit"}]  # a node of the next version
    tending = asyncio.ensure_future(node.announcer.run())

    async def is_refused() -> bool:
        return not await call(caller)

    await becomes(is_refused, "the route is gone")
    assert await call(caller, Credit("a"))
    node.others = []  # rolled back
    node.announcer.nudge()
    await becomes(lambda: call(caller), "the route is back")
    tending.cancel()
    await asyncio.wait({tending})


async def test_a_lost_bucket_is_made_again(url: str, start_node: Callable[..., Any]) -> None:
    node = await (await start_node(url)).serve()
    await node.js.delete_stream("KV_t-routes")
    await node.announcer.tend()

    assert await call(await start_node(url))


async def test_two_services_with_one_type_stay_unready_and_are_named(url: str, start_node: Callable[..., Any]) -> None:
    first = await (await start_node(url)).serve()
    second = await start_node(url)
    await second.streams.ensure(commands=True, events=True)
    second.announcer._service = "shipping"
    second.announcer._mine = [route_of(Debit, service="shipping")]

    await second.announcer.tend()

    (problem,) = second.announcer.problems
    assert "command of the service 'shipping' and already a command of the service 'billing'" in problem
    first.types.remove("Debit")  # it moves to the other service
    first.announcer._mine = [route_of(Credit)]
    await becomes(lambda: _tended(first, second), "the type has moved")


async def _tended(first: Node, second: Node) -> bool:
    await first.announcer.tend()
    await second.announcer.tend()
    return not second.announcer.problems


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition_by": "owner"}, "partition_by 'owner' here and 'account' on its route"),
        ({"kind": "event", "service": ""}, "is an event and already a command of the service 'billing'"),
    ],
)
async def test_other_declarations_of_a_type_are_named(
    url: str, start_node: Callable[..., Any], changes: dict[str, Any], words: str
) -> None:
    node = await (await start_node(url)).serve()
    node.announcer._mine = [route_of(Debit, **changes)]

    await node.announcer.tend()

    (problem,) = node.announcer.problems
    assert words in problem


async def test_nodes_that_write_the_same_route_at_once_agree(url: str, start_node: Callable[..., Any]) -> None:
    nodes = [await start_node(url) for _ in range(4)]
    await asyncio.gather(*(node.serve() for node in nodes))
    await asyncio.gather(*(node.announcer.tend() for node in nodes))

    assert not any(node.announcer.problems for node in nodes)
    assert (await nodes[0].js.stream("KV_t-routes")).messages == 2


# -- later -------------------------------------------------------------------------------------------------


async def test_a_delayed_command_comes_to_its_partition_when_its_time_has_come(
    url: str, start_node: Callable[..., Any]
) -> None:
    node = await (await start_node(url)).serve()
    node.moving = asyncio.ensure_future(node.mover.run())
    now = datetime.now(UTC).timestamp()

    await node.sender.enqueue_later(Debit("a", 1), "m1", at_utc=now + 1.5, timeout=5.0)
    await node.sender.enqueue_later(Debit("a", 2), "m2", at_utc=now - 60.0, timeout=5.0)
    await eventually(lambda: node.mover.moved == 1)
    early = await node.stored("t-cmd-billing")
    await eventually(lambda: node.mover.moved == 2)

    subject = f"t.cmd.billing.{partition_of('a', P)}"
    assert [(where, frame.id) for where, frame in early] == [(subject, "m2")]
    assert [(where, frame.id) for where, frame in await node.stored("t-cmd-billing")] == [
        (subject, "m2"),
        (subject, "m1"),
    ]
    await becomes(lambda: _is_empty(node, "t-at-billing"), "nothing waits any more")


async def _is_empty(node: Node, stream: str) -> bool:
    info = await node.js.stream(stream)
    return info is not None and info.messages == 0


async def test_what_is_due_waits_for_room_in_the_work_queue(url: str, start_node: Callable[..., Any]) -> None:
    node = await (await start_node(url, command_max_bytes=65_536)).serve()
    await fill(node, "x" * 1_000)
    node.moving = asyncio.ensure_future(node.mover.run())
    now = datetime.now(UTC).timestamp()

    await node.sender.enqueue_later(Debit("y" * 1_000, 7), "late", at_utc=now, timeout=5.0)
    await eventually(lambda: node.mover._taken is not None)
    await node.js.purge("t-cmd-billing")
    await eventually(lambda: node.mover.moved == 1)

    assert [frame.id for _, frame in await node.stored("t-cmd-billing")] == ["late"]


async def test_without_a_stream_for_delayed_commands_it_is_said_what_is_missing(
    url: str, start_node: Callable[..., Any]
) -> None:
    node = await (await start_node(url)).serve()
    await node.js.delete_stream("t-at-billing")

    with pytest.raises(ConfigurationError, match="there is no stream t-at-billing for delayed commands"):
        await node.sender.enqueue_later(Debit("a", 1), "m1", at_utc=0.0, timeout=5.0)


# -- faults ------------------------------------------------------------------------------------------------


async def flood(node: Node, seconds: float, timeout: float) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Enqueue numbers for ten keys, several at a time, and return what was accepted and what was not, by outcome."""
    accepted: list[tuple[str, int]] = []
    outcomes: dict[str, int] = defaultdict(int)
    until = monotonic() + seconds

    async def one(key: str) -> None:
        number = 0
        while monotonic() < until:
            calls = [
                node.sender.enqueue(Debit(key, number + ahead), f"{key}.{number + ahead}", timeout=timeout)
                for ahead in range(4)
            ]
            ends = await asyncio.gather(*calls, return_exceptions=True)
            for ahead, end in enumerate(ends):
                if isinstance(end, CallError):
                    outcomes[f"{end.code} {end.outcome}"] += 1
                    outcomes[str(end)] += 0
                elif isinstance(end, BaseException):
                    raise end
                else:
                    accepted.append((key, number + ahead))
            number += 4
            await asyncio.sleep(0.002)  # thousands of records are enough

    await asyncio.gather(*(one(f"k{n}") for n in range(10)))
    return accepted, outcomes


def check(accepted: list[tuple[str, int]], stored: list[tuple[str, MessageFrame]]) -> None:
    """Nothing accepted is lost, keys are in order, nothing is there twice."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for _, frame in stored:
        debit = msgspec.msgpack.decode(frame.body, type=Debit)
        numbers[debit.account].append(debit.cents)
    for key, there in numbers.items():
        assert there == sorted(set(there)), f"{key} is out of order or doubled"
    missing = [(key, number) for key, number in accepted if number not in set(numbers[key])]
    assert not missing, f"accepted and lost: {missing[:5]}"


@pytest.mark.nats
async def test_nothing_is_lost_doubled_or_reordered_when_the_server_is_killed(
    start_server: Callable[..., NatsServer], start_node: Callable[..., Any]
) -> None:
    server = start_server(jetstream=True)
    node = await (await start_node(server.url)).serve()
    flooding = asyncio.ensure_future(flood(node, 2.5, 15.0))

    for _ in range(3):
        before = node.sender.statistics().written.records
        await eventually(lambda: node.sender.statistics().written.records > before + 50)  # noqa: B023
        server.freeze()  # so that it has taken records, and not acknowledged them
        await eventually(lambda: node.sender.statistics().written.waiting == 40)
        server.restart()
    accepted, outcomes = await flooding

    assert not outcomes, "a restart within the deadline was seen by a caller"
    assert node.sender.statistics().written.retries > 0
    await node.sender.wait_idle()
    check(accepted, await node.stored("t-cmd-billing"))


@pytest.mark.nats
async def test_a_frozen_server_makes_outcomes_unknown_and_loses_nothing(
    start_server: Callable[..., NatsServer], start_node: Callable[..., Any]
) -> None:
    server = start_server(jetstream=True)
    node = await (await start_node(server.url)).serve()
    flooding = asyncio.ensure_future(flood(node, 2.0, 0.3))
    await eventually(lambda: node.sender.statistics().written.records > 50)

    server.freeze()
    await asyncio.sleep(1.0)
    server.thaw()
    accepted, outcomes = await flooding

    assert outcomes.get("TIMEOUT unknown", 0) > 0
    await node.sender.wait_idle()
    check(accepted, await node.stored("t-cmd-billing"))


@pytest.mark.nats
async def test_a_user_who_may_not_publish_commands_is_told_so(
    start_server: Callable[..., NatsServer], start_node: Callable[..., Any]
) -> None:
    config = """authorization { users: [
        {user: node, password: x},
        {user: caller, password: x, permissions: {publish: ["$JS.API.>"], subscribe: ["_INBOX.>", "$KV.>"]}}
    ] }"""
    server = start_server(config, jetstream=True)
    await (await start_node(server.url, user="node", password="x")).serve()
    caller = await start_node(server.url, user="caller", password="x")

    with pytest.raises(PermissionDeniedError, match=r"t\.cmd\.billing"):
        await caller.sender.enqueue(Debit("a", 1), "m1", timeout=30.0)
    with pytest.raises(PermissionDeniedError, match=r"t\.cmd\.billing"):
        await caller.sender.send(Debit("a", 1), "m2", timeout=30.0)


@pytest.mark.nats
@pytest.mark.slow
async def test_a_leader_that_is_killed_surfaces_no_error(
    start_server: Callable[..., NatsServer], start_node: Callable[..., Any]
) -> None:
    servers = start_cluster(start_server, 3, jetstream=True)
    urls = [server.url for server in servers]
    node = await start_node(*urls, store_timeout=60.0)
    await node.serve()
    info = await node.js.stream("t-cmd-billing")
    assert info.config.replicas == 3
    leader = int(info.raw["cluster"]["leader"].removeprefix("s"))
    flooding = asyncio.ensure_future(flood(node, 12.0, 15.0))
    await eventually(lambda: node.sender.statistics().written.records > 50)

    servers[leader].kill()
    accepted, outcomes = await flooding

    assert not outcomes, outcomes
    await node.sender.wait_idle()
    check(accepted, await node.stored("t-cmd-billing"))
