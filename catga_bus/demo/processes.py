"""The node processes: started, killed, frozen, thawed and in the end always ended."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from catga_bus.clock import Clock, monotonic

END_TIMEOUT = 5.0
"""Seconds that nodes have to finish what they have begun before they are killed."""


class NodeProcess:
    """A handle on one node process. It may be started again once it has ended.

    No method waits except `wait`. Signals to a process that is not running are ignored, so faults
    need no bookkeeping.

    Args:
        node_id: Id of the node.
        command: The program and its arguments. It must end when its standard input ends.
        environment: The environment of the process.
        log: File that standard output and standard error are appended to.
    """

    def __init__(self, node_id: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.node_id = node_id
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process last started."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """How the process last started has ended, negative for a signal; None if it has not."""
        return self._process.poll() if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether the process lives; a frozen one does."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_stopped(self) -> bool:
        """Whether the system says that the process stands still, as it does when it is frozen."""
        if not self.is_running or self.pid is None:
            return False
        # The stop is only looked at, not taken: who asks again gets the same answer.
        return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None

    def start(self) -> None:
        """Start the process.

        It is in a session of its own, so that Ctrl-C reaches this process alone, and ends when this
        process is gone, however that happens, because its standard input then ends.

        Raises:
            RuntimeError: It is running already.
        """
        if self.is_running:
            raise RuntimeError(f"node {self.node_id} is running already, as process {self.pid}")
        self._forget()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End the process at once, as a crash would (SIGKILL)."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the process where it stands (SIGSTOP): its connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask the process to finish and end (SIGTERM); a frozen one is thawed for it."""
        self._signal(signal.SIGTERM)
        self.thaw()

    def wait(self, timeout: float) -> bool:
        """Wait for the end of the process.

        Args:
            timeout: Bound, in seconds.

        Returns:
            Whether it has ended.
        """
        if self._process is None:
            return True
        try:
            self._process.wait(max(timeout, 0.0))
        except subprocess.TimeoutExpired:
            return False
        self._forget()
        return True

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # does nothing once the process has been waited for

    def _forget(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


@contextlib.contextmanager
def running(
    nodes: Sequence[NodeProcess], spares: Sequence[NodeProcess] = (), clock: Clock = monotonic
) -> Iterator[None]:
    """Start the nodes, and leave none behind.

    Neither an error nor Ctrl-C, not even a second one, keeps a node alive.

    Args:
        nodes: Handles that are not started.
        spares: Handles that may be started in the block; they are ended as well.
        clock: Where the time comes from.
    """
    everyone = [*nodes, *spares]
    try:
        for node in nodes:
            node.start()
        yield
    finally:
        try:
            for node in everyone:
                node.terminate()
            deadline = clock() + END_TIMEOUT
            for node in everyone:
                node.wait(deadline - clock())
        finally:
            for node in everyone:
                node.kill()
            for node in everyone:
                node.wait(END_TIMEOUT)
