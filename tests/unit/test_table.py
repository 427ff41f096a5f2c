"""Nodes that share partitions: the planning loop of each, over a bucket and keepers that are played."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from catga_bus.clock import monotonic
from catga_bus.partition.owners import Holding
from catga_bus.partition.plan import make_plan
from catga_bus.partition.planner import Peer, Planner
from catga_bus.partition.records import StaleError, Standing
from catga_bus.partition.table import Kept, Table
from catga_bus.testing import eventually
from catga_bus.wire import Notice

P = 16
TIMEOUT = 0.3
TYPES = frozenset({"Debit"})


class World:
    """The bucket, and what every node knows of the others."""

    def __init__(self) -> None:
        self.revision = 100
        self.records: dict[int, Holding] = {}
        self.tables: dict[str, Table] = {}
        self.peers: dict[str, Peer] = {}
        self.moves: list[tuple[int, str]] = []
        self.refused: set[int] = set()
        self.vain: set[int] = set()
        self.partitions = P

    def write(self, partition: int, node: str | None) -> int:
        self.revision += 1
        self.records[partition] = Holding(node, self.revision, (1, 1))
        if node:
            self.moves.append((partition, node))
        return self.revision

    def add(self, node: str, types: frozenset[str] = TYPES) -> Table:
        self.peers[node] = Peer(id=node, incarnation=(1, 1), is_live=True, types=types)

        async def read_all() -> dict[int, Holding]:
            return dict(self.records)

        async def read(partition: int) -> Holding | None:
            await asyncio.sleep(0)
            return self.records.get(partition)

        def tell(target: str, notice: Notice) -> None:
            table = self.tables.get(target)
            if table is not None:
                asyncio.get_running_loop().call_soon(table.on_notice, node, notice)

        table = self.tables[node] = Table(
            "cmd",
            Planner(self.partitions, node, lambda: (1, 1), TIMEOUT),
            node,
            lambda: (1, 1),
            peers=lambda: self.view(),
            routed=frozenset,
            read_all=read_all,
            read=read,
            keep=lambda partition, _, told: PlayedKeeper(self, node, partition, told),
            tell=tell,
            clock=monotonic,
        )
        table.start()
        self.wake()
        return table

    def view(self) -> list[Peer]:
        found = []
        for node, peer in self.peers.items():
            table = self.tables.get(node)
            epochs = table.epochs() if table is not None and peer.is_live else {}
            found.append(Peer(**{name: getattr(peer, name) for name in peer.__struct_fields__} | {"epochs": epochs}))
        return found

    def change(self, node: str, **fields: Any) -> None:
        peer = self.peers[node]
        self.peers[node] = Peer(**{name: getattr(peer, name) for name in peer.__struct_fields__} | fields)
        self.wake()

    def wake(self) -> None:
        for table in self.tables.values():
            table.wake()

    def owned(self) -> Counter[str]:
        return Counter({node: len(table.epochs()) for node, table in self.tables.items()})

    async def kill(self, node: str) -> None:
        await self.tables.pop(node).close()
        self.change(node, is_live=False)

    def is_whole(self) -> bool:
        """Whether every partition is worked on by one node, the one in the bucket."""
        owners = [(p, node) for node, table in self.tables.items() for p in table.epochs()]
        return sorted(owners) == sorted((p, one.node) for p, one in self.records.items()) and (
            len(owners) == self.partitions
        )


class PlayedKeeper:
    """A keeper that claims at once."""

    def __init__(self, world: World, node: str, partition: int, told: Callable[[], None]) -> None:
        self._world, self._node, self._partition, self._told = world, node, partition, told
        self.epoch = 0
        self.standing = Standing.CLAIMING
        self.doubts: list[str] = []
        self.suspended = 0

    async def take(self) -> None:
        await asyncio.sleep(0)
        if self._partition in self._world.refused:
            raise StaleError
        self.epoch = self._world.write(self._partition, self._node)
        if self._partition in self._world.vain:
            raise StaleError
        self.standing = Standing.ACTIVE

    async def hand_over(self) -> None:
        self.standing = Standing.DRAINING
        await asyncio.sleep(0.01)
        self._world.write(self._partition, None)
        self.standing = Standing.GONE

    def doubt(self, reason: str) -> None:
        self.doubts.append(reason)
        if self._world.records[self._partition].node != self._node:
            self.standing = Standing.GONE
            self._told()

    def suspend(self) -> None:
        self.suspended += 1

    async def revalidate(self) -> None:
        self.suspended -= 1

    def reconnected(self) -> None:
        self.doubt("reconnected")

    async def close(self) -> None:
        self.standing = Standing.GONE


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    for table in made.tables.values():
        await table.close()


async def test_the_first_node_claims_everything_at_once(world: World) -> None:
    table = world.add("a")
    await table.wait_settled()
    await eventually(world.is_whole)
    assert world.owned() == {"a": P}
    assert table.statistics().claims == P


async def test_a_node_that_joins_is_given_its_share_and_nothing_else_moves(world: World) -> None:
    await world.add("a").wait_settled()
    world.add("b")
    await eventually(lambda: world.owned() == {"a": 8, "b": 8} and world.is_whole())
    assert len(world.moves) == P + 8
    world.add("c")
    await eventually(lambda: sorted(world.owned().values()) == [5, 5, 6] and world.is_whole())
    assert {node for _, node in world.moves[P + 8 :]} == {"c"}


async def test_what_a_dead_node_held_is_taken_over_by_those_that_live(world: World) -> None:
    await world.add("a").wait_settled()
    world.add("b")
    await eventually(lambda: world.owned() == {"a": 8, "b": 8} and world.is_whole())
    await world.kill("a")
    await eventually(lambda: world.owned() == {"b": P} and world.is_whole())
    assert len(world.moves) == P + 8 + 8


async def test_a_node_that_leaves_hands_over_before_anybody_notices(world: World) -> None:
    await world.add("a").wait_settled()
    world.add("b")
    await eventually(lambda: world.owned() == {"a": 8, "b": 8} and world.is_whole())
    world.peers["a"] = Peer(id="a", incarnation=(1, 1), is_live=True, is_draining=True, types=TYPES)
    await world.tables["a"].leave()
    assert world.tables["a"].epochs() == {}
    await eventually(lambda: world.owned()["b"] == P)


async def test_the_last_node_releases_everything(world: World) -> None:
    await world.add("a").wait_settled()
    await world.tables["a"].leave()
    assert {record.node for record in world.records.values()} == {None}


async def test_an_owner_of_whom_nobody_has_heard_is_waited_for(world: World) -> None:
    for partition in range(P):
        world.write(partition, "ghost")
    began = monotonic()
    world.add("a")
    await eventually(lambda: world.owned() == {"a": P})
    assert monotonic() - began >= TIMEOUT


async def test_a_living_owner_is_never_robbed(world: World) -> None:
    world.peers["silent"] = Peer(id="silent", incarnation=(1, 1), is_live=True, types=TYPES)
    for partition in range(P):
        world.write(partition, "silent")
    table = world.add("a")
    await eventually(lambda: table.statistics().asked >= 16)
    assert table.epochs() == {}
    world.change("silent", is_live=False)
    await eventually(lambda: world.owned() == {"a": P})


async def test_a_former_life_of_a_node_owns_nothing(world: World) -> None:
    for partition in range(P):
        world.revision += 1
        world.records[partition] = Holding("a", world.revision, (0, 9))
    world.add("a")
    await eventually(lambda: world.owned() == {"a": P} and world.is_whole())


async def test_a_claim_that_somebody_else_won_is_tried_again_later(world: World) -> None:
    world.refused = {3}
    table = world.add("a")
    await eventually(lambda: table.statistics().stale >= 2)
    assert len(table.epochs()) == P - 1
    world.refused = set()
    await eventually(world.is_whole)


async def test_what_a_claim_in_vain_has_left_in_the_bucket_is_not_forgotten(world: World) -> None:
    world.partitions = 1
    later = make_plan(1, {}, ["a", "b"]).owners[0]
    assert later is not None
    first = "b" if later == "a" else "a"
    world.vain = {0}
    table = world.add(first)
    await eventually(lambda: table.statistics().stale > 0)
    world.add(later)  # which is told by the bucket that a living node owns the partition
    await eventually(lambda: table.plan is not None and len(table.plan.takers) == 2)
    world.vain = set()
    await eventually(world.is_whole)


async def test_nodes_without_a_handler_own_nothing(world: World) -> None:
    world.peers["client"] = Peer(id="client", incarnation=(1, 1), is_live=True)
    world.add("a")
    await eventually(lambda: world.owned() == {"a": P})


async def test_what_was_lost_while_nobody_looked_is_found_in_the_bucket(world: World) -> None:
    table = world.add("a")
    await table.wait_settled()
    world.peers["b"] = Peer(id="b", incarnation=(1, 1), is_live=True, types=TYPES)
    world.write(0, "b")
    table.kept()[0].doubt("told")
    await eventually(lambda: 0 not in table.epochs())
    assert len(table.epochs()) == P - 1


async def test_after_a_pause_everything_is_read_before_anything_goes_on(world: World) -> None:
    table = world.add("a")
    await table.wait_settled()
    table.suspend()
    keepers = [kept for kept in table.kept().values() if isinstance(kept, PlayedKeeper)]
    assert all(kept.suspended == 1 for kept in keepers)
    await eventually(lambda: all(kept.suspended == 0 for kept in keepers))


def _conforms(kept: PlayedKeeper) -> Kept:
    return kept
