"""What the faults came to, as tables and as raw data. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.outages import Kind, Outage, Toll
from benchmarks.reporting import figure, markdown_table
from benchmarks.statistics import Target, percentile
from benchmarks.steady import HANGING

WANTED_DETECTION = Target(1.0, aim=0.5, higher_is_better=False)
"""Seconds until a killed node is out of every live view."""

WANTED_FIRST_P99 = Target(0.6, higher_is_better=False)
"""Seconds, p99 of the calls of the first second after a freeze."""

WANTED_RETURN = Target(1.0, higher_is_better=False)
"""Seconds from the return of the server to the first answer."""

QUICK = ""
BUSY = ", busy"
IN_A_CROWD = ", in a crowd"
# The loads: what the name of a kind of fault is followed by.

NONE = Target(0.0, higher_is_better=False)

_MEASURES = {
    "suspect_seconds": "avoided in every live view",
    "faulted_seconds": "dead in every live view",
    "slowest_in_flight": "slowest call in flight",
    "p99_first": "p99 of calls in the first second",
    "slowest_first": "slowest call in the first second",
    "p99_after": "p99 of calls after that",
    "p99_thawed": "p99 of calls in the first second after the thaw",
}


@dataclass(frozen=True, slots=True)
class Rolls:
    """Rolling restarts."""

    times: int
    drain_seconds: Sequence[float]
    """From SIGTERM to the end of the process, each."""


@dataclass(frozen=True, slots=True)
class ServerRestart:
    """Kills of the server."""

    nodes: int
    first_answer_seconds: Sequence[float | None]
    """From its return to the first answer, each; None if there was none."""

    false_deaths: int


@dataclass(slots=True)
class FailoverFigures:
    """Everything that was measured."""

    rate: float
    outages: dict[str, list[Outage]] = field(default_factory=dict)
    """By the kind of the fault and the load."""

    tolls: dict[str, Toll] = field(default_factory=dict)
    rolls: Rolls | None = None
    server: ServerRestart | None = None
    group_shares: list[float] = field(default_factory=list)
    """Which share of the calls of a bare queue group failed during each freeze."""

    @property
    def is_sound(self) -> bool:
        """Whether every call ended, with the answer to itself."""
        return not any(end in (HANGING, "wrong answer") for toll in self.tolls.values() for end in toll.ends)

    def as_json(self) -> dict[str, Any]:
        """Return all of it for the raw data."""
        return {
            "outages": {name: [one.as_json() for one in outages] for name, outages in self.outages.items()},
            "tolls": {name: asdict(toll) for name, toll in self.tolls.items()},
            "rolls": None if self.rolls is None else asdict(self.rolls),
            "server_restarts": None if self.server is None else asdict(self.server),
            "bare_queue_group_share_failed": self.group_shares,
        }


def markdown(figures: FailoverFigures) -> str:
    """Return all tables, and the sentences that belong to them."""
    parts = [_times(figures), _on_nodes(figures), _tolls(figures), _sentences(figures), _verdicts(figures)]
    return "\n\n".join(part for part in parts if part)


def _times(figures: FailoverFigures) -> str:
    rows = []
    for fault, outages in figures.outages.items():
        for name, title in _MEASURES.items():
            values = _values(outages, name)
            if values:
                rows.append([f"{fault}: {title}", f"{len(values)} of {len(outages)}", *_shares(values)])
    return markdown_table(["seconds", "faults", "p50", "p99", "max"], rows) if rows else ""


def _on_nodes(figures: FailoverFigures) -> str:
    """Return the calls that the nodes were executing when the faults came, which are lost in the totals."""
    rows = []
    for fault, outages in figures.outages.items():
        latencies = [latency for one in outages for latency in one.on_node]
        counts = [len(outages), len(latencies), sum(one.on_node_failed for one in outages)]
        rows.append([fault, *(f"{count:,}" for count in counts), *(_shares(latencies) if latencies else "---")])
    headers = ["calls on the node", "faults", "calls", "failed", "p50, s", "p99, s", "max, s"]
    return markdown_table(headers, rows) if rows else ""


def _shares(values: Sequence[float]) -> list[str]:
    return [f"{percentile(values, share):.3f}" for share in (0.5, 0.99, 1.0)]


def _tolls(figures: FailoverFigures) -> str:
    rows = [
        [
            name,
            *(f"{count:,}" for count in (toll.calls, toll.failed, toll.executed_twice, toll.started_late)),
            f"{toll.slowest:.3f}",
            ", ".join(f"{end} {count:,}" for end, count in toll.ends.items() if end != "ok") or "-",
        ]
        for name, toll in figures.tolls.items()
    ]
    headers = ["under", "calls", "failed", "executed twice", "started late", "slowest, s", "how they failed"]
    return markdown_table(headers, rows)


def _sentences(figures: FailoverFigures) -> str:
    lines = []
    if figures.rolls is not None:
        drains = figures.rolls.drain_seconds
        lines.append(
            f"Rolling restarts: {figures.rolls.times} times all nodes; a node took {median(drains):.2f} s from SIGTERM "
            f"to its end, at most {max(drains):.2f} s."
        )
    if figures.server is not None:
        lines.append(
            f"Server killed {len(figures.server.first_answer_seconds)} times with {figures.server.nodes} nodes: first "
            f"answer {_texts(figures.server.first_answer_seconds)} s after its return; "
            f"{figures.server.false_deaths} false deaths."
        )
    if figures.group_shares:
        lines.append(
            f"Bare queue group with one of three members frozen: {median(figures.group_shares) * 100:.0f} % of the "
            f"calls failed whose time was over before the thaw."
        )
    return "\n\n".join(lines)


def _verdicts(figures: FailoverFigures) -> str:
    rows = []
    for fault, outages in figures.outages.items():
        if fault.startswith(Kind.KILL):
            title = f"{fault}: out of every live view, worst, s"
            rows.append(_verdict(title, outages, "faulted_seconds", WANTED_DETECTION))
        else:
            title = f"{fault}: p99 in the first second, median, s"
            rows.append(_verdict(title, outages, "p99_first", WANTED_FIRST_P99, 0.5))
    for name, toll in figures.tolls.items():
        if not name.startswith("bare"):
            rows.append(_row(f"{name}: requests failed", NONE, float(toll.failed)))
    if "rolling restart" in figures.tolls:
        twice = figures.tolls["rolling restart"].executed_twice
        rows.append(_row("rolling restart: executed twice", NONE, float(twice)))
    if figures.server is not None:
        answers = figures.server.first_answer_seconds
        worst = max(float("inf") if one is None else one for one in answers)
        rows.append(_row("server killed: first answer after its return, worst, s", WANTED_RETURN, worst))
        rows.append(_row("server killed: false deaths", NONE, float(figures.server.false_deaths)))
    return markdown_table(["target", "at most", "measured", "verdict"], rows) if rows else ""


def _verdict(title: str, outages: Sequence[Outage], name: str, wanted: Target, share: float = 1.0) -> list[str]:
    """Judge a measure; a fault for which there is no value counts as the worst of all."""
    values = _values(outages, name)
    values += [float("inf")] * (len(outages) - len(values))
    return _row(title, wanted, percentile(values, share))


def _row(title: str, wanted: Target, value: float) -> list[str]:
    return [title, figure(wanted.required), figure(value), wanted.verdict(value)]


def _values(outages: Sequence[Outage], name: str) -> list[float]:
    return [value for one in outages if (value := getattr(one, name)) is not None]


def _texts(values: Sequence[float | None]) -> str:
    return ", ".join("never" if value is None else f"{value:.2f}" for value in values)
