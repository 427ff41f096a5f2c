"""catga_bus with a backlog: a node that starts in front of it, and says when it handled the first of it."""

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from benchmarks.sides.commands import BUS_OPTIONS, PARTITIONS, Debit
from catga_bus import Bus


@dataclass(frozen=True, slots=True)
class Started:
    """How a node has started; seconds since the call of `Bus.start`."""

    seconds: float
    """Until it returned."""

    first_handled_seconds: float


class Node:
    """A node that is started by `begin`.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._bus = Bus("bench", url=url, namespace=namespace, partitions=PARTITIONS, **BUS_OPTIONS)
        self._first = asyncio.Event()
        self._first_at = 0.0

        @self._bus.handler
        async def debit(command: Debit) -> int:
            if not self._first_at:
                self._first_at = time.monotonic()
                self._first.set()
            return command.cents

    async def __aenter__(self) -> Self:
        """Be there with everything imported."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the bus."""
        await self._bus.drain()

    async def begin(self) -> Started:
        """Start the bus, and wait until the first command is handled."""
        began = time.monotonic()
        await self._bus.start()
        started = time.monotonic()
        await self._first.wait()
        return Started(started - began, self._first_at - began)
