"""Partitions: how many move when a node joins or leaves, beside other ways to spread them, and what planning costs.

Nothing is sent: the plan is a pure function, and so are the others.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.options import positive_integer
from benchmarks.reporting import Progress, Report, figure, markdown_table
from benchmarks.server import Server
from benchmarks.statistics import Target, percentile
from catga_bus.partition.hashing import partition_of
from catga_bus.partition.plan import make_plan

HELP = "partitions moved by a join and by a leave, and what it costs to plan them"

Owners = dict[int, str]
Spread = Callable[[int, Iterable[str], Owners], Owners]

WANTED_MOVES = Target(1.0, higher_is_better=False)
"""Partitions moved, as a multiple of what no plan can avoid."""

WANTED_SECONDS = Target(0.025, higher_is_better=False)
"""For the dearest plan of 1,000 partitions over 100 nodes: a tenth of the interval of heartbeats."""

_CASES = ((16, 2), (16, 3), (64, 3), (64, 10), (256, 10), (1_000, 99))
_KEYS = 10_000


def sticky_plan(partitions: int, nodes: Iterable[str], owners: Owners) -> Owners:
    """Spread as the bus does."""
    plan = make_plan(partitions, owners, set(nodes))
    return {partition: owner for partition, owner in enumerate(plan.owners) if owner is not None}


def hash_mod_n(partitions: int, nodes: Iterable[str], _owners: Owners) -> Owners:
    """Spread by the remainder: partition p to the node at place p mod n of the sorted list."""
    ordered = sorted(nodes)
    return {partition: ordered[partition % len(ordered)] for partition in range(partitions)}


def contiguous_ranges(partitions: int, nodes: Iterable[str], _owners: Owners) -> Owners:
    """Spread as pcgroups does: ranges of floor(P/n) to the sorted members, then the remainder one by one.

    Source:
        synadia-io/orbit.go, pcgroups/stream_consumer_group.go, GeneratePartitionFilters.
    """
    ordered = sorted(nodes)[:partitions]
    size = partitions // len(ordered)
    ranged = size * len(ordered)
    return {
        partition: ordered[partition // size] if partition < ranged else ordered[partition - ranged]
        for partition in range(partitions)
    }


_SPREADS: dict[str, Spread] = {
    "catga_bus": sticky_plan,
    "pcgroups": contiguous_ranges,
    "hash mod n": hash_mod_n,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--draws",
        type=positive_integer,
        help="sets of random node ids for each row (default: 100; quick: 5)",
        metavar="N",
    )


def run(options: argparse.Namespace, _server: Server, progress: Progress) -> Report:
    """Count what moves, time the plans, and report."""
    draws = options.draws if options.draws is not None else 5 if options.quick else 100
    progress.expect(len(_CASES) + 1)
    moved = []
    for partitions, nodes in _CASES:
        progress.step(f"{partitions:,} partitions, {nodes} nodes and one more")
        moved.append(_moved(partitions, nodes, draws))
    progress.step("time of a plan and of a key")
    costs = _costs(draws)
    return Report(_markdown(moved, costs), {"settings": {"draws": draws}, "moved": moved, "seconds": costs})


def _moved(partitions: int, nodes: int, draws: int) -> dict[str, Any]:
    """Have a node join `nodes` others, and one of those others leave; count both for every way to spread."""
    joins: dict[str, list[int]] = {title: [] for title in _SPREADS}
    leaves: dict[str, list[int]] = {title: [] for title in _SPREADS}
    unavoidable: list[int] = []
    for draw in range(draws):
        rng = random.Random(draw)
        *old, newcomer = (f"billing-{rng.getrandbits(50):x}" for _ in range(nodes + 1))
        gone = rng.choice(old)
        for title, spread in _SPREADS.items():
            before = spread(partitions, old, {})
            joined = spread(partitions, [*old, newcomer], before)
            left = spread(partitions, {*old, newcomer} - {gone}, joined)
            joins[title].append(_changed(before, joined))
            leaves[title].append(_changed(joined, left))
            if spread is sticky_plan:
                unavoidable.append(list(joined.values()).count(gone))
    return {
        "partitions": partitions,
        "nodes": nodes,
        "join": joins,
        "leave": leaves,
        "unavoidable_join": partitions // (nodes + 1),
        "unavoidable_leave": unavoidable,
    }


def _changed(before: Owners, after: Owners) -> int:
    return sum(after[partition] != owner for partition, owner in before.items())


def _costs(draws: int) -> dict[str, list[float]]:
    """Time plans of 1,000 partitions, each for other node ids; and partitions of keys, each time for all of them."""
    costs: dict[str, list[float]] = {"first": [], "at rest": [], "join": [], "leave": [], "64 over 3": [], "key": []}
    keys = [f"N{number:05d}-aircraft" for number in range(_KEYS)]
    for draw in range(draws):
        rng = random.Random(draw)
        ids = [f"billing-{rng.getrandbits(50):x}" for _ in range(101)]
        owners: Owners = {}
        for title, nodes in (("first", ids[:100]), ("at rest", ids[:100]), ("join", ids), ("leave", ids[1:])):
            started = time.perf_counter()
            plan = make_plan(1_000, owners, nodes)
            costs[title].append(time.perf_counter() - started)
            owners = {partition: owner for partition, owner in enumerate(plan.owners) if owner is not None}
        started = time.perf_counter()
        make_plan(64, {}, ids[:3])
        costs["64 over 3"].append(time.perf_counter() - started)
        started = time.perf_counter()
        if len({partition_of(key, 64) for key in keys}) != 64:
            raise BenchmarkError(f"{_KEYS:,} keys did not reach all of 64 partitions")
        costs["key"].append((time.perf_counter() - started) / _KEYS)
    return costs


def _markdown(moved: list[dict[str, Any]], costs: dict[str, list[float]]) -> str:
    rows = []
    for event in ("join", "leave"):
        for case in moved:
            nodes, least = case["nodes"], case[f"unavoidable_{event}"]
            change = f"{nodes} to {nodes + 1}" if event == "join" else f"{nodes + 1} to {nodes}"
            rows.append(
                [
                    f"{event}, {case['partitions']:,} partitions, {change} nodes",
                    _average([least] if isinstance(least, int) else least),
                    *(_average(case[event][title]) for title in _SPREADS),
                ]
            )
    least_moves = sum(sum(_least(case, event)) for case in moved for event in ("join", "leave"))
    all_moves = sum(sum(case[event]["catga_bus"]) for case in moved for event in ("join", "leave"))
    dearest = max(percentile(costs[title], 0.99) for title in ("first", "at rest", "join", "leave"))
    names = {
        "first": "1,000 partitions over 100 nodes, nobody owns any",
        "at rest": "the same, nothing to move",
        "join": "one node joins",
        "leave": "one node leaves",
        "64 over 3": "64 partitions over 3 nodes, nobody owns any",
        "key": "the partition of a key",
    }
    timed = [[name, _time(costs[key], 0.5), _time(costs[key], 0.99)] for key, name in names.items()]
    return (
        f"{markdown_table(['partitions moved', 'unavoidable', *_SPREADS], rows)}\n\n"
        f"{markdown_table(['time', 'p50', 'p99'], timed)}\n\n"
        f"Target for moves: {figure(WANTED_MOVES.required)} x the unavoidable: {figure(all_moves / least_moves)} x, "
        f"{WANTED_MOVES.verdict(all_moves / least_moves)}. Target for a plan of 1,000 over 100: p99 at most "
        f"{figure(WANTED_SECONDS.required * 1e3)} ms: {figure(dearest * 1e3)} ms, {WANTED_SECONDS.verdict(dearest)}."
    )


def _least(case: dict[str, Any], event: str) -> list[int]:
    draws = len(case[event]["catga_bus"])
    return [case["unavoidable_join"]] * draws if event == "join" else case["unavoidable_leave"]


def _average(counts: list[int]) -> str:
    return figure(mean(counts))


def _time(seconds: list[float], share: float) -> str:
    value = percentile(seconds, share)
    return f"{figure(value * 1e6)} us" if value < 1e-3 else f"{figure(value * 1e3)} ms"
