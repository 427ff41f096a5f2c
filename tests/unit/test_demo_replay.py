"""The whole flight desk inside one process, over the memory broker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from catga_bus.bus import Bus
from catga_bus.demo import day, faults, node, replay
from catga_bus.demo.data import SHIPPED, Flight, read_flights
from catga_bus.demo.day import Faults, NodeNotReadyError, gone_in_every_view, replay_day
from catga_bus.demo.display import Display, SilentDisplay
from catga_bus.demo.faults import plan_faults
from catga_bus.demo.ledger import ExecutionLog, read_executions
from catga_bus.demo.messages import Closing, RecordFlight
from catga_bus.demo.node import SERVICE, FlightDesk, open_desk
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.report import make_report
from catga_bus.result import Err

NODES = [f"{SERVICE}-1", f"{SERVICE}-2"]


@pytest.fixture(scope="module")
def flights() -> list[Flight]:
    return read_flights(SHIPPED)[:600]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"memory://{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "executions.jsonl"


@contextlib.asynccontextmanager
async def desks(url: str, path: Path, nodes: list[str] = NODES) -> AsyncIterator[list[Bus]]:
    async with contextlib.AsyncExitStack() as stack:
        log = stack.enter_context(ExecutionLog(path))
        buses = [Bus(SERVICE, url=url, node_id=node) for node in nodes]
        for bus in buses:
            open_desk(bus, FlightDesk(bus.node_id, log))
            await stack.enter_async_context(bus)
        yield buses


async def replayed(
    url: str, flights: list[Flight], *, rate: float = 0, display: Display | None = None, living: bool = True
) -> ReplayResult:
    return await replay_day(
        url,
        "catga",
        flights,
        NODES,
        rate=rate,
        in_flight=32,
        display=display or SilentDisplay(),
        is_running=lambda _: living,
    )


async def test_a_replay_of_two_nodes_adds_up(url, path, flights):
    async with desks(url, path):
        result = await replayed(url, flights)
    report = make_report(result, read_executions(path), flights)
    assert report.problems == []
    assert report.announced == report.late_flights > 0
    assert all(node.heard_closing and node.answered for node in report.nodes)


async def test_a_paced_replay_takes_its_time_and_shows_its_progress(url, path, flights):
    seen: list[Progress] = []

    class Watching(SilentDisplay):
        interval = 0.02

        def update(self, progress: Progress) -> None:
            seen.append(progress)

    async with desks(url, path):
        result = await replayed(url, flights[:100], rate=200, display=Watching())
    assert result.progress.seconds >= 99 / 200
    assert len(seen) > 2
    assert seen[-1] == result.progress
    assert seen[-1].done == 100
    assert max(progress.in_flight for progress in seen) <= 32


async def test_flights_are_sent_in_the_order_of_the_file(url, path, flights):
    async with desks(url, path):
        await replayed(url, flights[:50], rate=5_000)
    rows = [execution.row for execution in read_executions(path)]
    assert rows[0] == 0
    assert sorted(rows) == list(range(50))


async def test_a_desk_that_is_closed_refuses_flights(url, path, flights):
    async with desks(url, path, NODES[:1]), Bus("client", url=url) as client:
        await client.broadcast(Closing(0))
        while (result := await client.send(RecordFlight(0, flights[0]))).is_ok:
            pass
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("DESK_CLOSED", "refused")


async def test_a_replay_gives_up_when_too_much_fails(url, path, flights, monkeypatch):
    monkeypatch.setattr(replay, "MAX_FAILURES", 40)
    monkeypatch.setattr(day, "SETTLE_TIMEOUT", 0.1)  # no flight is announced here
    async with desks(url, path), Bus("client", url=url) as client:
        await client.broadcast(Closing(0))
        result = await replayed(url, flights)
    assert set(result.failures) == {"DESK_CLOSED"}
    assert 40 <= result.progress.failed < 600
    assert result.progress.answered + result.progress.failed == result.progress.done < 600


async def test_a_node_that_never_answers_is_named(url, path, flights, monkeypatch):
    monkeypatch.setattr(day, "READY_TIMEOUT", 0.2)
    async with desks(url, path, NODES[:1]):
        with pytest.raises(NodeNotReadyError, match="flight-desk-2 did not answer within"):
            await replayed(url, flights)


async def test_a_node_that_has_ended_is_named_at_once(url, path, flights):
    async with desks(url, path, NODES[:1]):
        with pytest.raises(NodeNotReadyError, match="flight-desk-2 ended before it was ready"):
            await replayed(url, flights, living=False)


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


async def test_a_node_is_gone_when_every_observer_says_so(url, path, monkeypatch):
    seen = {"flight-desk-1": iter(["online", "faulted"]), "flight-desk-2": iter(["suspect", "suspect", "left"])}
    asked: list[str] = []

    def statuses(bus: Bus, service: str) -> dict[str, str]:
        asked.append(bus.node_id)
        return {"flight-desk-9": next(seen[bus.node_id])}

    monkeypatch.setattr(node, "statuses", statuses)
    async with desks(url, path), Bus("client", url=url) as client:
        assert await gone_in_every_view(client, "flight-desk-9", NODES)
    assert sorted(asked) == ["flight-desk-1"] * 2 + ["flight-desk-2"] * 3


async def test_a_node_that_one_observer_still_sees_is_not_gone(url, path, monkeypatch):
    monkeypatch.setattr(day, "VIEWS_TIMEOUT", 0.1)
    monkeypatch.setattr(
        node, "statuses", lambda bus, _: {"flight-desk-9": "faulted"} if bus.node_id == NODES[0] else {}
    )
    async with desks(url, path), Bus("client", url=url) as client:
        assert not await gone_in_every_view(client, "flight-desk-9", NODES)


async def test_faults_befall_the_nodes_while_the_replay_runs(url, path, flights, monkeypatch):
    monkeypatch.setattr(faults, "REPLACE_AFTER", 0.02)
    monkeypatch.setattr(faults, "FREEZE_SECONDS", 0.05)
    seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def watch(_: Bus) -> AsyncIterator[tuple[str, str]]:
        while True:
            yield await seen.get()

    monkeypatch.setattr(day, "watch_statuses", watch)
    monkeypatch.setattr(node, "statuses", lambda *_: dict.fromkeys(NODES, "faulted"))
    replacement = f"{SERVICE}-3"
    processes = {node: Willing(node, seen) for node in (*NODES, replacement)}
    said: list[str] = []

    class Listening(SilentDisplay):
        def say(self, text: str) -> None:
            said.append(text)

    async with desks(url, path, [*NODES, replacement]):
        result = await replay_day(
            url,
            "catga",
            flights,
            NODES,
            rate=1_000,
            in_flight=32,
            display=Listening(),
            is_running=lambda node: processes[node].exit_code is None,
            faults=Faults(plan_faults(NODES, replacement), processes),
        )
    report = make_report(result, read_executions(path), flights)
    assert report.problems == []
    assert [fault.node for fault in report.faults] == ["flight-desk-2", "flight-desk-1"]
    assert report.faults[0].at < report.faults[1].at < report.seconds
    assert result.totals["flight-desk-2"] is None  # it was killed, as far as anybody knows
    assert result.totals[replacement] is not None
    assert all(fault.unanimous_after is not None for fault in report.faults)
    assert len(said) == len(result.faults.moments) >= 9
    assert not any("somebody-else" in text for text in said)
