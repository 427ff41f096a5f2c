"""Requests with a key go to the node that owns the key's partition, and to anybody when there is none."""

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from catga_bus import Bus, Context, Request
from catga_bus.partition.hashing import partition_of
from catga_bus.testing import eventually

P = 8


class Balance(Request[str], partition_by="account"):
    account: str


@pytest.fixture
async def nodes(url: str) -> AsyncIterator[list[Bus]]:
    """Three nodes, of which the first two say that they own the even and the odd partitions."""
    buses = [make_bus(url) for _ in range(3)]
    for bus in buses:
        await bus.start()
    yield buses
    for bus in buses:
        await bus.close()


def make_bus(url: str) -> Bus:
    bus = Bus("billing", url=url)

    @bus.handler
    async def balance(request: Balance, ctx: Context) -> str:
        return ctx.node

    return bus


def say(bus: Bus, partitions: dict[int, int]) -> None:
    """Have a node announce partitions."""
    assert bus._node is not None
    directory: Any = bus._node.directory
    report = directory._report

    def owning() -> Any:
        said = report()
        return type(said)(**{name: getattr(said, name) for name in said.__struct_fields__} | {"partitions": partitions})

    directory._report = owning


async def heard(client: Bus, owners: dict[int, str]) -> None:
    def is_known() -> bool:
        assert client._node is not None
        known = client._node.directory.owners("Balance").by_partition
        return {partition: node for partition, (_, node) in known.items()} == owners

    await eventually(is_known)


async def test_a_key_goes_to_its_owner_and_without_one_to_anybody(nodes: list[Bus], monkeypatch: Any) -> None:
    first, second, third = nodes
    monkeypatch.setattr("catga_bus.cluster.records.NodeInfo.partition_count", P, raising=False)
    owners = {p: (first if p % 2 == 0 else second).node_id for p in range(P) if p != 3}
    say(first, {p: 7 for p, node in owners.items() if node == first.node_id})
    say(second, {p: 7 for p, node in owners.items() if node == second.node_id})
    await heard(third, owners)
    seen = Counter[str]()
    for number in range(200):
        key = f"a-{number}"
        answer = (await third.send(Balance(key))).unwrap()
        owner = owners.get(partition_of(key, P))
        if owner is None:
            seen[answer] += 1
        else:
            assert answer == owner
    assert len(seen) == 3  # what nobody owns is spread


async def test_any_key_is_fine_where_nobody_owns_anything(nodes: list[Bus]) -> None:
    for key in ("", "x" * 5_000, "a\nb", "*.>", "é"):
        assert (await nodes[0].send(Balance(key))).is_ok
