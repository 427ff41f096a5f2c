"""The file of flights: what is read from it, and what is said about one that cannot be used."""

import gzip
from pathlib import Path

import pytest

from catga_bus.demo import data
from catga_bus.demo.data import (
    SHIPPED,
    Figures,
    Flight,
    FlightDataError,
    figures_of,
    in_schedule_order,
    read_flights,
)

HEADER = "scheduled,carrier,flight,tailnum,origin,dest,dep_delay,arr_delay,distance"
ROW = "2013-01-01T05:15,UA,1545,N14228,EWR,IAH,2,11,1400"


def written(tmp_path: Path, *rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "flights.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def shipped() -> list[Flight]:
    return read_flights(SHIPPED)


def test_the_shipped_file_adds_up_to_what_its_provenance_says(shipped):
    assert figures_of(shipped) == Figures(flights=27_004, cancelled=521, delay_minutes=265_801, miles=27_188_805)
    assert sum(flight.is_late for flight in shipped) == 1_821


def test_the_shipped_file_has_diverted_flights_and_unknown_aircraft(shipped):
    diverted = [f for f in shipped if f.dep_delay is not None and f.arr_delay is None]
    assert len(diverted) == 85
    assert sum(flight.tailnum is None for flight in shipped) == 155


def test_the_shipped_file_is_in_the_order_of_the_schedule(shipped):
    instants = [flight.scheduled for flight in shipped]
    assert instants == sorted(instants)
    assert in_schedule_order(shipped) == shipped


def test_flights_are_put_in_the_order_of_the_schedule_and_those_of_a_minute_stay_as_they_are(tmp_path):
    times = ("2013-01-02T05:15", "2013-01-01T05:15", "2013-01-02T05:15", "2013-01-01T05:14")
    rows = [",".join([at, "UA", str(number), *ROW.split(",")[3:]]) for number, at in enumerate(times)]
    assert [one.flight for one in in_schedule_order(read_flights(written(tmp_path, *rows)))] == [3, 1, 0, 2]


def test_a_flight_without_an_aircraft_has_its_carrier_and_number_for_one(shipped):
    unknown = [flight for flight in shipped if flight.tailnum is None]
    assert all(flight.dep_delay is None for flight in unknown)  # cancelled before one was given to them
    names = {flight.aircraft for flight in unknown}
    assert "AA 133" in names
    assert len(names) == 99
    assert names.isdisjoint({flight.tailnum for flight in shipped})


def test_no_tail_number_can_be_what_stands_for_one(tmp_path):
    with pytest.raises(FlightDataError, match="column tailnum"):
        read_flights(written(tmp_path, ROW.replace("N14228", "AA 133")))


def test_a_plain_file_is_read_like_a_compressed_one(tmp_path):
    plain = written(tmp_path, ROW)
    compressed = tmp_path / "flights.csv.gz"
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_flights(plain) == read_flights(compressed)
    assert len(read_flights(plain)) == 1


def test_windows_line_ends_a_byte_order_mark_and_empty_lines_are_read(tmp_path):
    path = tmp_path / "flights.csv"
    path.write_bytes(f"\ufeff{HEADER}\r\n{ROW}\r\n\r\n".encode())
    assert read_flights(path)[0].tailnum == "N14228"


def test_an_empty_departure_delay_is_a_cancelled_flight(tmp_path):
    (flight,) = read_flights(written(tmp_path, "2013-01-01T06:00,B6,125,NA,JFK,FLL,,,1069"))
    assert flight.dep_delay is None
    assert flight.tailnum is None
    assert figures_of([flight]) == Figures(flights=1, cancelled=1, delay_minutes=0, miles=1_069)


def test_a_flight_is_late_only_above_an_hour():
    def flight(delay: int | None) -> bool:
        text = "" if delay is None else str(delay)
        return data._flight(Path("x"), 2, [*ROW.split(",")[:6], text, "", "100"]).is_late

    assert [flight(delay) for delay in (None, -5, 60, 61)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("scheduled", "2013-01-01"),
        ("scheduled", "2013-02-30T06:00"),
        ("carrier", ""),
        ("carrier", "U A"),
        ("flight", "-3"),
        ("flight", "1_000"),
        ("tailnum", "N" * 13),
        ("origin", "é"),
        ("dest", ""),
        ("dep_delay", "2.5"),
        ("dep_delay", "NA"),
        ("arr_delay", "soon"),
        ("distance", ""),
        ("distance", "12345678"),
        ("distance", "٣"),
    ],
)
def test_a_bad_field_is_reported_with_line_column_and_value(tmp_path, column, value):
    fields = dict(zip(HEADER.split(","), ROW.split(","), strict=True)) | {column: value}
    path = written(tmp_path, ROW, ",".join(fields.values()))
    with pytest.raises(FlightDataError) as caught:
        read_flights(path)
    assert f"{path}, line 3, column {column}: expected " in str(caught.value)
    assert repr(value) in str(caught.value)


def test_bytes_that_are_not_text_are_reported_with_line_and_column(tmp_path):
    path = tmp_path / "flights.csv"
    path.write_bytes(f"{HEADER}\n{ROW}\n".encode().replace(b"EWR", b"\xff\xfe"))
    with pytest.raises(FlightDataError, match="line 2, column origin"):
        read_flights(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW + ",9", "10 columns where 9 belong"),
        ("2013-01-01T05:15,UA", "2 columns where 9 belong"),
        ('2013-01-01T05:15,"UA', "line 3"),
        ("x" * 200_000, "line 3: field larger than field limit"),
    ],
)
def test_a_line_that_is_no_row_is_reported_with_its_number(tmp_path, row, said):
    with pytest.raises(FlightDataError, match="line 3") as caught:
        read_flights(written(tmp_path, ROW, row))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (HEADER.replace("dep_delay", "delay"), "column dep_delay: the header says 'delay' there"),
        ("scheduled,carrier", "column flight: the header says 'nothing' there"),
        (HEADER + ",tail", "10 columns; the header must be"),
        ("", "column scheduled"),
    ],
)
def test_a_wrong_header_is_reported_with_what_belongs_there(tmp_path, header, said):
    with pytest.raises(FlightDataError, match="line 1") as caught:
        read_flights(written(tmp_path, ROW, header=header))
    assert said in str(caught.value)


def test_a_file_without_flights_is_an_error(tmp_path):
    with pytest.raises(FlightDataError, match="has no flights"):
        read_flights(written(tmp_path))


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FlightDataError, match=r"nowhere\.csv: cannot be read: No such file"):
        read_flights(tmp_path / "nowhere.csv")


def test_a_directory_is_an_error(tmp_path):
    with pytest.raises(FlightDataError, match="cannot be read: Is a directory"):
        read_flights(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file_is_an_error(tmp_path, damage):
    whole = bytearray(SHIPPED.read_bytes())
    if damage == "cut":
        del whole[20_000:]
    else:
        whole[1_000] ^= 0xFF
    path = tmp_path / "flights.csv.gz"
    path.write_bytes(whole)
    with pytest.raises(FlightDataError, match=r"flights\.csv\.gz"):
        read_flights(path)


def test_a_file_with_too_many_flights_is_refused_before_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_ROWS", 2)
    with pytest.raises(FlightDataError, match="more than 2 flights"):
        read_flights(written(tmp_path, ROW, ROW, ROW))
