"""What travels between the flight desk, the departures board and the replay."""

import msgspec

from catga_bus.demo.data import Figures, Flight
from catga_bus.messages import Event, Request


class AircraftFigures(msgspec.Struct, frozen=True):
    """The answer to `RecordFlight`: what one node has seen of one aircraft so far."""

    node: str
    tailnum: str | None
    """None where the file does not know the aircraft; the figures are then this flight's alone."""

    figures: Figures


class RecordFlight(Request[AircraftFigures], frozen=True):
    """Record one flight. Any node of the flight desk may take it."""

    row: int
    """Place of the flight in the file, counted from 0."""

    flight: Flight


class FlightDelayed(Event, frozen=True, durable=False):
    """A flight left over an hour late: for boards that show what is going on; not stored."""

    row: int
    carrier: str
    flight: int
    dep_delay: int


class Closing(Event, frozen=True, durable=False):
    """The day is over: broadcast to every node of the desk, which then takes no more flights."""

    flights: int
    """How many flights the sender has sent."""


class NodeTotals(msgspec.Struct, frozen=True):
    """The answer to `Totals`: what one node has in its memory."""

    node: str
    figures: Figures
    """One flight per execution: a request that ran twice counts twice."""

    announced: int
    """How many `FlightDelayed` events the node has published."""

    closed: bool
    """Whether the node has heard `Closing`."""


class View(Request[dict[str, str]], frozen=True):
    """Ask a node how it sees the nodes of the desk: their status by id; sent to one named node."""


class Totals(Request[NodeTotals], frozen=True):
    """Ask a node for its totals; sent to one named node."""
