"""The verdict, computed from the effect log alone: what is lost, doubled, out of order or changed. Pure."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import msgspec

from catga_bus.demo.data import Figures, Flight, figures_of
from catga_bus.demo.effects import Effect
from catga_bus.demo.ledger import Execution


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What became of things that must be written once each, those of one aircraft in the order of the schedule."""

    written: int
    lost: int
    """Expected, and never written."""

    out_of_order: int
    """Written after a later one of the same aircraft; of one that is doubled, its first counts."""

    doubled: int
    """Written although they had been written."""

    foreign: int
    """Written, and not expected."""

    @property
    def is_good(self) -> bool:
        """Whether each was written once, in order, and nothing else."""
        return not (self.lost or self.out_of_order or self.doubled or self.foreign)


def tally(entries: Iterable[tuple[int, str]], expected: Collection[int]) -> Tally:
    """Count what is wrong with a log.

    Args:
        entries: Row and aircraft of what was written, in the order in which it was.
        expected: The rows that should be there.
    """
    seen: Counter[int] = Counter()
    latest: dict[str, int] = {}
    out_of_order = 0
    for row, aircraft in entries:
        seen[row] += 1
        if seen[row] == 1:
            out_of_order += row < latest.get(aircraft, -1)
            latest[aircraft] = max(row, latest.get(aircraft, -1))
    return Tally(
        written=seen.total(),
        lost=sum(row not in seen for row in expected),
        out_of_order=out_of_order,
        doubled=seen.total() - len(seen),
        foreign=sum(row not in expected for row in seen),
    )


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the effects are those that the file of flights asks for."""

    effects: Tally
    changed: int
    """Effects whose values are not those of their flight."""

    epochs_fell: int
    """Effects committed in a partition after one of a higher epoch: by an owner that had lost it."""

    expected: Figures
    """Computed directly from the file."""

    counted: Figures
    """Computed from the effect log, every row of it."""

    @property
    def is_good(self) -> bool:
        """Whether every flight has its effect, once, unchanged, in its place, by the owner of its partition."""
        return self.effects.is_good and not self.changed and not self.epochs_fell and self.counted == self.expected


def judge(effects: Sequence[Effect], flights: Sequence[Flight]) -> Verdict:
    """Compare the effect log with the flights.

    Args:
        effects: All of them, in the order of their commits.
        flights: In the order of the schedule: their places are the rows.
    """
    counted = Figures()
    highest: dict[int, int] = {}
    changed = fell = 0
    for effect in effects:
        counted = counted.plus(effect.dep_delay, effect.distance)
        fell += effect.epoch < highest.get(effect.partition, 0)
        highest[effect.partition] = max(effect.epoch, highest.get(effect.partition, 0))
        if effect.row in range(len(flights)):
            flight = flights[effect.row]
            found = (effect.aircraft, effect.dep_delay, effect.distance)
            changed += found != (flight.aircraft, flight.dep_delay, flight.distance)
    return Verdict(
        effects=tally(((effect.row, effect.aircraft) for effect in effects), range(len(flights))),
        changed=changed,
        epochs_fell=fell,
        expected=figures_of(flights),
        counted=counted,
    )


class Runs(msgspec.Struct, frozen=True, kw_only=True):
    """How often handlers ran."""

    executions: int
    repeated: int
    """Commands whose handler began more than once."""

    repeated_on_faulted: int
    """Those of them that began on a node that was killed, frozen or rolled at least once: the ones a fault explains."""

    unlogged: int
    """Flights with an effect and without an execution: the log of executions is not to be believed then."""

    per_node: dict[str, int]
    """Executions by node."""


def count_runs(executions: Iterable[Execution], effects: Iterable[Effect], faulted: Collection[str]) -> Runs:
    """Count the executions.

    Args:
        executions: The lines of the execution log.
        effects: The effect log.
        faulted: Nodes that something was done to.
    """
    runs: Counter[str] = Counter()
    per_node: Counter[str] = Counter()
    there: set[str] = set()
    rows: set[int] = set()
    for execution in executions:
        runs[execution.message_id] += 1
        per_node[execution.node] += 1
        rows.add(execution.row)
        if execution.node in faulted:
            there.add(execution.message_id)
    return Runs(
        executions=runs.total(),
        repeated=sum(count > 1 for count in runs.values()),
        repeated_on_faulted=sum(runs[message_id] > 1 for message_id in there),
        unlogged=len({effect.row for effect in effects} - rows),
        per_node=dict(per_node),
    )
