"""Figures of a run per kind of fault: calls, failures, second executions, gaps and latencies. Pure."""

from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.chaos.story import Call, Story, Window

PHASES = ("before", "first second", "during", "after")
"""Of a fault, by the instant at which a call is made: until the next fault begins it is after the last one."""

NO_FAULT = "none"


@dataclass
class Figures:
    """What happened to the calls of one kind of fault and one phase; sums over several runs."""

    calls: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    ran_twice: int = 0
    longest_gap: float = 0.0
    """Seconds between two successes, of the gaps that ended in this phase."""

    latencies: list[float] = field(default_factory=list)
    """Seconds beyond the work itself, of the calls that ended well."""

    detections: list[float] = field(default_factory=list)
    """Seconds until a caller called the node dead that the fault hit; counted in the fault's first second."""

    def add(self, call: Call) -> None:
        """Count a call."""
        self.calls += 1
        self.ran_twice += len(call.starts) > 1
        if call.is_ok:
            self.latencies.append(call.ends[0].latency - call.invoke.work)
        else:
            end = call.ends[0] if call.ends else None
            self.failed[f"{end.code} {end.outcome}" if end else "no outcome"] += 1

    def merge(self, other: "Figures") -> None:
        """Add those of another run."""
        self.calls += other.calls
        self.failed += other.failed
        self.ran_twice += other.ran_twice
        self.longest_gap = max(self.longest_gap, other.longest_gap)
        self.latencies += other.latencies
        self.detections += other.detections


Table = dict[tuple[str, str], Figures]
"""Figures by kind of fault and phase."""


def tabulate(story: Story) -> Table:
    """Return the figures of a run."""
    table: Table = defaultdict(Figures)
    begins = [window.begin for window in story.windows]

    def place(instant: float) -> tuple[str, str]:
        before = bisect_right(begins, instant)
        return phase_of(instant, story.windows[before - 1] if before else None)

    for call in story.calls.values():
        table[place(call.invoke.t)].add(call)
    successes = sorted(call.ended for call in story.calls.values() if call.is_ok)
    for last, then in pairwise(successes):
        figures = table[place(then)]
        figures.longest_gap = max(figures.longest_gap, then - last)
    for window, seconds in _detections(story):
        table[window.kind, "first second"].detections.append(seconds)
    return dict(table)


def _detections(story: Story) -> Iterator[tuple[Window, float]]:
    """Yield each fault of a node with the time until each caller called it dead for the first time."""
    latest: dict[str, Window] = {}
    told: set[tuple[str, str]] = set()
    windows = deque(story.windows)
    for view in story.views:
        while windows and windows[0].begin <= view.t:
            window = windows.popleft()
            latest[window.target] = window
        hit = latest.get(view.node)
        if hit is not None and view.change == "faulted" and (hit.name, view.observer) not in told:
            told.add((hit.name, view.observer))
            yield hit, view.t - hit.begin


def phase_of(instant: float, window: Window | None) -> tuple[str, str]:
    """Return the kind and the phase of an instant whose latest fault is given."""
    if window is None:
        return NO_FAULT, "before"
    if instant < window.begin + 1.0:
        return window.kind, "first second"
    return window.kind, "during" if instant < window.end else "after"


def merge(tables: Iterable[Mapping[tuple[str, str], Figures]]) -> Table:
    """Return the figures of several runs together."""
    total: Table = defaultdict(Figures)
    for table in tables:
        for key, figures in table.items():
            total[key].merge(figures)
    return dict(total)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share (0 to 1) of the values lie, by nearest rank; of none 0."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


HEADINGS = ("fault", "phase", "calls", "ok", "ran twice", "gap ms", "p50 ms", "p99 ms", "dead ms", "failed")
"""Latencies are those beyond the work itself; `dead` is the longest time until a caller called the node dead."""


def lines(table: Mapping[tuple[str, str], Figures]) -> list[str]:
    """Return the table as aligned text."""
    rows = [HEADINGS]
    for (kind, phase), figures in sorted(table.items(), key=lambda item: (item[0][0], PHASES.index(item[0][1]))):
        failed = ", ".join(f"{count} {code}" for code, count in figures.failed.most_common())
        latencies = figures.latencies
        times = (figures.longest_gap, percentile(latencies, 0.5), percentile(latencies, 0.99))
        dead = f"{max(figures.detections) * 1000:.0f}" if figures.detections else "-"
        counts = (figures.calls, len(figures.latencies), figures.ran_twice)
        rows.append((kind, phase, *map(str, counts), *(f"{time * 1000:.1f}" for time in times), dead, failed or "0"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
