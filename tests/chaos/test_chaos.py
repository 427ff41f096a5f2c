"""Faults on real processes, about a minute of them; longer by hand: `python -m tests.chaos --help`."""

import os
from pathlib import Path

import pytest

from tests.chaos.__main__ import shown
from tests.chaos.report import lines
from tests.chaos.scenarios import SCENARIOS, Scenario, play, random_schedule

pytestmark = [pytest.mark.nats, pytest.mark.slow]

SEED = os.environ.get("CHAOS_SEED", "1")

SHORT = [scenario for scenario in SCENARIOS.values() if scenario.in_ci]


@pytest.mark.parametrize("scenario", SHORT, ids=lambda scenario: scenario.name)
async def test_a_scenario_keeps_its_promises(scenario: Scenario, tmp_path: Path) -> None:
    if reason := scenario.why_not():
        pytest.skip(reason)
    await _must_be_clean(scenario, tmp_path)


async def test_a_random_schedule_keeps_its_promises(tmp_path: Path) -> None:
    await _must_be_clean(random_schedule(12.0), tmp_path)


async def _must_be_clean(scenario: Scenario, directory: Path) -> None:
    played = await play(scenario, SEED, directory)
    text = [f"seed {SEED} (CHAOS_SEED), history in {directory}", *shown(played.violations), *lines(played.table)]
    assert played.is_clean, "\n".join(text)
