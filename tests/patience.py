"""What a test does where servers may be electing a leader: ask again, and pull again."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from catga_bus.clock import monotonic
from catga_bus.testing import eventually
from catga_bus.transport.jetstream import Consumption, JetStreamUnknownError

ELECTIONS: Final = 40.0
"""Seconds: the server takes 4 to 9 for one, and needs several to begin with."""

SILENCE: Final = 2.0
"""Seconds without a message or a status after which a pull is taken for lost."""

T = TypeVar("T")


async def certain(call: Callable[[], Awaitable[T]], unknown: Counter[str] | None = None) -> T:
    """Repeat a call that may be repeated until its outcome is known.

    Args:
        call: Makes the call.
        unknown: Counts the outcomes that were not known, by text.
    """
    async with asyncio.timeout(ELECTIONS):
        while True:
            try:
                return await call()
            except JetStreamUnknownError as error:
                if unknown is not None:
                    unknown[str(error)] += 1
                await asyncio.sleep(0.05)


async def pull_until(consumption: Consumption, batch: int, condition: Callable[[], object]) -> None:
    """Pull until a condition holds, and again whenever the server has fallen silent."""
    pulled_at = monotonic()
    consumption.pull(batch)

    def holds() -> object:
        nonlocal pulled_at
        if monotonic() - max(pulled_at, consumption.heard_at) > SILENCE:
            pulled_at = monotonic()
            consumption.pull(batch)
        return condition()

    await eventually(holds, ELECTIONS)
