"""The replay: a client that sends all flights, closes the day and asks nodes for totals."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

import msgspec

from catga_bus.bus import Bus
from catga_bus.clock import monotonic
from catga_bus.demo.data import Flight
from catga_bus.demo.display import Display
from catga_bus.demo.failover import CallTimes
from catga_bus.demo.faults import Chronicle, FaultPlan, FaultRecord
from catga_bus.demo.injector import FaultInjector, Victim
from catga_bus.demo.latency import LatencyHistogram
from catga_bus.demo.messages import Closing, FlightDelayed, NodeTotals, RecordFlight, Totals
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.watch import watch_statuses
from catga_bus.result import Err, Ok

MAX_FAILURES = 1_000
"""Failed requests after which the replay gives up: what is broken is known by then."""

READY_TIMEOUT = 20.0
"""Seconds that a node has to answer its first question."""

SETTLE_TIMEOUT = 2.0
"""Seconds that broadcast and events have to arrive: they are sent once, and may be lost."""

_POLL = 0.02  # seconds between two looks at something that takes a process or a round trip to change


class NodeNotReadyError(Exception):
    """A node did not begin to answer; the text says which, and why."""


class DeparturesBoard:
    """Another service: shows late departures as they are announced.

    Args:
        bus: A bus that is not started yet.
        expected: How many late flights there are.
    """

    def __init__(self, bus: Bus, expected: int) -> None:
        self._rows: set[int] = set()
        self._is_complete = asyncio.Event()

        @bus.handler
        async def show(event: FlightDelayed) -> None:
            self._rows.add(event.row)
            if len(self._rows) >= expected:
                self._is_complete.set()

        if not expected:
            self._is_complete.set()

    @property
    def flights(self) -> int:
        """Late flights shown, each once."""
        return len(self._rows)

    async def wait_complete(self, timeout: float) -> None:
        """Wait until every late flight has been shown, for at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_complete.wait(), timeout)


class Replay:
    """Sends flights in the order of the file, with a bounded number in flight.

    Args:
        bus: A started bus.
        flights: What to send.
        rate: Requests per second; 0 sends as fast as answers come.
        in_flight: Most requests without an answer, at least 1. A server that cannot hold the rate
            slows the replay down.
        chronicle: What happens to the nodes meanwhile, and the clock.
    """

    def __init__(
        self,
        bus: Bus,
        flights: Sequence[Flight],
        *,
        rate: float,
        in_flight: int,
        chronicle: Chronicle,
    ) -> None:
        self.times = CallTimes()
        self._bus = bus
        self._flights = flights
        self._rate = rate
        self._chronicle = chronicle
        self._now = chronicle.now
        self._is_over = False
        self._senders = min(in_flight, len(flights))
        self._next = iter(enumerate(flights))
        self._waiting = 0
        self._latency = LatencyHistogram()
        self._per_node: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    async def run(self, display: Display) -> Progress:
        """Send everything, or give up after `MAX_FAILURES`, and return how it went."""
        self._chronicle.begin()
        painter = asyncio.create_task(self._paint(display))
        try:
            # One task per place in flight rather than per request: bounded without a semaphore.
            async with asyncio.TaskGroup() as senders:
                for _ in range(self._senders):
                    senders.create_task(self._send_next())
        except ExceptionGroup as failed:
            # A bus that cannot be used tells every sender the same: one of them is enough.
            raise failed.exceptions[0] from None
        finally:
            self._is_over = True
            painter.cancel()
            await asyncio.wait([painter])
        progress = self.progress()
        display.update(progress)
        return progress

    @property
    def part(self) -> float:
        """How much of the replay is done, 0 to 1; 1 also when it has given up."""
        return 1.0 if self._is_over else (self._per_node.total() + self._failures.total()) / len(self._flights)

    def progress(self) -> Progress:
        """Return how far the replay has come."""
        p50, p99 = self._latency.percentile(50), self._latency.percentile(99)
        return Progress(
            total=len(self._flights),
            answered=self._per_node.total(),
            failed=self._failures.total(),
            in_flight=self._waiting,
            seconds=self._now(),
            p50_ms=None if p50 is None else p50 * 1_000,
            p99_ms=None if p99 is None else p99 * 1_000,
            per_node=dict(self._per_node),
            moments=self._chronicle.moments,
        )

    @property
    def failures(self) -> dict[str, int]:
        """Requests that were not answered, by code."""
        return dict(self._failures)

    async def _send_next(self) -> None:
        for row, flight in self._next:  # shared by all senders: each takes the next row of the file
            if self._failures.total() >= MAX_FAILURES:
                return
            if self._rate:
                await asyncio.sleep(row / self._rate - self._now())
            await self._send(row, flight)

    async def _send(self, row: int, flight: Flight) -> None:
        self._waiting += 1
        sent = self._now()
        result = await self._bus.send(RecordFlight(row, flight))
        self._waiting -= 1
        match result:
            case Ok(answer):
                answered = self._now()
                self._latency.add(answered - sent)
                self.times.add(sent, answered)
                self._per_node[answer.node] += 1
            case Err(code):
                # Not sent again: what has run under one id must not run under another.
                self._failures[code] += 1

    async def _paint(self, display: Display) -> None:
        while True:
            await asyncio.sleep(display.interval)
            display.update(self.progress())


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


async def close_day(bus: Bus, flights: int, nodes: Sequence[str]) -> dict[str, NodeTotals | None]:
    """Tell every node that the day is over, then ask each for its totals.

    Args:
        bus: A started bus.
        flights: How many flights were sent.
        nodes: Ids of the nodes.

    Returns:
        The totals of each node, or None where it did not answer. A broadcast arrives at most once
        and overtakes or is overtaken by a question, so a node that has not heard it yet is asked
        again until `SETTLE_TIMEOUT` has passed.
    """
    await bus.broadcast(Closing(flights))

    deadline = monotonic() + SETTLE_TIMEOUT

    async def ask(node: str) -> NodeTotals | None:
        result = await bus.send(Totals(), node=node)
        while result.is_ok and not result.value.closed and monotonic() < deadline:
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

    async def wait_ready(node: str) -> None:
        await ready(bus, [node], is_running)

    async with bus:
        await ready(bus, nodes, is_running)
        chronicle = Chronicle(tell=lambda moment: display.say(str(moment)))
        replay = Replay(bus, flights, rate=rate, in_flight=in_flight, chronicle=chronicle)
        record = None
        if faults is None:
            progress = await replay.run(display)
            living = list(nodes)
        else:
            injector = FaultInjector(faults.plan, faults.processes, chronicle, wait_ready)
            async with _watched(bus, {*nodes, *faults.plan.nodes}, chronicle):
                progress, record = await _replayed(replay, injector, display)
            living = [node for node in (*nodes, faults.plan.replacement) if is_running(node)]
        totals = await close_day(bus, progress.done, living)
        await board.wait_complete(SETTLE_TIMEOUT)
    return ReplayResult(
        progress=progress,
        failures=replay.failures,
        announcements=board.flights,
        totals=dict.fromkeys(nodes) | totals,
        times=replay.times,
        faults=record,
    )


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
