"""A node that leaves while its connection is gone, with work in hand that needs one."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import Bus, Ok, Request
from catga_bus.requests.attempts import Phase
from catga_bus.testing import eventually
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

LEAVE = 5.0
# Seconds that a node may take to leave once nothing runs: promised, whatever its server does.

LONG = 30.0
# For what takes a moment, but may take long on a busy machine.

MODULE = """
import asyncio, os
from pathlib import Path
from catga_bus import Bus, Request

bus = Bus("leaver", namespace=os.environ["NAMESPACE"])


def note(text):
    with Path("seen").open("a") as seen:
        seen.write(text + "\\n")


class Ping(Request[str]):
    pass


class Hold(Request[str]):
    number: int


@bus.handler
async def ping(request: Ping) -> str:
    return "pong"


@bus.handler(concurrency=1)
async def hold(request: Hold) -> str:
    note(f"began {request.number}")
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    note(f"ended {request.number}")
    return "held"
"""


class Ping(Request[str]):
    pass


class Hold(Request[str]):
    number: int


class Leaver:
    """One `catga run` in a directory of its own; `drain_timeout` is the default, 25 s."""

    def __init__(self, cwd: Path, url: str, namespace: str) -> None:
        (cwd / "leaver.py").write_text(MODULE)
        self._cwd = cwd
        with (cwd / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "catga_bus", "run", "leaver:bus", "--url", url],
                cwd=cwd,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "NAMESPACE": namespace},
            )

    @property
    def log(self) -> str:
        """What it has written to stderr so far."""
        return (self._cwd / "log").read_text()

    @property
    def seen(self) -> list[str]:
        """What its handler noted."""
        file = self._cwd / "seen"
        return file.read_text().splitlines() if file.exists() else []

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        def holds() -> Any:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log}"
            return condition()

        await eventually(holds, LONG, what=what)

    async def drains(self) -> None:
        """Send SIGTERM, and wait until it has been taken."""
        self.process.send_signal(signal.SIGTERM)
        await self.until(lambda: "draining" in self.log, "draining")

    def go(self) -> None:
        """Let the handler end."""
        (self._cwd / "go").touch()

    async def ended(self) -> int:
        """Return the exit code, which must be there in time."""
        await eventually(lambda: self.process.poll() is not None, LEAVE, what=f"the end: {self.log}")
        return self.process.returncode


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def client(nats_server: NatsServer, namespace: str) -> AsyncIterator[Bus]:
    bus = Bus("client", url=nats_server.url, namespace=namespace, reconnect_delay=0.02)
    await bus.start()
    yield bus
    await bus.close()


@pytest.fixture
def node(tmp_path: Path, nats_server: NatsServer, namespace: str) -> Iterator[Leaver]:
    leaver = Leaver(tmp_path, nats_server.url, namespace)
    yield leaver
    if leaver.process.poll() is None:
        leaver.process.kill()
    leaver.process.wait()


async def accepted(node: Leaver, client: Bus, count: int) -> list[asyncio.Task[Any]]:
    """Send so many requests, of which one runs, and wait until the client knows who has them."""
    await node.until(lambda: "serves" in node.log, "it serves")
    calls = [asyncio.create_task(client.send(Hold(number), timeout=60.0)) for number in range(count)]

    def all_known() -> bool:
        assert client._node is not None
        pending = list(client._node.caller._pending.values())
        return len(pending) == count and all(call.trouble().phase is Phase.ACCEPTED for call in pending)

    await eventually(all_known, LONG)
    assert node.seen == ["began 0"]
    return calls


async def test_what_may_not_start_without_a_connection_holds_nobody_up(
    node: Leaver, client: Bus, nats_server: NatsServer
) -> None:
    calls = await accepted(node, client, 3)
    nats_server.kill()
    await node.until(lambda: "lost the connection" in node.log, "the loss")
    await node.drains()
    node.go()
    code = await node.ended()
    ended = len(node.seen) // 2
    assert ended >= 1
    assert code == (0 if ended == 3 else 1), "the exit code tells whether something was left"
    assert ended == 3 or f"leaves {3 - ended} messages unfinished" in node.log
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_an_answer_waits_a_moment_for_the_server_to_come_back(
    node: Leaver, client: Bus, nats_server: NatsServer
) -> None:
    call = (await accepted(node, client, 1))[0]
    nats_server.kill()
    await node.until(lambda: "lost the connection" in node.log, "the loss")
    await node.drains()
    node.go()
    await node.until(lambda: "ended 0" in node.seen, "the end of the one that runs")
    nats_server.start()
    assert await asyncio.wait_for(call, LONG) == Ok("held")
    assert await node.ended() == 0
    assert node.seen == ["began 0", "ended 0"], "it ran once"
