"""The handlers of the flight desk, on a bus over the broker in memory."""

import sqlite3
from collections.abc import AsyncIterator
from datetime import datetime

import msgspec
import pytest

from catga_bus.bus import Bus
from catga_bus.demo.data import Flight
from catga_bus.demo.effects import create_effect_log, read_effects
from catga_bus.demo.ledger import ExecutionLog, read_executions
from catga_bus.demo.messages import Closing, FlightDelayed, NodeTotals, RecordFlight, Totals
from catga_bus.demo.node import SERVICE, command, open_desk
from catga_bus.demo.options import BUS_OPTIONS, inbox_at
from catga_bus.testing import eventually

FLIGHT = Flight(
    scheduled=datetime.fromisoformat("2013-01-01T06:00"),
    carrier="UA",
    flight=1545,
    tailnum="N14228",
    origin="EWR",
    dest="IAH",
    dep_delay=10,
    arr_delay=11,
    distance=1_400,
)


def record(row: int, **changes) -> RecordFlight:
    flight = msgspec.structs.replace(FLIGHT, **changes)
    return RecordFlight(flight.aircraft, row, flight)


@pytest.fixture
def path(tmp_path):
    create_effect_log(tmp_path / "effects.db")
    return tmp_path


@pytest.fixture
async def client(request, path) -> AsyncIterator[Bus]:
    """A client beside one node of the desk."""
    url = f"memory://{request.node.name}"
    desk = Bus(SERVICE, url=url, node_id="desk-1", inbox=inbox_at(path / "effects.db"), **BUS_OPTIONS)
    with ExecutionLog(path / "log") as log:
        open_desk(desk, log)
        async with desk, Bus("client", url=url, **BUS_OPTIONS) as bus:
            yield bus


async def test_a_flight_leaves_an_effect_and_a_line(client, path):
    (await client.send(record(7))).unwrap()
    (effect,) = read_effects(path / "effects.db")
    assert effect[1:6] == (7, "N14228", 10, 1_400, "desk-1")
    (execution,) = read_executions(path / "log")
    assert (execution.node, execution.row) == ("desk-1", 7)
    assert (execution.partition, execution.epoch) == (effect.partition, effect.epoch)
    assert effect.epoch > 0


async def test_what_is_handled_twice_leaves_two_lines_and_one_effect(client, path):
    # The first runs cannot write: the table is not there.
    effects = sqlite3.connect(path / "effects.db", isolation_level=None)
    effects.execute("ALTER TABLE effects RENAME TO elsewhere")
    await client.enqueue(record(0))
    await eventually(lambda: len(read_executions(path / "log")) >= 2)
    effects.execute("ALTER TABLE elsewhere RENAME TO effects")
    effects.close()
    await eventually(lambda: len(read_effects(path / "effects.db")) == 1)
    assert len({execution.message_id for execution in read_executions(path / "log")}) == 1


async def test_only_late_flights_are_announced(request, client):
    heard: list[FlightDelayed] = []
    board = Bus("board", url=f"memory://{request.node.name}", **BUS_OPTIONS)

    @board.handler(start="all")
    async def show(event: FlightDelayed) -> None:
        heard.append(event)

    async with board:
        for row, delay in enumerate((60, 61, None, 200)):
            (await client.send(record(row, dep_delay=delay))).unwrap()
        await eventually(lambda: len(heard) == 2)
    assert heard == [FlightDelayed("N14228", 1, "UA", 1545, 61), FlightDelayed("N14228", 3, "UA", 1545, 200)]


async def test_the_totals_say_what_was_done_and_whether_the_day_is_over(client):
    (await client.send(record(0))).unwrap()
    assert (await client.send(Totals(), node="desk-1")).unwrap() == NodeTotals("desk-1", 1, 0, 0, closed=False)
    await client.broadcast(Closing(1))
    totals = (await client.send(Totals(), node="desk-1")).unwrap()
    while not totals.closed:
        totals = (await client.send(Totals(), node="desk-1")).unwrap()
    assert totals.executions == 1


def test_the_command_of_a_node_does_not_show_the_address(tmp_path):
    words = command("desk-1", "demo-1", tmp_path / "effects.db", tmp_path / "log")
    assert "--url" not in words
    assert words[1:3] == ["-m", "catga_bus.demo.node"]
