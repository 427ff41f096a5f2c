"""What is seen while the replay runs: lines of text or nothing; `rich_display` draws."""

from types import TracebackType
from typing import Protocol, TextIO

from catga_bus.demo.partition_map import text_of_map
from catga_bus.demo.progress import Progress

_LINE_SECONDS = 2.0


class Display(Protocol):
    """Shows progress between `__enter__` and `__exit__`."""

    interval: float
    """Seconds between two updates."""

    def __enter__(self) -> "Display": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def update(self, progress: Progress) -> None:
        """Show how far the replay has come."""


class SilentDisplay:
    """Shows nothing: for output that a machine reads."""

    interval = 1.0

    def __enter__(self) -> "SilentDisplay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def say(self, text: str) -> None:
        """Show nothing."""

    def update(self, progress: Progress) -> None:
        """Show nothing."""


class PlainDisplay:
    """Writes one line every other second, and whenever the map of the partitions has changed.

    For files, pipes and terminals without rich.

    Args:
        stream: Where the lines go.
    """

    interval = 0.25

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: Progress | None = None

    def __enter__(self) -> "PlainDisplay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def say(self, text: str) -> None:
        """Write one line."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def update(self, progress: Progress) -> None:
        """Write one line, if it is time for one."""
        last = self._last
        is_time = last is None or progress.seconds - last.seconds >= _LINE_SECONDS
        if is_time or progress.is_over or (last and last.owners != progress.owners):
            self._last = progress
            self.say(summary(progress))


def summary(progress: Progress) -> str:
    """Return the progress as one line."""
    parts = [
        f"{progress.effects:,} of {progress.total:,}",
        f"{progress.per_second:,.0f}/s",
        f"{progress.waiting:,} waiting",
        f"stored in p50 {milliseconds(progress.p50_ms)} p99 {milliseconds(progress.p99_ms)}",
        f"[{text_of_map(progress.owners)}]",
        *(_share(node, share, progress.states[node]) for node, share in progress.shares.items()),
    ]
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    return "  ".join(parts)


def _share(node: str, share: float, state: str) -> str:
    return f"{node} {share:.0%} ({state})" if state else f"{node} {share:.0%}"


def seconds(value: float | None) -> str:
    """Return a duration for people, given in seconds."""
    return "-" if value is None else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """Return a duration for people, given in milliseconds."""
    return "-" if value is None else f"{value:.2f} ms"


def display_for(stream: TextIO) -> Display:
    """Return the best display for a stream.

    That is rich where it is installed and the stream is a terminal, else lines.
    """
    if stream.isatty():
        try:
            from catga_bus.demo.rich_display import RichDisplay
        except ImportError:
            pass
        else:
            return RichDisplay(stream)
    return PlainDisplay(stream)
