"""Two clusters that take each other for one: same namespace, same service, and not the same in all else."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from catga_bus import ConfigurationError
from catga_bus.testing import eventually
from tests.integration.till import Customer, MakeBus, Till
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

StartServer = Callable[..., NatsServer]

PATIENCE = 30.0


async def test_another_store_than_the_live_nodes_have_fails_the_start(
    start_server: StartServer, make_bus: MakeBus, tmp_path: Path
) -> None:
    url = start_server(jetstream=True).url
    till, other = Till(), Till()
    async with (
        till.on(make_bus(url, inbox=f"sqlite://{tmp_path}/one.db", node_id="one")),
        make_bus(url, "client") as client,
    ):
        customer = Customer(client)
        assert await customer.debit()
        with pytest.raises(ConfigurationError, match="node 'one' of service 'billing' has the inbox store"):
            await other.on(make_bus(url, inbox=f"sqlite://{tmp_path}/two.db")).start()
        assert await customer.debit()
        await eventually(lambda: till.count == customer.count, PATIENCE)
        async with till.on(make_bus(url, inbox=f"sqlite://{tmp_path}/one.db")):
            assert await customer.debit()
            await eventually(lambda: till.count == customer.count, PATIENCE)
    assert other.count == 0
    till.check(customer.accepted)


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.15])
async def test_of_two_clusters_that_start_at_once_with_a_store_each_not_both_work(
    start_server: StartServer, make_bus: MakeBus, tmp_path: Path, gap: float
) -> None:
    url = start_server(jetstream=True).url
    buses = [Till().on(make_bus(url, inbox=f"sqlite://{tmp_path}/{name}.db")) for name in ("one", "two")]

    async def start(place: int) -> str:
        await asyncio.sleep(place * gap)
        try:
            await buses[place].start()
        except ConfigurationError as error:
            return str(error)
        return ""

    said = await asyncio.gather(*(start(place) for place in range(2)))

    assert any("give both the same inbox=" in text for text in said), said
