"""catga_bus: durable events, handled in order per account by several services, each at its own position."""

import asyncio
from dataclasses import replace
from typing import Any

from benchmarks.load import REQUEST_TIMEOUT, LoadClient, Run
from benchmarks.sides.commands import ACCOUNTS, BUS_OPTIONS, PARTITIONS, Entered
from benchmarks.sides.stores import wait_read
from catga_bus import Bus, Event


class Debited(Event, partition_by="account"):
    """Money was taken from an account."""

    account: str
    cents: int
    memo: str


_NAMES = [f"account-{number:03}" for number in range(ACCOUNTS)]
_MEMO = "m" * 25


class Worker(Entered):
    """A node of a service of its own.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        number: Which service: that of the next round goes on where this one has ended.
    """

    def __init__(self, url: str, namespace: str, number: int) -> None:
        service = f"reader-{number}"
        super().__init__(Bus(service, url=url, namespace=namespace, partitions=PARTITIONS, **BUS_OPTIONS))

        @self._bus.handler
        async def debited(event: Debited) -> None:
            pass


class Client(Entered, LoadClient):
    """Publishes events; a measurement ends when every service has handled all of them.

    Args:
        url: Where the server is.
        namespace: The workers'.
        options: Of the bus, beside these.
    """

    def __init__(self, url: str, namespace: str, **options: Any) -> None:
        LoadClient.__init__(self)
        super().__init__(Bus("bench-publisher", url=url, namespace=namespace, **{**BUS_OPTIONS, **options}))
        self._where = (url, f"{namespace}-evt")

    async def call(self) -> None:
        """Publish one event."""
        order = next(self.orders)
        await self._bus.publish(Debited(_NAMES[order % ACCOUNTS], order, _MEMO), timeout=REQUEST_TIMEOUT)

    async def measure(self, in_flight: int, requests: int) -> Run:
        """Measure until all is handled."""
        await wait_read(*self._where)
        started = asyncio.get_running_loop().time()
        run = await super().measure(in_flight, requests)
        await wait_read(*self._where)
        return replace(run, seconds=asyncio.get_running_loop().time() - started)
