"""Failover: what callers feel when nodes are killed, frozen and rolled, and when the server is killed.

The load is open: so many requests per second, each with a deadline, whether or not earlier ones were
answered. Faults befall one of three node processes in turn; the server is one with default pings,
which does not notice a frozen client for minutes. With quick handlers next to nothing runs on a node when
it dies; the busy parts have handlers of a tenth of a second, and so tens of requests that were accepted and
not answered. A crowd keeps hundreds in flight at once. A bare queue group carries the load of the quick ones.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.executions import read_executions
from benchmarks.failover_report import BUSY, IN_A_CROWD, QUICK, FailoverFigures, Rolls, ServerRestart, markdown
from benchmarks.fleet import Fleet, Where, Witnessed, freeze
from benchmarks.options import positive_integer, positive_number
from benchmarks.outages import OK, Call, Fault, Kind, by_order, outage, share_failed_of_frozen, toll
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress, Report
from benchmarks.server import PlainServer, Server

HELP = "what callers feel when nodes are killed, frozen and rolled, and when the server is killed"

PARTS = ("kills", "freezes", "busy-kills", "busy-freezes", "crowd", "rolls", "server", "group")

CALL_TIMEOUT = 2.0
SERVER_CALL_TIMEOUT = 10.0
HANDLER_SECONDS = 0.005
"""What a handler waits: so that there are calls in flight when a fault comes, as there are in an ordinary service."""

BUSY_HANDLER_SECONDS = 0.1
"""What the handler of the busy parts and of the crowd waits."""

CROWD = 512
"""Calls in flight when a node of the crowd freezes."""

_NODES = 3
_DOWN_SECONDS = 1.0
_RETURN_SECONDS = 3.5
_QUIET_SECONDS = 1.5
# Long enough for as many deadlines to pass within the freeze as one of three seconds has calls.
_GROUP_FREEZE_SECONDS = 6.0
_CALL_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--only",
        type=_parts,
        default=PARTS,
        metavar="PART,PART,...",
        help=f"which parts to measure (default: {','.join(PARTS)})",
    )
    for name, default, what in (
        ("kills", 15, "nodes killed"),
        ("freezes", 15, "nodes frozen for 3 s"),
        ("busy-kills", 30, "nodes killed with tens of requests in hand"),
        ("busy-freezes", 30, "nodes frozen for 3 s with tens of requests in hand"),
        ("rolls", 20, "rolling restarts of all nodes"),
        ("server-restarts", 5, "times that the server is killed"),
        ("nodes", 10, "nodes that the killed server has"),
    ):
        quick = 3 if name == "nodes" else 1
        text = f"{what} (default: {default}; quick: {quick})"
        parser.add_argument(f"--{name}", type=positive_integer, metavar="N", help=text)
    parser.add_argument(
        "--rate", type=positive_number, metavar="R", help="requests per second (default: 400; quick: 100)"
    )
    parser.add_argument(
        "--busy-rate",
        type=positive_number,
        metavar="R",
        help="requests per second of the busy parts, a tenth of which are in flight (default: 900; quick: 200)",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Do one part after the other, each with processes of its own."""

    def number(value: int | None, usual: int, quick: int = 1) -> int:
        return value if value is not None else quick if options.quick else usual

    settings = {
        "kills": number(options.kills, 15),
        "freezes": number(options.freezes, 15),
        "busy_kills": number(options.busy_kills, 30),
        "busy_freezes": number(options.busy_freezes, 30),
        "rolls": number(options.rolls, 20),
        "server_restarts": number(options.server_restarts, 5),
        "nodes": number(options.nodes, 10, 3),
        "rate": options.rate if options.rate is not None else 100.0 if options.quick else 400.0,
        "busy_rate": options.busy_rate if options.busy_rate is not None else 200.0 if options.quick else 900.0,
        "crowd": CROWD,
        "handler_seconds": HANDLER_SECONDS,
        "busy_handler_seconds": BUSY_HANDLER_SECONDS,
        "timeout": CALL_TIMEOUT,
        "timeout_with_server_restarts": SERVER_CALL_TIMEOUT,
        "parts": options.only,
    }
    work = _Run(settings, server if options.url is not None else None, server.namespace, progress)
    progress.expect(work.steps)
    figures = work.all()
    return Report(markdown(figures), {"settings": settings} | figures.as_json(), sound=figures.is_sound)


class _Run:
    """One run with its settings; without a server that was given, one with default pings for each part."""

    def __init__(self, settings: dict[str, Any], given: Server | None, namespace: str, progress: Progress) -> None:
        self._settings = settings
        self._given = given
        self._namespace = namespace
        self._progress = progress
        self._group_freezes = min(3, settings["freezes"])

    @property
    def steps(self) -> int:
        """How many there will be."""
        of_part = {
            "kills": self._settings["kills"],
            "freezes": self._settings["freezes"],
            "busy-kills": self._settings["busy_kills"],
            "busy-freezes": self._settings["busy_freezes"],
            "crowd": 1,
            "rolls": self._settings["rolls"],
            "server": self._settings["server_restarts"],
            "group": self._group_freezes,
        }
        return sum(of_part[part] for part in self._settings["parts"])

    def all(self) -> FailoverFigures:
        """Do every part that was asked for."""
        figures = FailoverFigures(self._settings["rate"])
        parts: dict[str, Callable[[FailoverFigures], None]] = {
            "kills": self._kills,
            "freezes": self._freezes,
            "busy-kills": self._busy_kills,
            "busy-freezes": self._busy_freezes,
            "crowd": self._crowd,
            "rolls": self._rolls,
            "server": self._server_restarts,
            "group": self._group,
        }
        for part in self._settings["parts"]:
            parts[part](figures)
        return figures

    @contextmanager
    def _place(self, part: str, handler_seconds: float = HANDLER_SECONDS) -> Iterator[Where]:
        """Hold a server whose pings are the default, or the one that was given."""
        namespace = f"{self._namespace}-{part}"
        if self._given is not None:
            yield Where(self._given.url, namespace, handler_seconds)
            return
        with PlainServer() as server:
            yield Where(server.url, namespace, handler_seconds)

    def _kills(self, figures: FailoverFigures) -> None:
        self._faults(figures, Kind.KILL, QUICK, self._settings["kills"])

    def _freezes(self, figures: FailoverFigures) -> None:
        self._faults(figures, Kind.FREEZE, QUICK, self._settings["freezes"])

    def _busy_kills(self, figures: FailoverFigures) -> None:
        self._faults(figures, Kind.KILL, BUSY, self._settings["busy_kills"])

    def _busy_freezes(self, figures: FailoverFigures) -> None:
        self._faults(figures, Kind.FREEZE, BUSY, self._settings["busy_freezes"])

    def _crowd(self, figures: FailoverFigures) -> None:
        self._faults(figures, Kind.FREEZE, IN_A_CROWD, 1)

    def _faults(self, figures: FailoverFigures, kind: Kind, load: str, times: int) -> None:
        handler_seconds = HANDLER_SECONDS if load == QUICK else BUSY_HANDLER_SECONDS
        name = f"{kind}{load}"
        with (
            self._place(name.replace(", ", "-").replace(" ", "-"), handler_seconds) as where,
            Fleet(where, _NODES) as fleet,
        ):
            if kind is Kind.KILL:
                fleet.hold_standby()
            if load == IN_A_CROWD:
                fleet.begin_crowd(CROWD, CALL_TIMEOUT)
            else:
                fleet.begin_load(self._settings["rate" if load == QUICK else "busy_rate"], CALL_TIMEOUT)
            time.sleep(_QUIET_SECONDS)
            witnessed: list[Witnessed] = []
            for turn in range(1, times + 1):
                self._progress.step(f"{name} {turn} of {times}")
                witnessed.append(fleet.kill() if kind is Kind.KILL else fleet.freeze())
            calls, executions = fleet.end_load(CALL_TIMEOUT)
        figures.outages[name] = [
            outage(one.fault, calls, executions, one.views, one.views, CALL_TIMEOUT) for one in witnessed
        ]
        figures.tolls[name] = toll(calls, by_order(executions), CALL_TIMEOUT)

    def _rolls(self, figures: FailoverFigures) -> None:
        times = self._settings["rolls"]
        lasted: list[float] = []
        with self._place("roll") as where, Fleet(where, _NODES) as fleet:
            fleet.hold_standby()
            fleet.begin_load(self._settings["rate"], CALL_TIMEOUT)
            time.sleep(_QUIET_SECONDS)
            for turn in range(1, times + 1):
                self._progress.step(f"rolling restart {turn} of {times}")
                lasted += fleet.roll()
            calls, executions = fleet.end_load(CALL_TIMEOUT)
        figures.rolls = Rolls(times, lasted)
        figures.tolls["rolling restart"] = toll(calls, by_order(executions), CALL_TIMEOUT)

    def _server_restarts(self, figures: FailoverFigures) -> None:
        times, nodes = self._settings["server_restarts"], self._settings["nodes"]
        returns: list[tuple[float, float]] = []
        with PlainServer() as server:
            where = Where(server.url, f"{self._namespace}-server", HANDLER_SECONDS)
            with Fleet(where, nodes) as fleet:
                fleet.begin_load(self._settings["rate"], SERVER_CALL_TIMEOUT)
                time.sleep(_QUIET_SECONDS)
                for turn in range(1, times + 1):
                    self._progress.step(f"restart {turn} of {times} of the server of {nodes} nodes")
                    killed = time.monotonic()
                    server.kill()
                    time.sleep(_DOWN_SECONDS)
                    returns.append((killed, server.start()))
                    time.sleep(_RETURN_SECONDS)
                calls, executions = fleet.end_load(SERVER_CALL_TIMEOUT)
                fleet.wait_whole()
                deaths = fleet.false_deaths()
        figures.server = ServerRestart(nodes, [_first_answer(calls, back) for _, back in returns], deaths)
        figures.tolls["server killed"] = toll(calls, by_order(executions), SERVER_CALL_TIMEOUT)

    def _group(self, figures: FailoverFigures) -> None:
        faults: list[Fault] = []
        with self._place("group") as where, ExitStack() as stack:
            directory = stack.enter_context(TemporaryDirectory(prefix="bench-"))
            at = {"url": where.url, "namespace": where.namespace}
            member = {**at, "directory": directory, "handler_seconds": where.handler_seconds}
            role = "benchmarks.sides.queue_group"
            members = [stack.enter_context(RoleProcess(f"{role}:Member", **member)) for _ in range(_NODES)]
            caller = stack.enter_context(RoleProcess(f"{role}:Caller", **at))
            caller.call("begin_load", timeout=_CALL_SECONDS, rate=self._settings["rate"], seconds=CALL_TIMEOUT)
            for turn in range(self._group_freezes):
                self._progress.step(f"bare queue group, freeze {turn + 1} of {self._group_freezes}")
                time.sleep(_QUIET_SECONDS)
                begun = time.monotonic()
                until = freeze(members[turn % _NODES], _GROUP_FREEZE_SECONDS)
                faults.append(Fault(Kind.FREEZE, "", begun, until, until))
            time.sleep(_QUIET_SECONDS)
            calls = caller.call("end_load", timeout=_CALL_SECONDS, seconds=CALL_TIMEOUT)
            executions = by_order(read_executions(Path(directory)))
        figures.group_shares = [share_failed_of_frozen(calls, fault, CALL_TIMEOUT) for fault in faults]
        figures.tolls["bare queue group, freeze"] = toll(calls, executions, CALL_TIMEOUT)


def _first_answer(calls: list[Call], back: float) -> float | None:
    """Return how long after its return the server had carried an answer; None if it never did."""
    return min((call.ended - back for call in calls if call.end == OK and call.ended > back), default=None)


def _parts(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in names)
