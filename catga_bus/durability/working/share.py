"""Share: one tenure's part of the outbox. What was committed for sending in a partition is published by its owner."""

import asyncio
import contextlib

from catga_bus.durability.inbox.outbox import Relay
from catga_bus.effects import Fence
from catga_bus.errors import CatgaError

_OUTBOX_SECONDS = 0.1
# For which a hand-over waits until what was committed for sending is stored: some milliseconds as a rule, and what is
# not stored by then is published by the next owner, some of it for the second time.


class Share:
    """The outbox of one partition, for one tenure.

    Args:
        relay: Publishes; None if nothing is.
    """

    def __init__(self, relay: Relay | None) -> None:
        self._relay = relay
        self._fence: Fence | None = None

    def take_over(self, fence: Fence) -> None:
        """Publish what was committed under former owners, once for each fence."""
        if self._relay is not None and fence != self._fence:
            self._fence = fence
            self._relay.take_over(fence)

    async def hand_over(self) -> None:
        """Publish what was committed here, as far as that is quick: the next owner does the rest."""
        if self._relay is not None and self._fence is not None:
            with contextlib.suppress(TimeoutError, CatgaError):
                async with asyncio.timeout(_OUTBOX_SECONDS):
                    await self._relay.flush(self._fence)
            self.drop()

    def drop(self) -> None:
        """Publish nothing more."""
        if self._relay is not None and self._fence is not None:
            self._relay.drop(self._fence)
        self._fence = None
