"""An event loop whose time passes only when nothing is left to do: minutes of time-outs take milliseconds."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop without sockets; `time` begins at 1,000 seconds."""

    def __init__(self) -> None:
        self.now = 1_000.0
        super().__init__(_Leaping(self))

    def time(self) -> float:
        """The virtual instant."""
        return self.now


class _Leaping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits for something that never comes"
        self._loop.now += max(0.0, timeout)
        return []


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def clock() -> float:
    """The clock of the running loop."""
    return asyncio.get_running_loop().time()
