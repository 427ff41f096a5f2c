"""`catga demo`: the flight desk."""

from pathlib import Path

import click

from catga_bus.cli.options import debug_option, json_option

_DEMO_EXAMPLES = """\b
Examples:
  catga demo                     2,000 requests a second, with a live display
  catga demo --no-faults         the same, and nobody is killed or frozen
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
    help="Requests per second; 0 sends as fast as answers come.",
)
@click.option("--nodes", type=int, default=3, show_default=True, help="How many node processes.")
@click.option("--url", metavar="URL", help="A running server. [default: a private one]")
@click.option(
    "--in-flight",
    type=int,
    default=256,
    show_default=True,
    help="Most requests that wait for an answer.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the execution log and the output of the nodes in this directory.",
)
@click.option(
    "--faults/--no-faults",
    default=None,
    help="Kill and replace one node, and freeze another for 3 seconds, while the replay runs. "
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

    Meanwhile one node is killed and replaced and another one frozen for three seconds, unless --no-faults
    is given. Every execution is logged, and the totals of that log are compared with those of the file:
    exit code 0 only if they are equal, every request was answered, and every fault was real and noticed.
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
