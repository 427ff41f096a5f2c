"""What is said at the end: figures, shares, the verdict, and what went wrong."""

from collections.abc import Iterator, Sequence

import msgspec

from catga_bus.demo.data import Figures, Flight
from catga_bus.demo.display import milliseconds, seconds
from catga_bus.demo.fault_report import FaultReport, Replacement, fault_problems, fault_reports, replacement_of
from catga_bus.demo.faults import What
from catga_bus.demo.ledger import Execution, Verdict, judge, ran_twice_on
from catga_bus.demo.progress import ReplayResult


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One node: what it answered, what it logged, and what it remembers."""

    node: str
    answered: int
    share: float
    """Part of all answers, 0 to 1."""

    lines: Figures
    """What its lines add up to, every execution counted."""

    memory: Figures | None
    """What it said when it was asked for its `Totals`; None if it did not answer, or had been killed."""

    heard_closing: bool
    was_killed: bool
    """Whether it was killed on purpose; its lines count all the same."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a demo."""

    requests: int
    answered: int
    failures: dict[str, int]
    """Requests that were not answered, by code."""

    seconds: float
    requests_per_second: float
    p50_ms: float | None
    p99_ms: float | None
    """Time from sending to the answer, in milliseconds, exact to 1 %."""

    nodes: list[NodeReport]
    faults: list[FaultReport]
    """What was done to the nodes; empty after a peaceful replay."""

    replacement: Replacement | None
    """The node that took the place of a killed one."""

    file: Figures
    """Computed directly from the file."""

    executions: Figures
    """Computed from the lines of the execution log, each message id once."""

    ran_twice: int
    """Requests that have more than one line."""

    ran_twice_on_faulted: int
    """Those of them that have a line by a node that was killed or frozen: the ones that a fault explains."""

    late_flights: int
    """Flights of the file that a `FlightDelayed` event should announce."""

    announced: int
    """Those that reached the departures board; at most once, so fewer is no error."""

    problems: list[str]
    """What keeps the demo from succeeding, in words; empty if nothing does."""

    equal: bool
    """Whether the execution log adds up to the file."""

    @property
    def is_success(self) -> bool:
        """Whether log and file are equal, all was answered, and nodes agree with their lines."""
        return not self.problems


def make_report(result: ReplayResult, executions: Sequence[Execution], flights: Sequence[Flight]) -> Report:
    """Judge what happened.

    Args:
        result: What the replay saw.
        executions: The lines of the execution log.
        flights: The file.
    """
    verdict = judge(executions, flights)
    progress = result.progress
    faults = fault_reports(result.faults, result.times, (progress.p50_ms or 0.0) / 1_000)
    killed = {fault.node for fault in faults if fault.kind == What.KILLED}
    nodes = [
        NodeReport(
            node=node,
            answered=progress.per_node.get(node, 0),
            share=progress.shares.get(node, 0.0),
            lines=verdict.per_node.get(node, Figures()),
            memory=totals.figures if totals else None,
            heard_closing=totals is not None and totals.closed,
            was_killed=node in killed,
        )
        for node, totals in result.totals.items()
    ]
    return Report(
        requests=len(flights),
        answered=progress.answered,
        failures=result.failures,
        seconds=progress.seconds,
        requests_per_second=progress.per_second,
        p50_ms=progress.p50_ms,
        p99_ms=progress.p99_ms,
        nodes=nodes,
        faults=faults,
        replacement=replacement_of(result.faults),
        file=verdict.expected,
        executions=verdict.counted,
        ran_twice=verdict.ran_twice,
        ran_twice_on_faulted=ran_twice_on(executions, {fault.node for fault in faults}),
        late_flights=sum(flight.is_late for flight in flights),
        announced=result.announcements,
        problems=list(_problems(verdict, result, nodes)),
        equal=verdict.is_equal,
    )


def _problems(verdict: Verdict, result: ReplayResult, nodes: Sequence[NodeReport]) -> Iterator[str]:
    if verdict.counted != verdict.expected:
        yield "the execution log does not add up to the file"
    if verdict.missing_rows:
        yield f"{verdict.missing_rows:,} flights were not executed"
    if verdict.doubled_rows:
        yield f"{verdict.doubled_rows:,} flights were executed under more than one message id"
    if verdict.foreign_rows:
        yield f"{verdict.foreign_rows:,} executions are of flights that the file does not have"
    for code, count in result.failures.items():
        yield f"{count:,} requests failed with {code}"
    for node in nodes:
        if node.answered > node.lines.flights:
            yield f"node {node.node} answered {node.answered:,} requests, but logged {node.lines.flights:,}"
        if node.was_killed:
            continue
        if node.memory is None:
            yield f"node {node.node} did not tell its totals"
        elif node.memory != node.lines:
            yield f"node {node.node} remembers {node.memory}, but logged {node.lines}"
    yield from fault_problems(result.faults)


def json_of(report: Report) -> str:
    """Return the report as a JSON object, indented."""
    fields = msgspec.to_builtins(report)
    return msgspec.json.format(msgspec.json.encode(fields | {"success": report.is_success})).decode()


def text_of(report: Report) -> str:
    """Return the report for people."""
    speed = (
        f"{report.requests_per_second:,.0f} requests/s, "
        f"p50 {milliseconds(report.p50_ms)}, p99 {milliseconds(report.p99_ms)}"
    )
    heard = sum(node.heard_closing for node in report.nodes)
    living = sum(not node.was_killed for node in report.nodes)
    lines = [
        f"{report.answered:,} of {report.requests:,} requests answered in {report.seconds:.2f} s",
        speed,
        "",
        *_table(
            ["node", "answered", "share", "logged", "remembered"],
            [_node_row(node) for node in report.nodes],
        ),
        "",
        *_fault_lines(report),
        *_table(
            ["", "flights", "cancelled", "delay minutes", "miles"],
            [
                ["execution log", *_numbers(report.executions)],
                ["file", *_numbers(report.file)],
            ],
        ),
        "",
        _twice(report),
        f"late flights announced: {report.announced:,} of {report.late_flights:,} (at most once)",
        f"closing heard: by {heard} of {living} nodes (at most once)",
        *(f"problem: {problem}" for problem in report.problems),
        f"verdict: {_verdict(report)}",
    ]
    return "\n".join(lines)


def _twice(report: Report) -> str:
    text = f"ran twice: {report.ran_twice:,} requests"
    if not (report.faults and report.ran_twice):
        return text
    return f"{text}, {report.ran_twice_on_faulted:,} of them on a node that was killed or frozen"


def _verdict(report: Report) -> str:
    if not report.equal:
        return "NOT EQUAL"
    return "equal" if report.is_success else "equal, but see the problems"


def _node_row(node: NodeReport) -> list[str]:
    return [
        node.node,
        f"{node.answered:,}",
        f"{node.share:.1%}",
        f"{node.lines.flights:,}",
        _remembered(node),
    ]


def _remembered(node: NodeReport) -> str:
    if node.memory is not None:
        return f"{node.memory.flights:,}"
    return "killed" if node.was_killed else "no answer"


def _fault_lines(report: Report) -> Iterator[str]:
    if not report.faults:
        return
    header = [
        "fault",
        "at",
        "mended after",
        "noticed after",
        "faulted after",
        "in all views",
        "failover",
        "longest gap",
    ]
    yield from _table(header, [_fault_row(fault) for fault in report.faults])
    if (replacement := report.replacement) is not None:
        yield f"{replacement.node} took the place of the killed node, ready after {seconds(replacement.ready_after)}"
    yield ""


def _fault_row(fault: FaultReport) -> list[str]:
    views = (fault.noticed_after, fault.faulted_after, fault.unanimous_after)
    times = (fault.at, fault.mended_after, *views, fault.failover, fault.longest_gap)
    return [f"{fault.node} {fault.kind}", *map(seconds, times)]


def _numbers(figures: Figures) -> list[str]:
    return [f"{value:,}" for value in msgspec.structs.astuple(figures)]


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        name, *cells = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([name, *cells])
