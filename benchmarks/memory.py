"""Memory: whether a node and a caller go on growing while they do millions of requests."""

import argparse

from benchmarks.options import positive_integer
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress, Report, figure, markdown_table, mebibytes
from benchmarks.server import Server
from benchmarks.statistics import Target, growth_percent

HELP = "memory of a node and of a caller from one to five million requests"

WANTED_GROWTH = Target(5.0, higher_is_better=False)
"""Percent that a node may grow from the first fifth of the requests to the last."""

_STEPS = 5
_IN_FLIGHT = 256
# A million requests at 1,000 a second: a machine that is slower than this does not need to know.
_PATIENCE_SECONDS = 1000.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--requests",
        type=positive_integer,
        help="how many in all, in five equal parts (default: 5,000,000; quick: 50,000)",
        metavar="N",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Send the requests in five parts and weigh both processes after each."""
    total = options.requests if options.requests is not None else 50_000 if options.quick else 5_000_000
    part = max(total // _STEPS, _IN_FLIGHT)
    progress.expect(_STEPS)
    where = {"url": server.url, "namespace": server.namespace}
    samples = []
    with (
        RoleProcess("benchmarks.sides.catga:Worker", **where) as node,
        RoleProcess("benchmarks.sides.catga:Client", **where) as caller,
    ):
        for step in range(1, _STEPS + 1):
            progress.step(f"requests {part * (step - 1):,} to {part * step:,}")
            caller.call("measure", timeout=_PATIENCE_SECONDS, in_flight=_IN_FLIGHT, requests=part)
            samples.append(
                {
                    "requests": part * step,
                    "node_rss_bytes": node.rss_bytes(),
                    "caller_rss_bytes": caller.rss_bytes(),
                }
            )
    return Report(_markdown(samples), {"settings": {"in_flight": _IN_FLIGHT}, "samples": samples})


def _markdown(samples: list[dict[str, int]]) -> str:
    rows = [
        [
            f"{sample['requests']:,}",
            mebibytes(sample["node_rss_bytes"]),
            mebibytes(sample["caller_rss_bytes"]),
        ]
        for sample in samples
    ]
    node, caller = (
        growth_percent(samples[0][name], samples[-1][name]) for name in ("node_rss_bytes", "caller_rss_bytes")
    )
    table = markdown_table(["requests so far", "node, MiB", "caller, MiB"], rows)
    return (
        f"{table}\n\n"
        f"Growth from {samples[0]['requests']:,} to {samples[-1]['requests']:,} requests: "
        f"node {figure(node)} %, caller {figure(caller)} %. "
        f"Target for the node: at most {figure(WANTED_GROWTH.required)} %: "
        f"{WANTED_GROWTH.verdict(node)}."
    )
