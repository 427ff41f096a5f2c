"""The embedded server with real processes: who starts one, who shares one, who ends with whom."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nats
import pytest

from catga_bus.embedded import EmbeddedServer
from catga_bus.embedded.store import Store, server_name
from catga_bus.errors import BusStateError, ConfigurationError, DisconnectedError

pytestmark = pytest.mark.nats

DEADLINE = 20.0

OWNER = """
import asyncio, json, sys
from catga_bus.embedded import EmbeddedServer

async def main():
    async with EmbeddedServer(sys.argv[1] or None) as server:
        print(json.dumps([server.url, server.pid, server.is_owner, str(server.store)]), flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""
FORKING_OWNER = OWNER.replace(
    "        await asyncio.to_thread(sys.stdin.read)",
    "        import os, time\n"
    "        child = os.fork()\n"
    "        print(child or os.getpid(), flush=True) if child else time.sleep(600)\n"
    "        await asyncio.to_thread(sys.stdin.read)",
)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


class Owner:
    """Another process that starts a server and holds it until it is told to end."""

    def __init__(self, store: Path | str, program: str = OWNER) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = ""
        self.server_pid = 0
        self.is_owner = False
        self.store = Path()

    def ready(self) -> "Owner":
        facts = json.loads(self.line())
        self.url, self.server_pid, self.is_owner = facts[0], facts[1], facts[2]
        self.store = Path(facts[3])
        return self

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def close(self) -> None:
        """End in good order."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(DEADLINE)


@contextlib.contextmanager
def owner(store: Path | str = "", program: str = OWNER) -> Iterator[Owner]:
    started = Owner(store, program)
    try:
        yield started.ready()
    finally:
        started.close()


async def test_a_server_has_a_port_of_its_own_and_jetstream() -> None:
    async with EmbeddedServer() as first, EmbeddedServer() as second:
        assert first.url != second.url
        assert first.url.startswith("nats://127.0.0.1:")
        client = await nats.connect(first.url)
        await client.jetstream().account_info()
        assert client.max_payload == 1_048_576
        await client.close()


async def test_stop_ends_the_server_and_removes_a_temporary_store() -> None:
    server = EmbeddedServer()
    await server.start()
    assert server.store is not None
    assert server.is_owner
    assert (server.store / "nats-server.log").exists()
    await server.stop()
    await server.stop()
    assert not lives(server.pid)
    assert not server.store.exists()
    assert not server.is_owner


async def test_a_server_starts_once() -> None:
    async with EmbeddedServer() as server:
        with pytest.raises(BusStateError, match="starts once"):
            await server.start()


async def test_a_start_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    gaps: list[float] = []

    async def tick() -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(0)
            now = time.monotonic()
            gaps.append(now - before)
            before = now

    ticking = asyncio.create_task(tick())
    async with EmbeddedServer(tmp_path):
        pass
    ticking.cancel()
    assert len(gaps) > 10
    assert max(gaps) < 1.0


async def test_a_cancelled_start_leaves_nothing_behind(tmp_path: Path) -> None:
    for delay in (0.0, 0.01, 0.03, 0.05):
        server = EmbeddedServer(tmp_path)
        starting = asyncio.create_task(server.start())
        await asyncio.sleep(delay)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await server.stop()
        lock = Store(tmp_path).try_lock()
        assert lock is not None
        os.close(lock)


async def test_wait_returns_when_the_server_ends() -> None:
    server = EmbeddedServer()
    await server.start()
    waiting = asyncio.create_task(server.wait())
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.wait_for(waiting, DEADLINE)
    await server.stop()


async def test_a_server_started_from_a_thread_outlives_the_thread() -> None:
    servers: list[EmbeddedServer] = []

    def start() -> None:
        server = EmbeddedServer()
        asyncio.run(server.start())
        servers.append(server)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (server,) = servers
    client = await nats.connect(server.url)
    await client.flush()
    await client.close()
    assert lives(server.pid)
    await server.stop()
    assert not lives(server.pid)


def test_kill_of_the_owner_ends_its_server_and_removes_its_temporary_store() -> None:
    with owner() as other:
        assert lives(other.server_pid)
        other.kill()
        wait_until(lambda: not lives(other.server_pid), "the server ends")
        wait_until(lambda: not other.store.exists(), "the temporary store is removed")


def test_kill_of_an_owner_that_left_a_forked_child_ends_its_server() -> None:
    with owner(program=FORKING_OWNER) as other:
        child = int(other.line())
        try:
            other.kill()
            wait_until(lambda: not lives(other.server_pid), "the server ends")
            assert lives(child)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the server stays, and its lock")
async def test_kill_of_the_supervisor_ends_its_server(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    supervisor = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not lives(server.pid), "the server ends")
    await server.stop()


def test_ctrl_c_at_the_terminal_does_not_reach_the_server() -> None:
    with owner() as other:
        assert os.getpgid(other.server_pid) != os.getpgid(other.process.pid)


async def test_two_users_of_a_store_share_one_server(tmp_path: Path) -> None:
    with owner(tmp_path) as first:
        assert first.is_owner
        async with EmbeddedServer(tmp_path) as second:
            assert (second.url, second.pid) == (first.url, first.server_pid)
            assert not second.is_owner
        assert lives(first.server_pid)


async def test_five_processes_that_start_at_once_share_one_server(tmp_path: Path) -> None:
    owners = [Owner(tmp_path) for _ in range(5)]
    try:
        for one in owners:
            one.ready()
        assert len({one.url for one in owners}) == 1
        assert len({one.server_pid for one in owners}) == 1
        assert [one.is_owner for one in owners].count(True) == 1
    finally:
        for one in sorted(owners, key=lambda one: one.is_owner):
            one.close()


async def test_a_store_whose_owner_was_killed_is_taken_over_with_its_data_and_port(
    tmp_path: Path,
) -> None:
    with owner(tmp_path) as first:
        client = await nats.connect(first.url)
        stream = client.jetstream()
        await stream.add_stream(name="kept", subjects=["kept.>"])
        for number in range(10):
            await stream.publish("kept.number", b"%d" % number)
        await client.close()
        first.kill()
        async with EmbeddedServer(tmp_path) as second:
            assert second.is_owner
            assert second.pid != first.server_pid
            assert second.url == first.url
            client = await nats.connect(second.url)
            info = await client.jetstream().stream_info("kept")
            assert info.state.messages == 10
            await client.close()


async def test_a_store_whose_server_was_killed_is_taken_over(tmp_path: Path) -> None:
    first = EmbeddedServer(tmp_path)
    await first.start()
    os.kill(first.pid, signal.SIGKILL)
    async with EmbeddedServer(tmp_path) as second:
        assert second.is_owner
        assert second.pid != first.pid
    await first.stop()


async def test_the_last_port_is_given_up_if_somebody_else_has_it(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as first:
        port = int(first.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        async with EmbeddedServer(tmp_path) as second:
            assert second.url != first.url


async def test_a_record_of_another_server_at_the_same_port_is_not_believed(tmp_path: Path) -> None:
    async with EmbeddedServer() as stranger:
        store = Store(tmp_path)
        record = {"url": stranger.url, "name": "catga-gone", "pid": 1, "owner": 1}
        store.record_file.write_text(json.dumps(record))
        assert store.live_record() is None
        assert server_name(stranger.url) not in (None, "catga-gone")


async def test_a_locked_store_without_a_server_is_a_clear_error(tmp_path: Path) -> None:
    lock = Store(tmp_path).try_lock()
    assert lock is not None
    try:
        with pytest.raises(DisconnectedError, match=r"is locked, but no server answers there"):
            await EmbeddedServer(tmp_path, start_timeout=0.2).start()
    finally:
        os.close(lock)


async def test_a_store_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match=r"file' cannot be made: File exists"):
        await EmbeddedServer(file).start()


async def test_a_store_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    # A directory in the lock's place cannot be written by anybody, root included.
    (tmp_path / "catga.lock").mkdir()
    with pytest.raises(ConfigurationError, match=r"cannot be written: Is a directory"):
        await EmbeddedServer(tmp_path).start()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_store_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        await EmbeddedServer(tmp_path).start()


async def test_a_port_that_is_taken_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} of 127.0.0.1 is already in use"):
            await EmbeddedServer(tmp_path, port=port).start()


async def test_another_port_for_a_store_that_is_served_is_a_clear_error(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=f"already served at {first.url}"):
            await EmbeddedServer(tmp_path, port=port - 1).start()


async def test_a_binary_that_is_no_program_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "nats-server"
    binary.write_bytes(b"\x7fELF, but no more than that")
    binary.chmod(0o755)
    monkeypatch.setenv("CATGA_NATS_SERVER", str(binary))
    server = EmbeddedServer()
    with pytest.raises(ConfigurationError, match="cannot be executed: Exec format error"):
        await server.start()
    assert server.store is not None
    assert not server.store.exists()


async def test_a_program_that_is_no_server_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    monkeypatch.setenv("CATGA_NATS_SERVER", str(binary))
    with pytest.raises(DisconnectedError, match="ended with exit code 3"):
        await EmbeddedServer().start()


async def test_a_server_that_never_gets_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "nats-server"
    binary.write_text("#!/bin/sh\nexec sleep 600\n")
    binary.chmod(0o755)
    monkeypatch.setenv("CATGA_NATS_SERVER", str(binary))
    with pytest.raises(DisconnectedError, match=r"was not ready after 0\.\d+ s"):
        await EmbeddedServer(start_timeout=0.3).start()
