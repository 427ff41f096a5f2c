"""Any course of failures, pauses, hand-overs and take-overs: every effect once, in order per key, and nothing left."""

import asyncio
import random
from typing import Any

import pytest

from catga_bus import Context, Err, Fence, RetryOptions, Router
from catga_bus.durability.working.worker import Worker
from catga_bus.errors import CatgaError
from catga_bus.testing import eventually
from catga_bus.transport.jetstream import DeliveredMessage
from tests.unit.work_rig import Close, Debit, FakeInbox, Keeper, Rig

KEYS = [f"k{number}" for number in range(6)]
STEPS = 70


class Owner:
    """One node's tenure of the partition."""

    def __init__(self, rig: Rig, keeper: Keeper, worker: Worker) -> None:
        self.rig, self.keeper, self.worker = rig, keeper, worker


class World:
    """A stream of one partition, two nodes that own it in turn, and an inbox that they share."""

    def __init__(self, seed: int, *, with_inbox: bool) -> None:
        self.rng = random.Random(seed)
        self.inbox = FakeInbox() if with_inbox else None
        self.runs: list[tuple[str, int]] = []
        self.running: dict[tuple[int, str], int] = {}
        self.overlaps = 0
        self.epoch = 0
        self.sequence = 0
        self.number = 0
        self.stream: dict[int, DeliveredMessage] = {}  # what is not acknowledged
        self.taken: set[int] = set()  # by the present owner
        self.zombies: list[Owner] = []
        self.sent: dict[str, list[int]] = {key: [] for key in KEYS}
        self.owner: Owner
        self.nodes: list[Owner] = []

    async def start(self) -> None:
        for index in range(2):
            rig = await Rig(self._router(index), inbox=self.inbox).start()
            self.nodes.append(Owner(rig, rig.keeper, rig.worker))
            rig.worker.drop()
        self.claim(self.nodes[0])

    async def stop(self) -> None:
        for node in self.nodes:
            await node.rig.stop()

    def _router(self, index: int) -> Router:
        router, rng = Router(), self.rng

        async def run(key: str, number: int, ctx: Context) -> Any:
            self.overlaps += self.running.get((index, key), 0)
            self.running[index, key] = self.running.get((index, key), 0) + 1
            self.runs.append((key, number))
            try:
                if self.inbox is not None:
                    await (await ctx.transaction()).execute(f"{key} {number}")
                for _ in range(rng.choice((0, 0, 1, 3))):
                    await asyncio.sleep(0)
                if rng.random() < 0.1:
                    raise ValueError("now and then")
            finally:
                self.running[index, key] -= 1
            return Err("NO", "no") if rng.random() < 0.05 else number

        @router.handler(concurrency=rng.choice((1, 3, 64)), max_attempts=1_000, retry=RetryOptions(first=0.0))
        async def debit(command: Debit, ctx: Context) -> int | Err:
            result: int | Err = await run(command.account, command.cents, ctx)
            return result

        @router.handler(max_attempts=1_000, retry=RetryOptions(first=0.0))
        async def close(command: Close, ctx: Context) -> None:
            await run(command.account, int(ctx.message_id.split("-")[1]), ctx)

        return router

    # -- what happens ----------------------------------------------------------------------------------------

    def send(self) -> None:
        """Store a record."""
        rig, frames = self.nodes[0].rig, []
        for _ in range(self.rng.randint(1, 12)):
            self.number += 1
            key, waits = self.rng.choice(KEYS), self.rng.random() < 0.5
            message = Close(key) if self.rng.random() < 0.2 else Debit(key, self.number)
            self.sent[key].append(self.number)
            frames.append(rig.frame(message, message_id=f"m-{self.number}", waits=waits))
        self.sequence += 1
        self.stream[self.sequence] = rig.record(*frames, sequence=self.sequence)

    def claim(self, node: Owner) -> None:
        """Give the partition to a node, whose worker is as at its beginning."""
        self.epoch += 1
        if self.rng.random() < 0.5:
            node.keeper, node.worker = node.rig.partition(1, open=False)
        keeper = node.keeper
        keeper.fence = Fence(3, self.epoch)
        keeper.on_done = lambda sequence: self._acknowledged(node, sequence)
        keeper.on_lost = node.worker.drop
        keeper.is_careful = self.rng.random() < 0.2
        self.owner, self.taken = node, set()
        self.deliver()
        node.worker.resume()

    def _acknowledged(self, node: Owner, sequence: int) -> None:
        if node is self.owner:  # those of a stale owner reach nobody
            del self.stream[sequence]

    def deliver(self) -> None:
        """Hand the owner what it wants."""
        worker = self.owner.worker
        for sequence in sorted(set(self.stream) - self.taken):
            if not worker.wanted:
                return
            self.taken.add(sequence)
            worker.take(self.stream[sequence])

    def take_over(self) -> None:
        """Another node claims; the old owner learns of it later."""
        before = self.owner
        node = next(one for one in self.nodes if one is not before)
        if node in self.zombies:
            node.worker.drop()
            self.zombies.remove(node)
        self.zombies.append(before)
        self.claim(node)

    async def hand_over(self) -> None:
        """The owner finishes, then another node claims."""
        before = self.owner
        await asyncio.wait_for(before.worker.finish(below=self.rng.random() < 0.5), 10.0)
        node = next(one for one in self.nodes if one is not before)
        if node in self.zombies:
            node.worker.drop()
            self.zombies.remove(node)
        self.claim(node)

    def doubt(self) -> None:
        """The owner claims anew: a higher epoch, and what is in hand stays so."""
        self.owner.worker.pause()
        self.epoch += 1
        self.owner.keeper.fence = Fence(3, self.epoch)
        self.owner.worker.resume()

    async def turns(self) -> None:
        for _ in range(self.rng.randint(1, 15)):
            await asyncio.sleep(0)

    async def step(self, *, may_die: bool) -> None:
        chance = self.rng.random()
        if chance < 0.45:
            self.send()
            self.deliver()
        elif chance < 0.75:
            await self.turns()
        elif chance < 0.82:
            self.owner.worker.pause()
            await self.turns()
            self.owner.worker.resume()
        elif chance < 0.87:
            self.doubt()
        elif chance < 0.93:
            await self.hand_over()
        elif may_die:
            self.take_over()
        if self.zombies and self.rng.random() < 0.2:
            self.zombies.pop().worker.drop()
        if self.inbox is not None and self.rng.random() < 0.05:
            self.inbox.commit_errors.append(CatgaError("now and then"))
            self.inbox.find_errors += 1
        self.deliver()

    async def settle(self) -> None:
        """Let the present owner do all that is left."""

        def is_empty() -> bool:
            self.deliver()
            return not self.stream

        await eventually(is_empty, timeout=20.0, what="everything acknowledged")
        for zombie in self.zombies:
            zombie.worker.drop()


@pytest.mark.parametrize("seed", range(25))
async def test_with_an_inbox_every_effect_is_there_once_and_in_order_whoever_owned_the_partition(seed: int) -> None:
    world = World(seed, with_inbox=True)
    await world.start()
    try:
        for _ in range(STEPS):
            await world.step(may_die=True)
        await world.settle()
        assert world.inbox is not None
        effects = [line.split() for line in world.inbox.effects]
        for key, numbers in world.sent.items():
            assert [int(number) for own, number in effects if own == key] == numbers
        assert world.overlaps == 0
    finally:
        await world.stop()


@pytest.mark.parametrize("seed", range(100, 120))
async def test_without_one_an_owner_that_hands_over_leaves_nothing_to_be_repeated(seed: int) -> None:
    world = World(seed, with_inbox=False)
    await world.start()
    try:
        for _ in range(STEPS):
            await world.step(may_die=False)
        await world.settle()
        for key, numbers in world.sent.items():
            runs = [number for own, number in world.runs if own == key]
            assert runs == sorted(runs)
            assert sorted(set(runs)) == numbers
        failed = sum(node.rig.workshop.statistics().retries for node in world.nodes)
        assert len(world.runs) == world.number + failed
        assert world.overlaps == 0
        assert all(node.rig.workshop.statistics().frames == 0 for node in world.nodes)
    finally:
        await world.stop()
