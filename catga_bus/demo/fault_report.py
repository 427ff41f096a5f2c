"""What is said of the faults at the end: when they were noticed, what they cost, and whether they were real."""

import signal
from collections.abc import Iterator

import msgspec

from catga_bus.demo.failover import CallTimes, disturbance
from catga_bus.demo.faults import GONE, NOTICED, FaultRecord, What, first


class FaultReport(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: what happened, when it was noticed, and how the calls around it fared.

    All times are in seconds; `at` counts from the beginning of the replay, the others from `at`.
    """

    kind: str
    """`killed` or `frozen`."""

    node: str
    at: float
    mended_after: float | None
    """Until the replacement answered, or the node was thawed; None if it never did."""

    noticed_after: float | None
    """Until the bus of the replay saw the node as suspect, faulted or left; None if it never did."""

    faulted_after: float | None
    """Until it saw the node as faulted or left; None if it never did."""

    unanimous_after: float | None
    """Until every node that lived saw it so, exact to the interval at which they were asked; None if they never did."""

    failover: float | None
    """What the slowest call took longer than the median of all calls; None if no call was answered meanwhile.

    Counted are the calls that were under way between the fault and its end.
    """

    longest_gap: float | None
    """The longest time in which no call at all was answered."""


class Replacement(msgspec.Struct, frozen=True, kw_only=True):
    """The node that took the place of the killed one."""

    node: str
    started_at: float
    """Seconds since the beginning of the replay."""

    ready_after: float | None
    """Seconds from its start until it answered; None if it did not."""


def fault_reports(record: FaultRecord | None, times: CallTimes, median: float) -> list[FaultReport]:
    """Return the faults that happened, in the order in which they did.

    Args:
        record: What was done to the nodes; None if nothing was.
        times: All answered calls.
        median: Seconds that a call usually takes.
    """
    if record is None:
        return []
    plan = record.plan
    found = [
        _fault(record, times, median, plan.killed, What.KILLED, (plan.replacement, What.READY)),
        _fault(record, times, median, plan.frozen, What.FROZEN, (plan.frozen, What.THAWED)),
    ]
    return sorted((fault for fault in found if fault is not None), key=lambda fault: fault.at)


def _fault(
    record: FaultRecord, times: CallTimes, median: float, node: str, what: What, mended: tuple[str, What]
) -> FaultReport | None:
    at = first(record.moments, node, what)
    if at is None:
        return None

    def after(place: str, *things: What) -> float | None:
        found = first(record.moments, place, *things, since=at)
        return None if found is None else found - at

    mended_after = after(*mended)
    calls = disturbance(times, at, float("inf") if mended_after is None else at + mended_after)
    return FaultReport(
        kind=what.value,
        node=node,
        at=at,
        mended_after=mended_after,
        noticed_after=after(node, *NOTICED),
        faulted_after=after(node, *GONE),
        unanimous_after=after(node, What.UNANIMOUS),
        failover=None if calls.slowest is None else max(0.0, calls.slowest - median),
        longest_gap=calls.longest_gap,
    )


def replacement_of(record: FaultRecord | None) -> Replacement | None:
    """Return what became of the replacement; None if none was started."""
    started = None if record is None else first(record.moments, record.plan.replacement, What.STARTED)
    if record is None or started is None:
        return None
    is_ready = first(record.moments, record.plan.replacement, What.READY)
    return Replacement(
        node=record.plan.replacement,
        started_at=started,
        ready_after=None if is_ready is None else is_ready - started,
    )


def fault_problems(record: FaultRecord | None) -> Iterator[str]:
    """Yield what was planned and did not happen, and what nobody noticed, in words."""
    if record is None:
        return
    plan = record.plan
    for what, node in ((What.KILLED, plan.killed), (What.FROZEN, plan.frozen)):
        at = first(record.moments, node, what)
        if at is None:
            yield f"node {node} was to be {what}, but the replay ended before; lower the rate or send more flights"
        elif first(record.moments, node, *NOTICED, since=at) is None:
            yield f"nobody noticed that node {node} was {what}"
    if first(record.moments, plan.killed, What.KILLED) is not None and record.exit_code != -signal.SIGKILL:
        yield f"node {plan.killed} was not ended by SIGKILL: its exit code is {record.exit_code}"
    if first(record.moments, plan.frozen, What.FROZEN) is not None and not record.was_stopped:
        yield f"node {plan.frozen} did not stand still while it was frozen"
    replacement = replacement_of(record)
    if replacement is not None and replacement.ready_after is None:
        yield f"the replacement {plan.replacement} did not begin to answer"
