"""Events: published until every service has handled all of them, beside a log that bare nats-py reads without order.

How the sides take turns is in `rounds`.
"""

import argparse

from benchmarks.options import positive_integer, positive_integers, positive_number
from benchmarks.reporting import Progress, Report, figure_with_spread, markdown_table
from benchmarks.rounds import Rounds, Side, measure_rounds
from benchmarks.server import Server
from benchmarks.statistics import ratio_by_round, spread

HELP = "durable events to several services, beside bare nats-py"

SERVICES = (1, 3, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=positive_integer, help="rounds (default: 5; quick: 1)", metavar="N")
    parser.add_argument(
        "--services",
        type=positive_integers,
        default=SERVICES,
        help="how many services (default: 1,3,10)",
        metavar="N,...",
    )
    parser.add_argument(
        "--in-flight",
        type=positive_integer,
        default=1_024,
        help="events on their way at once (default: 1024)",
        metavar="N",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="how long the publishing of one measurement lasts, about (default: 1; quick: 0.2)",
        metavar="S",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Measure each number of services by itself, and report."""
    rounds = options.rounds if options.rounds is not None else 1 if options.quick else 5
    seconds = options.seconds if options.seconds is not None else 0.2 if options.quick else 1.0
    progress.expect(2 * rounds * len(options.services))
    measured: dict[int, Rounds] = {}
    for services in options.services:
        sides = {
            f"bare-{services}": Side(
                f"bare nats-py, {services}", "benchmarks.sides.bare_events", workers=services, is_numbered=True
            ),
            f"catga-{services}": Side(
                f"catga_bus, {services}", "benchmarks.sides.events", workers=services, is_numbered=True
            ),
        }
        measured[services] = measure_rounds(
            sides, (options.in_flight,), rounds, seconds, server, progress, is_part=True
        )
    settings = {"rounds": rounds, "seconds": seconds, "services": options.services, "in_flight": options.in_flight}
    raw = {"settings": settings, "services": {str(key): one.as_json() for key, one in measured.items()}}
    return Report(_markdown(measured, options.in_flight), raw)


def _markdown(measured: dict[int, Rounds], in_flight: int) -> str:
    rows = []
    for services, found in measured.items():
        ours, theirs = (found.throughput(f"{side}-{services}", in_flight) for side in ("catga", "bare"))
        cells = [figure_with_spread(spread(theirs)), figure_with_spread(spread(ours))]
        rows.append([str(services), *cells, figure_with_spread(ratio_by_round(ours, theirs), " x")])
    heads = ["services that handle every event", "bare nats-py, events/s", "catga_bus, events/s", "catga_bus / bare"]
    disturbed = "".join(found.disturbance() for found in measured.values())
    return f"{disturbed}{markdown_table(heads, rows)}"
