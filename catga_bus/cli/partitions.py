"""`catga partitions`: who owns each partition, how much waits in it, and how they move."""

import asyncio
import sys
from collections.abc import Sequence

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from catga_bus.bus import Bus
from catga_bus.cli.connection import command_bus
from catga_bus.cli.exits import ExitCode
from catga_bus.cli.nodes import look
from catga_bus.cli.nodes_view import visible
from catga_bus.cli.options import debug_option, json_option, keep_quiet, namespace_option, url_option
from catga_bus.cli.output import print_json, table_console
from catga_bus.cli.partition_facts import PartitionFacts
from catga_bus.cli.partitions_view import (
    PartitionRow,
    change_text,
    changes_between,
    owners_of,
    owners_table,
    partitions_table,
    summary_text,
)
from catga_bus.cli.stored import open_jetstream
from catga_bus.clock import utc_now
from catga_bus.errors import ConfigurationError
from catga_bus.wire import Names, token

_LOOK_EVERY = 0.5
"""Seconds between two looks: a look is one or two questions for each partition."""

_FRAME = 3  # lines of the screen that are not partitions: header, summary, cursor

_EXAMPLES = """\b
Examples:
  catga partitions                       who owns what, and what waits
  catga partitions --watch               the same, live, until Ctrl-C
  catga partitions --owners              one line for each owner
  catga partitions --service shop --json
  catga partitions --watch --json        one line for each move
"""


@click.command(short_help="Show who owns each partition, and what waits.", epilog=_EXAMPLES)
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C: redraw, or print each move.")
@click.option("--service", metavar="NAME", help="Only partitions of this service.")
@click.option("--owners", is_flag=True, help="One line for each owner.")
@url_option
@namespace_option
@json_option
@debug_option
def partitions(
    *, watch: bool, service: str | None, owners: bool, url: str | None, namespace: str, as_json: bool
) -> int:
    """Show every partition: of the work queue of each service, and of its position in the log of events.

    Pending is records that wait, those in flight included; a record holds up to 256 messages. Oldest is
    how long the first of them has waited. The epoch rises with every claim. Moves are counted while
    --watch runs; a terminal that is too low for all partitions gets one line for each owner.
    """
    keep_quiet()
    bus = command_bus("partitions", url, namespace)

    async def show() -> None:
        async with open_jetstream(url, namespace, "catga/partitions") as (jetstream, names, *_):
            facts = PartitionFacts(jetstream, names, "" if service is None else token(service))
            if watch and (as_json or not sys.stdout.isatty()):
                await _print_moves(facts, bus, as_json=as_json)
            elif watch:
                await _draw(facts, bus, owners=owners)
            else:
                show_partitions(
                    await facts.rows(bus.nodes(), utc_now().timestamp()), names, service, owners=owners, as_json=as_json
                )

    if not asyncio.run(look(bus, show)) and not watch:
        raise click.Abort
    return ExitCode.OK


def show_partitions(
    rows: Sequence[PartitionRow], names: Names, service: str | None, *, owners: bool, as_json: bool
) -> None:
    """Print partitions, or their owners.

    Raises:
        ConfigurationError: There are none of the service.
    """
    if service is not None and not rows:
        raise ConfigurationError(
            f"service {service!r} has no partitions: there is no stream {names.command_stream(service)}"
        )
    if as_json:
        print_json({"owners": owners_of(rows)} if owners else {"partitions": rows})
    elif rows:
        table_console().print(owners_table(rows) if owners else partitions_table(rows))
        click.echo(summary_text(rows))
    else:
        click.echo(_nothing(names.namespace))


def _nothing(namespace: str) -> str:
    return f"no partitions in namespace {namespace}: no node has started that handles commands or durable events"


async def _print_moves(facts: PartitionFacts, bus: Bus, *, as_json: bool) -> None:
    before: list[PartitionRow] = []
    while True:
        rows = await facts.rows(bus.nodes(), utc_now().timestamp())
        for change in changes_between(before, rows):
            if as_json:
                print_json(change)
            else:
                click.echo(change_text(change))
        sys.stdout.flush()
        before = rows
        await asyncio.sleep(_LOOK_EVERY)


async def _draw(facts: PartitionFacts, bus: Bus, *, owners: bool) -> None:
    with Live(console=table_console(), auto_refresh=False) as live:
        while True:
            rows = await facts.rows(bus.nodes(), utc_now().timestamp())
            is_short = owners or len(rows) + _FRAME > live.console.height
            table = owners_table(rows) if is_short else partitions_table(rows)
            shown = Group(table, Text(visible(summary_text(rows)))) if rows else Text(_nothing("this one"))
            live.update(shown, refresh=True)
            await asyncio.sleep(_LOOK_EVERY)
