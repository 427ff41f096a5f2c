"""`catga nodes`: who is alive, and how each of them fares."""

import asyncio
import contextlib
import os
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import click
import rich.console
from rich.live import Live
from rich.text import Text

from catga_bus.bus import Bus
from catga_bus.cli.connection import COMMAND_KEY, command_bus
from catga_bus.cli.exits import ExitCode
from catga_bus.cli.nodes_view import (
    Departures,
    NodeRow,
    Rates,
    change_object,
    change_text,
    nodes_object,
    nodes_table,
    nothing_text,
    row_of,
    silence_text,
)
from catga_bus.cli.options import debug_option, json_option, keep_quiet, namespace_option, url_option
from catga_bus.cli.output import print_json
from catga_bus.clock import Clock, monotonic
from catga_bus.cluster.records import ChangeKind, NodeInfo, NodeStatus
from catga_bus.signals import Signals

_RATE_PATIENCE = 1.0  # seconds that nodes have for the second heartbeat, from which their requests per second follow
_POLL = 0.05
_REDRAW = 0.25  # seconds; a node's figures change with its heartbeats, which come as often
_SHOW_LEFT = 10.0  # seconds that a node which left stays in the live table, for people to see it
_SILENCE = 2.0  # seconds without a heartbeat of one's own, which come four times a second, until it is said
_WIDTH = 200  # columns where there is no terminal: nothing is cut off in files and pipes


class NodesView:
    """The nodes that a bus sees, as rows.

    Nodes that are commands, this one among them, are left out unless they are asked for: they come and go with
    whoever looks.

    Args:
        bus: A started bus.
        service: Only nodes of this service; all if None.
        status: Only nodes of this status; all if None.
        commands: Whether nodes that are commands are shown.
        keep_left: Seconds for which `rows` has a node that is gone.
        clock: The clock of the bus.
    """

    def __init__(
        self,
        bus: Bus,
        service: str | None = None,
        status: str | None = None,
        *,
        commands: bool = False,
        keep_left: float = 0.0,
        clock: Clock = monotonic,
    ) -> None:
        self.service = service
        self.status = status
        self._bus = bus
        self._commands = commands
        self._clock = clock
        self._rates = Rates()
        self._departures = Departures(keep_left)

    def rows(self) -> list[NodeRow]:
        """Return one row for each node that is asked for."""
        now = self._clock()
        everyone = self._bus.nodes()
        self._rates.keep(node.id for node in everyone)
        rows = self._departures.observe([self._row(node, now) for node in everyone if self._is_asked_for(node)], now)
        return [row for row in rows if self.status in (None, row.status)]

    async def changes(self) -> AsyncIterator[tuple[str, NodeRow | None, int]]:
        """Yield what happens to the nodes that are asked for: what, the node, and how many changes were missed.

        There is no node only where changes were missed.
        """
        async for change in self._bus.watch_nodes():
            if change.node is None:
                yield str(change.kind), None, change.missed
            elif self._is_asked_for(change.node):
                row = self._row(change.node, self._clock())
                if self.status in (None, row.status):
                    yield str(change.kind), row, 0
            if change.kind in (ChangeKind.LEFT, ChangeKind.MISSED):
                self._rates.keep(node.id for node in self._bus.nodes())

    @property
    def silence(self) -> float:
        """Seconds since the bus has heard itself: for so long the rows are old."""
        return max(0.0, self._clock() - self._bus.node.last_beat)

    def _is_asked_for(self, node: NodeInfo) -> bool:
        return self.service in (None, node.service) and (self._commands or COMMAND_KEY not in node.metadata)

    def _row(self, node: NodeInfo, now: float) -> NodeRow:
        rate = self._rates.observe(node.id, node.incarnation, node.load.handled, node.last_beat)
        return row_of(node, now, rate)


_NODES_EXAMPLES = """\b
Examples:
  catga nodes                          who is alive now
  catga nodes --watch                  the same, live, until Ctrl-C
  catga nodes --service shop --json    for machines: one document
  catga nodes --watch --json           for machines: one line for each change
  catga nodes --watch --status faulted who goes silent
"""


@click.command(short_help="Show the live nodes and how they fare.", epilog=_NODES_EXAMPLES)
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C: redraw, or print each change.")
@click.option("--service", metavar="NAME", help="Only nodes of this service.")
@click.option("--status", type=click.Choice([str(status) for status in NodeStatus]), help="Only nodes of this status.")
@click.option("--all", "commands", is_flag=True, help="Also nodes that are commands, as this one is while it runs.")
@url_option
@namespace_option
@json_option
@debug_option
def nodes(
    *,
    watch: bool,
    service: str | None,
    status: str | None,
    commands: bool,
    url: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """Show every node of the namespace, clients included, as its heartbeats describe it.

    Load is messages in flight and messages taken in; stall is how long the event loop has been blocked;
    beat is the age of the last heartbeat; requests per second are counted between the last two; open
    breakers are the types and nodes that the node keeps its calls from. A narrow terminal gets fewer
    columns, --json has everything.

    A node that ended with a good-bye is gone at once; --watch tells of it. One that died before the
    command began cannot be seen by it.
    """
    if status == NodeStatus.LEFT and not watch:
        raise click.UsageError("a node that has left is in no view; --watch --status left tells when one leaves")
    keep_quiet()
    bus = command_bus("nodes", url, namespace)
    is_live = watch and not as_json and sys.stdout.isatty()
    view = NodesView(bus, service, status, commands=commands, keep_left=_SHOW_LEFT if is_live else 0.0)

    async def show() -> None:
        if is_live:
            await _show_live(view, namespace)
        elif watch:
            await _show_changes(view, as_json=as_json)
        else:
            await _show_once(view, namespace, as_json=as_json)

    if not asyncio.run(look(bus, show)) and not watch:
        raise click.Abort
    return ExitCode.OK


async def look(bus: Bus, show: Callable[[], Awaitable[None]]) -> bool:
    """Start the bus and show the nodes; return whether that came to its end before SIGTERM or Ctrl-C did.

    Raises:
        BrokenPipeError: Nobody reads any more.
    """

    async def run() -> None:
        async with bus:
            await show()

    def end(_: str = "") -> None:
        looking.cancel()

    looking = asyncio.create_task(run())
    with Signals(end), _noticing_the_reader(end) as is_read:
        await asyncio.wait({looking})
    if not is_read():
        raise BrokenPipeError
    if looking.cancelled():
        return False
    looking.result()
    return True


@contextlib.contextmanager
def _noticing_the_reader(on_gone: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Notice when the reader of a pipe is gone, as in `catga nodes --watch | head -1`: the next change may be far off.

    Args:
        on_gone: Called then.

    Yields:
        Returns whether there is a reader still.
    """
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()

    def notice() -> None:
        loop.remove_reader(number)  # it stays so
        gone.set()
        on_gone()

    number = _pipe()
    if number >= 0:
        loop.add_reader(number, notice)  # a pipe's own end never becomes readable but by that
    try:
        yield lambda: not gone.is_set()
    finally:
        if number >= 0:
            loop.remove_reader(number)


def _pipe() -> int:
    """Return the file descriptor of stdout if it is a pipe, else -1."""
    with contextlib.suppress(OSError, ValueError):  # it is closed, or not a file
        number = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            return number
    return -1


async def _show_once(view: NodesView, namespace: str, *, as_json: bool) -> None:
    rows = await settled(view)
    if as_json:
        print_json(nodes_object(rows))
    elif rows:
        console = _console()
        console.print(nodes_table(rows, console.width))
    else:
        click.echo(nothing_text(namespace, view.service, view.status))


async def settled(view: NodesView) -> list[NodeRow]:
    """Return the rows once each online node has a rate, or after `_RATE_PATIENCE` seconds."""
    rows = view.rows()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_RATE_PATIENCE):
            while any(row.status == NodeStatus.ONLINE and row.requests_per_second is None for row in rows):
                await asyncio.sleep(_POLL)
                rows = view.rows()
    return rows


async def _show_changes(view: NodesView, *, as_json: bool) -> None:
    async for change in view.changes():
        if as_json:
            print_json(change_object(*change))
        else:
            click.echo(change_text(*change))
        sys.stdout.flush()


async def _show_live(view: NodesView, namespace: str) -> None:
    nothing = nothing_text(namespace, view.service, view.status)
    # Redrawn here alone: a thread of rich's own would draw while the event loop is at work.
    with Live(console=_console(), auto_refresh=False) as live:
        while True:
            rows = view.rows()
            note = silence_text(view.silence) if view.silence > _SILENCE else None
            text = Text(nothing if note is None else f"{nothing}\n{note}")
            live.update(nodes_table(rows, live.console.width, note) if rows else text, refresh=True)
            await asyncio.sleep(_REDRAW)


def _console() -> rich.console.Console:
    return rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)
