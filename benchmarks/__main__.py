"""The command line: `python -m benchmarks requests`, or another name; `--help` lists them.

Exit codes: 0 measured, whatever the numbers; 1 the run broke off, or something happened that must
not, such as a caller without an answer; 2 wrong options, or no server.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    backlog,
    commands,
    events,
    failover,
    heartbeats,
    hot_path,
    idle,
    memory,
    overload,
    partitions,
    requests,
    takeover,
)
from benchmarks.errors import BenchmarkError, ServerUnreachableError, UsageError
from benchmarks.machine import describe_machine, machine_line
from benchmarks.reporting import make_progress, result_file, utc_now, write_json
from benchmarks.server import open_server

_BENCHMARKS = {
    "requests": requests,
    "memory": memory,
    "idle": idle,
    "overload": overload,
    "failover": failover,
    "heartbeats": heartbeats,
    "hot-path": hot_path,
    "partitions": partitions,
    "commands": commands,
    "events": events,
    "takeover": takeover,
    "backlog": backlog,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (UsageError, ServerUnreachableError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except BenchmarkError as error:
        print(f"benchmarks: broke off: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    name = options.benchmark
    with open_server(options.url) as server:
        machine = describe_machine(server.version)
        with make_progress() as progress:
            report = _BENCHMARKS[name].run(options, server, progress)
    print(f"{report.markdown}\n\n{machine_line(machine)}")
    now = utc_now()
    # A quick run proves that everything works; its numbers are not worth keeping.
    path = options.json or (None if options.quick else result_file(name, now))
    if path is not None:
        write_json(path, name, machine, report, now)
        print(f"\nraw data: {path}", file=sys.stderr)
    return 0 if report.sound else 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url",
        help="the NATS server to use, such as nats://127.0.0.1:4222 (default: a private one, started for the run)",
    )
    common.add_argument("--quick", action="store_true", help="a short run: to see that it works")
    common.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the raw data goes (default: benchmarks/results/, unless --quick)",
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure catga_bus, and what it is compared with."
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in _BENCHMARKS.items():
        command = benchmarks.add_parser(name, parents=[common], help=benchmark.HELP, description=benchmark.__doc__)
        benchmark.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
