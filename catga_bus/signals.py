"""Takes SIGTERM and SIGINT over for a while, and puts back exactly what was there."""

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Hands SIGTERM and SIGINT to a function on the event loop, as long as the context lasts.

    The loop's own `add_signal_handler` forgets what was there before it, so that the next Ctrl-C after a bus would
    meet nobody. Several of these at once all hear each signal, and may end in any order.

    Only the main thread can do this; in others the context does nothing.

    Args:
        on_signal: Called with the name of the signal, on the loop that runs when the context begins.

    Attributes:
        is_over: Whether the context has ended.
    """

    def __init__(self, on_signal: Callable[[str], None]) -> None:
        self._on_signal = on_signal
        self._previous: dict[int, Any] = {}
        self.is_over = False

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                self._previous[number] = signal.signal(number, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_over = True
        for number in self._previous:
            previous = self.before(number)
            if signal.getsignal(number) is self:  # else somebody came later: theirs stays
                signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: not from Python

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take one signal; called by the interpreter."""
        if not self.is_over:
            self._loop.call_soon_threadsafe(self._on_signal, signal.Signals(number).name)
        previous = self.before(number)
        if isinstance(previous, Signals):
            previous(number, frame)

    def before(self, number: int) -> Any:
        """Return what was there before, leaving out those that are over."""
        previous = self._previous[number]
        return previous.before(number) if isinstance(previous, Signals) and previous.is_over else previous
