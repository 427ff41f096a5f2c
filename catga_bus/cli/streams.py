"""`catga streams`: the streams of a namespace, what lies in them, and making those of a service."""

import asyncio

import click

from catga_bus.cli.exits import ExitCode
from catga_bus.cli.options import debug_option, json_option, keep_quiet, namespace_option, url_option
from catga_bus.cli.output import print_json, table_console
from catga_bus.cli.run import load_bus
from catga_bus.cli.stored import open_jetstream, with_jetstream
from catga_bus.cli.streams_view import StreamRow, kind_of, ordered, row_of, streams_table
from catga_bus.clock import monotonic
from catga_bus.durability.streams.plans import Change
from catga_bus.durability.streams.streams import Streams
from catga_bus.errors import ConfigurationError
from catga_bus.transport.jetstream import JetStream
from catga_bus.wire import Names

_EXAMPLES = """\b
Examples:
  catga streams                     what is stored, and within which limits
  catga streams apply shop.app:bus  make or change the streams of a service as its bus configures them
  catga streams --json | jq '.streams[] | select(.troubles != [])'
"""


@click.group(
    invoke_without_command=True, short_help="Show what is stored, and make a service's streams.", epilog=_EXAMPLES
)
@click.pass_context
@url_option
@namespace_option
@json_option
@debug_option
def streams(context: click.Context, *, url: str | None, namespace: str, as_json: bool) -> int:
    """Show every stream of the namespace, what lies in it and within which limits.

    There are the commands and the dead letters of each service, the log of events, and the buckets of
    owners and routes. P is the number of partitions; limits say what happens to what no longer fits.
    """
    if context.invoked_subcommand is not None:
        return ExitCode.OK

    async def look(jetstream: JetStream, names: Names) -> None:
        show_streams(await rows_of(jetstream, names), namespace, as_json=as_json)

    with_jetstream(look, url, namespace, "catga/streams")
    return ExitCode.OK


async def rows_of(jetstream: JetStream, names: Names) -> list[StreamRow]:
    """Return one row for each stream of a namespace."""
    rows = []
    for name in await jetstream.stream_names():
        if kind_of(name, names) is None:
            continue
        info = await jetstream.stream(name)
        row = row_of(info, names) if info is not None else None
        if row is not None:
            rows.append(row)
    return ordered(rows)


def show_streams(rows: list[StreamRow], namespace: str, *, as_json: bool) -> None:
    """Print streams."""
    if as_json:
        print_json({"streams": rows})
    elif rows:
        table_console().print(streams_table(rows))
    else:
        click.echo(f"nothing is stored in namespace {namespace}: a node makes its streams when it starts")


_APPLY_EXAMPLES = """\b
Examples:
  catga streams apply shop.app:bus --dry-run
  catga streams apply shop.app:bus --url nats://deploy:...@nats-1
"""


@streams.command(short_help="Make or change a service's streams.", epilog=_APPLY_EXAMPLES)
@click.argument("target", metavar="MODULE:BUS")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@url_option
@json_option
@debug_option
def apply(*, target: str, dry_run: bool, url: str | None, as_json: bool) -> int:
    """Make the streams of a service that are missing, and change those that differ from its bus.

    A bus never changes a stream by itself. What cannot be changed, as the number of partitions, is an
    error, and then nothing is. With manage_streams="verify" nodes need not be permitted to make streams:
    this command does it as a user who may.
    """
    keep_quiet()
    bus = load_bus(target)
    bus.override(url=url)
    handles = any(entry.options.durable for entry in (*bus.registry.commands(), *bus.registry.events()))
    if not handles:
        raise ConfigurationError(f"{target} handles no commands and no durable events: it needs no streams")

    async def change() -> list[Change]:
        address, space = ",".join(bus.urls), bus.config.namespace
        async with open_jetstream(address, space, "catga/streams") as (jetstream, names, denied, _):
            made = Streams(jetstream, names, bus.service, bus.config, monotonic, denied=denied)
            return await (made.plan_changes() if dry_run else made.apply())

    changes = asyncio.run(change())
    show_changes(changes, dry_run=dry_run, as_json=as_json)
    return ExitCode.FAILED if any(change.kind == "refuse" for change in changes) else ExitCode.OK


_DONE = {"create": "created", "update": "changed", "keep": "kept"}


def show_changes(changes: list[Change], *, dry_run: bool, as_json: bool) -> None:
    """Print what was done about each stream, or would be."""
    if as_json:
        print_json({"dry_run": dry_run, "changes": changes})
        return
    for change in changes:
        verb = change.kind if dry_run else _DONE[change.kind]
        click.echo(f"{verb:<8} {change.stream}")
        for one in change.differences:
            click.echo(f"{'':<8} {one.field}: {one.there!r} -> {one.wanted!r}")
