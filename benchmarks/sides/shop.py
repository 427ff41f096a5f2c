"""catga_bus under faults: nodes that note what they execute and how they see each other, and a steady caller."""

import asyncio
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from benchmarks.executions import ExecutionLog
from benchmarks.outages import OK, Sight
from benchmarks.steady import SteadyCaller
from catga_bus import Bus, Ok, Request


class Order(Request[int]):
    """Asks for its own number."""

    number: int


class _Watched:
    """A bus whose view of the nodes is written down.

    Args:
        bus: Started by `join`.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._sights: list[Sight] = []
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Be there with everything imported; `join` starts the bus."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the bus if it was started."""
        if self._watching is not None:
            await self._bus.drain()
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching

    async def join(self) -> str:
        """Start the bus, and return the id of its node."""
        await self._bus.start()
        self._watching = asyncio.create_task(self._watch())
        return self._bus.node_id

    async def see(self, service: str, nodes: int, within: float) -> bool:
        """Wait until exactly so many nodes of a service are online and ready; say whether they became so."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            if sum(one.is_ready for one in self._bus.nodes(service, "online")) == nodes:
                return True
            await asyncio.sleep(0.01)
        return False

    async def sights(self) -> list[Sight]:
        """Return how the nodes were seen since the start, in order."""
        return self._sights

    async def _watch(self) -> None:
        async for change in self._bus.watch_nodes():
            if change.node is not None:
                self._sights.append(Sight(time.monotonic(), change.node.id, str(change.node.status)))


class Node(_Watched):
    """A node with one handler that waits a little, as one does that asks a database.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        directory: Where it notes what it executes.
        handler_seconds: How long the handler waits.
        node_id: Of the node; drawn when None.
    """

    def __init__(
        self, url: str, namespace: str, directory: str, handler_seconds: float, node_id: str | None = None
    ) -> None:
        super().__init__(Bus("shop", url=url, namespace=namespace, node_id=node_id))
        log = ExecutionLog(directory)

        @self._bus.handler
        async def order(request: Order) -> int:
            log.note(request.number)
            await asyncio.sleep(handler_seconds)
            return request.number


class Caller(_Watched, SteadyCaller):
    """A bus without handlers, which asks steadily.

    Args:
        url: Where the server is.
        namespace: The nodes'.
    """

    def __init__(self, url: str, namespace: str) -> None:
        _Watched.__init__(self, Bus("shop-caller", url=url, namespace=namespace))
        SteadyCaller.__init__(self)

    async def call(self, order: int, timeout: float) -> str:
        """Send one order, and check that the answer is its own."""
        result = await self._bus.send(Order(order), timeout=timeout)
        if isinstance(result, Ok):
            return OK if result.value == order else "wrong answer"
        return f"{result.outcome} {result.code}"
