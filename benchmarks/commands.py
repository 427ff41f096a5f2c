"""Commands: durable, in order per key, beside what nats-py and FastStream do without order.

Three comparisons, each with its reference in the same rounds: with the result, beside a bare request that is
stored nowhere; accepted, beside `publish_async`; and stored, handled and acknowledged, beside a pull consumer. With
`--replicas` the streams lie on three servers of this machine, and with `--synced` each writes through to its disk.
How the sides take turns is in `rounds`.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from benchmarks.options import positive_integer, positive_integers, positive_number
from benchmarks.reporting import Progress, Report, figure, figure_with_spread, markdown_table
from benchmarks.rounds import Measurement, Rounds, Side, measure_rounds
from benchmarks.server import Server, open_cluster
from benchmarks.sides.commands import PARTITIONS
from benchmarks.statistics import Target, ratio_by_round, spread

HELP = "durable commands in order per key, beside nats-py and FastStream on JetStream"

TARGETED_IN_FLIGHT = 1_024

_COMMANDS = "benchmarks.sides.commands"
_BARE = "benchmarks.sides.bare_streams"


class Comparison(NamedTuple):
    """Sides that are measured in the same rounds."""

    title: str
    sides: Mapping[str, Side]
    """The first one is the reference; ratios are those of the others against it."""

    targets: Mapping[str, Target]
    """Of some sides, as a multiple of the reference."""


def comparisons(replicas: int) -> dict[str, Comparison]:
    """Return what is compared.

    Args:
        replicas: Servers that hold each stream.
    """

    def ours(title: str, how: str, partitions: int = PARTITIONS, workers: int = 1, *, is_away: bool = False) -> Side:
        worker = {"partitions": partitions, "stream_replicas": replicas, "is_away": is_away}
        return Side(title, _COMMANDS, worker, {"how": how}, workers=workers)

    def bare(title: str, how: str, *, is_handled: bool = False) -> Side:
        at = {"replicas": replicas}
        return Side(title, _BARE, {**at, "is_away": not is_handled}, {**at, "how": how, "is_handled": is_handled})

    result = Comparison(
        "with its result",
        {
            "request": Side("bare nats-py request, not stored", "benchmarks.sides.bare"),
            "send-16": ours("send, 16 partitions", "send"),
            "send-1": ours("send, 1 partition", "send", 1),
            "send-64": ours("send, 64 partitions", "send", 64),
            "send-16-nodes-3": ours("send, 16 partitions, 3 nodes", "send", workers=3),
        },
        {"send-16": Target(2.0, aim=5.0)},
    )
    accepted = Comparison(
        "until it is stored",
        {
            "publish-async": bare("nats-py publish_async", "publish_async"),
            "publish": bare("nats-py publish", "publish"),
            "enqueue-16": ours("enqueue, 16 partitions", "enqueue", is_away=True),
            "enqueue-1": ours("enqueue, 1 partition", "enqueue", 1, is_away=True),
            "enqueue-64": ours("enqueue, 64 partitions", "enqueue", 64, is_away=True),
        },
        {"enqueue-16": Target(3.0, aim=10.0)},
    )
    handled = Comparison(
        "stored, handled and acknowledged",
        {
            "bare-handled": bare("nats-py publish_async, pull, ack", "publish_async", is_handled=True),
            "faststream-handled": Side("FastStream on JetStream", "benchmarks.sides.faststream_streams"),
            "handled-16": ours("enqueue and handler, 16 partitions", "handled"),
            "handled-16-nodes-3": ours("enqueue and handler, 16 partitions, 3 nodes", "handled", workers=3),
        },
        {},
    )
    if replicas == 1:
        return {"result": result, "accepted": accepted, "handled": handled}
    few = {"request", "send-16", "publish-async", "enqueue-16"}
    return {
        name: one._replace(sides={key: side for key, side in one.sides.items() if key in few})
        for name, one in (("result", result), ("accepted", accepted))
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=positive_integer, help="rounds (default: 5; quick: 1)", metavar="N")
    parser.add_argument(
        "--in-flight",
        type=positive_integers,
        metavar="N,N,...",
        help="how many commands are on their way at once (default: 1,16,256,1024,4096; quick: 16)",
    )
    parser.add_argument(
        "--only", type=_sides, metavar="SIDE,SIDE,...", help="which sides to measure, beside the references of those"
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="how long one measurement lasts, about (default: 1; quick: 0.2)",
        metavar="S",
    )
    parser.add_argument(
        "--replicas", type=int, choices=(1, 3), default=1, help="servers that hold each stream (default: 1)"
    )
    parser.add_argument(
        "--synced", action="store_true", help="servers of its own that write each message through to the disk"
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Measure one comparison after the other, and report."""
    rounds = options.rounds if options.rounds is not None else 1 if options.quick else 5
    seconds = options.seconds if options.seconds is not None else 0.2 if options.quick else 1.0
    levels = options.in_flight or ((16,) if options.quick else (1, 16, 256, 1024, 4096))
    settings = {
        "rounds": rounds,
        "seconds": seconds,
        "in_flight": levels,
        "only": options.only,
        "replicas": options.replicas,
        "synced": options.synced,
    }
    wanted = {name: _chosen(one, options.only) for name, one in comparisons(options.replicas).items()}
    wanted = {name: one for name, one in wanted.items() if one is not None}
    steps = rounds * len(levels) * sum(len(one.sides) for one in wanted.values())
    is_own = options.replicas > 1 or options.synced
    measured: dict[str, Rounds] = {}
    with open_cluster(options.replicas, is_synced=options.synced) if is_own else nullcontext(server) as where:
        progress.expect(steps)
        for name, one in wanted.items():
            measured[name] = measure_rounds(one.sides, levels, rounds, seconds, where, progress, is_part=True)
    parts = [_section(wanted[name], levels, found) for name, found in measured.items()]
    kind = f"{options.replicas} server{'s' if options.replicas > 1 else ''}, "
    kind += "written through to the disk" if options.synced else "not written through to the disk"
    text = "\n\n".join([f"Streams on {kind}.", *parts])
    return Report(text, {"settings": settings, "comparisons": {key: one.as_json() for key, one in measured.items()}})


def _chosen(comparison: Comparison, only: Sequence[str] | None) -> Comparison | None:
    """Return a comparison with the sides that were asked for and its reference; None if it has none of them."""
    if only is None:
        return comparison
    reference, *others = comparison.sides
    keys = [key for key in others if key in only]
    if not keys and reference not in only:
        return None
    return comparison._replace(sides={key: comparison.sides[key] for key in (reference, *keys)})


def _section(comparison: Comparison, levels: Sequence[int], measured: Rounds) -> str:
    reference, *others = comparison.sides
    rates = {key: {level: measured.throughput(key, level) for level in levels} for key in comparison.sides}
    title = comparison.sides[reference].title
    rows: list[list[str]] = []
    for key, side in comparison.sides.items():
        rows.append([side.title, *(figure_with_spread(spread(rates[key][level])) for level in levels)])
    for key in others:
        ratios = [ratio_by_round(rates[key][level], rates[reference][level]) for level in levels]
        rows.append([f"{comparison.sides[key].title} / {title}", *(figure_with_spread(one, " x") for one in ratios)])
    head = f"commands/s, {comparison.title}"
    parts = [
        f"{measured.disturbance()}{markdown_table([head, *(f'{level:,} in flight' for level in levels)], rows)}",
        _processor_table(comparison, levels, measured.measurements),
    ]
    verdicts = [
        _verdict(comparison, key, rates[key][TARGETED_IN_FLIGHT], rates[reference][TARGETED_IN_FLIGHT])
        for key in others
        if key in comparison.targets and TARGETED_IN_FLIGHT in levels
    ]
    if verdicts:
        parts.append(markdown_table(["target", "at least", "aim", "measured", "verdict"], verdicts))
    return "\n\n".join(parts)


def _verdict(comparison: Comparison, key: str, rates: Sequence[float], reference: Sequence[float]) -> list[str]:
    wanted = comparison.targets[key]
    ratio = ratio_by_round(rates, reference)
    title = comparison.sides[next(iter(comparison.sides))].title
    name = f"{comparison.sides[key].title}, {TARGETED_IN_FLIGHT:,} in flight, against {title}"
    aim = "" if wanted.aim is None else f"{figure(wanted.aim)} x"
    measured = figure_with_spread(ratio, " x")
    return [name, f"{figure(wanted.required)} x", aim, measured, wanted.verdict(ratio.median)]


def _processor_table(comparison: Comparison, levels: Sequence[int], measured: Sequence[Measurement]) -> str:
    """Show whose processor time a command takes: what throughput is made of on few cores."""
    level = TARGETED_IN_FLIGHT if TARGETED_IN_FLIGHT in levels else max(levels)
    rows = []
    for key, side in comparison.sides.items():
        own = [each for each in measured if (each.side, each.in_flight) == (key, level)]
        cells = [_microseconds(own, f"{role}_cpu_seconds") for role in ("client", "worker", "server")]
        rows.append([side.title, *cells])
    head = f"processor time per command at {level:,} in flight, µs"
    return markdown_table([head, "caller", "workers", "nats-server"], rows)


def _microseconds(measured: Sequence[Measurement], name: str) -> str:
    values: list[tuple[Any, int]] = [(getattr(each, name), each.run.requests) for each in measured]
    if any(seconds is None for seconds, _ in values):
        return "not ours"
    return figure_with_spread(spread([seconds / count * 1e6 for seconds, count in values]))


def _sides(text: str) -> tuple[str, ...]:
    known = [key for one in comparisons(1).values() for key in one.sides]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return tuple(key for key in known if key in names)
