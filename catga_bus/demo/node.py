"""One node of the flight desk: a service as its team would write it.

`FlightDesk` is what the service does and knows nothing of a bus; `open_desk` ties it to messages;
`serve` runs it. The demo starts this module once per node: `python -m catga_bus.demo.node --help`.
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from catga_bus.bus import Bus
from catga_bus.context import Context
from catga_bus.demo.data import Figures
from catga_bus.demo.ledger import Execution, ExecutionLog, LedgerError
from catga_bus.demo.messages import (
    AircraftFigures,
    Closing,
    FlightDelayed,
    NodeTotals,
    RecordFlight,
    Totals,
    View,
)
from catga_bus.demo.watch import statuses
from catga_bus.errors import CatgaError
from catga_bus.result import Err

SERVICE = "flight-desk"
"""The nodes of one service share its requests."""


class FlightDesk:
    """The books of one node: figures per aircraft and in all.

    They grow with the number of aircraft, some 3,000 in the shipped file, and end with the process.

    Args:
        node: Id of the node.
        log: Where each execution leaves its line.
    """

    def __init__(self, node: str, log: ExecutionLog) -> None:
        self._node = node
        self._log = log
        self._aircraft: dict[str, Figures] = {}
        self._figures = Figures()
        self._announced = 0
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether no more flights are taken."""
        return self._closed

    def record(self, message_id: str, request: RecordFlight) -> AircraftFigures:
        """Write the execution down, then count the flight.

        Raises:
            LedgerError: The line could not be written; nothing is counted.
        """
        flight = request.flight
        self._log.append(Execution(message_id, self._node, request.row, flight.dep_delay, flight.distance))
        self._figures = self._figures.plus(flight.dep_delay, flight.distance)
        figures = Figures() if flight.tailnum is None else self._aircraft.get(flight.tailnum, Figures())
        figures = figures.plus(flight.dep_delay, flight.distance)
        if flight.tailnum is not None:
            self._aircraft[flight.tailnum] = figures
        return AircraftFigures(node=self._node, tailnum=flight.tailnum, figures=figures)

    def announced(self) -> None:
        """Count one announcement of a late flight."""
        self._announced += 1

    def close(self) -> None:
        """Take no more flights."""
        self._closed = True

    def totals(self) -> NodeTotals:
        """Return what this node has in its memory."""
        return NodeTotals(node=self._node, figures=self._figures, announced=self._announced, closed=self._closed)


def open_desk(bus: Bus, desk: FlightDesk) -> None:
    """Register the handlers of the flight desk."""

    @bus.handler
    async def record_flight(request: RecordFlight, ctx: Context) -> AircraftFigures | Err:
        if desk.is_closed:
            return Err("DESK_CLOSED", f"flight {request.flight.flight} came after closing time")
        answer = desk.record(ctx.message_id, request)
        if request.flight.is_late:
            flight = request.flight
            await ctx.publish(FlightDelayed(request.row, flight.carrier, flight.flight, flight.dep_delay or 0))
            desk.announced()
        return answer

    @bus.handler
    async def close_desk(event: Closing) -> None:
        desk.close()

    @bus.handler
    async def view(request: View) -> dict[str, str]:
        return statuses(bus, SERVICE)

    @bus.handler
    async def totals(request: Totals) -> NodeTotals:
        return desk.totals()


async def serve(url: str | None, node_id: str, namespace: str, log: Path, *, until_eof: bool = False) -> None:
    """Run one node until SIGTERM or SIGINT, then finish what it has begun.

    Args:
        url: Address of the server; None for the one that the environment names.
        node_id: Id of the node; no two nodes may share one.
        namespace: Keeps this run apart from all others on the same server.
        log: The execution log that all nodes share.
        until_eof: Also end when standard input, a pipe, ends: as it does when the parent dies.
    """
    bus = Bus(SERVICE, url=url, node_id=node_id, namespace=namespace)
    with ExecutionLog(log) as executions:
        open_desk(bus, FlightDesk(node_id, executions))
        if until_eof:
            _end_with_standard_input()
        await bus.run()


def _end_with_standard_input() -> None:
    loop = asyncio.get_running_loop()

    def on_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            signal.raise_signal(signal.SIGTERM)

    loop.add_reader(0, on_input)


def command(node_id: str, namespace: str, log: Path) -> list[str]:
    """Return the command that runs one node until its standard input ends.

    The address of the server is not part of it: it may hold a password, and anybody can read the
    arguments of a process. It goes in the environment, as `CATGA_URL`.

    Args:
        node_id: Id of the node.
        namespace: Keeps this run apart from all others on the same server.
        log: The execution log that all nodes share.
    """
    program = [sys.executable, "-m", "catga_bus.demo.node", "--until-eof"]
    return [*program, "--node-id", node_id, "--namespace", namespace, "--log", str(log)]


def main() -> None:
    """Run one node as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m catga_bus.demo.node",
        description="One node of the flight desk.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="address of the server (default: CATGA_URL, NATS_URL, this machine)")
    parser.add_argument("--node-id", required=True, help="id of this node; no two nodes may share one")
    parser.add_argument("--namespace", required=True, help="keeps this run apart from others on the server")
    parser.add_argument("--log", required=True, type=Path, help="the execution log that all nodes share")
    parser.add_argument("--until-eof", action="store_true", help="also end when standard input, a pipe, ends")
    options = parser.parse_args()
    node = serve(options.url, options.node_id, options.namespace, options.log, until_eof=options.until_eof)
    try:
        asyncio.run(node)
    except (CatgaError, LedgerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
