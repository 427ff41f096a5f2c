"""A day at the flight desk: wait for the nodes, replay the flights, close the day, ask for totals."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

import msgspec

from catga_bus.bus import Bus
from catga_bus.clock import monotonic
from catga_bus.demo.data import Flight
from catga_bus.demo.display import Display
from catga_bus.demo.faults import GONE, Chronicle, FaultPlan, FaultRecord, What, first
from catga_bus.demo.injector import FaultInjector, Victim
from catga_bus.demo.messages import Closing, NodeTotals, Totals, View
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.replay import DeparturesBoard, Replay
from catga_bus.demo.watch import watch_statuses

READY_TIMEOUT = 20.0
"""Seconds that a node has to answer its first question."""

SETTLE_TIMEOUT = 2.0
"""Seconds that broadcast and events have to arrive: they are sent once, and may be lost."""

VIEWS_TIMEOUT = 2.5
"""Seconds that the nodes have to agree that one of them is gone; a frozen one is thawed after 3."""

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


async def gone_in_every_view(bus: Bus, node: str, observers: Sequence[str]) -> bool:
    """Ask nodes how they see one of them until all of them see it as gone.

    Args:
        bus: A started bus.
        node: Id of the node that they are asked about.
        observers: Ids of the nodes that are asked.

    Returns:
        Whether all said so within `VIEWS_TIMEOUT`.
    """

    async def sees(observer: str) -> None:
        while True:
            result = await bus.send(View(), node=observer, timeout=1.0)
            if result.is_ok and result.value.get(node) in GONE:
                return
            await asyncio.sleep(_POLL)

    try:
        async with asyncio.timeout(VIEWS_TIMEOUT):
            await asyncio.gather(*map(sees, observers))
    except TimeoutError:
        return False
    return True


async def close_day(
    bus: Bus, flights: int, nodes: Sequence[str], is_running: Callable[[str], bool]
) -> dict[str, NodeTotals | None]:
    """Tell every node that the day is over, then ask each for its totals.

    Args:
        bus: A started bus.
        flights: How many flights were sent.
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


async def replay_day(
    url: str,
    namespace: str,
    flights: Sequence[Flight],
    nodes: Sequence[str],
    *,
    rate: float,
    in_flight: int,
    display: Display,
    is_running: Callable[[str], bool],
    faults: Faults | None = None,
) -> ReplayResult:
    """Send a file of flights to a running flight desk and close the day.

    Args:
        url: Address of the server.
        namespace: The nodes' namespace.
        flights: What to send.
        nodes: Ids of the nodes.
        rate: Requests per second; 0 for flat out.
        in_flight: Most requests without an answer.
        display: What shows the progress.
        is_running: Whether the process of a node lives.
        faults: What befalls the nodes meanwhile; None for a peaceful day.

    Raises:
        NodeNotReadyError: A node, or the replacement of one, did not begin to answer.
        CatgaError: There is no server, or it refuses us.
    """
    bus = Bus("departures-board", url=url, namespace=namespace)
    board = DeparturesBoard(bus, sum(flight.is_late for flight in flights))

    async with bus:
        await ready(bus, nodes, is_running)
        chronicle = Chronicle(tell=lambda moment: display.say(str(moment)))
        replay = Replay(bus, flights, rate=rate, in_flight=in_flight, chronicle=chronicle)
        record = None
        if faults is None:
            progress = await replay.run(display)
            living = list(nodes)
        else:
            injector = _injector(bus, faults, nodes, chronicle, is_running)
            async with _watched(bus, {*nodes, *faults.plan.nodes}, chronicle):
                progress, record = await _replayed(replay, injector, display)
            living = [node for node in (*nodes, faults.plan.replacement) if is_running(node)]
        totals = await close_day(bus, progress.done, living, is_running)
        await board.wait_complete(SETTLE_TIMEOUT)
    return ReplayResult(
        progress=progress,
        failures=replay.failures,
        announcements=board.flights,
        totals=dict.fromkeys(nodes) | totals,
        times=replay.times,
        faults=record,
    )


def _injector(
    bus: Bus, faults: Faults, nodes: Sequence[str], chronicle: Chronicle, is_running: Callable[[str], bool]
) -> FaultInjector:
    plan = faults.plan

    async def wait_ready(node: str) -> None:
        await ready(bus, [node], is_running)

    async def wait_gone(node: str) -> bool:
        is_replaced = first(chronicle.moments, plan.replacement, What.READY) is not None
        everyone = [*nodes, plan.replacement] if is_replaced else nodes
        return await gone_in_every_view(bus, node, [one for one in everyone if one != node and is_running(one)])

    return FaultInjector(plan, faults.processes, chronicle, wait_ready, wait_gone)


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


async def _replayed(replay: Replay, injector: FaultInjector, display: Display) -> tuple[Progress, FaultRecord]:
    """Send everything, and make the faults happen meanwhile."""
    injecting = asyncio.create_task(injector.run(lambda: replay.part))
    try:
        progress = await replay.run(display)
        return progress, await injecting
    finally:
        injecting.cancel()
        await asyncio.wait([injecting])
