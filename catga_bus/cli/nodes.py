"""`catga nodes`: who is alive, and how each of them fares."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import click
import rich.console
from rich.live import Live
from rich.text import Text

from catga_bus.bus import Bus
from catga_bus.cli.connection import CONNECT_TIMEOUT
from catga_bus.cli.exits import ExitCode
from catga_bus.cli.nodes_view import (
    NodeRow,
    Rates,
    change_object,
    change_text,
    nodes_object,
    nodes_table,
    nothing_text,
)
from catga_bus.cli.options import debug_option, json_option, keep_quiet, namespace_option, url_option
from catga_bus.cli.output import print_json
from catga_bus.clock import Clock, monotonic

_SERVICE = "catga-cli"
_STATUSES = ("online", "suspect", "faulted", "draining", "left")
_RATE_PATIENCE = 1.0  # seconds that nodes have for the second heartbeat, from which their requests per second follow
_POLL = 0.05
_REDRAW = 0.25  # seconds; a node's figures change with its heartbeats, which come as often
_WIDTH = 200  # columns where there is no terminal: nothing is cut off in files and pipes


class NodesView:
    """The nodes that a bus sees, as rows.

    Args:
        bus: A started bus.
        service: Only nodes of this service; all if None.
        status: Only nodes of this status; all if None.
        breakers_to: Returns the open breakers of this bus that keep calls from a node.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        bus: Any,
        service: str | None = None,
        status: str | None = None,
        *,
        breakers_to: Callable[[str], Iterable[str]] = lambda _: (),
        clock: Clock = monotonic,
    ) -> None:
        self.service = service
        self.status = status
        self._bus = bus
        self._breakers_to = breakers_to
        self._clock = clock
        self._rates = Rates()

    def rows(self) -> list[NodeRow]:
        """Return one row for each node that is asked for."""
        now = self._clock()
        everyone = self._bus.nodes(service=self.service)
        self._rates.keep(node.id for node in everyone)
        rows = [self._row(node, now) for node in everyone]
        return [row for row in rows if self.status in (None, row.status)]

    async def changes(self) -> AsyncIterator[tuple[str, NodeRow | None, int]]:
        """Yield what happens to the nodes that are asked for: what, the node, and how many changes were missed.

        There is no node only where changes were missed.
        """
        async for change in self._bus.watch_nodes():
            if change.node is None:
                yield str(change.kind), None, change.missed
                continue
            row = self._row(change.node, self._clock())
            if self.service in (None, row.service) and self.status in (None, row.status):
                yield str(change.kind), row, 0

    def _row(self, node: Any, now: float) -> NodeRow:
        return NodeRow(
            status=str(node.status),
            service=node.service,
            node=node.id,
            incarnation=node.incarnation,
            is_ready=node.is_ready,
            version=node.version,
            zone=node.zone,
            in_flight=node.load.in_flight,
            intake=node.load.intake,
            cpu=node.load.cpu,
            memory_bytes=node.load.memory_bytes,
            stall=node.stall,
            beat_age=max(0.0, now - node.last_beat),
            requests_per_second=self._rates.observe(node.id, node.incarnation, node.load.handled, node.last_beat),
            breakers=tuple(sorted({*node.breakers, *self._breakers_to(node.id)})),
        )


_NODES_EXAMPLES = """\b
Examples:
  catga nodes                          who is alive now
  catga nodes --watch                  the same, live, until Ctrl-C
  catga nodes --service shop --json    for machines: one document
  catga nodes --watch --json           for machines: one line for each change
  catga nodes --status faulted         who has gone silent
"""


@click.command(short_help="Show the live nodes and how they fare.", epilog=_NODES_EXAMPLES)
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C: redraw, or print each change.")
@click.option("--service", metavar="NAME", help="Only nodes of this service.")
@click.option("--status", type=click.Choice(_STATUSES), help="Only nodes of this status.")
@url_option
@namespace_option
@json_option
@debug_option
def nodes(
    *, watch: bool, service: str | None, status: str | None, url: str | None, namespace: str, as_json: bool
) -> int:
    """Show every node of the namespace as its heartbeats describe it.

    Load is messages in flight and messages taken in; stall is how long the event loop has been blocked;
    beat is the age of the last heartbeat; requests per second are counted between the last two. Open
    breakers are those of the node, and those that keep calls from here from it. A narrow terminal gets
    fewer columns, --json has everything.
    """
    keep_quiet()
    bus = Bus(_SERVICE, url=url, namespace=namespace, connect_timeout=CONNECT_TIMEOUT)
    look = _show_changes if watch else _show_once
    asyncio.run(_look(bus, lambda: look(NodesView(bus, service, status), namespace, as_json=as_json)))
    return ExitCode.OK


async def _look(bus: Bus, show: Callable[[], Any]) -> None:
    """Start the bus and show the nodes until that is done, or until SIGTERM or Ctrl-C."""
    async with bus:
        showing = asyncio.ensure_future(show())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, showing.cancel)
        await asyncio.wait([showing])
    if not showing.cancelled():
        showing.result()


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
            while any(row.status == "online" and row.requests_per_second is None for row in rows):
                await asyncio.sleep(_POLL)
                rows = view.rows()
    return rows


async def _show_changes(view: NodesView, namespace: str, *, as_json: bool) -> None:
    if not as_json and sys.stdout.isatty():
        await _show_live(view, namespace)
        return
    async for change in view.changes():
        if as_json:
            print_json(change_object(*change))
        else:
            click.echo(change_text(*change))
        sys.stdout.flush()


async def _show_live(view: NodesView, namespace: str) -> None:
    nothing = Text(nothing_text(namespace, view.service, view.status))
    # Redrawn here alone: a thread of rich's own would draw while the event loop is at work.
    with Live(console=_console(), auto_refresh=False) as live:
        while True:
            rows = view.rows()
            live.update(nodes_table(rows, live.console.width) if rows else nothing, refresh=True)
            await asyncio.sleep(_REDRAW)


def _console() -> rich.console.Console:
    return rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)
