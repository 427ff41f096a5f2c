"""`catga demo`: the flight desk."""

from pathlib import Path

import click

from catga_bus.cli.options import debug_option, json_option

_DEMO_EXAMPLES = """\b
Examples:
  catga demo                     2,000 flights a second, with a live display
  catga demo --no-faults         the same, and nobody is killed, frozen or rolled
  catga demo --rate 0            as fast as this machine goes, without faults
  catga demo --nodes 5 --json    for machines
  catga demo --data day.csv.gz   any file of that shape
"""


@click.command(short_help="Replay real flights through the bus and check the result.", epilog=_DEMO_EXAMPLES)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file of flights, .csv or .csv.gz. [default: the one that comes with the package]",
)
@click.option(
    "--rate",
    type=float,
    default=2_000.0,
    show_default=True,
    help="Flights per second; 0 hands them in as fast as they are stored.",
)
@click.option("--nodes", type=int, default=3, show_default=True, help="How many node processes.")
@click.option("--url", metavar="URL", help="A running server. [default: a private one]")
@click.option(
    "--in-flight",
    type=int,
    default=256,
    show_default=True,
    help="Most flights handed in and not known to be stored.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the logs of effects and executions and the output of the nodes in this directory.",
)
@click.option(
    "--faults/--no-faults",
    default=None,
    help="Kill and replace one node, freeze another for 3 seconds, and roll one, while the replay runs. "
    "[default: --faults, unless flat out or with one node]",
)
@json_option
@debug_option
def demo(
    *,
    data: Path | None,
    rate: float,
    nodes: int,
    url: str | None,
    in_flight: int,
    keep: Path | None,
    faults: bool | None,
    as_json: bool,
) -> int:
    """Replay the 27,004 flights that left New York in January 2013 through a service of three nodes.

    Each flight is a command, and those of one aircraft are handled in the order of the schedule. Meanwhile one
    node is killed and replaced, another one frozen for three seconds and one rolled, as a deployment does, unless
    --no-faults is given. Every effect is a row in a database, written in the transaction of its command, and the
    verdict is computed from these rows: exit code 0 only if none is lost, doubled or out of order, every late
    flight is on the departures board, and every fault was real and noticed.
    """
    from catga_bus.demo.app import run_demo  # here: what the demo needs would slow every command

    return run_demo(
        data=data,
        rate=rate,
        nodes=nodes,
        url=url,
        as_json=as_json,
        in_flight=in_flight,
        keep=keep,
        faults=faults,
    )
