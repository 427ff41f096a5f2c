"""The progress of the replay as a picture that moves; the only file of the demo that needs rich."""

from collections import deque
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from catga_bus.demo.display import milliseconds
from catga_bus.demo.faults import What
from catga_bus.demo.partition_map import Owners, mark_of, number_of
from catga_bus.demo.progress import Progress, effect_rates

_BAR_WIDTH = 30
_RATE_SECONDS = 0.5  # effects per second are those of this last stretch: long enough to be steady to the eye
_STYLES = {
    What.KILLED: "red",
    What.FROZEN: "blue",
    What.THAWED: "green",
    What.STARTED: "yellow",
    What.READY: "green",
    What.ROLLED: "magenta",
    What.ENDED: "magenta",
}
_CELLS = ("cyan", "green", "yellow", "magenta", "blue", "red")  # by the number of the node


class RichDisplay:
    """Shows a progress bar, the figures so far, who owns which partition, and how each node fares.

    A node's bar and rate are those of the last half second, its percentage is its part of all effects.

    All is redrawn in place.

    Args:
        stream: A terminal.
    """

    interval = 0.1

    def __init__(self, stream: TextIO) -> None:
        self._bar = Bar(
            TextColumn("flights"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("flights", total=None)
        # Redrawn by `update` alone: a thread of rich's own would draw while the event loop is at
        # work.
        self._live = Live(self._bar, console=Console(file=stream), auto_refresh=False)
        self._recent: deque[Progress] = deque()

    def __enter__(self) -> "RichDisplay":
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Write one line above the picture."""
        # Not as a string without markup: that option would hold for the picture below it, too.
        self._live.console.print(Text(text), soft_wrap=True)

    def update(self, progress: Progress) -> None:
        """Draw the picture again."""
        self._bar.update(self._task, total=progress.total, completed=progress.effects)
        self._recent.append(progress)
        while progress.seconds - self._recent[0].seconds > _RATE_SECONDS:
            self._recent.popleft()
        rates = effect_rates(self._recent[0], progress)
        self._live.update(
            Group(self._bar, _figures(progress), _map(progress.owners), _nodes(progress, rates)), refresh=True
        )


def _figures(progress: Progress) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_row(
        f"[bold]{progress.per_second:,.0f}[/] effects/s",
        f"[bold]{progress.waiting:,}[/] waiting",
        f"stored in p50 [bold]{milliseconds(progress.p50_ms)}[/]",
        f"p99 [bold]{milliseconds(progress.p99_ms)}[/]",
        f"[red]{progress.failed:,} failed[/]" if progress.failed else "",
    )
    return table


def _map(owners: Owners) -> Text:
    """Return one cell per partition, with the number of its owner."""
    row = Text("partitions ")
    for owner in owners:
        row.append(f" {mark_of(owner)} ", style="dim" if owner is None else f"bold reverse {_colour(owner)}")
        row.append(" ")
    return row


def _colour(node: str) -> str:
    return _CELLS[number_of(node) % len(_CELLS)]


def _nodes(progress: Progress, rates: dict[str, float]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right", width=len("10,000/s"))
    table.add_column(justify="right", width=len("100%"))
    shares, states, total = progress.shares, progress.states, sum(rates.values())
    for node in progress.nodes:
        style = _style(node, progress)
        bar = rates[node] / total if total else 0.0
        table.add_row(
            Text(node, style=style),
            Text("█" * round(bar * _BAR_WIDTH), style=_colour(node)),
            f"{rates[node]:,.0f}/s",
            f"{shares[node]:.0%}",
            Text(states[node], style=style),
        )
    return table


def _style(node: str, progress: Progress) -> str:
    """Return the colour of what was done to a node last."""
    done = [_STYLES[moment.what] for moment in progress.moments if moment.node == node and moment.what in _STYLES]
    return done[-1] if done else ""
