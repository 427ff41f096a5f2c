"""What the scenarios draw and demand, without a cluster."""

import random
from pathlib import Path
from typing import cast

import pytest

from tests.chaos import scenarios
from tests.chaos.checker import Expect
from tests.chaos.cluster import Cluster
from tests.chaos.evidence import KINDS
from tests.chaos.history import Record
from tests.chaos.scenarios import Scenario, moves, play


class NoCluster:
    """A cluster in which nothing happens."""

    def __init__(self, *_: object) -> None: ...

    async def __aenter__(self) -> "NoCluster":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def finish(self) -> list[Record]:
        return []


def test_a_random_schedule_has_every_kind_of_fault_but_those_of_a_cluster_of_their_own() -> None:
    drawn = {kind for kind, _ in moves(cast(Cluster, None), random.Random(1))}
    assert drawn == KINDS - {"poison", "unplug"}


async def test_each_fault_that_was_drawn_must_have_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def draw(cluster: Cluster, rng: random.Random) -> list[str]:
        return ["kill", "freeze", "freeze"]

    monkeypatch.setattr(scenarios, "Cluster", NoCluster)
    played = await play(Scenario("drawn", draw, Expect(faults=())), "1", tmp_path)
    assert played.violations["faults_happened"] == [
        "there was no kill, and 1 were meant",
        "there was no freeze, and 2 were meant",
    ]
