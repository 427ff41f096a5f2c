"""Figures of runs over what is stored. Pure."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from tests.chaos.report import percentile
from tests.chaos.stored.checker import hand_overs, sights, takeovers
from tests.chaos.stored.story import Story


@dataclass
class Figures:
    """What happened; sums over several runs."""

    runs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    takeovers: dict[str, list[float]] = field(default_factory=dict)
    """Seconds to the first new effect, of each partition, by the fault of its owner."""

    hand_overs: list[float] = field(default_factory=list)
    longest_gap: float = 0.0
    """Seconds between two effects."""

    def merge(self, other: "Figures") -> None:
        """Add those of other runs."""
        self.runs += other.runs
        self.counts += other.counts
        self.faults += other.faults
        self.seen += other.seen
        for kind, times in other.takeovers.items():
            self.takeovers.setdefault(kind, []).extend(times)
        self.hand_overs += other.hand_overs
        self.longest_gap = max(self.longest_gap, other.longest_gap)


def tabulate(story: Story) -> Figures:
    """Return the figures of a run."""
    figures = Figures(runs=1, seen=sights(story))
    counts = figures.counts
    counts["sent"] = len(story.messages)
    counts["keys"] = len({message.sent.key for message in story.messages.values()})
    for message in story.messages.values():
        counts["accepted"] += message.is_accepted
        counts["executions"] += len(message.begun)
        for one in message.settled:
            if one.outcome not in ("ok",):
                counts[f"{one.outcome} {one.code}"] += 1
    counts["effects"] = sum(map(len, story.effects.values()))
    counts["dead letters"] = sum(map(len, story.letters.values()))
    figures.faults.update(window.kind for window in story.windows)
    for kind, seconds, _ in takeovers(story):
        figures.takeovers.setdefault(kind, []).append(seconds)
    figures.hand_overs = list(hand_overs(story))
    times = sorted(effect.t for effects in story.effects.values() for effect in effects)
    figures.longest_gap = max((after - before for before, after in pairwise(times)), default=0.0)
    return figures


def merged(all_figures: Iterable[Figures]) -> Figures:
    """Return the figures of several runs together."""
    total = Figures()
    for figures in all_figures:
        total.merge(figures)
    return total


def lines(figures: Figures) -> list[str]:
    """Return the figures as text."""
    text = [f"{figures.runs} runs: " + _listed(figures.counts)]
    text.append("faults: " + _listed(figures.faults))
    text.append("seen: " + _listed(figures.seen))
    for kind, times in sorted(figures.takeovers.items()):
        text.append(f"first new effect after {kind}: " + _times(times))
    if figures.hand_overs:
        text.append("hand-over, last pull to grant: " + _times(figures.hand_overs))
    text.append(f"longest time without an effect: {figures.longest_gap * 1000:.0f} ms")
    return text


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count) or "nothing"


def _times(times: list[float]) -> str:
    p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
    return f"n={len(times)}, p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, max {max(times) * 1000:.0f} ms"
