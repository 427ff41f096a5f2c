"""What travels between the timetable, the flight desk and the departures board."""

import msgspec

from catga_bus.demo.data import Flight
from catga_bus.messages import Command, Event, Request


class RecordFlight(Command[None], frozen=True, partition_by="aircraft"):
    """Record one flight. The flights of one aircraft are recorded one after the other, in the order of the schedule."""

    aircraft: str
    """`Flight.aircraft`."""

    row: int
    """Place of the flight in the schedule, counted from 0."""

    flight: Flight


class FlightDelayed(Event, frozen=True, partition_by="aircraft"):
    """A flight left over an hour late. It is stored, and told to every service that handles it."""

    aircraft: str
    row: int
    carrier: str
    flight: int
    dep_delay: int


class Closing(Event, frozen=True, durable=False):
    """The day is over: broadcast to every node of the desk that lives; not stored."""

    flights: int
    """How many flights the timetable has handed in."""


class NodeTotals(msgspec.Struct, frozen=True):
    """The answer to `Totals`: what one node has done since its start."""

    node: str
    executions: int
    """How often its handler of `RecordFlight` has begun."""

    duplicates: int
    """Commands that were done before, by this node or another one: not run again."""

    fenced: int
    """Effects that were refused because another node had taken the partition over meanwhile."""

    closed: bool
    """Whether the node has heard `Closing`."""


class Totals(Request[NodeTotals], frozen=True):
    """Ask a node for its totals; sent to one named node."""
