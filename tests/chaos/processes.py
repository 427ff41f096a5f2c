"""Child processes of the rig: told what to do by one argument, killed at the end whatever happens."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

from tests.servers import dies_with_us

ROOT = Path(__file__).parents[2]
END_TIMEOUT = 40.0
# Seconds; a node drains for at most 25, a caller waits for its last deadline.


class Child:
    """A process that runs a module of the rig with a plan.

    Attributes:
        name: Of the node or the caller.
        may_end: Whether it is meant to end: a process that ends by itself otherwise is a failure of the run.
    """

    def __init__(
        self,
        name: str,
        module: str,
        plan: msgspec.Struct,
        log: Path,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.may_end = False
        self._command = [*prefix, sys.executable, "-m", module, msgspec.json.encode(plan).decode()]
        self._log = log
        self._env = {"PATH": os.environ.get("PATH", ""), **(env or {})}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it. It dies with this process, frozen or not."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=ROOT,
                env=self._env,
                stdout=log,
                stderr=log,
                preexec_fn=dies_with_us(),
            )

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The running or ended process."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    @property
    def pid(self) -> int:
        """Its process id, that of the program also when there is a prefix."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it lives; a frozen one does."""
        return self._process is not None and self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """What it ended with, minus the number of the signal if one ended it; None while it runs."""
        return None if self._process is None else self._process.returncode

    def check(self) -> None:
        """Raise if it has ended by itself.

        Raises:
            AssertionError: It has; the text has the end of its log.
        """
        assert self.may_end or self.is_running, (
            f"{self.name} ended by itself ({self.process.returncode}):\n{self._log.read_text()[-2000:]}"
        )

    async def kill(self) -> None:
        """End it at once (SIGKILL), and wait until it has."""
        self.may_end = True
        if self.is_running:
            self.process.kill()
        if self._process is not None:
            await self._process.wait()

    async def terminate(self) -> int:
        """Ask it to end (SIGTERM), wait until it has, and return its exit code."""
        self.may_end = True
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), END_TIMEOUT)

    def freeze(self) -> None:
        """Let it do nothing more while its sockets stay open (SIGSTOP); returns when every thread has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """End `freeze`."""
        self.process.send_signal(signal.SIGCONT)


def stance(pid: int) -> str:
    """Return whether the system says that a process stands still: `stopped` or `going`."""
    return "stopped" if psutil.Process(pid).status() == psutil.STATUS_STOPPED else "going"
