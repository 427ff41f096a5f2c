"""The progress of the replay as a picture that moves; the only file of the demo that needs rich."""

from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from catga_bus.demo.display import milliseconds
from catga_bus.demo.progress import Progress

_SHARE_WIDTH = 30


class RichDisplay:
    """Shows a progress bar, the figures so far and the share of each node, redrawn in place.

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
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, progress: Progress) -> None:
        """Draw the picture again."""
        self._bar.update(self._task, total=progress.total, completed=progress.done)
        self._live.update(Group(self._bar, _figures(progress), _shares(progress)), refresh=True)


def _figures(progress: Progress) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_row(
        f"[bold]{progress.per_second:,.0f}[/] requests/s",
        f"[bold]{progress.in_flight}[/] in flight",
        f"p50 [bold]{milliseconds(progress.p50_ms)}[/]",
        f"p99 [bold]{milliseconds(progress.p99_ms)}[/]",
        f"[red]{progress.failed:,} failed[/]" if progress.failed else "",
    )
    return table


def _shares(progress: Progress) -> Table:
    table = Table.grid(padding=(0, 1))
    for node, share in progress.shares.items():
        table.add_row(node, "█" * round(share * _SHARE_WIDTH), f"{share:.0%}")
    return table
