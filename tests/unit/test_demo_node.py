"""The books of a node, without a bus."""

from datetime import datetime

import msgspec
import pytest

from catga_bus.demo.data import Figures, Flight
from catga_bus.demo.ledger import Execution, ExecutionLog, LedgerError, read_executions
from catga_bus.demo.messages import AircraftFigures, NodeTotals, RecordFlight
from catga_bus.demo.node import FlightDesk, command

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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "executions.jsonl"


@pytest.fixture
def desk(path):
    with ExecutionLog(path) as log:
        yield FlightDesk("desk-1", log)


def flight(**changes) -> Flight:
    return msgspec.structs.replace(FLIGHT, **changes)


def test_the_answer_holds_the_running_figures_of_the_aircraft(desk):
    desk.record("id-0", RecordFlight(0, flight()))
    desk.record("id-1", RecordFlight(1, flight(tailnum="N2")))
    answer = desk.record("id-2", RecordFlight(2, flight(dep_delay=None)))
    figures = Figures(flights=2, cancelled=1, delay_minutes=10, miles=2_800)
    assert answer == AircraftFigures(node="desk-1", tailnum="N14228", figures=figures)


def test_flights_of_unknown_aircraft_are_not_taken_for_one_aircraft(desk):
    desk.record("id-0", RecordFlight(0, flight(tailnum=None)))
    answer = desk.record("id-1", RecordFlight(1, flight(tailnum=None)))
    assert answer.figures.flights == 1
    assert desk.totals().figures.flights == 2


def test_each_execution_leaves_its_line(desk, path):
    desk.record("id-0", RecordFlight(7, flight()))
    desk.record("id-0", RecordFlight(7, flight()))
    assert read_executions(path) == [Execution("id-0", "desk-1", 7, 10, 1_400)] * 2


def test_a_flight_whose_line_cannot_be_written_is_not_counted(desk, monkeypatch):
    monkeypatch.setattr("os.write", lambda *_: 0)
    with pytest.raises(LedgerError):
        desk.record("id-0", RecordFlight(0, flight()))
    assert desk.totals().figures == Figures()


def test_the_totals_say_what_was_announced_and_whether_the_desk_is_closed(desk):
    desk.record("id-0", RecordFlight(0, flight()))
    desk.announced()
    desk.close()
    assert desk.is_closed
    figures = Figures(flights=1, cancelled=0, delay_minutes=10, miles=1_400)
    assert desk.totals() == NodeTotals(node="desk-1", figures=figures, announced=1, closed=True)


def test_the_command_of_a_node_does_not_show_the_address(tmp_path):
    words = command("desk-1", "demo-1", tmp_path / "log")
    assert "--url" not in words
    assert words[1:3] == ["-m", "catga_bus.demo.node"]
