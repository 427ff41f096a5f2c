"""A day at the flight desk: wait for the nodes, replay the flights, close the day, ask for totals."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from catga_bus.bus import Bus
from catga_bus.clock import monotonic
from catga_bus.demo.board import DeparturesBoard
from catga_bus.demo.data import Flight
from catga_bus.demo.display import Display
from catga_bus.demo.effects import EffectCounts, EffectLog
from catga_bus.demo.faults import Chronicle, FaultPlan, FaultRecord
from catga_bus.demo.injector import FaultInjector, Victim
from catga_bus.demo.messages import Closing, NodeTotals, Totals
from catga_bus.demo.node import SERVICE
from catga_bus.demo.options import BUS_OPTIONS, PARTITIONS
from catga_bus.demo.partition_map import is_shared_out, text_of_map
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.replay import Replay
from catga_bus.demo.watch import owners, watch_statuses

READY_TIMEOUT = 20.0
"""Seconds that a node has to answer its first question."""

SHARE_TIMEOUT = 20.0
"""Seconds that the nodes have to share the partitions out among them."""

SETTLE_TIMEOUT = 2.0
"""Seconds that a broadcast has to arrive: it is sent once, and may be lost."""

BOARD_PATIENCE = 10.0
"""Seconds without a new late flight on the board after which the missing ones are waited for no longer."""

_POLL = 0.02  # seconds between two looks at something that takes a process or a round trip to change


class NodeNotReadyError(Exception):
    """A node did not begin to answer; the text says which, and why."""


async def ready(bus: Bus, nodes: Sequence[str], is_running: Callable[[str], bool]) -> None:
    """Wait until every node answers.

    Args:
        bus: A started bus.
        nodes: Ids of the nodes.
        is_running: Whether the process of a node lives.

    Raises:
        NodeNotReadyError: A node's process has ended, or it did not answer within `READY_TIMEOUT`.
    """

    async def answers(node: str) -> None:
        while not (await bus.send(Totals(), node=node, timeout=1.0)).is_ok:
            if not is_running(node):
                raise NodeNotReadyError(f"node {node} ended before it was ready")
            await asyncio.sleep(_POLL)

    for node in nodes:
        try:
            await asyncio.wait_for(answers(node), READY_TIMEOUT)
        except TimeoutError:
            raise NodeNotReadyError(f"node {node} did not answer within {READY_TIMEOUT:.0f} s") from None


async def shared_out(bus: Bus, nodes: Sequence[str], is_running: Callable[[str], bool]) -> None:
    """Wait until the nodes own all partitions, and none of them two more than another one.

    Args:
        bus: A started bus.
        nodes: Ids of the nodes.
        is_running: Whether the process of a node lives.

    Raises:
        NodeNotReadyError: A node's process has ended, or it takes longer than `SHARE_TIMEOUT`.
    """
    deadline = monotonic() + SHARE_TIMEOUT
    while not is_shared_out(found := owners(bus, SERVICE, PARTITIONS), nodes):
        if ended := [node for node in nodes if not is_running(node)]:
            raise NodeNotReadyError(f"node {ended[0]} ended before it was ready")
        if monotonic() > deadline:
            raise NodeNotReadyError(
                f"the partitions were not shared out within {SHARE_TIMEOUT:.0f} s: {text_of_map(found)}"
            )
        await asyncio.sleep(_POLL)


async def close_day(
    bus: Bus, flights: int, nodes: Sequence[str], is_running: Callable[[str], bool]
) -> dict[str, NodeTotals | None]:
    """Tell every node that the day is over, then ask each for its totals.

    Args:
        bus: A started bus.
        flights: How many flights were stored.
        nodes: Ids of the nodes.
        is_running: Whether the process of a node lives; one that does not is asked once.

    Returns:
        The totals of each node, or None where it did not answer. A node that was frozen until a moment ago has to be
        found alive before it can be asked. A broadcast arrives at most once
        and overtakes or is overtaken by a question, so a node that has not heard it yet is asked
        again until `SETTLE_TIMEOUT` has passed.
    """
    await bus.broadcast(Closing(flights))

    deadline = monotonic() + SETTLE_TIMEOUT

    async def ask(node: str) -> NodeTotals | None:
        result = await bus.send(Totals(), node=node)
        while not (result.is_ok and result.value.closed) and monotonic() < deadline and is_running(node):
            await asyncio.sleep(_POLL)
            result = await bus.send(Totals(), node=node)
        return result.value if result.is_ok else None

    return dict(zip(nodes, await asyncio.gather(*map(ask, nodes)), strict=True))


class Faults(msgspec.Struct, frozen=True):
    """The faults that a replay goes through."""

    plan: FaultPlan
    processes: Mapping[str, Victim]
    """The processes of the plan's nodes."""


class Desk(msgspec.Struct, frozen=True, kw_only=True):
    """A running flight desk, as a day finds it."""

    url: str
    """Address of the server."""

    namespace: str
    """The nodes' namespace."""

    nodes: Sequence[str]
    """Ids of the nodes."""

    is_running: Callable[[str], bool]
    """Whether the process of a node lives."""

    effects: Path
    """The effect log."""

    board: Path
    """The file of the departures board; made if it is not there."""

    faults: Faults | None = None
    """What befalls the nodes meanwhile; None for a peaceful day."""


async def replay_day(
    desk: Desk, flights: Sequence[Flight], *, rate: float, in_flight: int, display: Display
) -> ReplayResult:
    """Hand all flights to a running flight desk, wait for their effects, and close the day.

    Args:
        desk: The flight desk.
        flights: In the order of the schedule.
        rate: Commands per second; 0 for flat out.
        in_flight: Most commands not known to be stored.
        display: What shows the progress.

    Raises:
        NodeNotReadyError: A node, or one that takes the place of another, did not begin to answer.
        EffectLogError: The effect log cannot be read.
        CatgaError: There is no server, or it refuses us.
    """
    board = DeparturesBoard(desk.url, desk.namespace, desk.board)
    timetable = Bus("timetable", url=desk.url, namespace=desk.namespace, **BUS_OPTIONS)
    with EffectLog(desk.effects) as log:
        async with board.bus, timetable as bus:
            await ready(bus, desk.nodes, desk.is_running)
            await shared_out(bus, desk.nodes, desk.is_running)
            chronicle = Chronicle(tell=lambda moment: display.say(str(moment)))
            replay = Replay(
                bus,
                flights,
                rate=rate,
                in_flight=in_flight,
                chronicle=chronicle,
                effects=EffectCounts(log),
                owners=lambda: owners(bus, SERVICE, PARTITIONS),
            )
            progress, record = await _replayed(bus, desk, replay, chronicle, display)
            totals = await close_day(bus, progress.stored, _living(desk), desk.is_running)
            await board.wait_shown(sum(flight.is_late for flight in flights), BOARD_PATIENCE)
    return ReplayResult(
        progress=progress,
        began=chronicle.began,
        called=replay.called,
        stored_seconds=replay.stored_seconds,
        failures=replay.failures,
        shown=board.shown(),
        totals=dict.fromkeys(_everyone(desk)) | totals,
        faults=record,
    )


def _everyone(desk: Desk) -> list[str]:
    """Return the nodes that the day has seen, or was to see."""
    plan = None if desk.faults is None else desk.faults.plan
    return [*desk.nodes, *(() if plan is None else (plan.replacement, plan.successor))]


def _living(desk: Desk) -> list[str]:
    """Return the nodes that should be there at the end: all, without faults."""
    return [node for node in _everyone(desk) if desk.faults is None or desk.is_running(node)]


async def _replayed(
    bus: Bus, desk: Desk, replay: Replay, chronicle: Chronicle, display: Display
) -> tuple[Progress, FaultRecord | None]:
    """Replay everything, and make the faults happen meanwhile."""
    if desk.faults is None:
        return await replay.run(display), None
    plan = desk.faults.plan

    async def wait_ready(node: str) -> None:
        await ready(bus, [node], desk.is_running)

    injector = FaultInjector(plan, desk.faults.processes, chronicle, wait_ready)
    async with _watched(bus, {*desk.nodes, *plan.nodes}, chronicle):
        injecting = asyncio.create_task(injector.run(lambda: replay.part))
        try:
            progress = await replay.run(display)
            return progress, await injecting
        finally:
            injecting.cancel()
            await asyncio.wait([injecting])


@contextlib.asynccontextmanager
async def _watched(bus: Bus, nodes: Collection[str], chronicle: Chronicle) -> AsyncIterator[None]:
    """Write down how the bus sees the nodes, for as long as the block lasts."""

    async def watch() -> None:
        async for node, status in watch_statuses(bus):
            if node in nodes:
                chronicle.see(node, status)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])
    if not watching.cancelled():
        watching.result()
