"""Repeats what nobody knows the outcome of, more and more rarely."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from catga_bus.transport.jetstream import JetStreamUnknownError

T = TypeVar("T")


class Pauses:
    """Delays between attempts: doubled each time up to a bound, half of each drawn, so that none stay in step.

    Args:
        rng: Draws.
        first: Bound of the first one, in seconds.
        cap: Bound of all, in seconds. A cluster that has lost a leader has another one after 4 to 9 s.
    """

    __slots__ = ("_bound", "_cap", "_first", "_rng")

    def __init__(self, rng: random.Random, *, first: float = 0.1, cap: float = 2.0) -> None:
        self._rng = rng
        self._first = first
        self._cap = cap
        self._bound = first

    def take(self) -> float:
        """Return the next delay, in seconds."""
        bound = self._bound
        self._bound = min(2 * bound, self._cap)
        return bound * (0.5 + 0.5 * self._rng.random())

    def reset(self) -> None:
        """Begin anew."""
        self._bound = self._first


async def repeat(call: Callable[[], Awaitable[T]], pauses: Pauses, *, seconds: float) -> T:
    """Call until the outcome is known, which is right only for what may be done twice.

    Args:
        call: Does it once.
        pauses: Between attempts.
        seconds: After so many no further attempt begins.

    Raises:
        JetStreamUnknownError: The last attempt has no known outcome either.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while True:
        try:
            return await call()
        except JetStreamUnknownError:
            delay = pauses.take()
            if loop.time() + delay >= until:
                raise
            await asyncio.sleep(delay)
