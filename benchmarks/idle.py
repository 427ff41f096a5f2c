"""Idle: what a node costs that nobody asks anything, beside a process with nothing but nats-py."""

import argparse
import time
from typing import Any

from benchmarks.options import positive_number
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress, Report, figure, markdown_table
from benchmarks.server import Server
from benchmarks.statistics import Target

HELP = "processor time and memory of a node that has nothing to do"

WANTED_CPU_PERCENT = Target(1.0, higher_is_better=False)
WANTED_RSS_MB = Target(60.0, higher_is_better=False)

_PROCESSES = {
    "node of catga_bus": "benchmarks.sides.catga:Worker",
    "bare nats-py, for comparison": "benchmarks.sides.bare:Worker",
}
# What a start leaves behind (garbage to collect, first pings) is over by then.
_SETTLE_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="how long to watch (default: 10; quick: 2)",
        metavar="S",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Watch each process alone."""
    seconds = options.seconds if options.seconds is not None else 2.0 if options.quick else 10.0
    progress.expect(len(_PROCESSES))
    samples = []
    for title, role in _PROCESSES.items():
        progress.step(f"{title}, {seconds:g} s")
        samples.append({"process": title, **_watch(role, seconds, server)})
    return Report(_markdown(samples), {"settings": {"seconds": seconds}, "samples": samples})


def _watch(role: str, seconds: float, server: Server) -> dict[str, Any]:
    with RoleProcess(role, url=server.url, namespace=server.namespace) as process:
        time.sleep(min(_SETTLE_SECONDS, seconds))
        before, started = process.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        used, lasted = process.cpu_seconds() - before, time.monotonic() - started
        return {"cpu_percent": used / lasted * 100, "rss_bytes": process.rss_bytes()}


def _markdown(samples: list[dict[str, Any]]) -> str:
    rows = [[sample["process"], figure(sample["cpu_percent"]), figure(sample["rss_bytes"] / 1e6)] for sample in samples]
    node = samples[0]
    table = markdown_table(["process", "% of a core", "resident, MB"], rows)
    return (
        f"{table}\n\n"
        f"Targets for the node: at most {figure(WANTED_CPU_PERCENT.required)} % of a core: "
        f"{WANTED_CPU_PERCENT.verdict(node['cpu_percent'])}; "
        f"at most {figure(WANTED_RSS_MB.required)} MB: "
        f"{WANTED_RSS_MB.verdict(node['rss_bytes'] / 1e6)}."
    )
