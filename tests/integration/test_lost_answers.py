"""Answers to commands that are lost on their way, on a real server: whoever waits asks, and nothing runs twice."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from catga_bus import Ok
from catga_bus.testing import eventually
from tests.chaos.proxy import Proxy
from tests.integration.till import Debit, MakeBus, Till, node_of
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

StartServer = Callable[..., NatsServer]

PATIENCE = 30.0


@pytest.fixture
async def server(start_server: StartServer) -> NatsServer:
    return start_server(jetstream=True)


@pytest.fixture
async def proxy(server: NatsServer) -> AsyncIterator[Proxy]:
    proxy = Proxy(("127.0.0.1", server.port))
    await proxy.start()
    yield proxy
    await proxy.close()


@pytest.mark.parametrize("way", ["kept", "inbox"])
async def test_an_answer_that_is_given_while_the_sender_is_away_comes_all_the_same(
    server: NatsServer, proxy: Proxy, make_bus: MakeBus, tmp_path: Path, way: str
) -> None:
    till = Till()
    options = {"kept_bytes": 0, "inbox": f"sqlite://{tmp_path / 'inbox.db'}"} if way == "inbox" else {}
    async with till.on(make_bus(server.url, **options)) as bus, make_bus(proxy.address, "client") as client:
        assert await client.send(Debit("a-0", 0), timeout=PATIENCE) == Ok(0)
        till.is_open.clear()
        call = asyncio.ensure_future(client.send(Debit("a-0", 1), timeout=PATIENCE))
        await eventually(lambda: node_of(bus).durable.statistics().work.frames == 1, PATIENCE)
        proxy.cut()
        till.is_open.set()
        await eventually(lambda: node_of(bus).durable.statistics().work.handled == 2, PATIENCE)
        proxy.heal()

        assert await asyncio.wait_for(call, 10.0) == Ok(1)
        assert node_of(bus).durable.statistics().work.repeated >= 1
    assert till.entries == {"a-0": [0, 1]}
