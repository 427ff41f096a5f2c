"""Requests: latency one at a time, throughput with many in flight, beside other ways to do it.

How the sides take turns is in `rounds`.
"""

import argparse
from collections.abc import Sequence

from benchmarks.options import positive_integer, positive_integers, positive_number
from benchmarks.reporting import Progress, Report, figure, figure_with_spread, markdown_table
from benchmarks.rounds import Measurement, Side, measure_rounds
from benchmarks.server import Server
from benchmarks.statistics import Spread, Target, ratio_by_round, spread

HELP = "latency and throughput beside bare nats-py and FastStream"

_WORKERS_OF_FASTSTREAM = 64  # as many as a handler of catga_bus runs side by side by default


SIDES = {
    "catga": Side("catga_bus", "benchmarks.sides.catga"),
    "bare": Side("bare nats-py", "benchmarks.sides.bare", wanted_throughput=Target(2.5, aim=5.0)),
    "faststream": Side("FastStream", "benchmarks.sides.faststream", wanted_throughput=Target(35.0, aim=80.0)),
    "faststream-64": Side(
        f"FastStream, {_WORKERS_OF_FASTSTREAM} workers",
        "benchmarks.sides.faststream",
        {"max_workers": _WORKERS_OF_FASTSTREAM},
        wanted_throughput=Target(35.0, aim=80.0),
    ),
}
"""In the order of the columns; catga_bus is what the others are compared with."""

WANTED_LATENCY = Target(1.3, aim=1.1, higher_is_better=False)
"""Of the median of one request at a time, as a multiple of bare nats-py."""

TARGETED_IN_FLIGHT = (256, 1024)
"""The numbers in flight whose throughput has a target, besides each side's best."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=positive_integer, help="rounds (default: 5; quick: 1)", metavar="N")
    parser.add_argument(
        "--in-flight",
        type=positive_integers,
        default=(1, 16, 256, 1024),
        metavar="N,N,...",
        help="how many requests are on their way at once (default: 1,16,256,1024)",
    )
    parser.add_argument(
        "--only",
        type=_sides,
        default=tuple(SIDES),
        metavar="SIDE,SIDE,...",
        help=f"which sides to measure (default: {','.join(SIDES)})",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="how long one measurement lasts, about (default: 1.5; quick: 0.3)",
        metavar="S",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Measure, and report."""
    rounds = options.rounds if options.rounds is not None else 1 if options.quick else 5
    seconds = options.seconds if options.seconds is not None else 0.3 if options.quick else 1.5
    sides = {key: SIDES[key] for key in options.only}
    measured = measure_rounds(sides, options.in_flight, rounds, seconds, server, progress)
    settings = {
        "rounds": rounds,
        "seconds": seconds,
        "in_flight": options.in_flight,
        "sides": options.only,
    }
    tables = _Tables(options.only, options.in_flight, measured.measurements).markdown()
    return Report(f"{measured.disturbance()}{tables}", {"settings": settings} | measured.as_json())


class _Tables:
    """Turns measurements into Markdown."""

    def __init__(self, sides: Sequence[str], levels: Sequence[int], measured: Sequence[Measurement]) -> None:
        self._sides = [key for key in SIDES if key in sides]
        self._levels = levels
        self._measured = measured
        self._others = [key for key in self._sides if key != "catga"] if "catga" in sides else []

    def markdown(self) -> str:
        """Return all tables."""
        parts = [self._main_table(), self._processor_table()]
        verdicts = self._verdicts()
        if verdicts:
            headers = ["target", "at least", "aim", "measured", "verdict"]
            parts.append(markdown_table(headers, verdicts))
        return "\n\n".join(parts)

    def _main_table(self) -> str:
        titles = [SIDES[key].title for key in self._sides]
        ratios = [f"catga_bus / {SIDES[key].title}" for key in self._others]
        rows = []
        if 1 in self._levels:
            rows.append(self._row("one at a time, p50, µs", self._latency("p50_microseconds")))
            rows.append(self._row("one at a time, p99, µs", self._latency("p99_microseconds")))
        rows += [self._row(f"{level:,} in flight, requests/s", self._throughput(level)) for level in self._levels]
        if len(self._levels) > 1:
            rows.append(self._row("best of these, requests/s", self._best()))
        return markdown_table(["", *titles, *ratios], rows)

    def _row(self, title: str, values: dict[str, list[float]]) -> list[str]:
        cells = [figure_with_spread(spread(values[key])) for key in self._sides]
        ratios = [figure_with_spread(ratio_by_round(values["catga"], values[key]), " x") for key in self._others]
        return [title, *cells, *ratios]

    def _processor_table(self) -> str:
        """Show whose processor time a request takes: what throughput is made of on few cores."""
        level = max(self._levels)
        rows = []
        for key in self._sides:
            own = [each for each in self._measured if (each.side, each.in_flight) == (key, level)]
            cells = [
                self._microseconds_per_request(own, name)
                for name in ("client_cpu_seconds", "worker_cpu_seconds", "server_cpu_seconds")
            ]
            rows.append([SIDES[key].title, *cells])
        head = f"processor time per request at {level:,} in flight, µs"
        return markdown_table([head, "client", "worker", "nats-server"], rows)

    def _microseconds_per_request(self, measured: Sequence[Measurement], name: str) -> str:
        values = [(getattr(each, name), each.run.requests) for each in measured]
        if any(seconds is None for seconds, _ in values):
            return "not ours"
        return figure_with_spread(spread([seconds / count * 1e6 for seconds, count in values]))

    def _verdicts(self) -> list[list[str]]:
        rows = []
        for key in self._others:
            wanted = SIDES[key].wanted_throughput
            for level in TARGETED_IN_FLIGHT:
                if wanted and level in self._levels:
                    name = f"requests/s, {level:,} in flight, against {SIDES[key].title}"
                    rows.append(self._verdict(name, key, self._throughput(level), wanted))
            if wanted and len(self._levels) > 1:
                name = f"requests/s, best against best, against {SIDES[key].title}"
                rows.append(self._verdict(name, key, self._best(), wanted))
        if "bare" in self._others and 1 in self._levels:
            name = "p50 of one at a time, against bare nats-py (at most)"
            rows.append(self._verdict(name, "bare", self._latency("p50_microseconds"), WANTED_LATENCY))
        return rows

    def _verdict(self, name: str, other: str, values: dict[str, list[float]], wanted: Target) -> list[str]:
        ratio: Spread = ratio_by_round(values["catga"], values[other])
        aim = "" if wanted.aim is None else f"{figure(wanted.aim)} x"
        return [
            name,
            f"{figure(wanted.required)} x",
            aim,
            figure_with_spread(ratio, " x"),
            wanted.verdict(ratio.median),
        ]

    def _latency(self, name: str) -> dict[str, list[float]]:
        return {
            key: [getattr(each.run, name) for each in self._measured if (each.side, each.in_flight) == (key, 1)]
            for key in self._sides
        }

    def _throughput(self, level: int) -> dict[str, list[float]]:
        return {
            key: [
                each.run.requests_per_second for each in self._measured if (each.side, each.in_flight) == (key, level)
            ]
            for key in self._sides
        }

    def _best(self) -> dict[str, list[float]]:
        by_level = [self._throughput(level) for level in self._levels]
        return {
            key: [max(rates) for rates in zip(*(rates[key] for rates in by_level), strict=True)] for key in self._sides
        }


def _sides(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SIDES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SIDES)}")
    return tuple(key for key in SIDES if key in names)
