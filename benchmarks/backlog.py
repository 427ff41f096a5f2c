"""Backlog: a node that starts in front of a million stored commands, and works them off."""

import argparse
import asyncio
import time
from dataclasses import asdict

from benchmarks.options import positive_integer
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress, Report, figure, markdown_table
from benchmarks.server import Server
from benchmarks.sides.backlog import Started
from benchmarks.sides.commands import PARTITIONS
from benchmarks.sides.stores import wait_empty
from benchmarks.statistics import Target

HELP = "start and memory of a node in front of a million stored commands"

WANTED_START = Target(2.0, higher_is_better=False)
"""Seconds until the first command is handled."""

WANTED_PEAK_MB = Target(150.0, higher_is_better=False)

_IN_FLIGHT = 4_096
_PATIENCE_SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--commands", type=positive_integer, help="how many wait (default: 1,000,000; quick: 10,000)", metavar="N"
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Store the commands while no node is there, start one, and watch it until all are handled."""
    total = options.commands if options.commands is not None else 10_000 if options.quick else 1_000_000
    where = {"url": server.url, "namespace": server.namespace}
    progress.expect(3)
    progress.step(f"{total:,} commands are stored")
    away = RoleProcess("benchmarks.sides.commands:Worker", **where, partitions=PARTITIONS, is_away=True)
    with away, RoleProcess("benchmarks.sides.commands:Client", **where, how="enqueue") as client:
        client.call("measure", timeout=_PATIENCE_SECONDS, in_flight=_IN_FLIGHT, requests=total)
    with RoleProcess("benchmarks.sides.backlog:Node", **where) as node:
        idle = node.rss_bytes()
        progress.step("a node starts")
        began = time.monotonic()
        started: Started = node.call("begin", timeout=_PATIENCE_SECONDS)
        progress.step("it works them off")
        asyncio.run(wait_empty(server.url, f"{server.namespace}-cmd-bench"))
        seconds = time.monotonic() - began
        peak = node.peak_rss_bytes()
    rows = [
        ["until its start returned, s", figure(started.seconds), ""],
        [
            "until the first command was handled, s",
            figure(started.first_handled_seconds),
            f"at most {figure(WANTED_START.required)}: {WANTED_START.verdict(started.first_handled_seconds)}",
        ],
        [
            "most memory resident until all were handled, MB",
            figure(peak / 1e6),
            f"at most {figure(WANTED_PEAK_MB.required)}: {WANTED_PEAK_MB.verdict(peak / 1e6)}",
        ],
        ["memory resident before the start, MB", figure(idle / 1e6), ""],
        ["commands handled per second, start included", figure(total / seconds), ""],
    ]
    text = markdown_table([f"a node in front of {total:,} stored commands", "measured", "target"], rows)
    raw = {
        "settings": {"commands": total, "partitions": PARTITIONS},
        **asdict(started),
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "rss_bytes_before_start": idle,
    }
    return Report(text, raw)
