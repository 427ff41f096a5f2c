"""Nodes as `catga run` processes of their own, as an operator has them."""

import asyncio
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from catga_bus.testing import eventually

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0
# A start takes half a second; on a machine that is busy with other things many times that.


class NodeProcess:
    """One `catga run` with its health on a port of its own. Its output goes to files of its directory.

    Args:
        directory: Where it works; made if need be.
        target: `MODULE:BUS`.
        arguments: More arguments of `catga run`.
        environment: More of its environment.
    """

    def __init__(self, directory: Path, target: str, *arguments: str, **environment: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        own = {name: value for name, value in os.environ.items() if not name.startswith(("CATGA_", "NATS_"))}
        with (directory / "err").open("wb") as err, (directory / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "catga_bus", "run", target, "--health", "127.0.0.1:0", *arguments],
                cwd=directory,
                stdout=out,
                stderr=err,
                env={**own, "PYTHONPATH": str(ROOT), **environment},
            )

    @property
    def said(self) -> str:
        """What it has logged so far."""
        return (self.directory / "err").read_text()

    @property
    def url(self) -> str:
        """Where its health is served; empty until that is so."""
        return (self.directory / "out").read_text().partition("health at ")[2].strip()

    async def has_begun(self) -> None:
        """Wait until it serves its health."""
        await eventually(lambda: self.url or self.process.poll() is not None, START_SECONDS, what="the health server")
        assert self.process.poll() is None, self.said

    async def is_ready(self) -> None:
        """Wait until it takes work."""
        await self.has_begun()
        while await self.ask("/readyz") != (200, "ready\n"):
            assert self.process.poll() is None, self.said
            await asyncio.sleep(0.02)

    async def ask(self, path: str) -> tuple[int, str]:
        """Return status and body of one of its pages; 0 if it answers no more."""
        return await asyncio.to_thread(self._ask, path)

    def _ask(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10.0) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def has_ended(self, within: float) -> int:
        """Wait for its end and return its exit code."""
        await eventually(lambda: self.process.poll() is not None, within, what=f"its end, after {self.said[-2_000:]}")
        return self.process.returncode

    def kill(self) -> None:
        """End it for good. Killing twice is fine."""
        self.process.kill()
        self.process.wait()
