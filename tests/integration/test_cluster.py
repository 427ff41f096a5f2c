"""Nodes that know each other, on a real server: killed, frozen, blocked, doubled, cut off, and lied about."""

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import Bus, ChangeKind, ConfigurationError, Err, NodeChange, NodeInfo, NodeStatus, Ok
from catga_bus.clock import monotonic
from catga_bus.cluster.beats import BeatWriter, Identity, Report
from catga_bus.cluster.records import NodeLoad
from catga_bus.testing import eventually
from catga_bus.wire import Names
from tests.integration.shop import Spin, Where, service
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

ROOT = Path(__file__).parents[2]
SHOP = (sys.executable, "-m", "tests.integration.shop")


class Seen:
    """The changes that a bus was told of, each with its instant."""

    def __init__(self, bus: Bus) -> None:
        self.changes: list[tuple[float, NodeChange]] = []
        self._task = asyncio.create_task(self._watch(bus))

    async def _watch(self, bus: Bus) -> None:
        async for change in bus.watch_nodes():
            self.changes.append((monotonic(), change))

    def of(self, kind: ChangeKind, node_id: str | None = None) -> list[tuple[float, NodeInfo]]:
        """When a kind of change happened, and the node after it."""
        return [
            (at, change.node)
            for at, change in self.changes
            if change.kind is kind and change.node is not None and node_id in (None, change.node.id)
        ]

    async def first(self, kind: ChangeKind, node_id: str, timeout: float = 10.0) -> tuple[float, NodeInfo]:
        """Wait for a kind of change of a node."""
        return (await eventually(lambda: self.of(kind, node_id), timeout, what=f"{node_id} {kind}"))[0]


def is_online(bus: Bus, node_id: str) -> bool:
    return any(node.id == node_id and node.is_ready for node in bus.nodes(status="online"))


@asynccontextmanager
async def node(url: str, namespace: str, node_id: str, *watchers: Bus) -> AsyncIterator[asyncio.subprocess.Process]:
    """A node process that all watchers know, killed at the end whatever happens."""
    process = await asyncio.create_subprocess_exec(*SHOP, url, namespace, node_id, cwd=ROOT, env={"PATH": ""})
    try:
        for bus in watchers:
            await eventually(lambda bus=bus: is_online(bus, node_id), 30, what=f"{node_id} is online")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def client(server_url: str, namespace: str) -> AsyncIterator[Bus]:
    async with Bus("client", url=server_url, namespace=namespace) as bus:
        yield bus


async def test_a_killed_node_is_out_of_every_view_within_a_second(server_url: str, namespace: str, client: Bus) -> None:
    async with service(server_url, namespace, "other") as other, node(server_url, namespace, "a", client, other) as a:
        views = [Seen(client), Seen(other)]
        killed = monotonic()
        a.kill()
        for view in views:
            at, dead = await view.first(ChangeKind.FAULTED, "a")
            assert dead.evicted
            assert at - killed < 1.0
        assert await client.send(Where()) == Ok("other")
        result = await client.send(Where(), node="a")
        assert isinstance(result, Err)
        assert (result.code, result.outcome, result.retryable) == ("NO_HANDLER", "not_run", True)
        assert "node 'a' of service 'shop' is faulted" in result.message
        assert client.statistics().nodes.deaths == 1


async def test_a_frozen_node_is_dead_and_recovers_as_the_same_incarnation(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with node(server_url, namespace, "a", client) as a:
        seen = Seen(client)
        directory = client._node.directory  # type: ignore[union-attr]
        [before] = client.nodes(service="shop")
        a.send_signal(signal.SIGSTOP)
        try:
            _, dead = await seen.first(ChangeKind.FAULTED, "a")
            assert not dead.evicted
            assert "Where" in directory.troubled
            assert directory.is_dead("a")
        finally:
            a.send_signal(signal.SIGCONT)
        _, back = await seen.first(ChangeKind.RECOVERED, "a")
        assert back.incarnation == before.incarnation
        await eventually(lambda: is_online(client, "a"))
        assert not directory.troubled
        assert await client.send(Where(), node="a") == Ok("a")


async def test_a_handler_that_blocks_the_loop_is_a_stall_and_no_death(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with node(server_url, namespace, "a", client):
        seen = Seen(client)
        call = asyncio.create_task(client.send(Spin(5.0), timeout=20))
        await eventually(lambda: any(one.stall > 1.0 for one in client.nodes(service="shop")))
        [stalled] = client.nodes(service="shop")
        assert (stalled.status, stalled.is_ready) == (NodeStatus.ONLINE, False)
        assert client._node.directory.pick("Where") is None  # type: ignore[union-attr]
        assert await call == Ok("a")
        await eventually(lambda: is_online(client, "a"))
        assert not seen.of(ChangeKind.FAULTED)


async def test_a_server_that_restarts_kills_none_of_ten_nodes(nats_server: NatsServer, namespace: str) -> None:
    async with AsyncExitStack() as stack:
        buses = [service(nats_server.url, namespace, f"n{number}") for number in range(10)]
        await asyncio.gather(*(stack.enter_async_context(bus) for bus in buses))
        for bus in buses:
            await eventually(lambda bus=bus: len(bus.nodes(status="online")) == 10)
        views = [Seen(bus) for bus in buses]
        for _ in range(2):
            before = [bus.statistics().reconnects for bus in buses]
            nats_server.restart()
            for bus, count in zip(buses, before, strict=True):
                await eventually(lambda bus=bus, count=count: bus.statistics().reconnects > count, 20)
            heard = [bus.statistics().nodes.beats_heard for bus in buses]
            # Ten beats a quarter of a second: three seconds of them, in which silence would have been found.
            for bus, count in zip(buses, heard, strict=True):
                await eventually(lambda bus=bus, count=count: bus.statistics().nodes.beats_heard > count + 120, 20)
        for bus, view in zip(buses, views, strict=True):
            assert view.of(ChangeKind.FAULTED) == []
            assert len(bus.nodes(status="online")) == 10


async def test_a_node_that_was_cut_off_finds_nobody_dead(server_url: str, namespace: str, client: Bus) -> None:
    async with node(server_url, namespace, "a", client):
        seen = Seen(client)
        transport: Any = client._node.transport  # type: ignore[union-attr]
        for _ in range(3):
            transport._connection.lose("cut by the test")
            before = client.statistics().nodes.beats_heard
            await eventually(lambda seen=before: client.statistics().nodes.beats_heard > seen + 12, 20)
        assert seen.of(ChangeKind.FAULTED) == []
        assert is_online(client, "a")


async def test_a_node_whose_own_connection_brings_nothing_is_not_ready_though_its_heart_beats(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with service(server_url, namespace, "a") as bus:
        await eventually(lambda: is_online(client, "a"))
        seen = Seen(client)
        socket: Any = bus._node.transport._connection._socket._transport  # type: ignore[union-attr]
        for _ in range(2):
            socket.pause_reading()
            began = monotonic()
            await eventually(lambda: not is_online(client, "a"), 20)
            assert monotonic() - began < 2.0  # the server's pings would take twelve
            assert client._node.directory.pick("Where") is None  # type: ignore[union-attr]
            socket.resume_reading()
            await eventually(lambda: is_online(client, "a"), 1.0)
        assert not seen.of(ChangeKind.FAULTED)
        assert await client.send(Where(), node="a") == Ok("a")


async def test_who_may_not_hear_heartbeats_is_ready_all_the_same(start_server: Callable[..., NatsServer]) -> None:
    server = start_server(
        'authorization { users: [ { user: app, password: secret, permissions: { subscribe: { deny: ["catga.nodes.*"] }'
        " } }, { user: all, password: secret } ] }\nno_auth_user: all\n"
    )
    url = server.url.replace("nats://", "nats://app:secret@")
    async with Bus("client", url=server.url) as client, service(url, "catga", "a"):
        await eventually(lambda: is_online(client, "a"))
        beats = client.statistics().nodes.beats_heard
        await eventually(lambda: client.statistics().nodes.beats_heard > beats + 16)
        assert is_online(client, "a")


async def test_an_id_in_use_is_refused_with_its_owner_named(server_url: str, namespace: str, client: Bus) -> None:
    async with service(server_url, namespace, "a"):
        for other in (
            service(server_url, namespace, "a"),
            Bus("else", url=server_url, namespace=namespace, node_id="a"),
        ):
            with pytest.raises(ConfigurationError, match=r"node id 'a' is in use by a live node of service 'shop'"):
                await other.start()
        assert await client.send(Where(), node="a") == Ok("a")
    async with service(server_url, namespace, "a"):  # it is free again
        pass


async def test_a_pause_shorter_than_the_timeout_costs_a_node_its_id_not(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with node(server_url, namespace, "a", client) as a:
        a.send_signal(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.6, a.send_signal, signal.SIGCONT)
        with pytest.raises(ConfigurationError, match=r"node id 'a' is in use by a live node of service 'shop'"):
            await service(server_url, namespace, "a").start()
        await eventually(lambda: is_online(client, "a"))
        assert client.nodes(service="shop")[0].incarnation[0] == 1
        assert await client.send(Where(), node="a") == Ok("a")


async def test_of_two_with_one_id_the_one_that_was_silent_gives_way_and_takes_nothing_more_in(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with node(server_url, namespace, "a", client) as a:
        [older] = client.nodes(service="shop")
        a.send_signal(signal.SIGSTOP)
        second = Bus("shop", url=server_url, namespace=namespace, node_id="a")
        ran = 0

        @second.handler
        async def where(request: Where) -> str:
            nonlocal ran
            ran += 1
            return "second"

        async with second:
            a.send_signal(signal.SIGCONT)
            # It may be gone from the view for a moment, between the good-bye of the older one and a beat of this one.
            await eventually(lambda: any(one.incarnation > older.incarnation for one in client.nodes(service="shop")))
            nodes = second._node.directory  # type: ignore[union-attr]
            await eventually(lambda: nodes.statistics().rejected.get("rival"))

            async def hear_no_rival() -> None:
                """Until the older one beats no more, which it says last of all."""
                rivals = -1
                while rivals != nodes.statistics().rejected["rival"]:
                    rivals, beats = nodes.statistics().rejected["rival"], nodes.statistics().beats_heard
                    await eventually(lambda beats=beats: nodes.statistics().beats_heard > beats + 8)

            async with asyncio.timeout(20):
                await hear_no_rival()
            for _ in range(20):
                assert await client.send(Where(), node="a") == Ok("second")
                assert await client.send(Where()) == Ok("second")
            assert ran == 40
            assert not nodes.is_replaced


async def test_two_that_start_at_once_with_one_id_are_one(server_url: str, namespace: str) -> None:
    buses = [service(server_url, namespace, "a") for _ in range(2)]
    results = await asyncio.gather(*(bus.start() for bus in buses), return_exceptions=True)
    refused = [result for result in results if result is not None]
    for bus in buses:
        await bus.close()
    assert len(refused) == 1
    assert isinstance(refused[0], ConfigurationError)


async def test_an_id_whose_owner_was_killed_is_taken_at_once(server_url: str, namespace: str, client: Bus) -> None:
    async with node(server_url, namespace, "a", client) as first:
        [before] = client.nodes(service="shop")
        first.kill()
        await first.wait()
    async with node(server_url, namespace, "a", client):
        await eventually(lambda: [one.incarnation for one in client.nodes(service="shop")] != [before.incarnation])
        assert await client.send(Where(), node="a") == Ok("a")


async def test_a_clean_leave_is_seen_at_once(server_url: str, namespace: str, client: Bus) -> None:
    async with node(server_url, namespace, "a", client) as a:
        seen = Seen(client)
        a.send_signal(signal.SIGTERM)
        drained, _ = await seen.first(ChangeKind.DRAINING, "a")
        left, _ = await seen.first(ChangeKind.LEFT, "a")
        assert left - drained < 1.0
        assert client.nodes(service="shop") == []
        assert seen.of(ChangeKind.FAULTED) == []
        assert client.statistics().nodes.deaths == 0


async def test_leaving_takes_no_second_though_the_server_is_gone(nats_server: NatsServer, namespace: str) -> None:
    frozen, gone = (service(nats_server.url, namespace, name) for name in ("frozen", "gone"))
    await asyncio.gather(frozen.start(), gone.start())
    heart = [bus._node.directory for bus in (frozen, gone)]  # type: ignore[union-attr]
    nats_server.freeze()
    began = monotonic()
    await heart[0].close()
    assert monotonic() - began < 1.0
    nats_server.kill()
    began = monotonic()
    await heart[1].close()
    assert monotonic() - began < 1.0
    await asyncio.gather(frozen.close(), gone.close())


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4])
async def test_sigterm_during_the_start_ends_the_process(server_url: str, namespace: str, delay: float) -> None:
    process = await asyncio.create_subprocess_exec(*SHOP, server_url, namespace, "a", cwd=ROOT, env={"PATH": ""})
    try:
        await asyncio.sleep(0.5 + delay)  # an import takes half a second: the start is interrupted somewhere
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) in (0, -signal.SIGTERM)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("node_id", ["*", ">", "a.b.>", "with space", "ü", "x" * 200, "=", "\n"])
async def test_any_node_id_is_known_and_can_be_asked(
    server_url: str, namespace: str, client: Bus, node_id: str
) -> None:
    async with service(server_url, namespace, node_id):
        await eventually(lambda: is_online(client, node_id))
        assert await client.send(Where(), node=node_id) == Ok(node_id)
    await eventually(lambda: not is_online(client, node_id))


def beat_of(node_id: str, incarnation: tuple[int, int] = (1, 1), status: NodeStatus = NodeStatus.ONLINE) -> bytes:
    writer = BeatWriter(Identity("shop", node_id, "1", {}, types=("Where",)), incarnation)
    return writer.write(
        status, Report(is_ready=True), is_ready=True, interval=0.25, stall=0.0, load=NodeLoad(), utc_ms=0
    )


def identity_of(node: NodeInfo) -> Identity:
    """Who a node is: everybody can hear it, and say it."""
    return Identity(node.service, node.id, node.version, node.metadata, node.zone, node.region, node.types)


async def test_forged_malformed_replayed_and_ancient_beats_change_nothing(
    server_url: str, namespace: str, client: Bus
) -> None:
    names = Names(namespace)
    async with service(server_url, namespace, "a") as bus, Bus("evil", url=server_url, namespace=namespace) as evil:
        await eventually(lambda: is_online(client, "a") and is_online(client, evil.node_id))
        seen = Seen(client)
        heard: list[bytes] = []
        transport = evil._node.transport  # type: ignore[union-attr]
        await transport.subscribe(names.heartbeat("a"), lambda _, payload, *__: heard.append(payload))
        await eventually(lambda: heard)
        real = bus.node.incarnation
        shouted: dict[str, tuple[str, bytes]] = {
            "forged": (names.heartbeat("a"), beat_of("b")),
            "malformed": (names.heartbeat("a"), b"\xc1\x01\x93\x05\x91\xa1x\x91\x93\x01\x02\x03"),
            "replayed": (names.heartbeat("a"), heard[0]),
            "ancient": (names.heartbeat("a"), beat_of("a", (0, 0))),
        }
        for reason, (subject, payload) in shouted.items():
            transport.publish(subject, payload)
            await eventually(lambda reason=reason: client.statistics().nodes.rejected.get(reason), what=reason)
        # These are claims, and a node's own subject says that they are wrong: a good-bye, a new incarnation.
        probes = client.statistics().nodes.probes
        transport.publish(names.heartbeat("a"), beat_of("a", (99, 99)))
        await eventually(lambda: client.statistics().nodes.probes > probes)
        beats = client.statistics().nodes.beats_heard
        await eventually(lambda: client.statistics().nodes.beats_heard > beats + 3)  # it has been answered
        probes = client.statistics().nodes.probes
        [known] = client.nodes(service="shop")
        good_bye = BeatWriter(identity_of(known), real)
        good_bye._seq = 2**50
        transport.publish(
            names.heartbeat("a"),
            good_bye.write(
                NodeStatus.LEFT, Report(), is_ready=False, interval=0.25, stall=0.0, load=NodeLoad(), utc_ms=0
            ),
        )
        await eventually(lambda: client.statistics().nodes.probes > probes)
        beats = client.statistics().nodes.beats_heard
        await eventually(lambda: client.statistics().nodes.beats_heard > beats + 12)
        [known] = client.nodes(service="shop")
        assert (known.incarnation, known.status) == (real, NodeStatus.ONLINE)
        assert await client.send(Where(), node="a") == Ok("a")
        gone = {change.kind for _, change in seen.changes if change.node is not None and change.node.id == "a"}
        assert gone <= {ChangeKind.JOINED, ChangeKind.UPDATED}


async def test_who_is_asked_learns_nothing_that_lets_it_answer_for_others(
    server_url: str, namespace: str, client: Bus
) -> None:
    """Pings go to inboxes of which each is used once, and none of which tells where the others are."""
    names, replies = Names(namespace), []
    transport = client._node.transport  # type: ignore[union-attr]
    for subject in (f"{namespace}.to.*.*.ping", names.roll_call()):
        await transport.subscribe(subject, lambda _, __, reply, ___: replies.append(reply))
    async with service(server_url, namespace, "a"), service(server_url, namespace, "b"):
        await eventually(lambda: is_online(client, "a") and is_online(client, "b"))
    asked = [reply for reply in replies if reply.count(".") and ".ping." in reply]
    called = [reply for reply in replies if reply.endswith(".roll.call")]
    assert len(asked) >= 4
    assert called
    assert len(set(asked)) == len(asked)
    assert all(len(reply.rpartition(".")[2]) == 16 for reply in asked)
    roots = {reply.removesuffix(".roll.call") for reply in called}
    assert not any(reply.startswith(root) for reply in asked for root in roots)


async def test_a_forged_beat_keeps_no_killed_node_alive(server_url: str, namespace: str, client: Bus) -> None:
    names = Names(namespace)
    async with node(server_url, namespace, "a", client) as process:
        seen = Seen(client)
        [known] = client.nodes(service="shop")
        transport = client._node.transport  # type: ignore[union-attr]
        writer = BeatWriter(identity_of(known), known.incarnation)
        for jump, interval in ((900, 60.0), (2**50, 0.25), (2**51, 60.0)):
            writer._seq += jump
            forged = writer.write(
                NodeStatus.ONLINE, Report(), is_ready=True, interval=interval, stall=0.0, load=NodeLoad(), utc_ms=0
            )
            transport.publish(names.heartbeat("a"), forged)
            beats = client.statistics().nodes.beats_heard
            await eventually(lambda beats=beats: client.statistics().nodes.beats_heard > beats + 8)
        process.kill()
        killed = monotonic()
        at, _ = await seen.first(ChangeKind.FAULTED, "a")
        assert at - killed < 1.0


async def test_a_flood_of_forged_nodes_is_in_no_view_and_keeps_nobody_out(
    server_url: str, namespace: str, client: Bus
) -> None:
    names = Names(namespace)
    directory = client._node.directory  # type: ignore[union-attr]
    transport = client._node.transport  # type: ignore[union-attr]
    for number in range(10_500):
        transport.publish(names.heartbeat(f"x{number}"), beat_of(f"x{number}"))
        if number % 500 == 0:
            await asyncio.sleep(0)
    async with node(server_url, namespace, "a", client):
        assert {one.id for one in client.nodes(status="online")} == {client.node_id, "a"}
        assert len(client.nodes()) <= 102  # some are shown as suspect
        assert not directory.troubled
        assert directory.interval == 0.25


async def test_the_first_view_has_every_node_however_rarely_it_beats(server_url: str, namespace: str) -> None:
    rare: dict[str, Any] = {"heartbeat_interval": 10.0, "heartbeat_timeout": 40.0}
    async with service(server_url, namespace, "a", **rare), service(server_url, namespace, "b", **rare):
        for _ in range(5):
            async with Bus("client", url=server_url, namespace=namespace) as bus:
                assert [one.id for one in bus.nodes(service="shop")] == ["a", "b"]


async def test_a_disconnect_event_of_the_server_has_the_node_asked_at_once(
    start_server: Callable[..., NatsServer], namespace: str
) -> None:
    server = start_server(
        "accounts {\n"
        "  SYS: { users: [ { user: sys, password: secret } ] }\n"
        "  APP: { users: [ { user: app, password: secret } ] }\n"
        "}\nsystem_account: SYS\nno_auth_user: app\n"
    )
    options: dict[str, Any] = {"heartbeat_interval": 2.0, "heartbeat_timeout": 8.0}
    async with Bus(
        "client", url=server.url, namespace=namespace, disconnect_events="hints.disconnect", **options
    ) as client:
        transport = client._node.transport  # type: ignore[union-attr]
        process = await asyncio.create_subprocess_exec(
            *SHOP, server.url, namespace, "a", cwd=ROOT, env={"PATH": "", "SHOP_DRAIN": "1"}
        )
        try:
            await eventually(lambda: is_online(client, "a"), 30)
            process.kill()
            await process.wait()
            killed = monotonic()
            # What the server says in its own account, here carried by hand: tests have no second account to import.
            for name in ("catga/a", "catga/a/beats", "something else"):
                transport.publish("hints.disconnect", msgspec.json.encode({"client": {"name": name}, "reason": "x"}))
            transport.publish("hints.disconnect", b"no JSON")
            await eventually(lambda: [one.status for one in client.nodes(service="shop")] == ["faulted"])
            assert monotonic() - killed < 2.0  # its next beat was due in 0 to 2 s, and would have been missed later
            assert client.statistics().nodes.rejected["malformed"] == 1
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_bus_that_was_started_in_a_process_leaves_no_thread(server_url: str, namespace: str) -> None:
    async with Bus("client", url=server_url, namespace=namespace):
        assert any(thread.name == "catga-beats" for thread in threading.enumerate())
    assert not any(thread.name == "catga-beats" for thread in threading.enumerate())
