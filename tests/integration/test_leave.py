"""Leaving: SIGTERM ends a node in time, whatever its handlers do and wherever its server is."""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import Bus, Err, Ok, Request
from catga_bus.testing import eventually
from tests.fake_nats import FakeNats
from tests.integration.leaver import (
    Count,
    CountOnce,
    Forever,
    Hold,
    LeaveBehind,
    Pooled,
    PooledElsewhere,
    Stubborn,
    Stuck,
    Threaded,
)
from tests.integration.nodes import NodeProcess
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

LEAVE = 5.0
# Seconds for all but the handlers, whatever the server does.

Start = Callable[..., NodeProcess]
FAULTS = ["none", "kill", "freeze"]
ENDLESS = [Forever(), Stubborn(), Stuck(), Pooled(), PooledElsewhere(), Threaded()]


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
def start(tmp_path: Path, namespace: str) -> Iterator[Start]:
    """Start nodes that are killed at the end: `start(url, *arguments, drain=25.0, name="node", bus="bus")`."""
    nodes: list[NodeProcess] = []

    def run(
        url: str, *arguments: str, drain: float = 25.0, name: str = "node", bus: str = "bus", **more: str
    ) -> NodeProcess:
        environment = {"LEAVER_NAMESPACE": namespace, "LEAVER_DRAIN": str(drain), **more}
        target = f"tests.integration.leaver:{bus}"
        nodes.append(NodeProcess(tmp_path / name, target, "--url", url, *arguments, **environment))
        return nodes[-1]

    yield run
    for node in nodes:
        node.kill()


def cause(fault: str, server: NatsServer) -> None:
    if fault == "kill":
        server.kill()
    elif fault == "freeze":
        server.freeze()


async def begin(node: NodeProcess, url: str, namespace: str, request: Request[Any]) -> None:
    """Have a handler run for a caller that has gone since."""
    async with Bus("client", url=url, namespace=namespace) as client:
        call = asyncio.create_task(client.send(request, timeout=600.0))
        await eventually(lambda: (node.directory / "began").exists(), 10.0, what="the handler to begin")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_node_without_work_leaves_at_once(start: Start, nats_server: NatsServer, fault: str) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    cause(fault, nats_server)
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_runs_is_finished_first(start: Start, nats_server: NatsServer, namespace: str, fault: str) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    await begin(node, nats_server.url, namespace, Hold())
    cause(fault, nats_server)
    node.signal(signal.SIGTERM)
    await eventually(lambda: "SIGTERM, draining" in node.said, 10.0)
    with pytest.raises(AssertionError):
        await node.has_ended(1.0)
    (node.directory / "go").touch()
    assert await node.has_ended(LEAVE) == 0


async def test_what_runs_is_answered(start: Start, nats_server: NatsServer, namespace: str) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    async with Bus("client", url=nats_server.url, namespace=namespace) as client:
        call = asyncio.create_task(client.send(Hold(), timeout=60.0))
        await eventually(lambda: (node.directory / "began").exists(), 10.0)
        node.signal(signal.SIGTERM)
        await eventually(lambda: "SIGTERM, draining" in node.said, 10.0)
        refused = await client.send(Count(1), timeout=10.0)
        assert isinstance(refused, Err)
        assert refused.outcome == "not_run", refused
        (node.directory / "go").touch()
        assert await call == Ok("held")
    assert await node.has_ended(LEAVE) == 0
    assert not (node.directory / "ran").exists()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_", ENDLESS, ids=lambda one: type(one).__name__)
async def test_what_never_ends_is_cut_off(
    start: Start, nats_server: NatsServer, namespace: str, request_: Request[Any], fault: str
) -> None:
    node = start(nats_server.url, drain=0.5)
    await node.is_ready()
    await begin(node, nats_server.url, namespace, request_)
    cause(fault, nats_server)
    node.signal(signal.SIGTERM)
    assert await node.has_ended(0.5 + LEAVE) == 1, "something was left unfinished"
    assert "leaves 1 messages unfinished" in node.said


async def test_a_thread_that_a_handler_left_behind_keeps_nobody(
    start: Start, nats_server: NatsServer, namespace: str
) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    async with Bus("client", url=nats_server.url, namespace=namespace) as client:
        assert await client.send(LeaveBehind(), timeout=60.0) == Ok("left")
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0, "every message was finished"
    assert "ends without" in node.said


async def test_a_thread_of_a_service_that_cannot_start_keeps_nobody(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url, bus="unfit", LEAVER_THREAD="1")
    assert await node.has_ended(30.0) == 2
    assert "commands and durable events need JetStream" in node.said


async def test_what_a_program_does_at_exit_is_done(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url, LEAVER_AT_EXIT="0")
    await node.is_ready()
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0
    assert (node.directory / "at-exit").exists()
    assert "ends without" not in node.said


async def test_what_a_program_does_at_exit_for_ever_keeps_nobody(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url, LEAVER_AT_EXIT="3600")
    await node.is_ready()
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0
    assert "ends without" in node.said


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_second_signal_waits_for_nothing(
    start: Start, nats_server: NatsServer, namespace: str, fault: str
) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    await begin(node, nats_server.url, namespace, Stubborn())
    cause(fault, nats_server)
    node.signal(signal.SIGTERM)
    await eventually(lambda: "SIGTERM, draining" in node.said, 10.0)
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 1
    assert "second signal" in node.said


async def test_a_name_that_is_looked_up_for_ever_keeps_nobody(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url.replace("127.0.0.1", "localhost"))
    await node.is_ready()
    (node.directory / "no-names").touch()
    nats_server.kill()
    await eventually(lambda: node.said.count("lost the connection") == 2, 10.0)
    await eventually(lambda: node.said.count("no answer in time") >= 2, 20.0, what="both to look the name up in vain")
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0


# -- during the start --------------------------------------------------------------------------------------


async def test_a_signal_while_no_server_answers_ends_the_start(start: Start) -> None:
    async with FakeNats(is_mute=True) as server:
        node = start(server.url)
        await eventually(lambda: server.connections, 30.0, what="a connection")
        node.signal(signal.SIGTERM)
        assert await node.has_ended(LEAVE) == 0


async def test_a_signal_while_no_server_is_there_ends_the_start(start: Start, nats_server: NatsServer) -> None:
    nats_server.kill()
    node = start(nats_server.url)
    await eventually(lambda: "cannot connect" in node.said, 30.0)
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0


async def test_a_signal_before_the_subscriptions_are_confirmed_ends_the_start(start: Start) -> None:
    async with FakeNats() as server:  # it echoes no message: a node that starts hears nobody, and not itself
        node = start(server.url)
        await node.has_begun()
        await eventually(lambda: any(line.startswith(b"SUB") for line in server.lines), 30.0, what="a subscription")
        assert await node.ask("/readyz") == (503, "unready\n")
        node.signal(signal.SIGTERM)
        assert await node.has_ended(LEAVE) == 0
        assert "serves" not in node.said


async def test_a_signal_while_a_server_has_frozen_in_the_start_ends_it(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url)
    await eventually(lambda: "connected to" in node.said, 30.0)
    nats_server.freeze()
    node.signal(signal.SIGTERM)
    assert await node.has_ended(LEAVE) == 0


# -- rolling -----------------------------------------------------------------------------------------------

ROUNDS = 3
# How often each of the three nodes is replaced.


@pytest.mark.slow
async def test_a_rolling_restart_under_load_fails_nothing_and_runs_nothing_twice(
    start: Start, nats_server: NatsServer, namespace: str, tmp_path: Path
) -> None:
    def replace(place: int, round_: int) -> NodeProcess:
        return start(nats_server.url, "--node-id", f"leaver-{place}", name=f"{place}-{round_}")

    nodes = [replace(place, 0) for place in range(3)]
    for node in nodes:
        await node.is_ready()
    async with Bus("client", url=nats_server.url, namespace=namespace) as client:
        results: Counter[str] = Counter()
        over = asyncio.Event()
        sent = 0

        async def call(number: int) -> None:
            result = await client.send(Count(number) if number % 2 else CountOnce(number), timeout=2.0)
            results["ok" if result == Ok(number) else repr(result)] += 1

        async def load() -> None:
            nonlocal sent
            async with asyncio.TaskGroup() as calls:
                while not over.is_set():
                    for _ in range(12):
                        sent += 1
                        calls.create_task(call(sent))
                    await asyncio.sleep(0.02)

        loading = asyncio.create_task(load())
        for round_ in range(1, ROUNDS + 1):
            for place in range(3):
                nodes[place].signal(signal.SIGTERM)
                assert await nodes[place].has_ended(30.0) == 0
                nodes[place] = replace(place, round_)
                await nodes[place].is_ready()
        newest = [node.directory / "ran" for node in nodes]
        await eventually(lambda: all(file.exists() for file in newest), 10.0, what="each to take its share")
        over.set()
        await loading
    ran = Counter(line for file in tmp_path.glob("*/ran") for line in file.read_text().split())
    assert results == {"ok": sent}
    assert {number: times for number, times in ran.items() if times > 1} == {}
    assert len(ran) == sent
