"""Faults under commands and events, on real processes; longer by hand: `python -m tests.chaos --scenario durable`.

Which bugs the rig finds is tested with a few of them; `CHAOS_BUGS=all` plays all, and the trials without one.
"""

import os
from pathlib import Path

import pytest

from tests.chaos.__main__ import shown
from tests.chaos.stored.bugs import BUGS, FOUND
from tests.chaos.stored.scenarios import SCENARIOS, TRIALS, Played, Scenario, play

pytestmark = [pytest.mark.nats, pytest.mark.slow]

SEED = os.environ.get("CHAOS_SEED", "1")
SHORT = [scenario for scenario in SCENARIOS.values() if scenario.in_ci]
ALL_BUGS = os.environ.get("CHAOS_BUGS") == "all"
SAMPLE = ("acknowledge-before-commit", "no-fence-check", "keys-side-by-side")
"""Bugs that are planted in every run: one for what is lost, one for zombies, one for order."""


@pytest.mark.parametrize("scenario", SHORT, ids=lambda scenario: scenario.name)
async def test_a_scenario_keeps_its_promises(scenario: Scenario, tmp_path: Path) -> None:
    if reason := scenario.why_not():
        pytest.skip(reason)
    _must_be_clean(await play(scenario, SEED, tmp_path / "run"), tmp_path)


@pytest.mark.parametrize("bug", FOUND)
async def test_a_planted_bug_is_found(bug: str, tmp_path: Path) -> None:
    if not ALL_BUGS and bug not in SAMPLE:
        pytest.skip("planted by hand: CHAOS_BUGS=all")
    trial, check = FOUND[bug]
    played = await play(TRIALS[trial], SEED, tmp_path / "run", bug)
    assert check in played.violations, "\n".join([f"{trial} did not find {bug}", *shown(played.violations)])


@pytest.mark.skipif(not ALL_BUGS, reason="by hand: CHAOS_BUGS=all")
@pytest.mark.parametrize("trial", TRIALS)
async def test_a_trial_finds_nothing_where_no_bug_is(trial: str, tmp_path: Path) -> None:
    _must_be_clean(await play(TRIALS[trial], SEED, tmp_path / "run"), tmp_path)


def test_of_each_bug_it_is_known_who_finds_it() -> None:
    assert set(FOUND) == set(BUGS)
    assert {trial for trial, _ in FOUND.values()} <= set(TRIALS)


def _must_be_clean(played: Played, directory: Path) -> None:
    text = [f"seed {SEED} (CHAOS_SEED), history in {directory}", *shown(played.violations), *played.lines()]
    assert played.is_clean, "\n".join(text)
