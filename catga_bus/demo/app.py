"""`catga demo` from beginning to end: server, nodes, replay, verdict.

A command line only has to call one function, which returns the exit code and raises nothing for
what a user can do wrong:

    run_demo(*, data=None, rate=2_000.0, nodes=3, url=None, as_json=False, in_flight=256, keep=None,
    faults=None, out=None, err=None) -> int
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TextIO

import msgspec

from catga_bus.demo.cleanup import remove_streams
from catga_bus.demo.data import SHIPPED, Flight, FlightDataError, in_schedule_order, read_flights
from catga_bus.demo.day import Desk, Faults, NodeNotReadyError, replay_day
from catga_bus.demo.display import Display, SilentDisplay, display_for
from catga_bus.demo.effects import EffectLogError, create_effect_log, read_effects
from catga_bus.demo.faults import plan_faults
from catga_bus.demo.ledger import LedgerError, read_executions
from catga_bus.demo.node import SERVICE, command
from catga_bus.demo.processes import NodeProcess, running
from catga_bus.demo.progress import ReplayResult
from catga_bus.demo.report import make_report
from catga_bus.demo.report_text import json_of, text_of
from catga_bus.embedded import EmbeddedServer
from catga_bus.errors import CallError, CatgaError, DisconnectedError

MAX_RATE = 1_000_000
MAX_NODES = 64
_MIN_NODES = 2  # with faults: one is killed, and who would answer else?
MAX_IN_FLIGHT = 4_096
# Chosen: some megabytes of calls; more of them at once are stored no faster.


class ExitCode(IntEnum):
    """How a demo ends."""

    EQUAL = 0
    """The verdict is good, every flight was stored and announced, and all faults happened."""

    DIFFERENT = 1
    """An effect is lost, doubled, out of order or changed; or a flight could not be stored or was not announced, or a
    fault did not happen or was not noticed."""

    BAD_INPUT = 2
    """An argument or the file of flights cannot be used; nothing was started."""

    BROKEN = 3
    """The server or a node could not be started or reached."""

    INTERRUPTED = 130
    """Ctrl-C or SIGTERM."""


class _BadInputError(Exception):
    """An argument cannot be used."""


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    rate: float
    nodes: int
    url: str | None
    in_flight: int
    has_faults: bool

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= MAX_RATE:
            raise _BadInputError(f"rate must be 0 (flat out) to {MAX_RATE:,} flights per second, got {self.rate!r}")
        if not 1 <= self.nodes <= MAX_NODES:
            raise _BadInputError(f"nodes must be 1 to {MAX_NODES}, got {self.nodes!r}")
        if not 1 <= self.in_flight <= MAX_IN_FLIGHT:
            raise _BadInputError(f"in_flight must be 1 to {MAX_IN_FLIGHT:,}, got {self.in_flight!r}")
        if self.has_faults and not (self.rate and self.nodes >= _MIN_NODES):
            raise _BadInputError(
                f"faults need a rate above 0 and {_MIN_NODES} nodes or more, got rate {self.rate!r} and "
                f"{self.nodes!r} nodes; or say --no-faults"
            )


def run_demo(
    *,
    data: Path | None = None,
    rate: float = 2_000.0,
    nodes: int = 3,
    url: str | None = None,
    as_json: bool = False,
    in_flight: int = 256,
    keep: Path | None = None,
    faults: bool | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Run the demo, print its report, and return the exit code: see `ExitCode`.

    Server and nodes are gone when it returns. SIGTERM is noticed only when it is called from the
    main thread.

    Args:
        data: A file of flights, `.csv` or `.csv.gz`; None for the one that comes with the package.
        rate: Flights per second, 0 to 1,000,000; 0 hands in as fast as they are stored.
        nodes: How many node processes, 1 to 64.
        url: Address of a running server; None starts a private one.
        as_json: Report as JSON, and show nothing else.
        in_flight: Most flights handed in and not known to be stored, 1 to 4,096.
        keep: A new or empty directory for the logs of effects and executions and the output of the nodes; None for
            a temporary one, which is kept only when something fails.
        faults: Whether one node is killed and replaced, another one frozen and one rolled while the replay runs,
            which needs a rate and two nodes; None for whenever it is possible.
        out: Where the report goes; standard output if None.
        err: Where progress and errors go; standard error if None.
    """
    out, err = out or sys.stdout, err or sys.stderr
    display = SilentDisplay() if as_json else display_for(err)
    try:
        has_faults = faults if faults is not None else rate > 0 and nodes >= _MIN_NODES
        settings = _Settings(rate=rate, nodes=nodes, url=url, in_flight=in_flight, has_faults=has_faults)
        flights = in_schedule_order(read_flights(data or SHIPPED))
        with _Workplace(keep) as workplace, _warnings_in(display):
            return _run_in(workplace, settings, flights, display, as_json=as_json, out=out, err=err)
    except (_BadInputError, FlightDataError) as error:
        err.write(f"error: {error}\n")
        return ExitCode.BAD_INPUT
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.write("interrupted: server and nodes have been ended\n")
        return ExitCode.INTERRUPTED


class _Workplace:
    """The directory that holds the logs of effects and executions and the output of the nodes."""

    def __init__(self, keep: Path | None) -> None:
        self._is_wanted = keep is not None
        try:
            self.path = _empty(keep) if keep else Path(tempfile.mkdtemp(prefix="catga-demo-"))
        except OSError as error:
            raise _BadInputError(f"{error.filename}: cannot be used: {error.strerror}") from error

    def __enter__(self) -> "_Workplace":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_wanted:
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def effect_log(self) -> Path:
        return self.path / "effects.db"

    @property
    def board(self) -> Path:
        return self.path / "departures-board.db"

    @property
    def execution_log(self) -> Path:
        return self.path / "executions.jsonl"

    def output_of(self, node: str) -> Path:
        return self.path / f"{node}.log"

    def evidence(self) -> Iterator[str]:
        """Keep the directory, and yield where it is and what the nodes said last."""
        self._is_wanted = True
        for output in sorted(self.path.glob("*.log")):
            said = output.read_text(errors="replace").strip().splitlines()
            yield f"output of {output.stem}: {output}" + (f"\n    {said[-1]}" if said else " (empty)")
        yield f"effect log: {self.effect_log}"
        yield f"execution log: {self.execution_log}"


@contextlib.contextmanager
def _warnings_in(display: Display) -> Iterator[None]:
    """Show what the bus warns of as lines of a display: written by itself, it would tear the picture."""
    handler = _Saying(display)
    logger = logging.getLogger("catga_bus")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Saying(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(f"the bus: {record.getMessage()}")


def _empty(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise _BadInputError(f"{directory}: the directory to keep is not empty")
    # The nodes are told where it is, wherever they run.
    return directory.absolute()


def _run_in(
    workplace: _Workplace,
    settings: _Settings,
    flights: Sequence[Flight],
    display: Display,
    *,
    as_json: bool,
    out: TextIO,
    err: TextIO,
) -> ExitCode:
    try:
        result = asyncio.run(_replayed(workplace, settings, flights, display))
        effects, executions = read_effects(workplace.effect_log), read_executions(workplace.execution_log)
        report = make_report(result, effects, executions, flights)
    except (LedgerError, EffectLogError) as error:
        code = ExitCode.DIFFERENT
        err.write(f"error: {error}\n")
    except (CatgaError, NodeNotReadyError, OSError) as error:
        code = ExitCode.BROKEN
        err.write(f"error: {error.message if isinstance(error, CallError) else error}\n")
    else:
        code = ExitCode.EQUAL if report.is_success else ExitCode.DIFFERENT
        out.write(f"{json_of(report) if as_json else text_of(report)}\n")
        out.flush()
    if code != ExitCode.EQUAL:
        err.writelines(f"{line}\n" for line in workplace.evidence())
    return code


async def _replayed(
    workplace: _Workplace, settings: _Settings, flights: Sequence[Flight], display: Display
) -> ReplayResult:
    _cancel_on_sigterm()
    # A namespace of its own keeps this run apart from whatever else the server carries.
    namespace = f"demo-{secrets.token_hex(4)}"
    async with contextlib.AsyncExitStack() as stack:
        url = settings.url
        if url is None:
            url = (await stack.enter_async_context(EmbeddedServer())).url
            display.say(f"a private nats-server listens at {url}")
        else:
            await stack.enter_async_context(_Cleaner(url, namespace))
        create_effect_log(workplace.effect_log)
        processes = _handles(workplace, settings.nodes + 2 * settings.has_faults, url, namespace)
        nodes = list(processes)[: settings.nodes]
        spares = list(processes)[settings.nodes :]
        stack.enter_context(running([processes[node] for node in nodes], [processes[node] for node in spares]))
        display.say(f"{len(nodes)} nodes of {SERVICE} are starting; {len(flights):,} flights to record")
        stack.enter_context(display)
        desk = Desk(
            url=url,
            namespace=namespace,
            nodes=nodes,
            is_running=lambda node: processes[node].is_running,
            effects=workplace.effect_log,
            board=workplace.board,
            faults=Faults(plan_faults(nodes, *spares), processes) if spares else None,
        )
        return await replay_day(desk, flights, rate=settings.rate, in_flight=settings.in_flight, display=display)


class _Cleaner:
    """Removes what a run leaves on somebody else's server, unless there is none."""

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._namespace = namespace

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, DisconnectedError):
            await remove_streams(self._url, self._namespace)


def _handles(workplace: _Workplace, count: int, url: str, namespace: str) -> dict[str, NodeProcess]:
    """Return handles on node processes by their ids; none is started."""
    environment = os.environ | {"CATGA_URL": url}
    return {
        node: NodeProcess(
            node,
            command(node, namespace, workplace.effect_log, workplace.execution_log),
            environment,
            workplace.output_of(node),
        )
        for node in (f"{SERVICE}-{number}" for number in range(1, count + 1))
    }


def _cancel_on_sigterm() -> None:
    """Make SIGTERM do what Ctrl-C does: cancel the main task, which ends all on its way out."""
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
