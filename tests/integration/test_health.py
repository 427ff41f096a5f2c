"""`catga run --health`: what a prober is told in the life of a real node, its server and its handlers failing."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import Bus, Ok, Request
from catga_bus.testing import eventually
from tests.fake_nats import FakeNats
from tests.integration.leaver import Block, Count, Hold
from tests.integration.nodes import ROOT, NodeProcess
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

LIVE, DEAD, READY, UNREADY = (200, "live\n"), (503, "dead\n"), (200, "ready\n"), (503, "unready\n")
TARGET = "tests.integration.leaver:bus"

Start = Callable[..., NodeProcess]


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
def start(tmp_path: Path, namespace: str) -> Iterator[Start]:
    nodes: list[NodeProcess] = []

    def run(url: str, *arguments: str, **environment: str) -> NodeProcess:
        directory = tmp_path / f"node-{len(nodes)}"
        nodes.append(
            NodeProcess(directory, TARGET, "--url", url, *arguments, LEAVER_NAMESPACE=namespace, **environment)
        )
        return nodes[-1]

    yield run
    for node in nodes:
        node.kill()


async def becomes(node: NodeProcess, path: str, answer: tuple[int, str], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while (found := await node.ask(path)) != answer:
        assert time.monotonic() < deadline, f"{path} is {found} after {within} s: {node.said}"
        await asyncio.sleep(0.02)


async def checks(node: NodeProcess) -> dict[str, dict[str, Any]]:
    _, body = await node.ask("/health")
    return {check["name"]: check for check in json.loads(body)["checks"]}


async def asked(client: Bus, request: Request[Any], node: NodeProcess) -> "asyncio.Task[Any]":
    """Send a request, and return when its handler has begun."""
    call = asyncio.create_task(client.send(request, timeout=60.0))
    await eventually(lambda: (node.directory / "began").exists(), 10.0, what="the handler to begin")
    return call


async def test_a_node_is_ready_when_it_has_started_and_until_it_drains(
    start: Start, nats_server: NatsServer, namespace: str
) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    assert "serves" in node.said
    assert await node.ask("/livez") == LIVE
    status, body = await node.ask("/health")
    assert (status, json.loads(body)["ready"]) == (200, True)
    async with Bus("client", url=nats_server.url, namespace=namespace) as client:
        assert await client.send(Count(1)) == Ok(1)
        call = await asked(client, Hold(), node)
        assert (await checks(node))["in flight"]["value"] == 1
        node.signal(signal.SIGTERM)
        await eventually(lambda: "SIGTERM, draining" in node.said, 10.0)
        await becomes(node, "/readyz", UNREADY, within=2.0)
        assert await node.ask("/livez") == LIVE
        assert (await checks(node))["state"]["value"] == "draining"
        (node.directory / "go").touch()
        assert await call == Ok("held")
    assert await node.has_ended(10.0) == 0
    assert await node.ask("/livez") == (0, "")


async def test_a_node_without_a_server_lives_and_is_not_ready(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    nats_server.kill()
    await becomes(node, "/readyz", UNREADY)
    assert await node.ask("/livez") == LIVE
    found = await checks(node)
    assert [name for name, check in found.items() if check["status"] == "fail"] == ["connection", "subscriptions"]
    nats_server.start()
    await becomes(node, "/readyz", READY)
    assert await node.ask("/livez") == LIVE


async def test_a_node_that_waits_for_its_server_lives_and_is_not_ready(start: Start) -> None:
    async with FakeNats(is_mute=True) as server:
        node = start(server.url)
        await eventually(lambda: server.connections, 30.0, what="a connection")
        assert await node.ask("/readyz") == UNREADY
        assert await node.ask("/livez") == LIVE
        assert (await checks(node))["state"]["value"] == "starting"


@pytest.mark.slow
async def test_a_node_whose_loop_is_blocked_says_so_and_lives(
    start: Start, nats_server: NatsServer, namespace: str
) -> None:
    node = start(nats_server.url)
    await node.is_ready()
    async with Bus("client", url=nats_server.url, namespace=namespace) as client:
        call = await asked(client, Block(5.0), node)
        await becomes(node, "/readyz", UNREADY)
        assert await node.ask("/livez") == LIVE
        stall = (await checks(node))["stall"]
        assert stall["status"] == "fail"
        assert "the event loop has been blocked for" in stall["text"]
        assert not call.done()
        assert await call == Ok("blocked")
        await becomes(node, "/readyz", READY)


async def test_a_port_in_use_ends_the_node_before_it_takes_work(
    start: Start, nats_server: NatsServer, namespace: str
) -> None:
    first = start(nats_server.url)
    await first.is_ready()
    address = first.url.removeprefix("http://")
    second = start(nats_server.url, "--health", address)  # the last one counts
    assert await second.has_ended(30.0) == 2
    assert second.said.startswith(f"error: cannot listen on {address}: address already in use; choose another one")
    assert second.said.count("\n") == 1
    assert "connected" not in second.said


@pytest.mark.parametrize("address", ["8080", "here:there", "::1:8080", "127.0.0.1:99999"])
def test_an_address_that_is_none_ends_with_2(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "catga_bus", "run", TARGET, "--health", address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {address!r} is no address to listen on; write 127.0.0.1:8080, [::1]:8080")


async def test_a_token_that_is_too_short_ends_with_2(start: Start, nats_server: NatsServer) -> None:
    node = start(nats_server.url, CATGA_HEALTH_TOKEN="secret")
    assert await node.has_ended(30.0) == 2
    assert node.said.startswith("error: the health token must be at least 16 printable ASCII characters")
    assert "secret" not in node.said
