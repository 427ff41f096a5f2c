"""The report in words, and as JSON."""

from collections.abc import Iterator, Sequence
from statistics import median

import msgspec

from catga_bus.demo.data import Figures
from catga_bus.demo.display import milliseconds, seconds
from catga_bus.demo.fault_report import FaultReport
from catga_bus.demo.partition_map import text_of_map
from catga_bus.demo.report import NodeReport, Report


def json_of(report: Report) -> str:
    """Return the report as a JSON object, indented."""
    fields = msgspec.to_builtins(report)
    return msgspec.json.format(msgspec.json.encode(fields | {"success": report.is_success})).decode()


def text_of(report: Report) -> str:
    """Return the report for people."""
    heard = sum(node.heard_closing for node in report.nodes)
    living = sum(not node.was_ended for node in report.nodes)
    lines = [
        *_speed(report),
        "",
        *_table(["node", "effects", "share", "executions", "duplicates", "fenced"], map(_node_row, report.nodes)),
        f"partitions {text_of_map(report.owners)}, after {report.moves} moves",
        "",
        *_fault_lines(report),
        *_table(
            ["", "flights", "cancelled", "delay minutes", "miles"],
            [
                ["effect log", *_numbers(report.verdict.counted)],
                ["file", *_numbers(report.file)],
            ],
        ),
        "",
        _repeated(report),
        _announced(report),
        f"closing heard: by {heard} of {living} nodes (at most once)",
        *(f"problem: {problem}" for problem in report.problems),
        f"verdict: {_verdict(report)}",
    ]
    return "\n".join(lines)


def _speed(report: Report) -> Iterator[str]:
    yield (
        f"{report.stored:,} of {report.flights:,} flights stored in {report.stored_seconds:.2f} s, "
        f"p50 {milliseconds(report.stored_p50_ms)}, p99 {milliseconds(report.stored_p99_ms)}"
    )
    yield (
        f"{report.verdict.effects.written:,} effects in {report.seconds:.2f} s, {report.effects_per_second:,.0f}/s; "
        f"from call to effect p50 {milliseconds(report.effect_p50_ms)}, p99 {milliseconds(report.effect_p99_ms)}, "
        f"longest {milliseconds(report.effect_max_ms)}"
    )


def _announced(report: Report) -> str:
    found = report.announcements
    text = f"late flights on the departures board: {found.written:,} of {report.late_flights:,}"
    return f"{text}, {_wrong(found.out_of_order, found.doubled)}"


def _wrong(out_of_order: int, doubled: int) -> str:
    return f"{out_of_order:,} out of order per aircraft, {doubled:,} doubled"


def _verdict(report: Report) -> str:
    effects = report.verdict.effects
    found = f"{effects.written:,} effects, {effects.lost:,} lost, {_wrong(effects.out_of_order, effects.doubled)}"
    if report.is_success:
        return found
    return f"{found}: {'see the problems' if report.verdict.is_good else 'WRONG'}"


def _repeated(report: Report) -> str:
    runs = report.runs
    text = f"executions: {runs.executions:,}; {runs.repeated:,} flights ran more than once"
    if not (report.faults and runs.repeated):
        return text
    return f"{text}, {runs.repeated_on_faulted:,} of them on a node that was killed, frozen or rolled"


def _node_row(node: NodeReport) -> list[str]:
    untold = "ended" if node.was_ended else "no answer"
    told = [untold if count is None else f"{count:,}" for count in (node.duplicates, node.fenced)]
    return [node.node, f"{node.effects:,}", f"{node.share:.1%}", f"{node.executions:,}", *told]


def _fault_lines(report: Report) -> Iterator[str]:
    if not report.faults:
        return
    header = ["fault", "at", "noticed", "gone", "mended", "partitions", "first", "median", "last", "standstill"]
    yield from _table(header, map(_fault_row, report.faults))
    yield "noticed, gone, mended: after the fault. first to last: of its partitions, from the fault to the first effect"
    yield "of the next owner; of a rolled node, the pause in between. standstill: no effect on any partition"
    for newcomer in report.newcomers:
        after = seconds(newcomer.ready_after)
        yield f"{newcomer.node} took the place of {newcomer.place_of}, ready {after} after its start"
    yield ""


def _fault_row(fault: FaultReport) -> list[str]:
    moved = [min(fault.moved), median(fault.moved), max(fault.moved)] if fault.moved else [None] * 3
    times = (fault.at, fault.noticed_after, fault.gone_after, fault.mended_after)
    last = [*moved, fault.standstill]
    return [f"{fault.node} {fault.kind}", *map(seconds, times), str(len(fault.moved)), *map(seconds, last)]


def _numbers(figures: Figures) -> list[str]:
    return [f"{value:,}" for value in msgspec.structs.astuple(figures)]


def _table(header: list[str], body: "Sequence[list[str]] | map[list[str]]") -> Iterator[str]:
    rows = list(body)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        name, *cells = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([name, *cells])
