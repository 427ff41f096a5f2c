"""The end of a process that serves: what a program has left running must not keep it."""

import contextlib
import logging
import os
import sys
import threading
from types import TracebackType
from typing import Self

GRACE = 0.5
"""Seconds for what is still running once the bus is closed. Handlers have had a second of their own by then."""

_log = logging.getLogger("catga_bus")


class LastExit:
    """Ends the process if the end of an event loop takes too long, as a context around the loop's runner.

    The end of a loop waits, for ever, for tasks that will not be cancelled and for functions in its pool of threads. A
    handler with such a thing in it would keep a node that has left until somebody kills it.
    """

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        """Do nothing yet: until `begin` everything may take its time."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The loop has ended by itself: nothing is done."""
        self._is_over.set()

    def begin(self, code: int) -> None:
        """Give what still runs `GRACE` seconds; then end the process with an exit code.

        It ends like one that is killed: what was to be done at exit is left undone, but for what was logged or printed.
        """
        threading.Thread(target=self._wait, args=(code,), name="catga-last-exit", daemon=True).start()

    def _wait(self, code: int) -> None:
        if self._is_over.wait(GRACE):
            return
        _log.error("handlers run on that cannot be ended; the process ends without them")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
