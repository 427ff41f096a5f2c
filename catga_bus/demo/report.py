"""What is found at the end: the verdict, how partitions moved, and what went wrong. `report_text` puts it in words."""

import math
from collections.abc import Iterator, Sequence

import msgspec

from catga_bus.demo.data import Figures, Flight
from catga_bus.demo.effects import Effect
from catga_bus.demo.fault_report import FaultReport, Newcomer, fault_problems, fault_reports, newcomers_of
from catga_bus.demo.faults import What
from catga_bus.demo.latency import LatencyHistogram
from catga_bus.demo.ledger import Execution
from catga_bus.demo.moves import moves_of
from catga_bus.demo.partition_map import Owners
from catga_bus.demo.progress import ReplayResult
from catga_bus.demo.verdict import Runs, Tally, Verdict, count_runs, judge, tally

_ENDED = (What.KILLED, What.ROLLED)


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One node: what it did, and what it told at the end."""

    node: str
    effects: int
    share: float
    """Part of all effects, 0 to 1."""

    executions: int
    """Lines of the execution log."""

    duplicates: int | None
    """Commands that were done before; None if it did not tell."""

    fenced: int | None
    """Effects that were refused because another node owned the partition; None if it did not tell."""

    heard_closing: bool
    was_ended: bool
    """Whether it was killed or rolled on purpose, and so cannot tell."""

    @property
    def has_told(self) -> bool:
        """Whether it answered when it was asked for its totals."""
        return self.fenced is not None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a demo."""

    flights: int
    stored: int
    """Commands that the server accepted."""

    failures: dict[str, int]
    """Commands that it did not, by code."""

    stored_seconds: float
    """From the first call until the last command was stored."""

    seconds: float
    """From the first call until the last effect."""

    effects_per_second: float
    stored_p50_ms: float | None
    stored_p99_ms: float | None
    """From a call until its command was stored, in milliseconds, exact to 1 %."""

    effect_p50_ms: float | None
    effect_p99_ms: float | None
    effect_max_ms: float | None
    """From a call until the effect of its command."""

    nodes: list[NodeReport]
    faults: list[FaultReport]
    """What was done to the nodes; empty after a peaceful replay."""

    newcomers: list[Newcomer]
    """The nodes that were started in the place of others."""

    owners: Owners
    """Who owned which partition in the end."""

    moves: int
    """How often a partition went on at another node, as the effects show."""

    verdict: Verdict
    runs: Runs
    announcements: Tally
    """Of the late flights on the departures board."""

    late_flights: int
    problems: list[str]
    """What keeps the demo from succeeding, in words; empty if nothing does."""

    @property
    def file(self) -> Figures:
        """Computed directly from the file."""
        return self.verdict.expected

    @property
    def is_success(self) -> bool:
        """Whether the verdict is good, everything was stored and announced, and all faults were real."""
        return not self.problems


def make_report(
    result: ReplayResult, effects: Sequence[Effect], executions: Sequence[Execution], flights: Sequence[Flight]
) -> Report:
    """Judge what happened.

    Args:
        result: What the replay saw.
        effects: The effect log.
        executions: The lines of the execution log.
        flights: In the order of the schedule.
    """
    effects = [effect._replace(at=effect.at - result.began) for effect in effects]
    faults = fault_reports(result.faults, effects)
    verdict = judge(effects, flights)
    runs = count_runs(executions, effects, {fault.node for fault in faults})
    late = {row for row, flight in enumerate(flights) if flight.is_late}
    announcements = tally(result.shown, late)
    nodes = list(_nodes(result, effects, runs, {fault.node for fault in faults if fault.kind in _ENDED}))
    last = max((effect.at for effect in effects), default=0.0)
    delays = _delays(result, effects)
    p50, p99 = delays.percentile(50), delays.percentile(99)
    return Report(
        flights=len(flights),
        stored=result.progress.stored,
        failures=result.failures,
        stored_seconds=result.stored_seconds,
        seconds=last,
        effects_per_second=len(effects) / last if last > 0 else 0.0,
        stored_p50_ms=result.progress.p50_ms,
        stored_p99_ms=result.progress.p99_ms,
        effect_p50_ms=None if p50 is None else p50 * 1_000,
        effect_p99_ms=None if p99 is None else p99 * 1_000,
        effect_max_ms=None if delays.longest is None else delays.longest * 1_000,
        nodes=nodes,
        faults=faults,
        newcomers=newcomers_of(result.faults),
        owners=result.progress.owners,
        moves=len(moves_of(effects)),
        verdict=verdict,
        runs=runs,
        announcements=announcements,
        late_flights=len(late),
        problems=[
            *_verdict_problems(verdict, runs),
            *(f"{count:,} flights could not be stored: {code}" for code, count in result.failures.items()),
            *_announcement_problems(announcements),
            *(f"node {node.node} did not tell its totals" for node in nodes if not (node.was_ended or node.has_told)),
            *fault_problems(result.faults, faults),
        ],
    )


def _nodes(result: ReplayResult, effects: Sequence[Effect], runs: Runs, ended: set[str]) -> Iterator[NodeReport]:
    for node, totals in result.totals.items():
        own = sum(effect.node == node for effect in effects)
        yield NodeReport(
            node=node,
            effects=own,
            share=own / max(len(effects), 1),
            executions=runs.per_node.get(node, 0),
            duplicates=totals.duplicates if totals else None,
            fenced=totals.fenced if totals else None,
            heard_closing=totals is not None and totals.closed,
            was_ended=node in ended,
        )


def _delays(result: ReplayResult, effects: Sequence[Effect]) -> LatencyHistogram:
    delays = LatencyHistogram()
    for effect in effects:
        called = result.called[effect.row] if effect.row < len(result.called) else math.nan
        if not math.isnan(called):
            delays.add(effect.at - called)
    return delays


def _verdict_problems(verdict: Verdict, runs: Runs) -> Iterator[str]:
    effects = verdict.effects
    if effects.lost:
        yield f"{effects.lost:,} flights have no effect"
    if effects.out_of_order:
        yield f"{effects.out_of_order:,} effects came after a later one of the same aircraft"
    if effects.doubled:
        yield f"{effects.doubled:,} effects are of flights that had one"
    if effects.foreign:
        yield f"{effects.foreign:,} effects are of flights that the file does not have"
    if verdict.changed:
        yield f"{verdict.changed:,} effects have other values than their flights"
    if verdict.counted != verdict.expected:
        yield "the effect log does not add up to the file"
    if verdict.epochs_fell:
        yield f"{verdict.epochs_fell:,} effects were committed by a node that had lost the partition"
    if runs.unlogged:
        yield f"{runs.unlogged:,} flights have an effect, but no line in the execution log"


def _announcement_problems(announcements: Tally) -> Iterator[str]:
    if not announcements.is_good:
        yield (
            f"of the late flights on the departures board {announcements.lost:,} are missing, "
            f"{announcements.out_of_order:,} out of order, {announcements.doubled:,} doubled and "
            f"{announcements.foreign:,} not late"
        )
