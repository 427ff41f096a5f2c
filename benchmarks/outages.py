"""What a fault did to the calls around it, from the record of all calls and of all executions. Pure.

All instants are of one clock, `time.monotonic`, which the processes of a machine share.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from benchmarks.statistics import percentile

OK = "ok"
"""How a call ended that was answered; every other end is a failure."""

FIRST_SECONDS = 1.0
"""How long after a fault calls may feel it; what is sent later should not."""


class Kind(StrEnum):
    """What happens to a node."""

    KILL = "kill"
    FREEZE = "freeze"


class Call(NamedTuple):
    """One call, as its caller saw it."""

    order: int
    """Names the call; a node notes it when it runs the handler."""

    sent: float
    ended: float
    end: str


class Execution(NamedTuple):
    """One start of a handler."""

    order: int
    started: float
    process: int = 0
    """Of the node."""


class Sight(NamedTuple):
    """How one process saw a node, from this instant on."""

    at: float
    node: str
    status: str


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to a node, and when."""

    kind: Kind
    node: str
    at: float
    """Taken before the signal: no answer to it can seem to come too early."""

    until: float
    """When the node was thawed; for a killed one the end of the time in which it is watched."""

    over: float
    """When the next fault may begin: calls sent from `at` to here belong to this one."""

    process: int = 0
    """Of the node."""


@dataclass(frozen=True, slots=True)
class Outage:
    """One fault, and what came of it. Seconds, each None where there is nothing to count."""

    kind: Kind
    node: str
    suspect_seconds: float | None
    """From the fault until the last live view avoided the node; None if one never did."""

    faulted_seconds: float | None
    """From the fault until the last live view took it for dead; None if one never did."""

    slowest_in_flight: float | None
    """Of the calls on their way at the fault."""

    p99_first: float | None
    """Of the calls on their way at the fault or sent in the first second after it."""

    slowest_first: float | None
    p99_after: float | None
    """Of the calls sent after that, until `Fault.until`."""

    p99_thawed: float | None
    """Of the calls sent in the first second after a thaw."""

    calls: int
    """Sent from the fault until the next one, or on their way at it."""

    failed: int
    executed_twice: int
    started_late: int
    """Executions that began after their caller had given up."""

    on_node: Sequence[float] = ()
    """Latencies of the calls that the node was executing at the fault: those that need a second attempt."""

    on_node_failed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return all of it for the raw data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Toll:
    """What became of the calls of a stretch of time."""

    calls: int
    failed: int
    executed_twice: int
    started_late: int
    ends: Mapping[str, int]
    """How many ended in which way."""

    slowest: float


def seen_in_every_view(
    views: Mapping[str, Sequence[Sight]], fault: Fault, statuses: Iterable[str], live: Iterable[str]
) -> float | None:
    """Return how long it took until every live view had seen the node with one of the statuses.

    Args:
        views: What each process saw, in order.
        fault: What it is about; what was seen before it or after its end does not count.
        statuses: Those that count.
        live: The processes that must have seen it.
    """
    wanted = frozenset(statuses)
    firsts = [
        next(
            (
                one.at - fault.at
                for one in views[process]
                if one.node == fault.node and one.status in wanted and fault.at <= one.at < fault.until
            ),
            None,
        )
        for process in live
    ]
    seen = [first for first in firsts if first is not None]
    return max(seen) if seen and len(seen) == len(firsts) else None


def toll(calls: Sequence[Call], executions: Mapping[int, Sequence[float]], timeout: float) -> Toll:
    """Count what became of calls.

    Args:
        calls: Those that are counted.
        executions: When each order was started, from `by_order`.
        timeout: Seconds that each call had.
    """
    starts = [(call, executions.get(call.order, ())) for call in calls]
    return Toll(
        calls=len(calls),
        failed=sum(call.end != OK for call in calls),
        executed_twice=sum(len(instants) > 1 for _, instants in starts),
        started_late=sum(instant > call.sent + timeout for call, instants in starts for instant in instants),
        ends=dict(Counter(call.end for call in calls).most_common()),
        slowest=max((call.ended - call.sent for call in calls), default=0.0),
    )


def by_order(executions: Iterable[Execution]) -> dict[int, list[float]]:
    """Return when each order was started."""
    starts: dict[int, list[float]] = {}
    for one in executions:
        starts.setdefault(one.order, []).append(one.started)
    return starts


def outage(
    fault: Fault,
    calls: Sequence[Call],
    executions: Sequence[Execution],
    views: Mapping[str, Sequence[Sight]],
    live: Iterable[str],
    timeout: float,
) -> Outage:
    """Return what came of one fault.

    Args:
        fault: The fault.
        calls: All calls of the run.
        executions: All of the run.
        views: What each process saw.
        live: The processes that had to see it.
        timeout: Seconds that each call had.
    """
    own = [call for call in calls if call.ended > fault.at and call.sent < fault.over]
    in_flight = [call for call in own if call.sent <= fault.at]
    started = {one.order for one in executions if one.process == fault.process and one.started <= fault.at}
    on_node = [call for call in in_flight if call.order in started]
    first_end = min(fault.at + FIRST_SECONDS, fault.until)
    first = [call for call in own if call.sent < first_end]
    after = [call for call in own if first_end <= call.sent < fault.until]
    thawed = [call for call in own if fault.until <= call.sent < fault.until + FIRST_SECONDS]
    counts = toll(own, by_order(executions), timeout)
    live = tuple(live)
    return Outage(
        kind=fault.kind,
        node=fault.node,
        suspect_seconds=seen_in_every_view(views, fault, ("suspect", "faulted", "left"), live),
        faulted_seconds=seen_in_every_view(views, fault, ("faulted", "left"), live),
        slowest_in_flight=_latency(in_flight, 1.0),
        p99_first=_latency(first, 0.99),
        slowest_first=_latency(first, 1.0),
        p99_after=_latency(after, 0.99),
        p99_thawed=_latency(thawed, 0.99) if fault.kind is Kind.FREEZE else None,
        calls=counts.calls,
        failed=counts.failed,
        executed_twice=counts.executed_twice,
        started_late=counts.started_late,
        on_node=tuple(call.ended - call.sent for call in on_node),
        on_node_failed=sum(call.end != OK for call in on_node),
    )


def share_failed_of_frozen(calls: Sequence[Call], fault: Fault, timeout: float) -> float:
    """Return which share of the calls failed that had to be answered while a node was frozen, 0 to 1.

    Calls whose time ended after the thaw are left out: the thawed node may still have answered them.

    Raises:
        ValueError: There were none.
    """
    caught = [call for call in calls if fault.at <= call.sent < fault.until - timeout]
    if not caught:
        raise ValueError(f"no call had to be answered in the {fault.until - fault.at:.1f} s of the freeze")
    return sum(call.end != OK for call in caught) / len(caught)


def _latency(calls: Sequence[Call], share: float) -> float | None:
    return percentile([call.ended - call.sent for call in calls], share) if calls else None
