"""What is done to services with stores, and what must hold: named scenarios.

Unless it says otherwise there are three nodes over 16 partitions, and one producer with 200 keys that sends 200
messages a second, one in ten of which it waits for.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos import evidence, netns
from tests.chaos.proxy import Direction
from tests.chaos.stored.checker import Expect, check
from tests.chaos.stored.cluster import StoredCluster
from tests.chaos.stored.messages import SERVICE
from tests.chaos.stored.report import Figures, lines, tabulate
from tests.chaos.stored.story import tell

QUIET = 0.7
"""Seconds of load before the first fault and after the last."""

LEAST = evidence.SHORTEST + 0.1

Play = Callable[[StoredCluster, random.Random], Awaitable[Sequence[str] | None]]


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Scenario:
    """A named run of the rig."""

    name: str
    play: Play
    expect: Expect
    in_ci: bool = False
    """Whether it is part of the short run."""

    why_not: Callable[[], str | None] = _always
    servers: int = 1
    partitions: int = 16


@dataclass(frozen=True)
class Played:
    """The result of a scenario."""

    violations: Mapping[str, list[str]]
    figures: Figures

    @property
    def is_clean(self) -> bool:
        """Whether every check held."""
        return not self.violations

    def lines(self) -> list[str]:
        """Return the figures as text."""
        return lines(self.figures)


async def play(scenario: Scenario, seed: str, directory: Path, bug: str = "") -> Played:
    """Play a scenario and check its history, which stays in `directory`.

    Raises:
        AssertionError: A process did not do what it was told, or ended by itself.
    """
    try:
        async with StoredCluster(
            directory, seed, bug=bug, servers=scenario.servers, partitions=scenario.partitions
        ) as cluster:
            drawn = await scenario.play(cluster, random.Random(seed)) or ()
            remains = await cluster.finish()
    except Exception as error:
        error.add_note(f"{scenario.name}, seed {seed}: history and logs in {directory}")
        raise
    expect = replace(scenario.expect, faults=(*scenario.expect.faults, *drawn))
    story = tell(remains, expect.listeners)
    return Played(check(story, expect), tabulate(story))


SCENARIOS: dict[str, Scenario] = {}


def _scenario(
    expect: Expect,
    *,
    in_ci: bool = False,
    why_not: Callable[[], str | None] = _always,
    servers: int = 1,
    partitions: int = 16,
) -> Callable[[Play], Play]:
    def register(function: Play) -> Play:
        name = function.__name__.replace("_", "-")
        SCENARIOS[name] = Scenario(name, function, expect, in_ci, why_not, servers, partitions)
        return function

    return register


LOAD: dict[str, Any] = {"rate": 200.0, "keys": 200}
PAUSING = LOAD | {"mix": {"quick": 0.83, "long": 0.15, "flaky": 0.02}}
"""With handlers that run for a second: some of them is in hand whenever a node stands still."""


@_scenario(
    Expect(
        faults=("kill",) * 3,
        only_ok=True,
        longest_gap=3.0,
        longest_takeover=4.0,
        sees={"takeover": 3, "redelivery": 1, "known": 1, "executed": 1, "kill@commit": 1, "kill@committed": 1},
    ),
    in_ci=True,
)
async def durable_kill(cluster: StoredCluster, rng: random.Random) -> None:
    """Nodes are killed: at random, between effect and commit, and between commit and acknowledgement."""
    first, second, third = rng.sample(await cluster.start_nodes(3), 3)
    await cluster.start_producer("p1", **LOAD)
    await asyncio.sleep(QUIET)
    await cluster.kill_at(first, "committed")
    await cluster.replace(first)
    await cluster.kill_at(second, "commit")
    await cluster.replace(second)
    await cluster.kill(third)
    await asyncio.sleep(2.0)


@_scenario(
    Expect(faults=("freeze",) * 2, only_ok=True, longest_gap=8.0, sees={"takeover": 2, "redelivery": 1}), in_ci=False
)
async def durable_freeze(cluster: StoredCluster, rng: random.Random) -> None:
    """Two of three nodes stand still, one after the other, for long enough to lose what they own."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_producer("p1", **PAUSING)
    await asyncio.sleep(QUIET)
    for node in rng.sample(nodes, 2):
        await cluster.freeze(node, rng.uniform(2.5, 4.0))
        await cluster.wait_calm()
    await asyncio.sleep(QUIET)


@_scenario(
    Expect(
        faults=("freeze",) * 2,
        only_ok=True,
        longest_gap=8.0,
        sees={"takeover": 2, "redelivery": 1, "fenced": 1, "freeze@run": 1, "freeze@commit": 1},
    ),
    in_ci=True,
)
async def durable_freeze_in_commit(cluster: StoredCluster, rng: random.Random) -> None:
    """A node stands still in a handler and commits when it has lost its partition; another one within its commit.

    The first is refused by the store. The second has the store's only writer with it: nobody commits before it thaws.
    """
    first, second, _ = rng.sample(await cluster.start_nodes(3), 3)
    await cluster.start_producer("p1", **PAUSING)
    await asyncio.sleep(QUIET)
    async with cluster.frozen_at(first, "run", "long") as hit:
        await cluster.wait_run_elsewhere(hit)
        await asyncio.sleep(0.4)  # in which others of its partition are committed
    await cluster.wait_calm()
    async with cluster.frozen_at(second, "commit"):
        await asyncio.sleep(2.0)
    await asyncio.sleep(2.0)


@_scenario(
    Expect(
        faults=("roll",) * 3,
        only_ok=True,
        repeats=0,
        longest_gap=3.0,
        sees={"hand_over": 16},
        most={"known": 0, "redelivery": 0, "takeover": 0, "fenced": 0},
    ),
    in_ci=True,
)
async def durable_roll(cluster: StoredCluster, rng: random.Random) -> None:
    """All three nodes are replaced, one after the other, as a deploy does it: nothing runs twice."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_producer("p1", **LOAD)
    await asyncio.sleep(QUIET)
    for node in rng.sample(nodes, len(nodes)):
        await cluster.roll(node)
    await asyncio.sleep(QUIET)


@_scenario(
    Expect(faults=("restart_server",) * 2, only_ok=True, lost_answers=True, longest_gap=8.0, sees={"reclaim": 1}),
    in_ci=True,
)
async def durable_server(cluster: StoredCluster, rng: random.Random) -> None:
    """The server is killed and started again, twice: what waits for it is stored once, in order."""
    await cluster.start_nodes(3)
    await cluster.start_producer("p1", **LOAD, waits=0.0)
    await cluster.start_producer("p2", rate=200.0, keys=10, waits=0.0)
    await asyncio.sleep(QUIET)
    await cluster.restart_server(rng.uniform(LEAST, 1.5))
    await asyncio.sleep(2.0)
    await cluster.restart_server(rng.uniform(LEAST, 1.5))
    await asyncio.sleep(2.0)


@_scenario(Expect(faults=("freeze_server",), only_ok=True, lost_answers=True, longest_gap=10.0))
async def durable_server_frozen(cluster: StoredCluster, rng: random.Random) -> None:
    """The server stands still for a while; no connection breaks."""
    await cluster.start_nodes(3)
    await cluster.start_producer("p1", **LOAD)
    await asyncio.sleep(QUIET)
    await cluster.freeze_server(rng.uniform(1.5, 4.0))
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("kill_leader",), only_ok=True, lost_answers=True, longest_gap=15.0), servers=3, partitions=8)
async def durable_cluster_leader(cluster: StoredCluster, rng: random.Random) -> None:
    """Of three servers the one that leads the work queue is killed: nobody is told, with a deadline of 15 s."""
    await cluster.start_nodes(3)
    await cluster.start_producer("p1", rate=100.0, keys=100)
    await asyncio.sleep(QUIET)
    await cluster.kill_leader(cluster.names.command_stream(SERVICE), rng.uniform(LEAST, 3.0))
    await asyncio.sleep(12.0)


@_scenario(
    Expect(
        faults=("cut", "half_open"),
        only_ok=True,
        lost_answers=True,
        longest_gap=8.0,
        sees={"takeover": 2, "redelivery": 1},
    )
)
async def durable_cut(cluster: StoredCluster, rng: random.Random) -> None:
    """The link of a node is cut, and later swallows everything; its store is still in reach, its partitions are not."""
    await cluster.start_nodes(2)
    node = await cluster.start_node(linked=True)
    await cluster.start_producer("p1", **PAUSING)
    await cluster.wait_calm()
    await asyncio.sleep(QUIET)
    await cluster.cut(node, rng.uniform(2.0, 3.0))
    await cluster.wait_shared([node])
    await cluster.wait_calm()
    await cluster.half_open(node, rng.uniform(2.5, 3.5))
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("cut",) * 2, only_ok=True, lost_answers=True, longest_gap=8.0))
async def durable_producer_cut(cluster: StoredCluster, rng: random.Random) -> None:
    """The link of the producer is cut twice: what it may have sent before is stored once, and in order."""
    await cluster.start_nodes(2)
    await cluster.start_producer("p1", linked=True, rate=400.0, keys=20)
    await asyncio.sleep(QUIET)
    for _ in range(2):
        await cluster.cut("p1", rng.uniform(LEAST, 2.0))
        await asyncio.sleep(rng.uniform(1.0, 2.0))
    await asyncio.sleep(QUIET)


@_scenario(
    Expect(faults=("unplug",), only_ok=True, lost_answers=True, longest_gap=8.0, sees={"takeover": 1}),
    why_not=netns.why_not,
)
async def durable_unplugged(cluster: StoredCluster, rng: random.Random) -> None:
    """The cable of a node, in a network of its own, is pulled for 3 s."""
    await cluster.start_nodes(2)
    node = await cluster.start_node(in_space=True)
    await cluster.start_producer("p1", **PAUSING)
    await cluster.wait_calm()
    await asyncio.sleep(QUIET)
    await cluster.unplug(node, 3.0)
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("delete_consumers", "delete_owners"), only_ok=True, longest_gap=8.0, sees={"reclaim": 4}))
async def durable_bucket_and_consumers(cluster: StoredCluster, rng: random.Random) -> None:
    """Consumers are deleted under their owners, then the bucket that says who owns what; then a node is killed."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_producer("p1", **LOAD)
    await asyncio.sleep(QUIET)
    await cluster.delete_consumers(cluster.names.command_stream(SERVICE), 6)
    await asyncio.sleep(1.5)
    await cluster.delete_owners()
    await asyncio.sleep(1.5)
    await cluster.kill(rng.choice(nodes))
    await asyncio.sleep(2.5)


@_scenario(
    Expect(
        faults=("kill", "kill", "roll"),
        listeners=("mail", "stock"),
        only_ok=True,
        longest_gap=4.0,
        sees={"takeover": 2, "redelivery": 1, "hand_over": 1, "kill@committed": 1},
    ),
    in_ci=True,
)
async def durable_events(cluster: StoredCluster, rng: random.Random) -> None:
    """Two services get every event; nodes of both are killed, and one is rolled."""
    options = {"takes_commands": False, "takes_events": True}
    mail, stock = await asyncio.gather(
        cluster.start_nodes(2, "mail", **options), cluster.start_nodes(2, "stock", **options)
    )
    await cluster.start_producer("p1", **LOAD, events=1.0)
    await asyncio.sleep(QUIET)
    await cluster.kill_at(mail[0], "committed")
    await cluster.replace(mail[0])
    await cluster.kill(rng.choice(stock))
    await cluster.roll(mail[1])
    await asyncio.sleep(2.0)


@_scenario(
    Expect(
        faults=("kill",) * 2,
        only_ok=True,
        longest_gap=4.0,
        sees={"letter": 5, "takeover": 2, "kill@burying": 1, "kill@buried": 1},
    )
)
async def durable_letters(cluster: StoredCluster, rng: random.Random) -> None:
    """Some messages always fail; nodes are killed before and after a dead letter is stored."""
    first, second, _ = rng.sample(await cluster.start_nodes(3), 3)
    await cluster.start_producer("p1", rate=150.0, keys=100, mix={"quick": 0.85, "doomed": 0.1, "flaky": 0.05})
    await asyncio.sleep(QUIET)
    await cluster.kill_at(first, "burying")
    await cluster.replace(first)
    await cluster.kill_at(second, "buried")
    await asyncio.sleep(2.0)


@_scenario(Expect(faults=("die",), longest_gap=8.0, sees={"killer": 1, "letter": 1, "takeover": 3}))
async def durable_killer(cluster: StoredCluster, rng: random.Random) -> None:
    """A message kills every process that runs it, until it is a dead letter; its batch mates have their effects."""
    await cluster.start_nodes(3)
    await cluster.start_producer("p1", rate=100.0, keys=100)
    await asyncio.sleep(QUIET)
    burst = {"rate": 2_000.0, "keys": 20, "limit": 60, "opening": ["killer"], "mix": {"quick": 1.0}, "waits": 0.0}
    async with cluster.deaths():
        await cluster.start_producer("p2", **burst)
        await cluster.wait_letter()
    await asyncio.sleep(2.0)


@_scenario(
    Expect(
        faults=("kill", "freeze", "freeze"),
        only_ok=True,
        longest_gap=8.0,
        sees={"takeover": 2, "freeze@claimed": 1, "freeze@emptied": 1},
    )
)
async def durable_claim(cluster: StoredCluster, rng: random.Random) -> None:
    """A claimant stands still before it makes its consumer, and its rival after it has deleted the one before.

    Then the claimant that was overtaken thaws first: nothing keeps its consumer out, only the read before it begins.
    """
    first, second, third = rng.sample(await cluster.start_nodes(3), 3)
    await cluster.start_producer("p1", **LOAD)
    await asyncio.sleep(QUIET)
    cluster.arm(second, "claimed", "freeze")
    await cluster.kill(first)
    async with AsyncExitStack() as rival:
        async with cluster.frozen_at(second, "claimed", is_armed=True) as hit:
            await rival.enter_async_context(cluster.frozen_at(third, "emptied", hit.what))
            await asyncio.sleep(LEAST)
        await asyncio.sleep(LEAST)
    await asyncio.sleep(3.0)


# -- trials ------------------------------------------------------------------------------------------------------------
#
# Short runs with one fault each, clean without a bug: what finds each of `tests.chaos.stored.bugs`.

TRIALS: dict[str, Scenario] = {}


def _trial(function: Play) -> Play:
    name = function.__name__.removeprefix("trial_").replace("_", "-")
    TRIALS[name] = Scenario(name, function, Expect(listeners=("mail",)), partitions=4)
    return function


@_trial
async def trial_order(cluster: StoredCluster, rng: random.Random) -> None:
    """Nothing happens but that messages fail, and take their time."""
    await cluster.start_nodes(1)
    await cluster.start_producer("p1", rate=200.0, keys=20, mix={"quick": 0.85, "slow": 0.1, "flaky": 0.05})
    await asyncio.sleep(2.0)


@_trial
async def trial_commit(cluster: StoredCluster, rng: random.Random) -> None:
    """A node is killed between effect and commit."""
    await _kill_one_at(cluster, "commit")


@_trial
async def trial_committed(cluster: StoredCluster, rng: random.Random) -> None:
    """A node is killed between commit and acknowledgement."""
    await _kill_one_at(cluster, "committed")


@_trial
async def trial_burying(cluster: StoredCluster, rng: random.Random) -> None:
    """A node is killed before a dead letter is stored."""
    await _kill_one_at(cluster, "burying")


@_trial
async def trial_buried(cluster: StoredCluster, rng: random.Random) -> None:
    """A node is killed between a dead letter and the acknowledgement of its message."""
    await _kill_one_at(cluster, "buried")


async def _kill_one_at(cluster: StoredCluster, point: str) -> None:
    first, _ = await cluster.start_nodes(2)
    await cluster.start_producer("p1", rate=100.0, keys=50, mix={"quick": 0.85, "slow": 0.1, "doomed": 0.05})
    await cluster.wait_calm()
    await cluster.kill_at(first, point)
    await asyncio.sleep(1.5)


@_trial
async def trial_zombie(cluster: StoredCluster, rng: random.Random) -> None:
    """A node stands still in a handler, and commits when it has lost its partition."""
    first, _ = await cluster.start_nodes(2)
    await cluster.start_producer("p1", **PAUSING)
    await cluster.wait_calm()
    async with cluster.frozen_at(first, "run", "long") as hit:
        await cluster.wait_run_elsewhere(hit)
        await asyncio.sleep(0.4)
    await asyncio.sleep(1.5)


@_trial
async def trial_roll(cluster: StoredCluster, rng: random.Random) -> None:
    """A node is rolled while it runs something in every partition."""
    first, _ = await cluster.start_nodes(2)
    await cluster.start_producer("p1", rate=100.0, keys=50, mix={"quick": 0.5, "slow": 0.5})
    await cluster.wait_calm()
    await cluster.roll(first, with_successor=False)
    await asyncio.sleep(0.5)


@_trial
async def trial_server(cluster: StoredCluster, rng: random.Random) -> None:
    """The server is killed and started again under a producer with few keys."""
    await cluster.start_nodes(1)
    await cluster.start_producer("p1", rate=500.0, keys=10, waits=0.0)
    await asyncio.sleep(QUIET)
    await cluster.restart_server(LEAST)
    await asyncio.sleep(2.0)


@_trial
async def trial_events(cluster: StoredCluster, rng: random.Random) -> None:
    """A node that reads events is killed with some of them in hand."""
    first, _ = await cluster.start_nodes(2, "mail", takes_commands=False, takes_events=True)
    await cluster.start_producer("p1", rate=100.0, keys=50, events=1.0, mix={"quick": 0.5, "slow": 0.5})
    await cluster.wait_calm()
    await cluster.kill(first)
    await asyncio.sleep(2.0)


TRIALS["claim"] = replace(SCENARIOS["durable-claim"], name="claim")
TRIALS["killer"] = replace(SCENARIOS["durable-killer"], name="killer")


# -- a schedule from a seed --------------------------------------------------------------------------------------------

MIX = Expect(
    listeners=("ledger", "mail"),
    only_ok=True,
    lost_answers=True,
    longest_gap=15.0,
    sees={"takeover": 1, "redelivery": 1, "hand_over": 1, "letter": 1},
)
POINTS = ("run", "commit", "committed")

Move = tuple[str, Callable[[], Awaitable[object]]]


def moves(cluster: StoredCluster, rng: random.Random) -> list[Move]:
    """Return one fault of every kind, each of which draws its target and its length when it is called."""

    def node() -> str:
        return rng.choice(sorted(cluster.nodes))

    async def kill_and_replace() -> None:
        name = node()
        await cluster.kill(name)
        await cluster.replace(name)

    async def kill_at_and_replace() -> None:
        name = node()
        await cluster.kill_at(name, rng.choice(POINTS))
        await cluster.replace(name)

    async def freeze_at() -> None:
        async with cluster.frozen_at(node(), rng.choice(POINTS)):
            await asyncio.sleep(rng.uniform(LEAST, 3.0))

    def way() -> Direction:
        return rng.choice(list(Direction))

    def consumers() -> Awaitable[None]:
        streams = (cluster.names.command_stream(SERVICE), cluster.names.event_stream())
        return cluster.delete_consumers(rng.choice(streams), 5)

    return [
        ("kill", kill_and_replace),
        ("kill", kill_at_and_replace),
        ("freeze", lambda: cluster.freeze(node(), rng.uniform(LEAST, 4.0))),
        ("freeze", freeze_at),
        ("roll", lambda: cluster.roll(node())),
        ("restart_server", lambda: cluster.restart_server(rng.uniform(LEAST, 1.5))),
        ("freeze_server", lambda: cluster.freeze_server(rng.uniform(LEAST, 2.0))),
        ("cut", lambda: cluster.cut(node(), rng.uniform(LEAST, 3.0))),
        ("cut", lambda: cluster.cut("p1", rng.uniform(LEAST, 2.0))),
        ("half_open", lambda: cluster.half_open(node(), rng.uniform(LEAST, 3.0))),
        ("one_way", lambda: cluster.one_way(node(), way(), rng.uniform(LEAST, 3.0))),
        ("delete_consumers", consumers),
        ("delete_owners", cluster.delete_owners),
    ]


async def _play_mix(seconds: float, cluster: StoredCluster, rng: random.Random) -> Sequence[str]:
    """Two services, three nodes each; one fault after the other until the time is up, every kind before any again."""
    options: dict[str, Any] = {"linked": True, "takes_events": True}
    await asyncio.gather(
        cluster.start_nodes(3, **options), cluster.start_nodes(2, "mail", takes_commands=False, **options)
    )
    mix = {"quick": 0.86, "slow": 0.05, "long": 0.05, "flaky": 0.02, "doomed": 0.02}
    await cluster.start_producer("p1", linked=True, rate=80.0, keys=200, events=0.4, mix=mix)
    await cluster.start_producer("p2", rate=80.0, keys=200, events=0.4, mix=mix)
    await asyncio.sleep(QUIET)
    loop = asyncio.get_running_loop()
    over = loop.time() + seconds
    deck: list[Move] = []
    drawn: list[str] = []
    while loop.time() < over:
        if not deck:
            deck = rng.sample(moves(cluster, rng), len(moves(cluster, rng)))
        await cluster.wait_shared(list(cluster.nodes))
        kind, make = deck.pop()
        drawn.append(kind)
        await make()
        await asyncio.sleep(rng.uniform(0.5, 3.0))
    await asyncio.sleep(2.0)
    return drawn


def random_schedule(seconds: float) -> Scenario:
    """Return a scenario that draws its faults from the seed. Same seed, same schedule, not the same interleaving."""
    return Scenario("durable-mix", partial(_play_mix, seconds), MIX)


SCENARIOS["durable-mix"] = random_schedule(60.0)
