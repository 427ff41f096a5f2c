"""A fleet: node processes that faults befall, and a caller process that asks them steadily."""

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from benchmarks.errors import BenchmarkError
from benchmarks.executions import read_executions
from benchmarks.outages import Call, Execution, Fault, Kind, Sight
from benchmarks.processes import RoleFailedError, RoleProcess

FREEZE_SECONDS = 3.0
"""Long enough for every view to take the node for dead, and to find out that it is not."""

WATCH_SECONDS = 2.5
"""How long the calls after a kill are watched before a replacement joins, which is no part of the fault."""

SETTLE_SECONDS = 0.6
# What a replacement or a thaw stirs up is over by then, and the next fault finds an ordinary day.

_THAWED_SECONDS = 1.2
_CALL_SECONDS = 30.0
_DRAIN_SECONDS = 30.0
_SERVICE = "shop"


@dataclass(frozen=True, slots=True)
class Where:
    """Where a fleet works, and how long its handlers wait."""

    url: str
    namespace: str
    handler_seconds: float


@dataclass(slots=True)
class _Member:
    process: RoleProcess
    id: str = ""


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A fault, and how each process that had to notice saw the nodes."""

    fault: Fault
    views: Mapping[str, Sequence[Sight]] = field(default_factory=dict)


class Fleet:
    """Nodes of catga_bus, and a caller.

    Args:
        where: Where it works.
        size: How many nodes.
    """

    def __init__(self, where: Where, size: int) -> None:
        self._where = where
        self._size = size
        self._stack = ExitStack()
        self._directory: Path
        self._caller: RoleProcess
        self._nodes: list[_Member] = []
        self._standby: _Member | None = None
        self._next = 0

    def __enter__(self) -> Self:
        """Start all processes; the nodes see each other when this returns."""
        with ExitStack() as stack:
            self._directory = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
            stack.callback(self._end_nodes)
            where = {"url": self._where.url, "namespace": self._where.namespace}
            self._caller = stack.enter_context(RoleProcess("benchmarks.sides.shop:Caller", **where))
            self._caller.call("join", timeout=_CALL_SECONDS)
            self._nodes = [self._launch() for _ in range(self._size)]
            for member in self._nodes:
                member.process.result(timeout=_CALL_SECONDS)
            for member in self._nodes:
                member.process.begin("join")
            for member in self._nodes:
                member.id = member.process.result(timeout=_CALL_SECONDS)
            self.wait_whole()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all processes."""
        self._stack.__exit__(kind, error, traceback)

    def begin_load(self, rate: float, timeout: float) -> None:
        """Have the caller send `rate` requests per second, each with so many seconds."""
        self._caller.call("begin_load", timeout=_CALL_SECONDS, rate=rate, seconds=timeout)

    def begin_crowd(self, in_flight: int, timeout: float) -> None:
        """Have the caller keep so many requests in flight, each with so many seconds."""
        self._caller.call("begin_crowd", timeout=_CALL_SECONDS, in_flight=in_flight, seconds=timeout)

    def end_load(self, timeout: float) -> tuple[list[Call], list[Execution]]:
        """Stop the load; return all calls, and all executions."""
        patience = timeout + _CALL_SECONDS
        calls: list[Call] = self._caller.call("end_load", timeout=patience, seconds=timeout)
        return calls, list(read_executions(self._directory))

    def hold_standby(self) -> None:
        """Have a process ready that can take the place of a node, with everything imported."""
        if self._standby is None:
            self._standby = self._launch()
            self._standby.process.result(timeout=_CALL_SECONDS)

    def wait_whole(self) -> None:
        """Wait until all views hold all nodes.

        Raises:
            BenchmarkError: One does not, 30 s later.
        """
        for process in (self._caller, *(member.process for member in self._nodes)):
            whole = process.call(
                "see", timeout=2 * _CALL_SECONDS, service=_SERVICE, nodes=self._size, within=_CALL_SECONDS
            )
            if not whole:
                raise BenchmarkError(f"a view did not hold all {self._size} nodes within {_CALL_SECONDS:g} s")

    def kill(self) -> Witnessed:
        """Kill the next node (SIGKILL), watch, and have the standby take its place."""
        self.hold_standby()
        victim = self._take_turn()
        process = victim.process.pid
        at = time.monotonic()
        victim.process.send_signal(signal.SIGKILL)
        time.sleep(WATCH_SECONDS)
        until = time.monotonic()
        victim.process.join(_CALL_SECONDS)
        if victim.process.exit_code != -signal.SIGKILL:
            raise BenchmarkError(f"node {victim.id} was to be killed and ended with {victim.process.exit_code}")
        views = self._views(victim)
        self._replace(victim)
        return Witnessed(Fault(Kind.KILL, victim.id, at, until, self._settled(), process), views)

    def freeze(self, seconds: float = FREEZE_SECONDS) -> Witnessed:
        """Freeze the next node (SIGSTOP) for so long, and watch."""
        victim = self._take_turn()
        at = time.monotonic()
        until = freeze(victim.process, seconds)
        time.sleep(_THAWED_SECONDS)
        self.wait_whole()
        views = self._views(victim)
        return Witnessed(Fault(Kind.FREEZE, victim.id, at, until, self._settled(), victim.process.pid), views)

    def roll(self) -> list[float]:
        """Restart all nodes, one after the other: SIGTERM, wait, replace.

        Returns:
            How long each took to drain and end, in seconds.
        """
        lasted = []
        for victim in tuple(self._nodes):
            self.hold_standby()
            at = time.monotonic()
            victim.process.send_signal(signal.SIGTERM)
            victim.process.join(_DRAIN_SECONDS)
            lasted.append(time.monotonic() - at)
            self._replace(victim)
            self.wait_whole()
        return lasted

    def false_deaths(self) -> int:
        """Return how often any view took a node for dead that lives."""
        live = {member.id for member in self._nodes}
        seen = [sight for view in self._views(None).values() for sight in view]
        return sum(sight.status == "faulted" and sight.node in live for sight in seen)

    def _settled(self) -> float:
        time.sleep(SETTLE_SECONDS)
        return time.monotonic()

    def _views(self, but: _Member | None) -> dict[str, list[Sight]]:
        processes = {member.id: member.process for member in self._nodes if member is not but}
        processes["caller"] = self._caller
        return {name: process.call("sights", timeout=_CALL_SECONDS) for name, process in processes.items()}

    def _take_turn(self) -> _Member:
        self._next += 1
        return self._nodes[(self._next - 1) % len(self._nodes)]

    def _launch(self) -> _Member:
        process = RoleProcess(
            "benchmarks.sides.shop:Node",
            url=self._where.url,
            namespace=self._where.namespace,
            directory=str(self._directory),
            handler_seconds=self._where.handler_seconds,
        )
        process.launch()
        return _Member(process)

    def _replace(self, gone: _Member) -> None:
        gone.process.__exit__(None, None, None)
        place = self._nodes.index(gone)
        self.hold_standby()
        if self._standby is not None:
            member, self._standby = self._standby, None
            self._nodes[place] = member
            member.id = member.process.call("join", timeout=_CALL_SECONDS)
        self.hold_standby()
        self.wait_whole()

    def _end_nodes(self) -> None:
        """End all at once, not one drain after the other."""
        members = [*self._nodes, *([] if self._standby is None else [self._standby])]
        for number in (signal.SIGCONT, signal.SIGTERM):
            for member in members:
                with suppress(RoleFailedError, ProcessLookupError):
                    member.process.send_signal(number)
        for member in members:
            member.process.__exit__(None, None, None)


def freeze(process: RoleProcess, seconds: float) -> float:
    """Stop a process for so long, and return the instant of its thaw.

    Raises:
        BenchmarkError: The system says that it did not stand still.
    """
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
        if not process.is_stopped:
            raise BenchmarkError("a process that was to be frozen went on")
    finally:
        until = time.monotonic()
        process.send_signal(signal.SIGCONT)
    return until
