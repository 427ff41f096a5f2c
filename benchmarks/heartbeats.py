"""Heartbeats: what it costs a node, and the server, that nodes know each other, by how many there are.

The node that is watched is a real one in a process of its own. The others beat from one process with the code of a
real node, and each hears what a real one would hear.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.options import positive_integers, positive_number
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress, Report, figure, markdown_table
from benchmarks.server import Server
from benchmarks.sides.listener import Reading
from benchmarks.statistics import Target
from catga_bus.cluster.directory import MAX_BEATS_PER_SECOND

HELP = "what a node and the server pay for the heartbeats of 3, 50 and 200 nodes"

WANTED_HEARD = Target(1.1 * MAX_BEATS_PER_SECOND, higher_is_better=False)
"""Beats per second that a node may hear: the documented bound, and what answers to probes may add to it."""

_SETTLE_SECONDS = 1.5
_CALL_SECONDS = 30.0
# Connecting and starting a node takes a few milliseconds each; a busy machine several times as long.
_SEEN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen in one cluster."""

    nodes: int
    seconds: float
    interval: float
    """Seconds between the beats of a node, as it was in the end."""

    heard_per_second: float
    loop_cpu_percent: float
    beats_cpu_percent: float
    server_cpu_percent: float | None
    """None where the server is not ours to look at."""

    probes: int
    deaths: int
    """Of nodes that lived all the time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--nodes",
        type=positive_integers,
        help="how many nodes there are (default: 1,3,50,200; quick: 1,3)",
        metavar="N,N,...",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="how long to watch each (default: 15; quick: 1)",
        metavar="S",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Watch one node in clusters of several sizes."""
    sizes = options.nodes if options.nodes is not None else (1, 3) if options.quick else (1, 3, 50, 200)
    seconds = options.seconds if options.seconds is not None else 1.0 if options.quick else 15.0
    progress.expect(len(sizes))
    samples = []
    for size in sizes:
        progress.step(f"{size} nodes, {seconds:g} s")
        samples.append(_watch(size, seconds, server))
    raw = {"settings": {"nodes": sizes, "seconds": seconds}, "samples": [asdict(one) for one in samples]}
    return Report(_markdown(samples), raw, sound=not any(one.deaths for one in samples))


def _watch(size: int, seconds: float, server: Server) -> Sample:
    where = {"url": server.url, "namespace": f"{server.namespace}-{size}"}
    with ExitStack() as stack:
        node = stack.enter_context(RoleProcess("benchmarks.sides.listener:Listener", **where))
        if size > 1:
            crowd: dict[str, Any] = {**where, "nodes": size - 1}
            stack.enter_context(RoleProcess("benchmarks.sides.crowd:Crowd", **crowd))
        if not node.call("see", timeout=_SEEN_SECONDS + _CALL_SECONDS, nodes=size, within=_SEEN_SECONDS):
            raise BenchmarkError(f"the node did not see all {size} nodes online within {_SEEN_SECONDS:g} s")
        time.sleep(_SETTLE_SECONDS)
        before, server_before = node.call("read", timeout=_CALL_SECONDS), server.cpu_seconds()
        time.sleep(seconds)
        after, server_after = node.call("read", timeout=_CALL_SECONDS), server.cpu_seconds()
    of_server = None if server_before is None or server_after is None else server_after - server_before
    return _sample(before, after, of_server)


def _sample(before: Reading, after: Reading, server_seconds: float | None) -> Sample:
    lasted = after.at - before.at
    return Sample(
        nodes=after.known,
        seconds=lasted,
        interval=after.interval,
        heard_per_second=(after.beats_heard - before.beats_heard) / lasted,
        loop_cpu_percent=(after.loop_cpu_seconds - before.loop_cpu_seconds) / lasted * 100,
        beats_cpu_percent=(after.beats_cpu_seconds - before.beats_cpu_seconds) / lasted * 100,
        server_cpu_percent=None if server_seconds is None else server_seconds / lasted * 100,
        probes=after.probes - before.probes,
        deaths=after.deaths,
    )


def _markdown(samples: Sequence[Sample]) -> str:
    rows = [
        [
            str(one.nodes),
            f"{one.interval:g}",
            figure(one.heard_per_second),
            figure(one.loop_cpu_percent),
            figure(one.beats_cpu_percent),
            "not ours" if one.server_cpu_percent is None else figure(one.server_cpu_percent),
            str(one.probes),
            str(one.deaths),
        ]
        for one in samples
    ]
    headers = ["nodes", "interval, s", "beats heard/s", "event loop, %", "beats' thread, %", "nats-server, %"]
    table = markdown_table([*headers, "probes", "false deaths"], rows)
    most = max(one.heard_per_second for one in samples)
    return (
        f"Processor time is in % of one core, for a node that has nothing else to do.\n\n{table}\n\n"
        f"Target: at most {figure(WANTED_HEARD.required)} beats heard per second: "
        f"{figure(most)}, {WANTED_HEARD.verdict(most)}."
    )
