"""The order of calls for which a route must be read first: nobody behind them is sent before they are.

Whatever its type, a message waits for those that were sent before it: else one of another type with the same key would
overtake them. Who waits is let through in one go, so that a rush ends: one at a time, callers that come back as soon
as they are through would keep it up for ever.
"""

import asyncio
import contextlib
from collections import deque

from catga_bus.clock import Clock
from catga_bus.durability.sending.outlets import Outlet, Outlets


class Turnstile:
    """Lets callers through in the order in which they came, each with its outlet ready.

    Args:
        outlets: Makes them ready.
        clock: Monotonic seconds.

    Attributes:
        count: Callers that are in it. While there are some, nobody may go past.
    """

    def __init__(self, outlets: Outlets, clock: Clock) -> None:
        self._outlets = outlets
        self._clock = clock
        self._waiting: deque[tuple[Outlet, asyncio.Future[bool]]] = deque()
        self._is_finding = False  # whether somebody makes an outlet ready, or is about to
        self._passing = 0  # callers that have been let through and have not gone yet
        self.count = 0

    async def enter(self, outlet: Outlet, deadline: float) -> None:
        """Wait until everybody before is through and the outlet is ready; go on without awaiting anything.

        Raises:
            TimeoutError: The deadline passed before it was this caller's turn.
            CatgaError: As `Outlets.make_ready`.
        """
        self.count += 1
        try:
            if self.count == 1 or await self._must_find(outlet, deadline):
                self._is_finding = True
                try:
                    await self._outlets.make_ready(outlet, deadline)
                finally:
                    self._is_finding = False
        finally:
            self.count -= 1
            if not self._is_finding and not self._passing:
                self._let_through()

    async def _must_find(self, outlet: Outlet, deadline: float) -> bool:
        """Wait for those before; return whether the outlet is to be made ready still."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        place = (outlet, turn)
        self._waiting.append(place)
        try:
            async with asyncio.timeout(deadline - self._clock()):
                return await turn
        finally:
            if not turn.done() or turn.cancelled():
                with contextlib.suppress(ValueError):  # it may have been passed over already
                    self._waiting.remove(place)
            elif turn.result():
                self._is_finding = False  # whoever goes on sets it again
            else:
                self._passing -= 1

    def _let_through(self) -> None:
        """Let everybody through whose outlet is ready, up to the first one whose is not: that one makes it ready."""
        now = self._clock()
        while self._waiting and not self._is_finding:
            outlet, turn = self._waiting.popleft()
            if turn.done():
                continue  # its caller has just been cancelled
            if self._outlets.is_ready(outlet, now):
                self._passing += 1
                turn.set_result(False)
            else:
                self._is_finding = True
                turn.set_result(True)
