"""What is done to a cluster, and what must hold: named scenarios, and a schedule drawn from a seed.

A scenario is a function that plays on a running cluster, and an `Expect`. Unless it says otherwise there are three
nodes and one caller that makes 250 calls a second with a deadline of 2 s, one in twenty of half a second, so that
something is under way whenever a node dies.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from catga_bus.errors import Code
from tests.chaos import evidence, netns
from tests.chaos.checker import ANY_CODE, DETECTION, RECOVERY, Allowed, Expect, check
from tests.chaos.cluster import Cluster
from tests.chaos.proxy import Direction
from tests.chaos.report import Table, tabulate
from tests.chaos.story import tell

STEADY = {"Quick": 0.95, "Slow": 0.05}
QUIET = 1.0
# Seconds of load before the first fault and after the last.

LEAST = evidence.SHORTEST + 0.1
# Seconds that a fault lasts at least: of a shorter one nobody could say whether it was real.

Play = Callable[[Cluster, random.Random], Awaitable[Sequence[str] | None]]
"""Plays; returns the kinds of the faults that it drew, which must have happened beside those of its `Expect`."""

Move = tuple[str, Callable[[], Awaitable[object]]]
"""A kind of fault, and what makes one."""


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Scenario:
    """A named run of the rig."""

    name: str
    play: Play
    expect: Expect
    in_ci: bool = True
    """Whether it is part of the short run."""

    why_not: Callable[[], str | None] = _always
    """Returns why it cannot be played on this machine, or None."""


@dataclass(frozen=True)
class Played:
    """The result of a scenario."""

    violations: Mapping[str, list[str]]
    table: Table

    @property
    def is_clean(self) -> bool:
        """Whether every check held."""
        return not self.violations


async def play(scenario: Scenario, seed: str, directory: Path) -> Played:
    """Play a scenario and check its history, which stays in `directory`.

    Raises:
        AssertionError: A process did not do what it was told, or ended by itself.
    """
    try:
        async with Cluster(directory, seed) as cluster:
            drawn = await scenario.play(cluster, random.Random(seed)) or ()
            records = await cluster.finish()
    except Exception as error:
        error.add_note(f"{scenario.name}, seed {seed}: history and logs in {directory}")
        raise
    story = tell(records)
    expect = replace(scenario.expect, faults=(*scenario.expect.faults, *drawn))
    return Played(check(story, expect), tabulate(story))


SCENARIOS: dict[str, Scenario] = {}


def _scenario(
    expect: Expect, *, in_ci: bool = True, why_not: Callable[[], str | None] = _always
) -> Callable[[Play], Play]:
    def register(function: Play) -> Play:
        SCENARIOS[function.__name__] = Scenario(function.__name__, function, expect, in_ci, why_not)
        return function

    return register


@_scenario(Expect(faults=("kill",), longest_gap=2.0))
async def kill(cluster: Cluster, rng: random.Random) -> None:
    """One of three nodes is killed between accepting requests and answering them."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_caller(mix=STEADY)
    await asyncio.sleep(QUIET)
    await cluster.kill(rng.choice(nodes))
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("kill",), longest_gap=2.0), in_ci=False)
async def kill_accepted(cluster: Cluster, rng: random.Random) -> None:
    """The same when every request takes a third of a second, so that dozens are accepted and not answered."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_caller(mix={"Slow": 1.0}, rate=150.0, timeout=4.0)
    await asyncio.sleep(QUIET)
    await cluster.kill(rng.choice(nodes))
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("freeze",), longest_gap=2.0), in_ci=False)
async def freeze(cluster: Cluster, rng: random.Random) -> None:
    """One of three nodes stands still for 3 s; the server pings as it does by default and does not notice."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_caller(mix=STEADY)
    await asyncio.sleep(QUIET)
    await cluster.freeze(rng.choice(nodes), 3.0)
    await asyncio.sleep(2.0)


@_scenario(Expect(faults=("freeze",), longest_gap=2.0))
async def freeze_patient(cluster: Cluster, rng: random.Random) -> None:
    """The same with deadlines that outlive the freeze: what others have done is not repeated after the thaw."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_caller(mix=STEADY, timeout=10.0)
    await asyncio.sleep(QUIET)
    await cluster.freeze(rng.choice(nodes), 3.0)
    await asyncio.sleep(2.0)


@_scenario(
    Expect(
        faults=("freeze",),
        may_fail=(
            Allowed(
                requests=frozenset({"Pinned"}),
                codes=frozenset({Code.TIMEOUT, Code.NO_HANDLER, Code.CIRCUIT_OPEN}),
                under="freeze",
                most=0.75,
            ),
        ),
        longest_gap=2.0,
    )
)
async def thaw(cluster: Cluster, rng: random.Random) -> None:
    """Requests for a frozen node and no other end unanswered; when it thaws it starts none of them."""
    nodes = await cluster.start_nodes(3)
    node = rng.choice(nodes)
    await cluster.start_caller("c1", mix=STEADY, rate=100.0)
    await cluster.start_caller("c2", mix={"Pinned": 1.0}, rate=100.0, timeout=1.0, node=node)
    await asyncio.sleep(QUIET)
    await cluster.freeze(node, 3.0)
    await asyncio.sleep(2.0)


@_scenario(Expect(faults=("roll",) * 3, ran_twice=0, longest_gap=2.0))
async def rolling_restart(cluster: Cluster, rng: random.Random) -> None:
    """All three nodes are replaced, one after the other, as a deploy does it."""
    nodes = await cluster.start_nodes(3)
    await cluster.start_caller(mix=STEADY)
    await asyncio.sleep(QUIET)
    for node in rng.sample(nodes, len(nodes)):
        await cluster.roll(node)
    await asyncio.sleep(QUIET)


@_scenario(Expect(faults=("restart_server",), longest_gap=8.0))
async def server_restart(cluster: Cluster, rng: random.Random) -> None:
    """The server is killed and started again; calls with 10 s see nothing but a pause."""
    await cluster.start_nodes(3)
    await cluster.start_caller(mix=STEADY, timeout=10.0)
    await asyncio.sleep(QUIET)
    await cluster.restart_server(rng.uniform(LEAST, 1.5))
    await asyncio.sleep(4.0)


@_scenario(Expect(faults=("freeze_server",), longest_gap=8.0), in_ci=False)
async def server_frozen(cluster: Cluster, rng: random.Random) -> None:
    """The server stands still for a while; no connection breaks."""
    await cluster.start_nodes(3)
    await cluster.start_caller(mix=STEADY, timeout=10.0)
    await asyncio.sleep(QUIET)
    await cluster.freeze_server(rng.uniform(1.0, 3.0))
    await asyncio.sleep(3.0)


async def _with_linked_caller(cluster: Cluster) -> str:
    await cluster.start_nodes(3)
    name = await cluster.start_caller(mix=STEADY, timeout=10.0, linked=True)
    await asyncio.sleep(QUIET)
    return name


async def _with_linked_node(cluster: Cluster) -> str:
    await cluster.start_nodes(2)
    name = await cluster.start_node(linked=True)
    await cluster.start_caller(mix=STEADY)
    await asyncio.sleep(QUIET)
    return name


@_scenario(Expect(faults=("cut",), longest_gap=8.0), in_ci=False)
async def caller_cut(cluster: Cluster, rng: random.Random) -> None:
    """The connection of the caller is reset, and refused for a while."""
    name = await _with_linked_caller(cluster)
    await cluster.cut(name, rng.uniform(LEAST, 2.0))
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("cut",), longest_gap=2.0), in_ci=False)
async def node_cut(cluster: Cluster, rng: random.Random) -> None:
    """The connection of one of three nodes is reset, and refused for a while."""
    name = await _with_linked_node(cluster)
    await cluster.cut(name, rng.uniform(1.0, 2.0))
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("half_open",), longest_gap=8.0), in_ci=False)
async def caller_half_open(cluster: Cluster, rng: random.Random) -> None:
    """What the caller and the server send each other disappears, and nobody is told."""
    name = await _with_linked_caller(cluster)
    await cluster.half_open(name, 2.0)
    await asyncio.sleep(4.0)


@_scenario(Expect(faults=("half_open",), longest_gap=2.0), in_ci=False)
async def node_half_open(cluster: Cluster, rng: random.Random) -> None:
    """What one of three nodes and the server send each other disappears, and nobody is told."""
    name = await _with_linked_node(cluster)
    await cluster.half_open(name, 3.0)
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("one_way",), longest_gap=2.0), in_ci=False)
async def node_deaf(cluster: Cluster, rng: random.Random) -> None:
    """Nothing reaches one of three nodes, while what it sends arrives."""
    name = await _with_linked_node(cluster)
    await cluster.one_way(name, Direction.DOWN, 3.0)
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("one_way",), longest_gap=2.0), in_ci=False)
async def node_mute(cluster: Cluster, rng: random.Random) -> None:
    """Nothing that one of three nodes sends arrives, while it hears all."""
    name = await _with_linked_node(cluster)
    await cluster.one_way(name, Direction.UP, 3.0)
    await asyncio.sleep(3.0)


@_scenario(Expect(faults=("delay",), ran_twice=0, longest_gap=2.0), in_ci=False)
async def node_slow_link(cluster: Cluster, rng: random.Random) -> None:
    """The link of one of three nodes takes 40 ms each way, as between continents; nothing else happens."""
    name = await _with_linked_node(cluster)
    await cluster.delay(name, 0.04, 3.0)
    await asyncio.sleep(1.0)


@_scenario(Expect(faults=("unplug",), longest_gap=2.0), in_ci=False, why_not=netns.why_not)
async def node_unplugged(cluster: Cluster, rng: random.Random) -> None:
    """The cable of one of three nodes, in a network of its own, is pulled for 3 s."""
    await cluster.start_nodes(2)
    name = await cluster.start_node(in_space=True)
    await cluster.start_caller(mix=STEADY)
    await asyncio.sleep(QUIET)
    await cluster.unplug(name, 3.0)
    await asyncio.sleep(3.0)


_BUSY = frozenset({Code.OVERLOADED, Code.CIRCUIT_OPEN})


def _flooded(bystanders: float) -> tuple[Allowed, ...]:
    """Return what may fail under a flood: of it a tenth can be done; what else is asked meanwhile shares the intake.

    Args:
        bystanders: Which share of the calls that are no part of the flood.
    """
    return (
        Allowed(requests=frozenset({"Heavy"}), codes=_BUSY, under="overload", most=0.97),
        Allowed(requests=frozenset({"Quick", "Slow"}), codes=_BUSY, under="overload", most=bystanders),
    )


# Three of four requests find the intake full, so that of the bystanders, asked three times, two of five are refused.
@_scenario(Expect(faults=("overload",), may_fail=_flooded(0.6), longest_gap=2.0))
async def overload(cluster: Cluster, rng: random.Random) -> None:
    """Ten times what the nodes can do: 3 nodes, 2 executions of 20 ms at a time each, and 3,000 calls a second."""
    await cluster.start_nodes(3, intake=64)
    await cluster.start_caller(mix={"Quick": 1.0}, rate=100.0)
    await asyncio.sleep(QUIET)
    await cluster.overload(4.0, mix={"Heavy": 1.0}, rate=3_000.0)
    await asyncio.sleep(RECOVERY + QUIET)


# A bystander that was accepted by both nodes that died is not tried a third time: it might be the poison.
_POISONED = (
    Allowed(requests=frozenset({"Poison"}), codes=ANY_CODE, under="poison", most=1),
    Allowed(requests=frozenset({"Quick", "Slow"}), codes=frozenset({Code.HANDLER_ERROR}), under="poison", most=2),
)


@_scenario(
    Expect(
        faults=("poison",),
        may_fail=_POISONED,
        runs_per_call=2,
        longest_gap=2.0,
    )
)
async def poison(cluster: Cluster, rng: random.Random) -> None:
    """A request kills the process that handles it; of five nodes it costs at most two."""
    await cluster.start_nodes(5)
    await cluster.start_caller(mix=STEADY)
    await asyncio.sleep(QUIET)
    cluster.sees_poison()
    await cluster.start_caller("c2", mix={"Poison": 1.0}, rate=50.0, timeout=4.0, limit=1)
    await asyncio.sleep(4.0)


# -- a schedule from a seed --------------------------------------------------------------------------------

RANDOM_TIMEOUT = 10.0


RANDOM_NODES = {"heavy_concurrency": 4, "intake": 1_024}
# A flood fills the intakes; the backlog of a server that stood still, each call asked up to three times, does not.


async def _play_random(seconds: float, cluster: Cluster, rng: random.Random) -> Sequence[str]:
    """Three linked nodes, a linked caller and one that is not; one fault after the other until the time is up."""
    for _ in range(3):
        await cluster.start_node(linked=True, **RANDOM_NODES)
    await cluster.start_caller("c1", mix=STEADY, rate=150.0, timeout=RANDOM_TIMEOUT, linked=True)
    await cluster.start_caller("c2", mix=STEADY, rate=150.0, timeout=RANDOM_TIMEOUT)
    await asyncio.sleep(QUIET)
    loop = asyncio.get_running_loop()
    over = loop.time() + seconds
    deck: list[Move] = []
    drawn: list[str] = []
    while loop.time() < over:
        if not deck:
            deck = rng.sample(moves(cluster, rng), len(moves(cluster, rng)))
        await cluster.wait_all_serve()
        kind, make = deck.pop()
        drawn.append(kind)
        await make()
        await asyncio.sleep(rng.uniform(1.0, 3.0))
    await asyncio.sleep(DETECTION)
    return drawn


def moves(cluster: Cluster, rng: random.Random) -> list[Move]:
    """Return one fault of every kind, each of which draws its target and its length when it is called."""

    def node() -> str:
        return rng.choice(sorted(cluster.nodes))

    async def kill_and_replace() -> None:
        await cluster.kill(node())
        await cluster.start_node(linked=True, **RANDOM_NODES)

    def flood() -> Awaitable[None]:
        return cluster.overload(3.0, mix={"Heavy": 1.0}, rate=2_500.0, timeout=RANDOM_TIMEOUT)

    def way() -> Direction:
        return rng.choice(list(Direction))

    return [
        ("kill", kill_and_replace),
        ("freeze", lambda: cluster.freeze(node(), rng.uniform(LEAST, 4.0))),
        ("roll", lambda: cluster.roll(node())),
        ("overload", flood),
        ("restart_server", lambda: cluster.restart_server(rng.uniform(LEAST, 1.5))),
        ("freeze_server", lambda: cluster.freeze_server(rng.uniform(LEAST, 2.0))),
        ("cut", lambda: cluster.cut(node(), rng.uniform(LEAST, 2.0))),
        ("cut", lambda: cluster.cut("c1", rng.uniform(LEAST, 2.0))),
        ("half_open", lambda: cluster.half_open(node(), rng.uniform(LEAST, 3.0))),
        ("half_open", lambda: cluster.half_open("c1", rng.uniform(LEAST, 2.0))),
        ("one_way", lambda: cluster.one_way(node(), way(), rng.uniform(LEAST, 3.0))),
        ("one_way", lambda: cluster.one_way("c1", way(), rng.uniform(LEAST, 2.0))),
        ("delay", lambda: cluster.delay(node(), 0.04, rng.uniform(1.0, 3.0))),
        ("delay", lambda: cluster.delay("c1", 0.04, rng.uniform(1.0, 3.0))),
    ]


def random_schedule(seconds: float) -> Scenario:
    """Return a scenario that draws its faults from the seed: every kind once before any comes twice.

    The seed gives the same schedule, not the same interleaving.
    """
    return Scenario(
        f"random {seconds:g} s",
        partial(_play_random, seconds),
        Expect(faults=(), may_fail=_flooded(0.25), longest_gap=8.0),
    )
