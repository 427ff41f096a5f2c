"""Rounds: several sides measured in turns, so that what disturbs the machine disturbs all of them alike.

Every round starts all workers and clients anew, each in its own process, and goes through the
numbers in flight; at each number the sides take their turns one right after the other, in an order
that rotates from round to round. Ratios are taken per round.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import Run
from benchmarks.machine import busy_percent, busy_seconds, core_count
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress
from benchmarks.server import Server
from benchmarks.statistics import Target, requests_for

QUIET_PERCENT = 10.0
"""How much of the machine others may take. One of two cores, 50 %, took three quarters of its throughput from bare
nats-py at 256 in flight, and need not take as much from the other sides: ratios then say nothing."""

_LISTEN_SECONDS = 0.3
# A slow machine may need several times what was asked for; a hang needs for ever.
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Side:
    """One way to send a request."""

    title: str
    module: str
    worker_options: dict[str, Any] = field(default_factory=dict)
    client_options: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    """Where its processes look for packages first; None for nowhere else."""

    wanted_throughput: Target | None = None
    """What catga_bus should reach as a multiple of this side."""

    workers: int = 1
    """How many processes of the worker there are."""

    is_numbered: bool = False
    """Whether each worker is told its `number`, so that that of the next round takes its place."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One side at one number in flight in one round."""

    round: int
    side: str
    in_flight: int
    run: Run
    client_cpu_seconds: float
    worker_cpu_seconds: float
    server_cpu_seconds: float | None
    """None where the server is not ours to look at."""

    others_percent: float | None
    """How much of all cores other processes took meanwhile; None where the server would be one of them."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it for the raw data."""
        values = asdict(self)
        run = values.pop("run")
        return values | run | {"requests_per_second": self.run.requests_per_second}


@dataclass(frozen=True, slots=True)
class Rounds:
    """All that was measured."""

    busy_percent_before_round: Sequence[float]
    measurements: Sequence[Measurement]

    def as_json(self) -> dict[str, Any]:
        """Return all of it for the raw data."""
        return {
            "busy_percent_before_round": self.busy_percent_before_round,
            "measurements": [each.as_json() for each in self.measurements],
        }

    def latency(self, side: str, name: str) -> list[float]:
        """Return a measure of one request at a time, by round."""
        return [getattr(each.run, name) for each in self._of(side, 1)]

    def throughput(self, side: str, in_flight: int) -> list[float]:
        """Return the requests per second, by round."""
        return [each.run.requests_per_second for each in self._of(side, in_flight)]

    def disturbance(self) -> str:
        """Return a warning where something else was running, or nothing."""
        return _disturbance(self.busy_percent_before_round, self.measurements)

    def _of(self, side: str, in_flight: int) -> list[Measurement]:
        return [each for each in self.measurements if (each.side, each.in_flight) == (side, in_flight)]


def measure_rounds(
    sides: Mapping[str, Side],
    levels: Sequence[int],
    rounds: int,
    seconds: float,
    server: Server,
    progress: Progress,
    *,
    is_part: bool = False,
) -> Rounds:
    """Measure every side at every number in flight, so many times.

    Args:
        sides: What is measured, by key.
        levels: The numbers in flight.
        rounds: How many rounds.
        seconds: How long one measurement lasts, about.
        server: Where the sides meet.
        progress: Told of every measurement.
        is_part: Whether the caller has told it how many there will be.
    """
    if not is_part:
        progress.expect(rounds * len(levels) * len(sides))
    measured: list[Measurement] = []
    busy: list[float] = []
    keys = tuple(sides)
    for number in range(1, rounds + 1):
        busy.append(busy_percent(_LISTEN_SECONDS))
        shift = (number - 1) % len(keys)
        order = keys[shift:] + keys[:shift]
        measured += _measure_round(number, {key: sides[key] for key in order}, levels, seconds, server, progress)
    return Rounds(busy, measured)


def _disturbance(before_rounds: Sequence[float], measured: Sequence[Measurement]) -> str:
    """Return a warning where something else was running, or nothing."""
    during = [each.others_percent for each in measured if each.others_percent is not None]
    worst = max([*before_rounds, *during])
    if worst <= QUIET_PERCENT:
        return ""
    told = f", during {sum(each > QUIET_PERCENT for each in during)} of {len(during)} measurements more than"
    return (
        f"**Not to be quoted:** other processes took up to {worst:.0f} % of the machine"
        f"{f'{told} {QUIET_PERCENT:.0f} %' if during else ''}; repeat when nothing else is running.\n\n"
    )


def _measure_round(
    number: int,
    sides: Mapping[str, Side],
    levels: Sequence[int],
    seconds: float,
    server: Server,
    progress: Progress,
) -> Iterator[Measurement]:
    with ExitStack() as stack:
        teams = {key: _start(key, side, server, stack) for key, side in sides.items()}
        for in_flight in levels:
            for key, side in sides.items():
                progress.step(f"round {number}: {in_flight:,} in flight, {side.title}")
                yield _measure(number, key, in_flight, seconds, teams[key], server)


def _start(key: str, side: Side, server: Server, stack: ExitStack) -> "_Team":
    # A namespace for each side, or the workers of both kinds of FastStream would share their work.
    where = {"url": server.url, "namespace": f"{server.namespace}-{key}"}
    workers = []
    for number in range(side.workers):
        options = side.worker_options | ({"number": number} if side.is_numbered else {})
        workers.append(stack.enter_context(RoleProcess(f"{side.module}:Worker", side.path, **where, **options)))
    client = stack.enter_context(RoleProcess(f"{side.module}:Client", side.path, **where, **side.client_options))
    return _Team(client, workers)


@dataclass(frozen=True, slots=True)
class _Team:
    """The processes of one side."""

    client: RoleProcess
    workers: Sequence[RoleProcess]

    def cpu_seconds(self, server: Server) -> tuple[float, float, float, float]:
        """Return the processor time of client, workers, server and the whole machine so far."""
        of_workers = sum(worker.cpu_seconds() for worker in self.workers)
        return self.client.cpu_seconds(), of_workers, server.cpu_seconds() or 0.0, busy_seconds()


def _measure(number: int, side: str, in_flight: int, seconds: float, team: _Team, server: Server) -> Measurement:
    patience = _PATIENCE_SECONDS + 10 * seconds
    rate = team.client.call("calibrate", timeout=patience, in_flight=in_flight, seconds=seconds / 4)
    requests = requests_for(rate, seconds, in_flight=in_flight)
    before = team.cpu_seconds(server)
    result = team.client.call("measure", timeout=patience, in_flight=in_flight, requests=requests)
    after = team.cpu_seconds(server)
    of_client, of_workers, of_server, of_all = (end - begin for begin, end in zip(before, after, strict=True))
    of_others = max(0.0, of_all - of_client - of_workers - of_server)
    return Measurement(
        number,
        side,
        in_flight,
        result,
        of_client,
        of_workers,
        of_server if server.pids else None,
        of_others / result.seconds / core_count() * 100 if server.pids else None,
    )
