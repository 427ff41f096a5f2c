"""The end of a process that serves: what a program has left running must not keep it."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time

GRACE = 0.5
"""Seconds for what is still running once the bus is closed. Handlers have had a second of their own by then."""

AT_EXIT = 1.0
"""Seconds for what the program has registered to be done at exit, such as sending the last of its telemetry. Chosen: a
node whose server has frozen is still gone within the promised 5 s."""

_log = logging.getLogger("catga_bus")


class LastExit:
    """Ends the process if its end takes too long.

    The end of an event loop waits, for ever, for tasks that will not be cancelled and for functions in its pool of
    threads; the end of the interpreter does so for all other threads that are no daemons, and for the functions in any
    other pool. A handler with such a thing in it would keep a node that has left until somebody kills it.
    """

    def __init__(self) -> None:
        self._are_threads_over = threading.Event()

    def begin(self, code: int, why: str = "") -> None:
        """Give what still runs `GRACE` seconds, and what is done at exit `AT_EXIT`; then end the process.

        It ends like one that is killed: what else was to be done is left undone, but for what was logged or printed.
        Nothing takes this back: the process is over.

        Args:
            code: The exit code that it ends with then.
            why: What it ends of, if of an error: nobody may have had the time to say it.
        """
        # The interpreter waits for threads first. Of what is registered, the last is done first.
        atexit.register(self._are_threads_over.set)
        threading.Thread(target=self._wait, args=(code, why), name="catga-last-exit", daemon=True).start()

    def _wait(self, code: int, why: str) -> None:
        what = "handlers or threads run on that cannot be ended"
        if self._are_threads_over.wait(GRACE):
            time.sleep(AT_EXIT)  # the process ends meanwhile, and this thread with it
            what = "what is done at exit takes too long"
        _log.error("%s%s: the process ends without", f"{why}; " if why else "", what)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
