"""What is done to services with stores, and what must hold: named scenarios.

Unless it says otherwise there are three nodes over 16 partitions, and one producer with 200 keys that sends 200
messages a second, one in ten of which it waits for.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos import evidence
from tests.chaos.stored.checker import Expect, check
from tests.chaos.stored.cluster import StoredCluster
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


LOAD = {"rate": 200.0, "keys": 200}


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
