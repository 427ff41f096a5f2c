"""Processes that do what the benchmark says: each role has a process and an event loop of its own.

The parent holds a `RoleProcess`; the child builds the role, an async context manager, and runs its
methods one at a time as they are asked for over a pipe. A child ends when the pipe closes, so none
outlives a parent that was killed. On SIGTERM it leaves its role, which drains what it has.
"""

import asyncio
import importlib
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import uvloop

from benchmarks.errors import BenchmarkError

# Interpreter start and imports take about 1 s; thirty times that is a hang.
_START_SECONDS = 30.0
# A bus drains for at most 25 s by default.
_STOP_SECONDS = 30.0


class RoleFailedError(BenchmarkError):
    """A role raised, died, or did not answer in time; the text names it."""


class RoleProcess:
    """A role in a process of its own.

    Args:
        role: Where the role is found, `package.module:Class`. Only the child imports it, so that no
            side pays for the libraries of another.
        path: Where the child looks for packages first, such as another version of catga_bus; None for nowhere else.
        arguments: What the role's class is called with; must pickle.
    """

    def __init__(self, role: str, path: Path | None = None, /, **arguments: Any) -> None:
        self._role = role
        # Spawned, not forked: a child inherits neither the parent's memory nor its event loop.
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(target=_run_child, args=(child_end, role, path, arguments), daemon=True)
        self._child_end = child_end

    def __enter__(self) -> Self:
        """Start the process and wait until the role is ready.

        Raises:
            RoleFailedError: The role raised while starting, or took longer than 30 s.
        """
        self.launch()
        try:
            self.result(timeout=_START_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def launch(self) -> None:
        """Start the process and do not wait: `result` returns when the role is ready, and `__exit__` ends it."""
        self._process.start()
        # Closed here, or the end of the child would never be seen as the end of the pipe.
        self._child_end.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the role finish, and end the process if it does not."""
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(_STOP_SECONDS if error is None else 2.0)
        self._end()

    def call(self, method: str, *, timeout: float, **arguments: Any) -> Any:
        """Run a method of the role and return what it returns.

        Args:
            method: The name of an async method.
            timeout: Seconds to wait for its end.
            arguments: What the method is called with; must pickle.

        Raises:
            RoleFailedError: The method raised, its process died, or the time is over.
        """
        self.begin(method, **arguments)
        return self.result(timeout=timeout)

    def begin(self, method: str, **arguments: Any) -> None:
        """Start a method of the role and return at once; `result` fetches what it returns."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._died() from error

    def is_done(self, wait_seconds: float) -> bool:
        """Wait at most `wait_seconds`, and say whether `result` would return at once."""
        return self._connection.poll(wait_seconds)

    def result(self, *, timeout: float) -> Any:
        """Return what the method begun last returned.

        Raises:
            RoleFailedError: The method raised, its process died, or `timeout` seconds have passed.
        """
        if not self._connection.poll(timeout):
            raise RoleFailedError(f"{self._role}: no answer within {timeout:g} s")
        try:
            succeeded, value = self._connection.recv()
        except EOFError as error:
            raise self._died() from error
        if not succeeded:
            raise RoleFailedError(f"{self._role}: {value}")
        return value

    @property
    def exit_code(self) -> int | None:
        """How the process ended, negative for a signal; None if it has not."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None, "the process was not launched"
        return self._process.pid

    @property
    def is_stopped(self) -> bool:
        """Whether the system says that the process stands still."""
        return bool(psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED)

    def send_signal(self, number: signal.Signals) -> None:
        """Send the process a signal.

        Raises:
            RoleFailedError: The process has ended.
        """
        if self._process.pid is None or self._process.exitcode is not None:
            raise self._died()
        os.kill(self._process.pid, number)

    def join(self, timeout: float) -> None:
        """Wait for the end of the process.

        Raises:
            RoleFailedError: It lives on after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise RoleFailedError(f"{self._role}: its process has not ended within {timeout:g} s")

    def cpu_seconds(self) -> float:
        """Return the processor time used so far, user and system."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Return the memory resident now."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def peak_rss_bytes(self) -> int:
        """Return the most memory ever resident; what is now, where the system keeps no record."""
        # getrusage would report the larger of the child's peak and its parent's at the fork.
        with suppress(OSError), open(f"/proc/{self._process.pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return self.rss_bytes()

    def _died(self) -> RoleFailedError:
        self._process.join(1.0)
        return RoleFailedError(f"{self._role}: its process ended, exit code {self._process.exitcode}")

    def _end(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(2.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._connection.close()


def _run_child(connection: Connection, role: str, path: Path | None, arguments: dict[str, Any]) -> None:
    if path is not None:
        sys.path.insert(0, str(path))
    # Ctrl-C reaches the whole process group; the parent alone decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(asyncio.CancelledError, BrokenPipeError):
        uvloop.run(_serve(connection, role, arguments))


async def _serve(connection: Connection, role: str, arguments: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue(1)
    main = asyncio.current_task()

    def read() -> None:
        try:
            orders.put_nowait(connection.recv())
        except EOFError:
            # The parent is gone; whatever is running is for nobody.
            loop.remove_reader(connection.fileno())
            if main is not None:
                main.cancel()

    if main is not None:
        loop.add_signal_handler(signal.SIGTERM, main.cancel)
    try:
        module, _, name = role.partition(":")
        manager = getattr(importlib.import_module(module), name)(**arguments)
        async with manager as running:
            connection.send((True, None))
            loop.add_reader(connection.fileno(), read)
            # uvloop has made the pipe non-blocking, and what is larger than its buffer would be cut off.
            os.set_blocking(connection.fileno(), True)
            while (order := await orders.get()) is not None:
                connection.send(await _obey(running, *order))
            loop.remove_reader(connection.fileno())
    except Exception as error:
        connection.send((False, _text(error)))


async def _obey(running: Any, method: str, arguments: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, await getattr(running, method)(**arguments)
    except Exception as error:
        return False, _text(error)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
