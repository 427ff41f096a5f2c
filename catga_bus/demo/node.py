"""One node of the flight desk: a service as its team would write it.

`FlightDesk` is what the service does; `open_desk` ties it to messages; `serve` runs it. The demo starts this module
once per node: `python -m catga_bus.demo.node --help`.
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from catga_bus.bus import Bus
from catga_bus.clock import monotonic
from catga_bus.context import Context
from catga_bus.demo.effects import INSERT
from catga_bus.demo.ledger import Execution, ExecutionLog, LedgerError
from catga_bus.demo.messages import Closing, FlightDelayed, NodeTotals, RecordFlight, Totals
from catga_bus.demo.options import BUS_OPTIONS, inbox_at
from catga_bus.errors import CatgaError

SERVICE = "flight-desk"
"""The nodes of one service share its partitions."""


def open_desk(bus: Bus, log: ExecutionLog) -> None:
    """Register the handlers of the flight desk.

    Args:
        bus: A bus with an inbox in the file of the effect log, not yet started.
        log: Where each execution leaves its line.
    """
    executions = 0
    is_closed = False

    @bus.handler
    async def record_flight(command: RecordFlight, ctx: Context) -> None:
        nonlocal executions
        executions += 1
        assert ctx.fence is not None  # commands have one
        partition, epoch = ctx.fence.partition, ctx.fence.epoch
        log.append(Execution(ctx.message_id, ctx.node, command.row, partition, epoch))
        flight = command.flight
        transaction = await ctx.transaction()
        if flight.is_late:
            # Sent with the commit, so never for a flight that is not recorded, and never twice.
            await ctx.publish(
                FlightDelayed(command.aircraft, command.row, flight.carrier, flight.flight, flight.dep_delay or 0)
            )
        effect = (command.row, command.aircraft, flight.dep_delay, flight.distance, ctx.node, partition, epoch)
        await transaction.execute(INSERT, (*effect, monotonic()))

    @bus.handler
    async def close_desk(event: Closing) -> None:
        nonlocal is_closed
        is_closed = True

    @bus.handler
    async def totals(request: Totals) -> NodeTotals:
        work = bus.statistics().stored.work
        return NodeTotals(
            node=bus.node_id, executions=executions, duplicates=work.duplicates, fenced=work.fenced, closed=is_closed
        )


async def serve(
    url: str | None, node_id: str, namespace: str, effects: Path, log: Path, *, until_eof: bool = False
) -> bool:
    """Run one node until SIGTERM or SIGINT, then finish what it has begun and hand its partitions over.

    Args:
        url: Address of the server; None for the one that the environment names.
        node_id: Id of the node; no two nodes may share one.
        namespace: Keeps this run apart from all others on the same server.
        effects: The effect log that all nodes share, and their inbox.
        log: The execution log that all nodes share.
        until_eof: Also end when standard input, a pipe, ends: as it does when the parent dies.

    Returns:
        Whether nothing was left unfinished.
    """
    bus = Bus(SERVICE, url=url, node_id=node_id, namespace=namespace, inbox=inbox_at(effects), **BUS_OPTIONS)
    with ExecutionLog(log) as executions:
        open_desk(bus, executions)
        if until_eof:
            _end_with_standard_input()
        return await bus.run()


def _end_with_standard_input() -> None:
    loop = asyncio.get_running_loop()

    def on_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            signal.raise_signal(signal.SIGTERM)

    loop.add_reader(0, on_input)


def command(node_id: str, namespace: str, effects: Path, log: Path) -> list[str]:
    """Return the command that runs one node until its standard input ends.

    The address of the server is not part of it: it may hold a password, and anybody can read the
    arguments of a process. It goes in the environment, as `CATGA_URL`.

    Args:
        node_id: Id of the node.
        namespace: Keeps this run apart from all others on the same server.
        effects: The effect log that all nodes share.
        log: The execution log that all nodes share.
    """
    program = [sys.executable, "-m", "catga_bus.demo.node", "--until-eof", "--node-id", node_id]
    return [*program, "--namespace", namespace, "--effects", str(effects), "--log", str(log)]


def main() -> None:
    """Run one node as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m catga_bus.demo.node",
        description="One node of the flight desk. Exit code 0: it has finished what it had begun; 1: it has not.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="address of the server (default: CATGA_URL, NATS_URL, this machine)")
    parser.add_argument("--node-id", required=True, help="id of this node; no two nodes may share one")
    parser.add_argument("--namespace", required=True, help="keeps this run apart from others on the server")
    parser.add_argument("--effects", required=True, type=Path, help="the effect log that all nodes share")
    parser.add_argument("--log", required=True, type=Path, help="the execution log that all nodes share")
    parser.add_argument("--until-eof", action="store_true", help="also end when standard input, a pipe, ends")
    given = parser.parse_args()
    node = serve(given.url, given.node_id, given.namespace, given.effects, given.log, until_eof=given.until_eof)
    try:
        sys.exit(0 if asyncio.run(node) else 1)
    except (CatgaError, LedgerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
