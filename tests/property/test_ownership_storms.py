"""Random worlds under random faults: every law holds after every event, and everything comes to rest.

`OWNERSHIP_STORMS` is how many of them are run, from the first seed on; `OWNERSHIP_SEED` is the first. What fails says
its seed: run that one alone by `OWNERSHIP_SEED=<seed> OWNERSHIP_STORMS=1`.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.ownership.checker import ViolationError
from tests.ownership.network import Weather
from tests.ownership.storms import Storm
from tests.ownership.world import World

FIRST = int(os.environ.get("OWNERSHIP_SEED", "0"))
COUNT = int(os.environ.get("OWNERSHIP_STORMS", "40"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Say nothing of what is survived."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_all(make: Callable[[int], Storm], count: int) -> tuple[Counter[str], list[World]]:
    """Run storms; return what was seen."""
    seen: Counter[str] = Counter()
    worlds = []
    for seed in range(FIRST, FIRST + count):
        try:
            world = make(seed).run()
        except ViolationError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        checker = world.checker
        seen["effects"] += len(checker.effects)
        seen["repeated"] += sum(checker.executions.values()) - len(checker.effects)
        seen["taken over"] += checker.takeovers
        seen["fenced"] += checker.fenced
        seen["buried"] += len(checker.letters)
        seen["delivered again"] += sum(node.statistics.repeated for node in world.lives)
        seen["epochs of one's own"] += sum(node.statistics.reclaims for node in world.lives)
        worlds.append(world)
    return seen, worlds


def test_whatever_happens_every_law_holds_and_everything_comes_to_rest() -> None:
    seen, _ = run_all(Storm, COUNT)
    if COUNT >= 40:
        assert not [what for what in seen if seen[what] == 0], seen  # otherwise it was no storm


def test_where_nodes_only_come_and_go_nothing_is_run_twice() -> None:
    seen, worlds = run_all(
        lambda seed: Storm(seed, faults=("roll",), weather=Weather(), kills=False, is_calm=True), max(1, COUNT // 4)
    )
    assert seen["repeated"] == seen["fenced"] == seen["buried"] == 0
    assert sum(node.statistics.hand_overs for world in worlds for node in world.lives) > COUNT // 4


def test_one_seed_is_one_course_of_events() -> None:
    first, second = Storm(FIRST).run(), Storm(FIRST).run()
    assert (first.now, first.steps, first.points) == (second.now, second.steps, second.points)
    assert first.checker.executions == second.checker.executions
