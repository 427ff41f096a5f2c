"""The flights: read and checked from a file, and what they add up to when no bus is involved."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from catga_bus.errors import ConfigurationError

LATE_MINUTES = 60
"""A departure that is later than this is announced by a `FlightDelayed` event."""

MAX_ROWS = 1_000_000
# Chosen: all rows are held in memory, some 400 bytes each. All flights from New York in 2013 are
# 336,776.

SHIPPED = Path(__file__).with_name("flights-2013-01.csv.gz")
"""The file that comes with the package; `PROVENANCE.md` beside it says where it is from."""

_GZIP_MAGIC = b"\x1f\x8b"


class FlightDataError(ConfigurationError):
    """A file of flights cannot be used; the text names the file, the line and the column."""


class Flight(msgspec.Struct, frozen=True):
    """One row of the file."""

    scheduled: datetime
    """Scheduled departure, local time."""

    carrier: str
    flight: int
    tailnum: str | None
    """Registration of the aircraft; None where the file says `NA`."""

    origin: str
    dest: str
    dep_delay: int | None
    """Minutes, negative when early; None: cancelled."""

    arr_delay: int | None
    """Minutes, negative when early; None: cancelled or diverted."""

    distance: int
    """Miles."""

    @property
    def aircraft(self) -> str:
        """What flies: the tail number, or carrier and flight number where the file does not know it.

        Those flights are cancelled ones that no aircraft was given to; the space in what stands for it keeps it from
        being a registration. So they are spread over the partitions, and the days of one flight number are in order.
        """
        return f"{self.carrier} {self.flight}" if self.tailnum is None else self.tailnum

    @property
    def is_late(self) -> bool:
        """Whether the flight left more than `LATE_MINUTES` after its time."""
        return self.dep_delay is not None and self.dep_delay > LATE_MINUTES


class Figures(msgspec.Struct, frozen=True):
    """What a number of flights add up to."""

    flights: int = 0
    """All of them, cancelled ones included."""

    cancelled: int = 0
    delay_minutes: int = 0
    """Sum of the departure delays; early departures count negative."""

    miles: int = 0
    """Sum of the distances of all flights, cancelled ones included."""

    def plus(self, dep_delay: int | None, distance: int) -> "Figures":
        """Return the figures with one more flight.

        Args:
            dep_delay: Departure delay in minutes; None if the flight was cancelled.
            distance: Miles.
        """
        return Figures(
            flights=self.flights + 1,
            cancelled=self.cancelled + (dep_delay is None),
            delay_minutes=self.delay_minutes + (dep_delay or 0),
            miles=self.miles + distance,
        )


def in_schedule_order(flights: Iterable[Flight]) -> list[Flight]:
    """Return flights by their scheduled departure; those of one minute in the order in which they came."""
    return sorted(flights, key=lambda flight: flight.scheduled)


def figures_of(flights: Iterable[Flight]) -> Figures:
    """Add flights up directly: what the bus has to arrive at as well."""
    figures = Figures()
    for flight in flights:
        figures = figures.plus(flight.dep_delay, flight.distance)
    return figures


def read_flights(path: Path) -> list[Flight]:
    """Read a file of flights, `.csv` or `.csv.gz` (told apart by content), and check every field.

    Raises:
        FlightDataError: The file cannot be read, or a line is not what it should be.
    """
    flights: list[Flight] = []
    try:
        with _opened(path) as text:
            for flight in _parsed(path, text):
                if len(flights) == MAX_ROWS:
                    raise FlightDataError(f"{path}: more than {MAX_ROWS:,} flights; split the file")
                flights.append(flight)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FlightDataError(f"{path}: cannot be read: {reason}") from error
    if not flights:
        raise FlightDataError(f"{path}: has no flights, only a header")
    return flights


def _opened(path: Path) -> IO[str]:
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    raw: Any = (gzip.open if is_gzip else open)(path, "rb")
    # Bytes that are not UTF-8 become surrogates, which no column admits: so they are reported with
    # line and column.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _parsed(path: Path, text: IO[str]) -> Iterator[Flight]:
    rows = csv.reader(text, strict=True)
    try:
        _check_header(path, next(rows, []))
        for row in rows:
            if not row:
                continue  # an empty line, as some editors leave at the end
            if len(row) != len(_COLUMNS):
                raise FlightDataError(f"{path}, line {rows.line_num}: {len(row)} columns where {len(_COLUMNS)} belong")
            yield _flight(path, rows.line_num, row)
    except csv.Error as error:
        raise FlightDataError(f"{path}, line {rows.line_num}: {error}") from error


def _check_header(path: Path, header: list[str]) -> None:
    if header == list(_COLUMNS):
        return
    for place, name in enumerate(_COLUMNS):
        found = header[place] if place < len(header) else "nothing"
        if found != name:
            raise FlightDataError(
                f"{path}, line 1, column {name}: the header says {found[:40]!r} there; it must be {','.join(_COLUMNS)}"
            )
    raise FlightDataError(f"{path}, line 1: {len(header)} columns; the header must be {','.join(_COLUMNS)}")


def _flight(path: Path, line: int, row: list[str]) -> Flight:
    fields: dict[str, Any] = {}
    for (name, (parse, expected)), value in zip(_COLUMNS.items(), row, strict=True):
        try:
            fields[name] = parse(value)
        except ValueError:
            raise FlightDataError(
                f"{path}, line {line}, column {name}: expected {expected}, got {value[:40]!r}"
            ) from None
    return Flight(**fields)


def _matching(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def checked(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(value)
        return value

    return checked


_code = _matching(r"[A-Za-z0-9]{1,8}")
_registration = _matching(r"[A-Za-z0-9-]{1,12}")
_whole = _matching(r"[0-9]{1,6}")
_signed = _matching(r"-?[0-9]{1,6}")
_instant = _matching(r"\d{4}-\d\d-\d\dT\d\d:\d\d")


def _number(value: str) -> int:
    return int(_whole(value))


def _delay(value: str) -> int | None:
    return int(_signed(value)) if value else None


def _tail_number(value: str) -> str | None:
    return None if value in {"", "NA"} else _registration(value)


def _time(value: str) -> datetime:
    return datetime.fromisoformat(_instant(value))


# Per column of the file, in its order: how a field is read, and what to tell who wrote something
# else.
_COLUMNS: dict[str, tuple[Callable[[str], Any], str]] = {
    "scheduled": (_time, "a time like 2013-01-31T06:00"),
    "carrier": (_code, "1 to 8 letters and digits"),
    "flight": (_number, "a whole number of up to 6 digits"),
    "tailnum": (_tail_number, "1 to 12 letters, digits and dashes, or NA"),
    "origin": (_code, "1 to 8 letters and digits"),
    "dest": (_code, "1 to 8 letters and digits"),
    "dep_delay": (_delay, "whole minutes, or nothing for a cancelled flight"),
    "arr_delay": (_delay, "whole minutes, or nothing for a cancelled or diverted flight"),
    "distance": (_number, "whole miles of up to 6 digits"),
}
