"""`catga` as a shell uses it: processes of its own, with their exit codes and what they say."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

DEADLINE = 30.0


class Catga:
    """One `catga` process."""

    started: ClassVar[list["Catga"]] = []

    def __init__(self, cwd: Path, *arguments: str, stdin: str | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "catga_bus", *arguments],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={name: value for name, value in os.environ.items() if name not in ("CATGA_URL", "NATS_URL")},
        )
        self.arguments = arguments
        self.stdin = stdin
        self.before = ""
        self.started.append(self)

    def line(self) -> str:
        """Read one line of stdout."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"stdout has ended: {self.before}"
        return line

    def until(self, word: str) -> str:
        """Read stderr up to the line that holds a word."""
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.before += line
            if word in line:
                return line
        raise AssertionError(f"no {word!r} in stderr: {self.before}")

    def end(self, number: signal.Signals | None = None) -> tuple[int, str, str]:
        """Wait for the end, after a signal if one is given: exit code, stdout, stderr."""
        if number is not None:
            self.process.send_signal(number)
        try:
            out, err = self.process.communicate(self.stdin, DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"did not end: {self.before}{err}") from None
        return self.process.returncode, out, self.before + err


def end_all() -> Iterator[None]:
    """End what a test has left behind. A fixture."""
    yield
    while Catga.started:
        with Catga.started.pop().process as process:  # closes its pipes, and waits for it
            process.kill()


def catga(cwd: Path, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    return Catga(cwd, *arguments, stdin=stdin).end()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.02)
