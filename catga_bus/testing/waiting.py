"""Waiting for a condition with a deadline, instead of sleeping and hoping."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_EAGER_TURNS = 20
# Looks in the first turns of the loop, without a timer: what happens in memory is seen at once.

_FIRST_PAUSE = 0.001
_LAST_PAUSE = 0.02
# Then a pause that doubles between these: short beside anything that a test waits for, and a
# condition that costs a microsecond costs nothing.


async def eventually(condition: Callable[[], T], timeout: float = 5.0, *, what: str = "") -> T:
    """Wait until a condition holds; return what it returned.

    Args:
        condition: Called again and again on the event loop; holds when it returns something true.
            What it raises is raised here.
        timeout: Seconds until the wait fails, above 0.
        what: Said when it fails; by default the name of the condition.

    Raises:
        AssertionError: The condition did not hold within `timeout`; the text has its last value.

    Example:
        >>> seen = []
        >>> async def main():
        ...     asyncio.get_running_loop().call_later(0.01, seen.append, "message")
        ...     return await eventually(lambda: seen, what="a message")
        >>> asyncio.run(main())
        ['message']
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pause = _FIRST_PAUSE
    turns = 0
    while not (value := condition()):
        if loop.time() >= deadline:
            name = what or getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"not within {timeout} s: {name}; last value {value!r}")
        if turns < _EAGER_TURNS:
            turns += 1
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(pause)
            pause = min(_LAST_PAUSE, pause * 2)
    return value
