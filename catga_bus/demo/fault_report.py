"""What is said of the faults at the end: when they were noticed, how partitions moved, and whether they were real."""

import math
import signal
from collections.abc import Iterator, Sequence

import msgspec

from catga_bus.demo.effects import Effect
from catga_bus.demo.faults import GONE, NOTICED, FaultPlan, FaultRecord, What, first
from catga_bus.demo.moves import hand_overs, moves_of, standstill, takeovers


class FaultReport(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: what happened, when it was noticed, and how long the partitions of the node stood still.

    All times are in seconds; `at` counts from the beginning of the replay, the others from `at`.
    """

    kind: str
    """`killed`, `frozen` or `rolled`."""

    node: str
    at: float
    mended_after: float | None
    """Until the node in its place answered, or the node was thawed; None if it never did."""

    noticed_after: float | None
    """Until the bus of the timetable saw the node as suspect, draining, faulted or left; None if it never did."""

    gone_after: float | None
    """Until it saw the node as faulted or left; None if it never did."""

    moved: list[float]
    """One for each partition of the node that went on elsewhere, sorted.

    Killed or frozen: from the fault to the first effect of the next owner. Rolled: from the last effect of the node to
    the first of the next owner.
    """

    standstill: float | None
    """The longest time without an effect on any partition, until the fault was mended.

    It tells when a node was frozen while it wrote to the database: nobody else can write until it is thawed.
    """


class Newcomer(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was started in the place of another one."""

    node: str
    place_of: str
    started_at: float
    """Seconds since the beginning of the replay."""

    ready_after: float | None
    """Seconds from its start until it answered; None if it did not."""


def fault_reports(record: FaultRecord | None, effects: Sequence[Effect]) -> list[FaultReport]:
    """Return the faults that happened, in the order in which they did.

    Args:
        record: What was done to the nodes; None if nothing was.
        effects: The effect log, its instants in seconds since the replay began.
    """
    if record is None:
        return []
    plan = record.plan
    found = [
        _fault(record, effects, plan.killed, What.KILLED, (plan.replacement, What.READY)),
        _fault(record, effects, plan.frozen, What.FROZEN, (plan.frozen, What.THAWED)),
        _fault(record, effects, plan.rolled, What.ROLLED, (plan.successor, What.READY)),
    ]
    return sorted((fault for fault in found if fault is not None), key=lambda fault: fault.at)


def _fault(
    record: FaultRecord, effects: Sequence[Effect], node: str, what: What, mended: tuple[str, What]
) -> FaultReport | None:
    at = first(record.moments, node, what)
    if at is None:
        return None

    def after(place: str, *things: What) -> float | None:
        found = first(record.moments, place, *things, since=at)
        return None if found is None else found - at

    mended_after = after(*mended)
    mended_at = math.inf if mended_after is None else at + mended_after
    moves = moves_of(effects)
    if what is What.ROLLED:
        moved = hand_overs(moves, node, at)
    else:
        moved = takeovers(moves, node, at, mended_at if what is What.FROZEN else math.inf)
    return FaultReport(
        kind=what.value,
        node=node,
        at=at,
        mended_after=mended_after,
        noticed_after=after(node, *NOTICED),
        gone_after=after(node, *GONE),
        moved=moved,
        standstill=standstill(effects, at, mended_at),
    )


def newcomers_of(record: FaultRecord | None) -> list[Newcomer]:
    """Return what became of the nodes that were started in the place of others."""
    if record is None:
        return []
    return [
        Newcomer(node=node, place_of=other, started_at=started, ready_after=None if ready is None else ready - started)
        for node, other in _places(record.plan)
        if (started := first(record.moments, node, What.STARTED)) is not None
        for ready in [first(record.moments, node, What.READY)]
    ]


def _places(plan: FaultPlan) -> tuple[tuple[str, str], ...]:
    return (plan.replacement, plan.killed), (plan.successor, plan.rolled)


def fault_problems(record: FaultRecord | None, reports: Sequence[FaultReport]) -> Iterator[str]:
    """Yield what was planned and did not happen, and what nobody noticed, in words.

    Args:
        record: What was done to the nodes; None if nothing was.
        reports: What `fault_reports` made of it.
    """
    if record is None:
        return
    plan = record.plan
    for what, node in ((What.KILLED, plan.killed), (What.FROZEN, plan.frozen), (What.ROLLED, plan.rolled)):
        if first(record.moments, node, what) is None:
            yield f"node {node} was to be {what}, but the replay ended before; lower the rate or send more flights"
    for report in reports:
        if report.noticed_after is None:
            yield f"nobody noticed that node {report.node} was {report.kind}"
        if not report.moved:
            yield f"no partition of node {report.node} went on elsewhere when it was {report.kind}"
    yield from _unreal(record)
    for newcomer in newcomers_of(record):
        if newcomer.ready_after is None:
            yield f"node {newcomer.node}, in the place of {newcomer.place_of}, did not begin to answer"


def _unreal(record: FaultRecord) -> Iterator[str]:
    """Yield the faults that were not what they were to be."""
    plan = record.plan
    if first(record.moments, plan.killed, What.KILLED) is not None and record.exit_code != -signal.SIGKILL:
        yield f"node {plan.killed} was not ended by SIGKILL: its exit code is {record.exit_code}"
    if first(record.moments, plan.frozen, What.FROZEN) is not None and not record.was_stopped:
        yield f"node {plan.frozen} did not stand still while it was frozen"
    code = record.rolled_exit_code
    if first(record.moments, plan.rolled, What.ROLLED) is not None and code != 0:
        yield f"node {plan.rolled} did not finish and end when it was rolled: its exit code is {code}"
