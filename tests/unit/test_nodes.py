"""What a bus knows of the nodes, and sends by it: in memory."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import (
    BlockingBus,
    Bus,
    BusStateError,
    ChangeKind,
    ConfigurationError,
    Context,
    Err,
    NodeChange,
    NodeInfo,
    NodeLoad,
    NodeStatus,
    Ok,
    Outgoing,
    Request,
)
from catga_bus.clock import monotonic
from catga_bus.cluster.beats import BeatWriter, Identity, Report, check_identity
from catga_bus.cluster.claim import SILENT_STRIDE
from catga_bus.cluster.watching import Watcher
from catga_bus.codec import Gate
from catga_bus.node import Node
from catga_bus.testing import broker_of, eventually
from catga_bus.wire import MAX_BEAT_BYTES
from tests.cluster_simulation import info


class Where(Request[str]):
    pass


class Ask(Request[str]):
    zone: str


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


def shop(url: str, node_id: str, **options: Any) -> Bus:
    bus = Bus("shop", url=url, node_id=node_id, **options)

    @bus.handler
    async def where(request: Where, ctx: Context) -> str:
        return ctx.node

    @bus.handler
    async def ask(request: Ask, ctx: Context) -> str:
        return (await ctx.send(Where(), where=lambda node: node.zone == request.zone)).unwrap()

    return bus


@pytest.fixture
async def client(url: str) -> AsyncIterator[Bus]:
    async with Bus("client", url=url, node_id="client") as bus:
        yield bus


def inside(bus: Bus) -> Node:
    assert bus._node is not None
    return bus._node


def introduce(bus: Bus, *nodes: NodeInfo) -> None:
    """Let nodes be heard for the first time, and answer."""
    directory = inside(bus).directory
    detector, now = directory._detector, monotonic()
    for one in nodes:
        [probe] = detector.beat(now, one, 1).probes
        detector.answered(now, one, 2, probe.number)
    directory._view_changed()


async def test_a_bus_is_a_node_and_knows_itself_when_it_has_started(url: str) -> None:
    async with shop(url, "a", version="1.2", zone="eu-1", region="eu", metadata={"team": "x"}) as bus:
        own = bus.node
        assert (own.id, own.service, own.version) == ("a", "shop", "1.2")
        assert (own.zone, own.region, dict(own.metadata)) == ("eu-1", "eu", {"team": "x"})
        assert (own.status, set(own.types)) == (NodeStatus.ONLINE, {"Where", "Ask"})
        assert own.incarnation[0] == 1
        assert bus.nodes() == [own]
        await eventually(lambda: bus.node.is_ready)
        assert abs(own.clock_offset) < 60


async def test_the_view_is_complete_when_the_start_returns(url: str) -> None:
    async with shop(url, "b"), shop(url, "a"), Bus("desk", url=url, node_id="c") as last:
        assert [(node.service, node.id) for node in last.nodes()] == [("desk", "c"), ("shop", "a"), ("shop", "b")]
        assert [node.id for node in last.nodes(service="shop")] == ["a", "b"]
        assert [node.id for node in last.nodes(status="online")] == ["c", "a", "b"]
        assert last.nodes(status=NodeStatus.FAULTED) == []
        with pytest.raises(ConfigurationError, match=r"status must be one of online, .* got 'up'"):
            last.nodes(status="up")


async def test_a_start_in_memory_waits_for_no_heartbeat(url: str) -> None:
    async with Bus("a", url=url, heartbeat_interval=60.0, heartbeat_timeout=600.0) as one:
        async with asyncio.timeout(5):
            async with Bus("b", url=url, heartbeat_interval=60.0, heartbeat_timeout=600.0) as two:
                assert {node.service for node in two.nodes()} == {"a", "b"}
                await eventually(lambda: len(one.nodes()) == 2)


async def test_nodes_need_a_bus_that_is_started() -> None:
    bus = Bus("shop", url="memory://none")
    for ask in (lambda: bus.node, bus.nodes, bus.watch_nodes):
        with pytest.raises(BusStateError, match="not started"):
            ask()


async def test_who_watches_sees_a_node_come_and_go(url: str, client: Bus) -> None:
    changes: list[tuple[str, str]] = []

    async def watch() -> None:
        async for change in client.watch_nodes():
            assert change.node is not None
            changes.append((str(change.kind), change.node.id))

    watching = asyncio.create_task(watch())
    async with shop(url, "a"):
        await eventually(lambda: ("joined", "a") in changes)
    await eventually(lambda: ("left", "a") in changes)
    assert changes[0] == ("joined", "client")
    of_a = [kind for kind, node_id in changes if node_id == "a"]
    assert [kind for kind in of_a if kind != "updated"] == ["joined", "draining", "left"]
    assert [node.id for node in client.nodes()] == ["client"]
    await client.close()
    await watching  # ends with the bus


async def test_a_watcher_that_never_reads_is_bounded_and_told_what_it_missed(url: str, client: Bus) -> None:
    watcher = client.watch_nodes(max_pending=3)
    for _ in range(4):
        async with shop(url, "a"):
            pass
    await eventually(lambda: client.statistics().nodes.missed_changes > 5)
    assert len(watcher._queue) <= 3  # type: ignore[attr-defined]
    async with shop(url, "b"):
        await eventually(lambda: len(client.nodes()) == 2)
        first = await anext(watcher)
        assert first.kind is ChangeKind.MISSED
        assert first.node is None
        assert first.missed == client.statistics().nodes.missed_changes
        present = [await anext(watcher), await anext(watcher)]
        assert [(change.kind, change.node and change.node.id) for change in present] == [
            (ChangeKind.JOINED, "client"),
            (ChangeKind.JOINED, "b"),
        ]
    with pytest.raises(ConfigurationError, match="max_pending"):
        client.watch_nodes(max_pending=0)


async def test_a_watcher_that_is_dropped_is_forgotten(client: Bus) -> None:
    watcher = client.watch_nodes()
    assert len(inside(client).directory._watchers) == 1
    del watcher
    assert len(inside(client).directory._watchers) == 0


async def test_a_slow_watcher_goes_on_with_what_comes_after() -> None:
    known = [info("a")]
    watcher = Watcher(lambda: known, 2)
    for _ in range(5):
        watcher.push(NodeChange(ChangeKind.UPDATED, info("a")))
    assert (await anext(watcher)).missed == 6  # the first one as well, which nobody had read
    assert (await anext(watcher)).kind is ChangeKind.JOINED
    watcher.push(NodeChange(ChangeKind.LEFT, info("a")))
    watcher.end()
    assert [change.kind async for change in watcher] == [ChangeKind.LEFT]


async def test_a_request_goes_to_nodes_that_fit(url: str, client: Bus) -> None:
    async with shop(url, "a", zone="eu-1"), shop(url, "b", zone="eu-2"), shop(url, "c", zone="eu-1"):
        await eventually(lambda: len([one for one in client.nodes(service="shop") if one.is_ready]) == 3)
        results = [await client.send(Where(), where=lambda node: node.zone == "eu-1") for _ in range(100)]
        shares = Counter(result.unwrap() for result in results)
        assert set(shares) == {"a", "c"}
        assert min(shares.values()) > 20
        assert await client.send(Ask("eu-2")) == Ok("b")  # from a handler
        result = await client.send(Where(), where=lambda node: node.zone == "mars")
        assert isinstance(result, Err)
        assert (result.code, result.outcome, result.retryable) == ("NO_HANDLER", "not_run", True)
        assert "live nodes that handle Where: a, b, c" in result.message


async def test_a_choice_that_raises_is_named(url: str, client: Bus) -> None:
    def pick_zone(node: NodeInfo) -> bool:
        raise KeyError(node.zone)

    async with shop(url, "a"):
        await eventually(lambda: len(client.nodes()) == 2)
        with pytest.raises(ConfigurationError, match=r"where=.*pick_zone raised KeyError"):
            await client.send(Where(), where=pick_zone)
        with pytest.raises(ConfigurationError, match="leave out node or where"):
            await client.send(Where(), where=lambda _: True, node="a")
        assert client.statistics().calls.in_flight == 0


async def test_outbound_middleware_sees_the_choice(url: str) -> None:
    seen: list[Outgoing] = []
    bus = Bus("client", url=url)

    @bus.middleware(side="outbound")
    async def look(message: Any, ctx: Outgoing, call_next: Any) -> Any:
        seen.append(ctx)
        return await call_next(message)

    def anywhere(node: NodeInfo) -> bool:
        return node.id == "b"

    async with shop(url, "a"), shop(url, "b"), bus:
        assert await bus.send(Where(), where=anywhere) == Ok("b")
    assert seen[0].where is anywhere


async def test_an_unknown_node_is_waited_for_and_then_named(url: str, client: Bus) -> None:
    call = asyncio.create_task(client.send(Where(), node="late"))
    await asyncio.sleep(0)
    async with shop(url, "late"):
        assert await call == Ok("late")
        result = await client.send(Where(), node="nobody")
        assert isinstance(result, Err)
        assert (result.code, result.outcome, result.retryable) == ("NO_HANDLER", "not_run", True)
        assert result.message == "node 'nobody' is not known; live nodes: client, late"


async def test_a_node_that_left_is_named_as_such(url: str, client: Bus) -> None:
    async with shop(url, "a"):
        assert await client.send(Where(), node="a") == Ok("a")
    await eventually(lambda: len(client.nodes()) == 1)
    result = await client.send(Where(), node="a", timeout=60)
    assert isinstance(result, Err)
    assert (result.code, result.message) == ("NO_HANDLER", "node 'a' of service 'shop' has left")
    assert inside(client).directory.is_dead("a")
    assert inside(client).directory.address("a") == ("shop", "a")


async def test_an_id_in_use_is_refused_and_free_again_afterwards(url: str) -> None:
    async with shop(url, "a") as first:
        with pytest.raises(ConfigurationError, match="node id 'a' is in use by a live node of service 'shop'"):
            await shop(url, "a").start()
        assert first.node.status is NodeStatus.ONLINE
    async with shop(url, "a"):
        pass


async def test_two_that_start_at_once_with_one_id_are_one(url: str) -> None:
    buses = [shop(url, "a") for _ in range(2)]
    results = await asyncio.gather(*(bus.start() for bus in buses), return_exceptions=True)
    for bus in buses:
        await bus.close()
    assert sum(isinstance(result, ConfigurationError) for result in results) == 1


async def test_an_id_that_somebody_silent_has_is_taken_after_the_timeout_with_a_number_far_higher(
    url: str, client: Bus
) -> None:
    began = monotonic()
    async with shop(url, "a", heartbeat_interval=0.1, heartbeat_timeout=0.4):
        assert monotonic() - began < 0.4  # nobody is there
    await inside(client).transport.subscribe("catga.to.shop.a.ping", lambda *_: None)
    began = monotonic()
    async with shop(url, "a", heartbeat_interval=0.1, heartbeat_timeout=0.4) as bus:
        assert monotonic() - began >= 0.4
        assert bus.node.incarnation[0] >= SILENT_STRIDE


async def test_who_is_asked_does_not_learn_where_answers_to_requests_arrive(url: str) -> None:
    replies: list[str] = []
    async with Bus("desk", url=url) as desk:
        await inside(desk).transport.subscribe("catga.nodes.=", lambda _, __, reply, ___: replies.append(reply))
        async with Bus("client", url=url, inbox_prefix="_INBOX.client") as client:
            await eventually(lambda: replies)
            told, requests = replies[0].split("."), inside(client).caller._inbox.split(".")
            assert told[:2] == requests[:2] == ["_INBOX", "client"]
            assert told[2] != requests[2]


def own_subjects(url: str) -> list[str]:
    """Where node a can be addressed."""
    return [one for one in broker_of(url).subjects() if ".to.shop.a." in one]


async def test_who_is_replaced_takes_nothing_more_in_and_finishes_what_runs(url: str, client: Bus) -> None:
    going, let_go = asyncio.Event(), asyncio.Event()
    bus = Bus("shop", url=url, node_id="a")

    @bus.handler
    async def where(request: Where) -> str:
        going.set()
        await let_go.wait()
        return "done"

    async with bus:
        call = asyncio.create_task(client.send(Where(), node="a", timeout=30))
        await going.wait()
        directory = inside(bus).directory
        rival = msgspec.structs.replace(bus.node, incarnation=(SILENT_STRIDE, 1))
        assert rival.is_ready
        directory._detector.rival = None
        directory.on_answer(rival, 1, 0)
        assert directory.is_replaced
        await eventually(lambda: own_subjects(url) == ["catga.to.shop.a.ping"])
        assert "catga.rpc.Where" not in broker_of(url).subjects()
        let_go.set()
        assert await call == Ok("done")
        await eventually(lambda: not own_subjects(url))
        await eventually(lambda: len(client.nodes()) == 1)


async def test_who_cannot_stand_down_says_so_and_still_closes(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with shop(url, "a") as bus:
        node = inside(bus)

        async def fail() -> None:
            raise ValueError("no way out")

        monkeypatch.setattr(node.responder, "stop_intake", fail)
        node._stand_down()
        await eventually(lambda: "a has lost its id and could not stop its work" in caplog.text)
        assert "no way out" in caplog.text
        monkeypatch.undo()


async def test_a_cut_broker_kills_nobody(url: str, client: Bus) -> None:
    async with shop(url, "a"):
        await eventually(lambda: len(client.nodes()) == 2)
        broker_of(url).cut()
        await eventually(lambda: not client._connection.up.is_set())
        broker_of(url).heal()
        await eventually(lambda: client.statistics().reconnects)
        heard = client.statistics().nodes.beats_heard
        await eventually(lambda: client.statistics().nodes.beats_heard > heard + 6)
        assert client.statistics().nodes.deaths == 0
        assert len(client.nodes(status="online")) == 2


async def test_the_less_loaded_of_two_is_picked_and_the_avoided_never(url: str, client: Bus) -> None:
    directory = inside(client).directory
    directory._random = random.Random(7).random
    introduce(client, *(info(name, load=NodeLoad(intake=intake)) for name, intake in (("idle", 0), ("busy", 100))))
    shares = Counter(directory.pick("T") for _ in range(1_000))
    assert shares["shop", "idle"] > 700  # three of four pairs hold it
    assert directory.pick("T", avoid={"idle"}) == ("shop", "busy")
    assert directory.pick("T", avoid={"idle", "busy"}) is None
    assert directory.pick("T", (), lambda node: node.id == "busy") == ("shop", "busy")
    assert directory.pick("Other") is None


async def test_types_of_nodes_not_to_be_trusted_are_troubled(client: Bus) -> None:
    directory = inside(client).directory
    detector = directory._detector
    assert not directory.troubled
    introduce(client, info("fine"), info("stalled", is_ready=False, types=("Slow", "T")))
    assert set(directory.troubled) == {"Slow", "T"}
    assert directory.doubtful("T") == [("shop", "stalled")]
    assert directory.pick("Slow") is None
    stalled = info("stalled", is_ready=False, status=NodeStatus.DRAINING, types=("Slow", "T"))
    detector.beat(monotonic(), stalled, 3)
    directory._view_changed()
    assert not directory.troubled  # it answers, or takes no more
    assert {one for _, one in directory.doubtful("T")} == {"fine", "stalled"}


async def test_a_listener_that_fails_keeps_nobody_from_knowing(url: str, client: Bus) -> None:
    dead: list[str] = []
    on_dead = inside(client).directory.on_dead
    on_dead.insert(0, lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    on_dead.append(lambda node: dead.append(node.id))
    async with shop(url, "a"):
        await eventually(lambda: len(client.nodes()) == 2)
    await eventually(lambda: dead == ["a"])


async def test_the_interval_grows_with_the_nodes(client: Bus) -> None:
    directory = inside(client).directory
    introduce(client, *(info(f"n{number}") for number in range(199)))
    assert directory.interval == pytest.approx(0.5)  # 200 nodes, 400 beats a second


async def test_new_ids_that_nobody_proves_are_in_no_view_and_slow_no_heart(client: Bus) -> None:
    directory = inside(client).directory
    for number in range(4_000):
        directory.on_beat(info(f"x{number}", (1, number), interval=60.0), 1)
    assert [node.id for node in client.nodes(status="online")] == ["client"]
    assert directory.pick("T") is None
    assert not directory.troubled
    assert directory.interval == 0.25
    await eventually(lambda: directory._detector.newcomers < 1_000)  # whom nobody knows, nobody waits for
    assert client.statistics().nodes.rejected["full"] > 2_000


def test_a_blocking_bus_knows_the_nodes(url: str) -> None:
    with BlockingBus("client", url=url, node_id="c") as bus:
        assert bus.node.id == "c"
        assert [node.id for node in bus.nodes(status="online")] == ["c"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heartbeat_interval": 0.01}, "heartbeat_interval must be 0.05 to 60"),
        ({"heartbeat_timeout": 0.4}, "heartbeat_timeout must be at least twice heartbeat_interval, which is 0.25"),
        ({"heartbeat_timeout": 601}, "heartbeat_timeout must be 0.1 to 600"),
        ({"stall_timeout": 0}, "stall_timeout must be 0.05 to 600"),
        ({"disconnect_events": "a b"}, "a b"),
        ({"zone": "x" * 257}, "zone must be at most 256 characters, got 257"),
        ({"version": "x" * 257}, "version must be at most 256 characters, got 257"),
        ({"metadata": {str(n): "" for n in range(65)}}, "metadata must have at most 64 entries, got 65"),
        ({"metadata": {"a": "x" * 257}}, "keys and values of metadata must be at most 256 characters, got 257 in 'a'"),
    ],
)
def test_what_does_not_fit_a_heartbeat_is_refused_when_the_bus_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Bus("shop", url="memory://a", **options)


@pytest.mark.parametrize(
    ("types", "text"),
    [
        ({"types": ("T",) * 1_025}, "a node handles at most 1,024 request types, got 1,025; make it two services"),
        ({"commands": ("T",) * 1_025}, "a node handles at most 1,024 command types, got 1,025; make it two services"),
        ({"events": ("T",) * 1_025}, "a node handles at most 1,024 event types, got 1,025; make it two services"),
        ({"types": ("x" * 1_024,) * 60}, "the names of the types and the metadata of node 'a' are 61,.* bytes"),
        (
            dict.fromkeys(("types", "commands", "events"), ("x" * 1024,) * 12),
            "of node 'a' are 36,.* bytes, at most 36,864 fit a heartbeat",
        ),
    ],
)
def test_more_types_than_fit_a_heartbeat_are_refused(types: dict[str, tuple[str, ...]], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        check_identity(Identity("shop", "a", "1", {}, **types))


def test_what_moves_has_room_beside_the_most_that_stays() -> None:
    most = dict.fromkeys(range(1_024), 2**53 - 1)
    identity = Identity("shop", "a", "1", {}, types=("x" * 1_020,) * 35)
    payload = BeatWriter(identity, (1, 2**52)).write(
        NodeStatus.ONLINE,
        Report(partitions=most, event_partitions=most, breakers=("Quote",) * 100),
        is_ready=True,
        interval=0.25,
        stall=60.0,
        load=NodeLoad(4_096, 4_096, 2**52, 1.5, 2**40),
        utc_ms=2**42,
    )
    assert len(payload) <= MAX_BEAT_BYTES
    [beat] = Gate().beats(payload).frames
    assert (beat.partitions, beat.event_partitions) == (most, most)
