"""`catga nodes` in a cluster of real processes."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from catga_bus import Bus
from catga_bus.embedded import EmbeddedServer
from tests.commands import DEADLINE, Catga, catga, end_all
from tests.deployment import Deployment
from tests.servers import free_port, server_binary

pytestmark = pytest.mark.nats

leftovers = pytest.fixture(autouse=True)(end_all)

SHOP = """
from catga_bus import Bus, Request

bus = Bus("shop", version="1.2.3", zone="eu-1")


class Quote(Request[str]):
    sku: str


@bus.handler
async def quote(request: Quote) -> str:
    return request.sku
"""

NodesOf = Callable[[str], Catga]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with EmbeddedServer() as server:
        yield server.url


@pytest.fixture
def start(shop: Path, url: str) -> NodesOf:
    """Start a node with an id."""

    def start(node_id: str) -> Catga:
        node = Catga(shop, "run", "shop:bus", "--url", url, "--node-id", node_id)
        node.until("serves")
        return node

    return start


def changes(watching: Catga, kind: str, node_id: str) -> dict[str, Any]:
    """Read changes until one of this kind and node comes, and return its row."""
    while True:
        change = json.loads(watching.line())
        if (change["kind"], change["node"]["node"]) == (kind, node_id):
            row: dict[str, Any] = change["node"]
            return row


async def test_the_table_has_all_nodes_and_not_itself(shop: Path, url: str, start: NodesOf) -> None:
    for node_id in ("shop-1", "shop-2"):
        start(node_id)
    async with Bus("web", node_id="web-1", url=url):
        code, out, err = await asyncio.to_thread(catga, shop, "nodes", "--url", url)
        assert (code, err) == (0, "")
        header, *lines = (line.split() for line in out.splitlines())
        assert header[:3] == ["status", "service", "node"]
        assert [line[:3] for line in lines] == [
            ["online", "shop", "shop-1"],
            ["online", "shop", "shop-2"],
            ["online", "web", "web-1"],
        ]
        code, out, _ = await asyncio.to_thread(catga, shop, "nodes", "--url", url, "--json", "--service", "shop")
        first, second = json.loads(out)["nodes"]
        assert (first["node"], second["node"]) == ("shop-1", "shop-2")
        facts = {name: first[name] for name in ("version", "zone", "types", "is_ready", "in_flight", "breakers")}
        assert facts == {
            "version": "1.2.3",
            "zone": "eu-1",
            "types": ["Quote"],
            "is_ready": True,
            "in_flight": 0,
            "breakers": [],
        }
        assert first["memory_bytes"] > 1_000_000
        assert first["requests_per_second"] == 0.0
        assert 0.0 <= first["beat_age"] < 1.0


async def test_itself_is_shown_if_asked_for(shop: Path, url: str) -> None:
    assert catga(shop, "nodes", "--url", url)[1].startswith("no nodes in namespace catga; ")
    (own,) = json.loads(catga(shop, "nodes", "--url", url, "--all", "--json")[1])["nodes"]
    assert (own["service"], own["metadata"], own["types"]) == ("catga-cli", {"catga.command": "nodes"}, [])


async def test_watching_tells_who_joins_dies_freezes_goes_on_and_leaves(shop: Path, url: str, start: NodesOf) -> None:
    start("shop-1")
    watching = Catga(shop, "nodes", "--watch", "--json", "--url", url)
    assert changes(watching, "joined", "shop-1")["status"] == "online"
    second = start("shop-2")
    assert changes(watching, "joined", "shop-2")["types"] == ["Quote"]
    second.process.kill()
    assert changes(watching, "faulted", "shop-2")["is_evicted"] is True
    third = start("shop-3")
    changes(watching, "joined", "shop-3")
    third.process.send_signal(signal.SIGSTOP)
    assert changes(watching, "faulted", "shop-3")["is_evicted"] is False
    third.process.send_signal(signal.SIGCONT)
    assert changes(watching, "recovered", "shop-3")["status"] == "online"
    assert third.end(signal.SIGTERM)[0] == 0
    assert changes(watching, "draining", "shop-3")["is_ready"] is False
    assert changes(watching, "left", "shop-3")["status"] == "left"
    assert watching.end(signal.SIGTERM)[::2] == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_is_the_end_of_watching(shop: Path, url: str, start: NodesOf, number: signal.Signals) -> None:
    start("shop-1")
    watching = Catga(shop, "nodes", "--watch", "--url", url)
    assert watching.line().split() == ["joined", "online", "shop", "shop-1"]
    assert watching.end(number)[::2] == (0, "")


async def test_a_signal_interrupts_a_look_that_has_not_begun(shop: Path) -> None:
    """Nobody answers at the address: the look would take two seconds, and end with 3."""
    watching = Catga(shop, "nodes", "--url", f"nats://127.0.0.1:{free_port()}")
    children = Path(f"/proc/{watching.process.pid}/task/{watching.process.pid}/status")
    deadline = time.monotonic() + DEADLINE
    while not _catches(children, signal.SIGTERM):  # until it has taken the signal over
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert watching.end(signal.SIGTERM) == (130, "", "interrupted\n")


def _catches(status: Path, number: int) -> bool:
    with contextlib.suppress(OSError):
        mask = re.search(r"SigCgt:\s+([0-9a-f]+)", status.read_text())
        return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)
    return False


async def test_watching_ends_when_nobody_reads(shop: Path, url: str, start: NodesOf) -> None:
    """Without a word, and although nothing changes any more."""
    start("shop-1")
    watching = Catga(shop, "nodes", "--watch", "--json", "--url", url)
    watching.line()
    assert watching.process.stdout is not None
    watching.process.stdout.close()
    assert watching.process.stderr is not None
    assert watching.process.wait(DEADLINE) == 1
    assert watching.process.stderr.read() == ""


async def test_no_server_ends_with_3(shop: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    for words in ((), ("--watch", "--json")):
        code, out, err = catga(shop, "nodes", "--url", f"nats://{address}", *words)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert address in err


async def test_those_that_left_can_only_be_watched_for(shop: Path) -> None:
    code, _, err = catga(shop, "nodes", "--status", "left")
    assert code == 2
    assert "--watch --status left" in err


@pytest.mark.parametrize("user", ["operator", "web", "shop"])
async def test_the_users_of_a_deployment_see_the_nodes(shop: Path, tmp_path: Path, user: str) -> None:
    server_binary()
    deployment = Deployment(tmp_path / "deployment")
    server = deployment.server()
    with deployment.started(server):
        async with Bus("shop", node_id="shop-1", url=server.url, **deployment.account("shop")) as bus:
            address = f"nats://{user}:{deployment.password(user)}@{server.address}"
            code, out, err = await asyncio.to_thread(catga, shop, "nodes", "--json", "--all", "--url", address)
            assert (code, err) == (0, "")
            seen = {node["node"]: node for node in json.loads(out)["nodes"]}
            assert seen.pop("shop-1")["status"] == "online"
            assert [node["service"] for node in seen.values()] == [user]
            assert bus._connection.denied == set()
        assert "ermissions Violation" not in server.log


class Screen:
    """`catga nodes --watch` on a terminal, and what stands on it."""

    def __init__(self, cwd: Path, url: str, columns: int) -> None:
        self._terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._text = ""
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "catga_bus", "nodes", "--watch", "--url", url],
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)

    def until(self, condition: Callable[[list[str]], object]) -> list[str]:
        """Wait until the last full drawing holds a condition, and return its lines."""
        deadline = time.monotonic() + DEADLINE
        while not condition(lines := self.lines()):
            assert time.monotonic() < deadline, self._text[-2_000:]
            if select.select([self._terminal], [], [], 0.1)[0]:
                self._text = (self._text + os.read(self._terminal, 65_536).decode())[-50_000:]
        return lines

    def lines(self) -> list[str]:
        drawings = re.sub(r"\x1b\[[0-9;]*m", "", self._text).split(
            "\x1b[2K"
        )  # it erases each line before it draws anew
        whole = [drawing for drawing in drawings if "status" in drawing]
        return whole[-1].split("\r\n") if whole else []

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def test_a_terminal_shows_the_nodes_as_they_come_and_go(shop: Path, start: NodesOf, url: str) -> None:
    first, _ = start("shop-1"), start("shop-2")
    screen = Screen(shop, url, 60)
    try:
        lines = screen.until(lambda lines: sum("online" in line for line in lines) == 2)
        assert "memory" not in lines[0]
        assert all(len(line) <= 60 for line in lines)
        first.process.kill()
        screen.until(lambda lines: any(line.startswith("faulted") and "shop-1" in line for line in lines))
        third = start("shop-3")
        screen.until(lambda lines: any(line.startswith("online") and "shop-3" in line for line in lines))
        assert third.end(signal.SIGTERM)[0] == 0
        screen.until(lambda lines: any(line.startswith("left") and "shop-3" in line for line in lines))
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(DEADLINE) == 0
    finally:
        screen.close()
