"""Thaw: what a node does that stood still for a while before it takes up work again."""

import asyncio
import contextlib

from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.errors import CallError
from catga_bus.transport.base import Transport

_FLUSH_SECONDS = 5.0  # a server that takes longer is gone, and what it holds with it

_REASON = "thaw"


class Thaw:
    """A barrier: after a gap nothing starts until the server has answered a ping.

    Callers may have gone elsewhere meanwhile. What they have said about it lies in the connection, behind the
    requests, and has been read when the answer to the ping is read: the server keeps the order.

    Args:
        transport: The connection.
        dispatcher: Starts nothing meanwhile.

    Attributes:
        gap: Seconds to take off the time of what arrives; 0.0 when there is no barrier.
        count: Barriers so far.
    """

    def __init__(self, transport: Transport, dispatcher: Dispatcher) -> None:
        self._transport = transport
        self._dispatcher = dispatcher
        self._task: asyncio.Task[None] | None = None
        self.gap = 0.0
        self.count = 0

    def begin(self, gap: float) -> None:
        """Put the barrier up; if it is up, it stays until a ping sent from now on is answered.

        Args:
            gap: Seconds for which the loop stood still.
        """
        self.gap += gap
        self.count += 1
        self._dispatcher.pause(_REASON)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._wait())

    async def close(self) -> None:
        """Take the barrier down."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _wait(self) -> None:
        try:
            seen = -1
            while seen != self.count:
                seen = self.count
                with contextlib.suppress(CallError):
                    await self._transport.flush(_FLUSH_SECONDS)
        finally:
            self.gap = 0.0
            self._dispatcher.resume(_REASON)
