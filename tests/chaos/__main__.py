"""The rig by hand: `python -m tests.chaos --seed 7 --minutes 30 [--scenario NAME]`."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from catga_bus.clock import monotonic
from tests.chaos import report, scenarios
from tests.chaos.report import Table
from tests.chaos.stored import report as stored_report
from tests.chaos.stored import scenarios as stored

ROUND_SECONDS = 60.0
# A history is read into memory: a round of this length makes one of some 20 MB.

SHOWN = 5


def main() -> int:
    """Play rounds until the time is up; return 1 if one of them broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", default="1", help="same seed, same schedule (not the same interleaving)")
    parser.add_argument("--minutes", type=float, default=0.0, help="play rounds for so long; one round by default")
    names = [*scenarios.SCENARIOS, *stored.SCENARIOS, "all", "durable"]
    text = "a named one, or all in turn, or all of commands and events (`durable`); random by default"
    parser.add_argument("--scenario", choices=names, help=text)
    parser.add_argument("--keep", type=Path, help="where the histories of failed rounds go (default: a new directory)")
    options = parser.parse_args()
    keep = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    return asyncio.run(_play_rounds(_turns(options.scenario), options.seed, options.minutes * 60.0, keep))


Scenario = scenarios.Scenario | stored.Scenario
Played = scenarios.Played | stored.Played


def _turns(name: str | None) -> Sequence[Scenario]:
    if name is None:
        return [scenarios.random_schedule(ROUND_SECONDS)]
    turns: dict[str, Scenario] = {**scenarios.SCENARIOS, **stored.SCENARIOS}
    chosen = turns.values() if name == "all" else stored.SCENARIOS.values() if name == "durable" else [turns[name]]
    for scenario in chosen:
        if reason := scenario.why_not():
            print(f"{scenario.name} is left out: {reason}")
    return [scenario for scenario in chosen if scenario.why_not() is None]


async def _play(scenario: Scenario, seed: str, directory: Path) -> Played:
    if isinstance(scenario, stored.Scenario):
        return await stored.play(scenario, seed, directory)
    return await scenarios.play(scenario, seed, directory)


async def _play_rounds(turns: Sequence[Scenario], seed: str, seconds: float, keep: Path) -> int:
    over = monotonic() + seconds
    table: Table = {}
    figures = stored_report.Figures()
    number = failed = 0
    while turns and (number < len(turns) or monotonic() < over):
        scenario = turns[number % len(turns)]
        number += 1
        directory = keep / f"round-{number}"
        played = await _play(scenario, f"{seed}-{number}", directory)
        if isinstance(played, stored.Played):
            figures.merge(played.figures)
        else:
            table = report.merge((table, played.table))
        failed += not played.is_clean
        print(f"round {number}: {scenario.name}: {'clean' if played.is_clean else 'BROKEN'}", flush=True)
        if played.is_clean:
            shutil.rmtree(directory)
        else:
            print(verdict(played, f"{seed}-{number}", directory), flush=True)
    if table:
        print("\n".join(report.lines(table)))
    if figures.runs:
        print("\n".join(stored_report.lines(figures)))
    print(f"{number} rounds, {failed} broken; seed {seed}" + (f"; histories in {keep}" if failed else ""))
    return 1 if failed or not number else 0


def verdict(played: Played, seed: str, directory: Path) -> str:
    """Return what a round broke, its seed and where its history lies."""
    text = [f"seed {seed}, history in {directory}"]
    text += shown(played.violations)
    return "\n".join(text)


def shown(violations: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the violations as lines, the first few of each check."""
    text: list[str] = []
    for check, found in violations.items():
        text.append(f"  {check}: {len(found)}")
        text += [f"    {one}" for one in found[:SHOWN]]
    return text


if __name__ == "__main__":
    sys.exit(main())
