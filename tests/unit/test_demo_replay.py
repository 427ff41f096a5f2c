"""The whole flight desk inside one process, over the memory broker."""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from catga_bus.bus import Bus
from catga_bus.context import Context
from catga_bus.demo import day, faults, replay
from catga_bus.demo.data import SHIPPED, Flight, in_schedule_order, read_flights
from catga_bus.demo.day import Desk, Faults, NodeNotReadyError, replay_day
from catga_bus.demo.display import Display, SilentDisplay
from catga_bus.demo.effects import INSERT, create_effect_log, read_effects
from catga_bus.demo.faults import plan_faults
from catga_bus.demo.ledger import ExecutionLog, read_executions
from catga_bus.demo.messages import NodeTotals, RecordFlight, Totals
from catga_bus.demo.node import SERVICE, open_desk
from catga_bus.demo.options import BUS_OPTIONS, inbox_at
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.report import Report, make_report
from catga_bus.errors import OverloadedError

NODES = (f"{SERVICE}-1", f"{SERVICE}-2")


@pytest.fixture(scope="module")
def flights() -> list[Flight]:
    return in_schedule_order(read_flights(SHIPPED))[:600]


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    create_effect_log(tmp_path / "effects.db")
    return Desk(
        url=f"memory://{request.node.name.replace('[', '-').replace(']', '')}",
        namespace="catga",
        nodes=NODES,
        is_running=lambda _: True,
        effects=tmp_path / "effects.db",
        board=tmp_path / "board.db",
    )


def log_of(desk: Desk) -> Path:
    return desk.effects.with_name("executions.jsonl")


@contextlib.asynccontextmanager
async def open_nodes(
    desk: Desk, nodes: Sequence[str] = NODES, open_node: Callable[[Bus, ExecutionLog], None] = open_desk
) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        log = stack.enter_context(ExecutionLog(log_of(desk)))
        for node in nodes:
            bus = Bus(SERVICE, url=desk.url, node_id=node, inbox=inbox_at(desk.effects), **BUS_OPTIONS)
            open_node(bus, log)
            await stack.enter_async_context(bus)
        yield


async def replayed(
    desk: Desk, flights: Sequence[Flight], *, rate: float = 0, display: Display | None = None
) -> ReplayResult:
    return await replay_day(desk, flights, rate=rate, in_flight=32, display=display or SilentDisplay())


def reported(desk: Desk, result: ReplayResult, flights: Sequence[Flight]) -> Report:
    return make_report(result, read_effects(desk.effects), read_executions(log_of(desk)), flights)


async def test_a_replay_over_two_nodes_has_every_effect_once_and_in_order(desk, flights):
    async with open_nodes(desk):
        result = await replayed(desk, flights)
    report = reported(desk, result, flights)
    assert report.problems == []
    assert report.verdict.effects.written == report.runs.executions == 600
    assert report.announcements.written == report.late_flights > 0
    assert [node.node for node in report.nodes] == list(NODES)
    assert all(node.heard_closing and node.effects for node in report.nodes)
    assert sorted(map(report.owners.count, NODES)) == [8, 8]
    assert not any(map(math.isnan, result.called))


async def test_a_paced_replay_takes_its_time_and_shows_its_progress(desk, flights):
    seen: list[Progress] = []

    class Watching(SilentDisplay):
        interval = 0.02

        def update(self, progress: Progress) -> None:
            seen.append(progress)

    async with open_nodes(desk):
        result = await replayed(desk, flights[:100], rate=200, display=Watching())
    assert result.progress.seconds >= result.stored_seconds >= 99 / 200
    assert len(seen) > 2
    assert seen[-1] == result.progress
    assert seen[-1].effects == seen[-1].stored == 100
    assert max(progress.in_flight for progress in seen) <= 32


async def test_the_replay_waits_for_effects_when_too_many_are_missing(desk, flights, monkeypatch):
    monkeypatch.setattr(replay, "MAX_BACKLOG", 10)
    backlogs: list[int] = []

    class Watching(SilentDisplay):
        interval = 0.001

        def update(self, progress: Progress) -> None:
            backlogs.append(progress.stored - progress.effects)

    async with open_nodes(desk):
        report = reported(desk, await replayed(desk, flights, display=Watching()), flights)
    assert report.problems == []
    assert max(backlogs) <= 10 + 32


# -- planted faults: the verdict must find them ------------------------------------------------------------------


def careless(spoil: Callable[[int], int]) -> Callable[[Bus, ExecutionLog], None]:
    """Return what opens a desk that writes as many effects of a flight as `spoil` says of its row."""

    def open_node(bus: Bus, log: ExecutionLog) -> None:
        @bus.handler
        async def record_flight(command: RecordFlight, ctx: Context) -> None:
            transaction = await ctx.transaction()
            flight = command.flight
            effect = (command.row, command.aircraft, flight.dep_delay, flight.distance, ctx.node, *ctx.fence[:2], 0.0)
            for _ in range(spoil(command.row)):
                await transaction.execute(INSERT, effect)

        @bus.handler
        async def totals(request: Totals) -> NodeTotals:
            return NodeTotals(bus.node_id, 0, 0, 0, closed=True)

    return open_node


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "EFFECT_PATIENCE", 0.2)
    monkeypatch.setattr(day, "BOARD_PATIENCE", 0.0)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("count", "lost", "doubled"), [(0, 2, 0), (1, 0, 0), (2, 0, 2)])
async def test_effects_that_a_desk_loses_or_doubles_are_found(desk, flights, count, lost, doubled):
    async with open_nodes(desk, open_node=careless(lambda row: count if row in (7, 99) else 1)):
        report = reported(desk, await replayed(desk, flights[:100]), flights[:100])
    assert (report.verdict.effects.lost, report.verdict.effects.doubled) == (lost, doubled)
    assert report.verdict.is_good is (count == 1)
    assert not report.is_success  # nothing was logged or announced


@pytest.mark.usefixtures("_impatient")
async def test_flights_that_are_handed_in_out_of_order_are_found(desk, flights):
    changed = list(flights)
    first, second = [row for row, flight in enumerate(flights) if flight.aircraft == "N711MQ"][:2]
    async with open_nodes(desk):
        client = Bus("client", url=desk.url, **BUS_OPTIONS)
        async with client:
            for row in (second, first):
                (await client.send(RecordFlight("N711MQ", row, flights[row]))).unwrap()
        result = await replayed(desk, changed)
    report = reported(desk, result, flights)
    assert report.verdict.effects.out_of_order >= 1
    assert report.verdict.effects.doubled == 2
    assert not report.is_success


# -- a desk that does not work -----------------------------------------------------------------------------------


async def test_a_replay_gives_up_when_too_much_cannot_be_stored(desk, flights, monkeypatch):
    monkeypatch.setattr(replay, "MAX_FAILURES", 40)
    monkeypatch.setattr(day, "BOARD_PATIENCE", 0.0)
    numbers = itertools.count()
    real = Bus.enqueue

    async def full(self, command, **options):
        if next(numbers) >= 20:
            raise OverloadedError("the work queue is full")
        return await real(self, command, **options)

    monkeypatch.setattr(Bus, "enqueue", full)
    async with open_nodes(desk):
        result = await replayed(desk, flights)
    assert set(result.failures) == {"OVERLOADED"}
    assert 40 <= result.progress.failed < 600
    assert result.progress.stored == result.progress.effects == 20
    problem = f"{result.progress.failed} flights could not be stored: OVERLOADED"
    assert problem in reported(desk, result, flights).problems


async def test_a_bus_that_cannot_be_used_is_told_once(desk, flights, monkeypatch):
    async def denied(self, command, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(Bus, "enqueue", denied)
    async with open_nodes(desk):
        with pytest.raises(ZeroDivisionError):
            await replayed(desk, flights)


async def test_a_node_that_never_answers_is_named(desk, flights, monkeypatch):
    monkeypatch.setattr(day, "READY_TIMEOUT", 0.2)
    async with open_nodes(desk, NODES[:1]):
        with pytest.raises(NodeNotReadyError, match="flight-desk-2 did not answer within"):
            await replayed(desk, flights)


async def test_a_node_that_has_ended_is_named_at_once(desk, flights):
    async with open_nodes(desk, NODES[:1]):
        with pytest.raises(NodeNotReadyError, match="flight-desk-2 ended before it was ready"):
            await replayed(msgspec.structs.replace(desk, is_running=lambda _: False), flights)


async def test_partitions_that_nobody_takes_are_shown(desk, flights, monkeypatch):
    monkeypatch.setattr(day, "SHARE_TIMEOUT", 0.0)
    monkeypatch.setattr(day, "owners", lambda *_: ("flight-desk-1", None, "flight-desk-2"))
    async with open_nodes(desk):
        with pytest.raises(NodeNotReadyError, match="the partitions were not shared out within 0 s: 1·2"):
            await replayed(desk, flights)


# -- faults ------------------------------------------------------------------------------------------------------


class Willing:
    """A process that does nothing but tell the watch what a bus would see."""

    def __init__(self, node: str, seen: asyncio.Queue[tuple[str, str]]) -> None:
        self.exit_code: int | None = None
        self.is_stopped = False
        self._node = node
        self._seen = seen

    def start(self) -> None:
        pass

    def kill(self) -> None:
        self.exit_code = -9
        self._seen.put_nowait((self._node, "faulted"))

    def freeze(self) -> None:
        self.is_stopped = True
        self._seen.put_nowait((self._node, "suspect"))

    def thaw(self) -> None:
        self.is_stopped = False
        self._seen.put_nowait((self._node, "online"))
        self._seen.put_nowait(("somebody-else", "faulted"))

    def terminate(self) -> None:
        self.exit_code = 0
        self._seen.put_nowait((self._node, "draining"))


async def test_faults_befall_the_nodes_while_the_replay_runs(desk, flights, monkeypatch):
    monkeypatch.setattr(faults, "REPLACE_AFTER", 0.02)
    monkeypatch.setattr(faults, "FREEZE_SECONDS", 0.05)
    seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def watch(_: Bus) -> AsyncIterator[tuple[str, str]]:
        while True:
            yield await seen.get()

    monkeypatch.setattr(day, "watch_statuses", watch)
    others = (f"{SERVICE}-3", f"{SERVICE}-4")
    processes = {node: Willing(node, seen) for node in (*NODES, *others)}
    said: list[str] = []

    class Listening(SilentDisplay):
        def say(self, text: str) -> None:
            said.append(text)

    desk = msgspec.structs.replace(
        desk,
        is_running=lambda node: processes[node].exit_code is None,
        faults=Faults(plan_faults(NODES, *others), processes),
    )
    async with open_nodes(msgspec.structs.replace(desk, nodes=(*NODES, *others)), (*NODES, *others)):
        # Four nodes share the partitions here, not two.
        monkeypatch.setattr(day, "is_shared_out", lambda owners, _: None not in owners)
        result = await replayed(desk, flights, rate=600, display=Listening())
    report = reported(desk, result, flights)
    assert report.verdict.is_good
    # Nobody dies here, so the partitions need not move.
    assert {problem.partition(" of node ")[0] for problem in report.problems} <= {"no partition"}
    assert [(fault.kind, fault.node) for fault in report.faults] == [
        ("killed", NODES[1]),
        ("frozen", NODES[0]),
        ("rolled", others[0]),
    ]
    assert report.faults[0].at < report.faults[1].at < report.faults[2].at < report.stored_seconds
    assert [newcomer.node for newcomer in report.newcomers] == list(others)
    assert {node: totals is None for node, totals in result.totals.items()} == {
        NODES[0]: False, NODES[1]: True, others[0]: True, others[1]: False,
    }  # fmt: skip
    assert len(said) == len(result.faults.moments) >= 11
    assert not any("somebody-else" in text for text in said)


async def test_the_day_is_over_when_every_node_has_heard_so(desk):
    async with open_nodes(desk), Bus("client", url=desk.url, **BUS_OPTIONS) as client:
        await day.ready(client, NODES, desk.is_running)
        totals = await day.close_day(client, 5, [*NODES, "flight-desk-9"], lambda node: node in NODES)
        assert [node is not None and node.closed for node in totals.values()] == [True, True, False]
