"""What people see: progress while a benchmark runs, Markdown at its end, and raw data as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from benchmarks.errors import UsageError
from benchmarks.statistics import Spread

RESULTS = Path(__file__).parent / "results"
"""Where full runs leave their raw data."""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one benchmark."""

    markdown: str
    """Tables and the sentences that belong to them."""

    raw: dict[str, Any]
    """Settings and every single measurement; JSON can carry it."""

    sound: bool = True
    """False if something happened that must not, whatever the numbers are."""


class Progress(Protocol):
    """Tells people that a benchmark is alive, from its first step to its last."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""

    def step(self, text: str) -> None:
        """Say what begins now."""


class PlainProgress:
    """A line per step on standard error: for logs, and where rich is not installed."""

    def __init__(self) -> None:
        self._steps = 0
        self._done = 0

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._steps = steps

    def step(self, text: str) -> None:
        """Say what begins now."""
        self._done += 1
        width = len(str(self._steps))
        print(f"[{self._done:>{width}}/{self._steps}] {text}", file=sys.stderr, flush=True)


class RichProgress:
    """A bar on the terminal, with the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar = self._bars.add_task("starting", total=None)
        self._begun = False

    def __enter__(self) -> Self:
        """Begin."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""
        self._bars.stop()

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._bars.update(self._bar, total=steps)

    def step(self, text: str) -> None:
        """Say what begins now."""
        self._bars.update(self._bar, description=text, advance=1 if self._begun else 0)
        self._begun = True


def make_progress() -> Progress:
    """Return a bar where a person watches and rich is there, else plain lines."""
    if sys.stderr.isatty():
        try:
            return RichProgress()
        except ImportError:
            return PlainProgress()
    return PlainProgress()


def figure(value: float) -> str:
    """Return a number as precise as a benchmark can be: three digits that count.

    Example:
        >>> figure(123456.0), figure(2.3456), figure(0.0)
        ('123,000', '2.35', '0')
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def figure_with_spread(value: Spread, suffix: str = "") -> str:
    """Return a median and, where there is more than one value behind it, the range."""
    text = f"{figure(value.median)}{suffix}"
    if value.low == value.high:
        return text
    return f"{text} ({figure(value.low)} to {figure(value.high)})"


def mebibytes(size_bytes: float) -> str:
    """Return a size in MiB.

    Example:
        >>> mebibytes(3_145_728)
        '3.0'
    """
    return f"{size_bytes / 2**20:,.1f}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column to the left and all others to the right.

    Cells are padded, so that it reads well as plain text too.
    """
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if column == 0 else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([line(headers), f"| {' | '.join(rule)} |", *map(line, rows)])


def result_file(name: str, now: datetime) -> Path:
    """Return where the raw data of a full run goes: one file per benchmark and minute."""
    return RESULTS / f"{name}-{now:%Y-%m-%dT%H%MZ}.json"


def write_json(path: Path, name: str, machine: dict[str, Any], report: Report, now: datetime) -> None:
    """Write the raw data of a run.

    Args:
        path: The file; made anew.
        name: Of the benchmark.
        machine: What it ran on.
        report: What it saw.
        now: When it ended, in UTC.

    Raises:
        UsageError: The file cannot be written.
    """
    content = {"benchmark": name, "ended": now.isoformat(timespec="seconds"), "machine": machine}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | report.raw, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"the raw data cannot be written to {str(path)!r}: {error}") from error


def utc_now() -> datetime:
    """Return the date and time, in UTC."""
    return datetime.now(UTC)
