"""Nodes as processes of their own on a real server: signals, restarts, shares and deadlines."""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from catga_bus import Bus, Err, Ok
from catga_bus.testing import eventually
from tests.integration.shop import Echo, Sleep, Spin, Stuck, Where
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

ROOT = Path(__file__).parents[2]
SHOP = (sys.executable, "-m", "tests.integration.shop")


@asynccontextmanager
async def node(
    url: str, namespace: str, node_id: str, client: Bus, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A node process that answers, killed at the end whatever happens."""
    process = await asyncio.create_subprocess_exec(
        *SHOP, url, namespace, node_id, cwd=ROOT, env={"PATH": "", **environment}
    )
    try:
        async with asyncio.timeout(30):
            while not isinstance(await client.send(Where(), node=node_id, timeout=1.0), Ok):
                assert process.returncode is None
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


async def test_three_nodes_share_slow_requests_within_a_few_percent(
    server_url: str, namespace: str, client: Bus
) -> None:
    names = ["a", "b", "c"]
    async with (
        node(server_url, namespace, "a", client),
        node(server_url, namespace, "b", client),
        node(server_url, namespace, "c", client),
    ):
        shares: Counter[str] = Counter()
        left = iter(range(6_000))

        async def worker() -> None:
            for _ in left:
                shares[(await client.send(Sleep(0.005))).unwrap()] += 1

        await asyncio.gather(*(worker() for _ in range(120)))
    assert sum(shares.values()) == 6_000
    # Each draw is one request: 2,000 of 6,000 with a standard deviation of 37. A grain of 64 would make it 290.
    assert all(1_750 < shares[name] < 2_250 for name in names), shares


async def test_sigterm_drains_and_what_had_arrived_is_answered(server_url: str, namespace: str, client: Bus) -> None:
    async with node(server_url, namespace, "a", client) as process:
        calls = [asyncio.create_task(client.send(Sleep(0.5))) for _ in range(20)]
        await eventually(lambda: client.statistics().calls.in_flight == 20)
        await asyncio.wait_for(client.send(Where(), node="a"), 10)  # the calls before it have arrived as well
        process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*calls) == [Ok("a")] * 20
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_a_second_signal_ends_at_once(server_url: str, namespace: str, client: Bus) -> None:
    async with node(server_url, namespace, "a", client) as process:
        call = asyncio.create_task(client.send(Sleep(3600), timeout=60))
        assert await client.send(Where(), node="a") == Ok("a")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), 0.5)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_a_drain_ends_with_a_thread_that_never_does(server_url: str, namespace: str, client: Bus) -> None:
    async with node(server_url, namespace, "a", client, SHOP_DRAIN="0.2") as process:
        call = asyncio.create_task(client.send(Stuck(), timeout=60))
        assert await client.send(Where(), node="a") == Ok("a")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


async def test_sigterm_during_the_start_ends_the_process(namespace: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *SHOP, "nats://127.0.0.1:1", namespace, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        await asyncio.sleep(0)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 20)
        # 0 if the signal met the bus, -SIGTERM if it came before the program had got that far.
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_handler_that_blocks_the_loop_delays_but_loses_nothing(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with node(server_url, namespace, "a", client):
        slow = asyncio.create_task(client.send(Spin(1.0)))
        quick = [asyncio.create_task(client.send(Where())) for _ in range(50)]
        assert await slow == Ok("a")
        assert await asyncio.gather(*quick) == [Ok("a")] * 50


async def test_a_server_restarted_under_load_fails_no_call_with_time_left(
    nats_server: NatsServer, namespace: str
) -> None:
    async with Bus("client", url=nats_server.url, namespace=namespace) as client:
        async with (
            node(nats_server.url, namespace, "a", client),
            node(nats_server.url, namespace, "b", client),
        ):
            results: Counter[str] = Counter()
            over = asyncio.Event()

            async def worker() -> None:
                while not over.is_set():
                    result = await client.send(Echo(b"x" * 100), timeout=15.0)
                    results["ok" if isinstance(result, Ok) else f"{result.code} {result.outcome}"] += 1

            workers = [asyncio.create_task(worker()) for _ in range(64)]
            await eventually(lambda: results["ok"] > 500, timeout=20)
            for _ in range(2):
                nats_server.kill()
                await eventually(lambda: client.statistics().calls.in_flight == 64)
                nats_server.restart()
                before = results["ok"]
                await eventually(lambda seen=before: results["ok"] > seen + 500, timeout=20)
            over.set()
            async with asyncio.timeout(20):
                await asyncio.gather(*workers)
        assert set(results) == {"ok"}, results
        assert client.statistics().reconnects == 2


async def test_without_its_server_every_call_ends_honestly_at_its_deadline(
    nats_server: NatsServer, namespace: str
) -> None:
    async with (
        Bus("client", url=nats_server.url, namespace=namespace) as client,
        node(nats_server.url, namespace, "a", client),
    ):
        running = asyncio.create_task(client.send(Sleep(30), timeout=1.0))
        assert await client.send(Where(), node="a") == Ok("a")
        nats_server.kill()
        await eventually(lambda: not client._node.transport.is_connected)  # type: ignore[union-attr]
        late = await client.send(Where(), timeout=0.2)
        assert isinstance(late, Err)
        assert (late.code, late.outcome) == ("DISCONNECTED", "not_run")
        ended = await running
        assert isinstance(ended, Err)
        assert (ended.code, ended.outcome) == ("DISCONNECTED", "unknown")


async def test_one_node_killed_with_requests_in_hand_leaves_them_unknown_and_the_rest_go_on(
    server_url: str, namespace: str, client: Bus
) -> None:
    async with node(server_url, namespace, "a", client) as a, node(server_url, namespace, "b", client):
        held = asyncio.create_task(client.send(Sleep(30), node="a", timeout=2.0))
        assert await client.send(Where(), node="a") == Ok("a")
        a.kill()
        await a.wait()
        result = await held
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("NO_HANDLER", "unknown")  # known before the deadline: the node is dead
        assert [await client.send(Where()) for _ in range(50)] == [Ok("b")] * 50
