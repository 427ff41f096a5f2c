"""`python -m catga_bus.demo`: the demo without the command line's extra."""

import argparse
import sys
from pathlib import Path

from catga_bus.demo.app import run_demo
from catga_bus.demo.data import SHIPPED


def main() -> int:
    """Run the demo as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m catga_bus.demo",
        description="Replay a month of flights through the bus as commands; kill one node, freeze another and roll "
        "a third meanwhile, and check what came of it. "
        "Exit code 0: every flight has its effect, once and in order; 1: not so; "
        "2: bad arguments or file; 3: server or nodes broken; 130: interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, help=f"file of flights, .csv or .csv.gz (default: {SHIPPED.name})")
    parser.add_argument(
        "--rate",
        type=float,
        default=2_000.0,
        help="flights per second; 0 = flat out (default: 2000)",
    )
    parser.add_argument("--nodes", type=int, default=3, help="node processes (default: 3)")
    parser.add_argument("--url", help="a running server (default: start a private one)")
    parser.add_argument("--json", action="store_true", help="report as JSON, show nothing else")
    parser.add_argument("--in-flight", type=int, default=256, help="most flights not known to be stored (default: 256)")
    parser.add_argument("--keep", type=Path, help="keep logs and node output in this directory")
    parser.add_argument(
        "--faults",
        action=argparse.BooleanOptionalAction,
        help="kill, freeze and roll nodes meanwhile (default: yes, unless flat out or with one node)",
    )
    options = parser.parse_args()
    return run_demo(
        data=options.data,
        rate=options.rate,
        nodes=options.nodes,
        url=options.url,
        as_json=options.json,
        in_flight=options.in_flight,
        keep=options.keep,
        faults=options.faults,
    )


if __name__ == "__main__":
    sys.exit(main())
