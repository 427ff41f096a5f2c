"""Wall clocks an hour off: nothing that is decided depends on them."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from catga_bus import NodeStatus, Ok
from catga_bus.clock import monotonic
from catga_bus.durability.inbox.addresses import CLOCK_MARGIN, is_too_old
from catga_bus.durability.inbox.base import Recorded
from catga_bus.durability.inbox.memory_inbox import MemoryInbox
from catga_bus.durability.sending import schedule
from catga_bus.effects import Fence
from catga_bus.testing import eventually
from tests.integration.nodes import NodeProcess
from tests.integration.till import OWNERS, QUEUE, SERVICE, Customer, Debit, Effects, MakeBus, Till, jetstream_of
from tests.servers import NatsServer

StartServer = Callable[..., NatsServer]

PATIENCE = 30.0
HOUR = 3_600.0
DAY = 24 * HOUR

both_ways = pytest.mark.parametrize("skew", [HOUR, -HOUR], ids=["ahead", "behind"])


@pytest.fixture
async def effects(tmp_path: Path) -> Effects:
    effects = Effects(tmp_path / "inbox.db")
    await effects.make()
    return effects


StartNode = Callable[..., NodeProcess]


@pytest.fixture
async def start_node(tmp_path: Path, effects: Effects) -> AsyncIterator[StartNode]:
    """Start nodes whose clock is wrong: `start_node(server, skew)`."""
    nodes: list[NodeProcess] = []

    def start(server: NatsServer, skew: float) -> NodeProcess:
        place = tmp_path / f"node-{len(nodes)}"
        environment = {"SKEW": str(skew), "SERVER": server.url, "INBOX": effects.address}
        nodes.append(NodeProcess(place, "tests.integration.skewed:bus", **environment))
        return nodes[-1]

    yield start
    for node in nodes:
        node.kill()


@pytest.mark.nats
@both_ways
async def test_a_node_that_is_an_hour_off_takes_over_and_loses_and_doubles_nothing(
    start_server: StartServer, make_bus: MakeBus, start_node: StartNode, effects: Effects, skew: float
) -> None:
    server = start_server(jetstream=True)
    right, wrong = start_node(server, 0.0), start_node(server, skew)
    await asyncio.gather(right.is_ready(), wrong.is_ready())
    async with make_bus(server.url, "client") as client:
        await eventually(lambda: len(nodes_of(client)) == 2, PATIENCE)
        customer = Customer(client)
        flow = asyncio.create_task(customer.go_on())
        await passes(effects, 200)
        assert all(info.status is NodeStatus.ONLINE for info in client.nodes())

        right.kill()  # all is in the hands of the one whose clock is wrong
        await passes(effects, 200)
        await jetstream_of(client).delete_stream(OWNERS)  # and a new bucket begins where its clock says, or above
        for name in await jetstream_of(client).consumer_names(QUEUE):
            await jetstream_of(client).delete_consumer(QUEUE, name)
        await passes(effects, 200)
        successor = start_node(server, 0.0)
        await successor.is_ready()
        wrong.kill()
        await passes(effects, 200)

        customer.is_over = True
        await flow
        await eventually(lambda: effects.count >= customer.count, PATIENCE)
    assert not customer.errors
    effects.check(customer.accepted)


def nodes_of(client: object) -> list[object]:
    return [info for info in client.nodes() if info.service == SERVICE]  # type: ignore[attr-defined]


async def passes(effects: Effects, count: int) -> None:
    """Wait for so many more effects."""
    before = effects.count
    await eventually(lambda: effects.count >= before + count, PATIENCE, what=f"{count} more effects after {before}")


@pytest.mark.nats
@both_ways
async def test_a_delay_is_measured_by_the_server_and_an_instant_is_its_own(
    start_server: StartServer, make_bus: MakeBus, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    url = start_server(jetstream=True).url
    till = Till()

    def wrong_now() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=skew)

    monkeypatch.setattr(schedule, "utc_now", wrong_now)
    async with till.on(make_bus(url)), make_bus(url, "client") as client:
        began = monotonic()
        await client.enqueue(Debit("delay", 1), delay=1.0)
        await client.enqueue(Debit("at", 2), at=datetime.now(UTC) + timedelta(seconds=1.0))
        assert await client.send(Debit("now", 3)) == Ok(3)
        assert till.entries == {"now": [3]}

        await eventually(lambda: till.count == 3, PATIENCE)
        assert monotonic() - began >= 1.0


@pytest.mark.parametrize("off", list(itertools.product([0.0, HOUR, -HOUR], range(4))))
async def test_a_mark_outlives_its_message_whichever_clock_is_an_hour_off(off: tuple[float, int]) -> None:
    """The clocks of the server, of the node that did it, of the one that sweeps, and of the one that gets it again."""
    skew, whose = off
    server, doer, sweeper, other = (skew if place == whose else 0.0 for place in range(4))
    for age in (0.0, HOUR, DAY):  # of the message, when it is done
        now = 1_700_000_000.0
        inbox = MemoryInbox(retention=7 * DAY + CLOCK_MARGIN, utc=lambda: now + doer)  # noqa: B023
        await inbox.open()
        stored_at = now + server
        now += age
        await inbox.unit(SERVICE, "m", Fence(0, 1)).commit(Recorded(0, b""))
        for _ in range(9 * 24):
            now += HOUR
            await inbox.sweep(now + sweeper)
            is_known = await inbox.find(SERVICE, "m") is not None
            assert is_known or is_too_old(inbox, stored_at, now + other), f"done again {now - stored_at:,.0f} s later"
        assert await inbox.find(SERVICE, "m") is None
        await inbox.close()
