"""Charts of the newest results, as SVG: every single measurement is a dot, so the spread is there to be seen.

`python -m benchmarks.charts` draws them anew after a full run.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.errors import UsageError
from benchmarks.reporting import RESULTS

CHARTS = Path(__file__).parents[1] / "docs" / "charts"
"""Where the charts are kept."""

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 760, 190, 80, 46, 26
_INK, _FAINT, _DOT, _GOAL = "#6e7781", "#d0d7de", "#0969da", "#cf222e"  # legible on white and on black
_SIDES = (("catga", "catga_bus"), ("bare", "bare nats-py"), ("faststream", "FastStream"))


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one thing."""

    label: str
    values: Sequence[float]
    is_ours: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """What is measured: the places of its ticks, in rising order, are the bounds of the chart as well."""

    title: str
    ticks: Sequence[float]
    is_logarithmic: bool = False
    target: float | None = None

    def share(self, value: float) -> float:
        """Return where a value lies between the first tick (0.0) and the last (1.0)."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.is_logarithmic:
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low) / (high - low)


def strips(title: str, axis: Axis, rows: Sequence[Row]) -> str:
    """Return a chart with a strip of dots for each row, and its median in figures.

    Raises:
        ValueError: A value lies beyond the axis: a dot outside would be a dot unseen.
    """
    height = _TOP + _ROW * len(rows) + 44
    bottom = _TOP + _ROW * len(rows)
    parts = [_text(_LEFT, 20, title, anchor="start", size=15)]
    for tick in axis.ticks:
        x = _x(axis, tick)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="{_FAINT}"/>')
        parts.append(_text(x, bottom + 16, _figure(tick)))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 36, axis.title))
    if axis.target is not None:
        x = _x(axis, axis.target)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="{_GOAL}" stroke-dasharray="4 3"/>'
        )
    for number, row in enumerate(rows):
        y = _TOP + _ROW * number + _ROW / 2
        parts.append(_text(_LEFT - 12, y + 4, row.label, anchor="end"))
        for value in row.values:
            if not axis.ticks[0] <= value <= axis.ticks[-1]:
                raise ValueError(f"{row.label}: {value:g} lies beyond the axis of {title!r}")
            color = _DOT if row.is_ours else _INK
            parts.append(f'<circle cx="{_x(axis, value):.1f}" cy="{y}" r="4" fill="{color}" fill-opacity="0.5"/>')
        parts.append(_text(_WIDTH - _RIGHT + 12, y + 4, _figure(median(row.values)), anchor="start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img"'
    return "\n".join([f'{head} font-family="sans-serif">', f"<title>{escape(title)}</title>", *parts, "</svg>", ""])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{_INK}">{escape(text)}</text>'
    )


def failover(raw: dict[str, Any]) -> str:
    """Return how long each killed or frozen node took to be dead in every live view."""
    rows = [
        Row(f"{load}: {len(faults)}", [fault["faulted_seconds"] for fault in faults])
        for load, faults in raw["outages"].items()
    ]
    axis = Axis(
        "seconds until the node was dead in every live view; a dot is a fault", (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    )
    return strips("Dead nodes are known", Axis(axis.title, axis.ticks, target=1.0), rows)


def requests(raw: dict[str, Any]) -> str:
    """Return the throughput of each side at each number in flight."""
    rows = [
        Row(f"{name}, {in_flight:,} in flight", list(_throughput(raw, side, in_flight)), is_ours=side == "catga")
        for in_flight in raw["settings"]["in_flight"]
        for side, name in _SIDES
    ]
    axis = Axis("requests/s, logarithmic; a dot is a round", (1e3, 1e4, 1e5, 1e6), is_logarithmic=True)
    return strips("Requests per second", axis, rows)


def commands(raw: dict[str, Any]) -> str:
    """Return the throughput of the sides of each comparison, at the number in flight that has targets."""
    rows = [
        Row(name, [one["requests_per_second"] for one in _of(raw, comparison, side)], is_ours=is_ours)
        for comparison, side, name, is_ours in (
            ("result", "request", "bare request, not stored", False),
            ("result", "send-16", "send, with its result", True),
            ("accepted", "publish-async", "publish_async", False),
            ("accepted", "enqueue-16", "enqueue, until stored", True),
            ("handled", "bare-handled", "nats-py, pulled and acked", False),
            ("handled", "faststream-handled", "FastStream, the same", False),
            ("handled", "handled-16", "enqueue, handled", True),
        )
    ]
    title = "commands/s, 1,024 in flight, 16 partitions, logarithmic; a dot is a round"
    return strips("Durable commands per second", Axis(title, (1e3, 1e4, 1e5, 1e6), is_logarithmic=True), rows)


def _of(raw: dict[str, Any], comparison: str, side: str) -> list[dict[str, Any]]:
    found = raw["comparisons"][comparison]["measurements"]
    return [one for one in found if (one["side"], one["in_flight"]) == (side, 1_024)]


def takeover(raw: dict[str, Any]) -> str:
    """Return how long each partition stood still when its owner was killed, frozen or rolled."""
    rows = []
    for part, kind, name in (
        ("kills", "kill", "killed"),
        ("freezes", "freeze", "frozen"),
        ("rolls", "hand-over", "rolled: handed over"),
    ):
        seconds = [move["seconds"] for move in raw["parts"][part]["moves"] if move["kind"] == kind]
        rows.append(Row(f"{name}: {len(seconds)}", seconds))
    ticks = (0.001, 0.01, 0.1, 1.0, 10.0)
    title = "seconds that a partition stood still, logarithmic; a dot is a partition"
    return strips("Partitions go on", Axis(title, ticks, is_logarithmic=True, target=1.5), rows)


def _throughput(raw: dict[str, Any], side: str, in_flight: int) -> Iterable[float]:
    for one in raw["measurements"]:
        if (one["side"], one["in_flight"]) == (side, in_flight):
            yield one["requests_per_second"]


def newest(benchmark: str, results: Path = RESULTS) -> dict[str, Any]:
    """Return the raw data of the newest full run.

    Raises:
        UsageError: There is none.
    """
    found = sorted(results.glob(f"{benchmark}-*.json"))
    if not found:
        raise UsageError(f"no results of {benchmark!r} in {results}; run `python -m benchmarks {benchmark}` first")
    raw: dict[str, Any] = json.loads(found[-1].read_text())
    return raw


_CHARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "commands": commands,
    "failover": failover,
    "requests": requests,
    "takeover": takeover,
}


def draw(results: Path = RESULTS) -> dict[str, str]:
    """Return the text of every chart for which there are results, by the name of its file."""
    there = [name for name in _CHARTS if any(results.glob(f"{name}-*.json"))]
    return {f"{name}.svg": _CHARTS[name](newest(name, results)) for name in there}


def main() -> None:
    """Write the charts."""
    CHARTS.mkdir(parents=True, exist_ok=True)
    for name, text in draw().items():
        (CHARTS / name).write_text(text)
        print(CHARTS / name)


if __name__ == "__main__":
    main()
