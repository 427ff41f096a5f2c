"""Hot path: what liveness and failover cost a request, against the bus as it was before it had them.

The bus of now is measured as it is and without its circuit breaker. The rest cannot be switched off,
so the bus of an earlier commit takes part in the same rounds, in processes of its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.options import positive_integer, positive_integers, positive_number
from benchmarks.reporting import Progress, Report, figure, figure_with_spread, markdown_table
from benchmarks.revisions import unpack_revision
from benchmarks.rounds import Rounds, Side, measure_rounds
from benchmarks.server import Server
from benchmarks.statistics import Target, ratio_by_round, spread

HELP = "requests per second with and without the machinery of liveness and failover"

BEFORE = "59a724e3760f"
"""The last commit whose nodes did not know each other."""

WANTED_SHARE = Target(0.95)
"""Of the requests per second of the earlier bus."""

_NOW = "now"
_NO_BREAKER = "no-breaker"
_BEFORE = "before"


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
        "--seconds",
        type=positive_number,
        help="how long one measurement lasts, about (default: 1.5; quick: 0.3)",
        metavar="S",
    )
    parser.add_argument(
        "--before",
        default=BEFORE,
        metavar="COMMIT",
        help=f"the earlier bus (default: {BEFORE}, the last one whose nodes did not know each other)",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Measure the bus beside its earlier self, and report."""
    rounds = options.rounds if options.rounds is not None else 1 if options.quick else 5
    seconds = options.seconds if options.seconds is not None else 0.3 if options.quick else 1.5
    with TemporaryDirectory(prefix="bench-") as directory:
        commit = unpack_revision(options.before, Path(directory))
        sides = _sides(Path(directory), commit)
        measured = measure_rounds(sides, options.in_flight, rounds, seconds, server, progress)
    settings = {"rounds": rounds, "seconds": seconds, "in_flight": options.in_flight, "before": commit}
    tables = _markdown(sides, options.in_flight, measured)
    return Report(f"{measured.disturbance()}{tables}", {"settings": settings} | measured.as_json())


def _sides(tree: Path, commit: str) -> dict[str, Side]:
    off = {"breaker": None}
    where = {"tree": str(tree)}
    return {
        _NOW: Side("catga_bus", "benchmarks.sides.catga"),
        _NO_BREAKER: Side("without breaker", "benchmarks.sides.catga", off, off),
        _BEFORE: Side(f"at {commit[:8]}", "benchmarks.sides.earlier", where, where, tree),
    }


def _markdown(sides: dict[str, Side], levels: Sequence[int], measured: Rounds) -> str:
    rows, verdicts = [], []
    for level in levels:
        rates = {key: measured.throughput(key, level) for key in sides}
        ratio = ratio_by_round(rates[_NOW], rates[_BEFORE])
        ratios = [ratio, ratio_by_round(rates[_NOW], rates[_NO_BREAKER])]
        rows.append(
            [
                f"{level:,} in flight, requests/s",
                *(figure_with_spread(spread(rates[key])) for key in sides),
                *(figure_with_spread(each, " x") for each in ratios),
            ]
        )
        title = f"requests/s, {level:,} in flight, against {sides[_BEFORE].title}"
        wanted = f"{figure(WANTED_SHARE.required)} x"
        verdicts.append([title, wanted, figure_with_spread(ratio, " x"), WANTED_SHARE.verdict(ratio.median)])
    titles = [side.title for side in sides.values()]
    others = [f"catga_bus / {sides[key].title}" for key in (_BEFORE, _NO_BREAKER)]
    main = markdown_table(["", *titles, *others], rows)
    return f"{main}\n\n{markdown_table(['target', 'at least', 'measured', 'verdict'], verdicts)}"
