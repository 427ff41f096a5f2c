"""Processes that share an inbox are killed at every step: nothing is ever half done, and nothing is done twice."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest

from catga_bus.durability.inbox.base import Outbound, Recorded
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.effects import Fence

CRASHER = Path(__file__).with_name("inbox_crasher.py")
FENCE = Fence(3, 100)


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "inbox.db"
    inbox = SqliteInbox(path)
    await inbox.open()
    await inbox.script(["CREATE TABLE effects (number INTEGER)"])
    await inbox.close()
    yield path
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def start(what: str, path: Path, *rest: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(CRASHER), what, str(path), *map(str, rest)]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def done(path: Path) -> list[int]:
    """Check that effects, marks, results and sent messages belong together; return the numbers that are done."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN")  # all of one instant, while others go on
        marks = connection.execute("SELECT message_id, body FROM catga_inbox").fetchall()
        effects = Counter(number for (number,) in connection.execute("SELECT number FROM effects"))
        sent = Counter(message_id for (message_id,) in connection.execute("SELECT message_id FROM catga_outbox"))
    numbers = sorted(int(message_id[2:]) for message_id, _ in marks)
    assert all(body == message_id[2:].encode() for message_id, body in marks)
    assert effects == Counter(number for number in numbers if number % 3)
    assert sent == Counter(f"m-{number}.1" for number in numbers)
    return numbers


def test_killed_before_every_statement_it_leaves_all_or_nothing(path: Path) -> None:
    progress = [0]
    killed = 0
    with start("steps", path) as crasher:
        for line in pipe(crasher.stdout):
            _, ended_by = map(int, line.split())
            progress.append(len(done(path)))
            if ended_by != signal.SIGKILL:
                assert ended_by == 0
                break
            killed += 1
            pipe(crasher.stdin).write("\n")
            pipe(crasher.stdin).flush()
    assert killed > 10
    assert progress == sorted(progress)
    assert done(path) == list(range(9))


@pytest.mark.slow
def test_killed_at_any_instant_while_three_share_the_file(path: Path) -> None:
    rng = random.Random(7)
    running = [start("load", path, seed) for seed in range(3)]
    counts = [0]
    try:
        for kill in range(15):
            victim = running[kill % 3]
            assert pipe(victim.stdout).readline() == "running\n"
            target = counts[-1] + rng.randrange(1, 200)
            while count_marks(path) < target:
                assert victim.poll() is None
            victim.kill()
            victim.communicate()
            counts.append(len(done(path)))
            running[kill % 3] = start("load", path, 100 + kill)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    numbers = done(path)
    assert len(numbers) >= counts[-1] > 1_000
    assert counts == sorted(counts)


def count_marks(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM catga_inbox").fetchone()
    return int(count)


async def test_a_frozen_owner_that_thaws_is_fenced(path: Path) -> None:
    with start("zombie", path, 100) as zombie:
        assert pipe(zombie.stdout).readline() == "ready\n"
        zombie.send_signal(signal.SIGSTOP)
        inbox = SqliteInbox(path)
        await inbox.open()
        successor = Fence(3, 101)
        assert await inbox.unsent("billing", successor, 10) == []
        pipe(zombie.stdin).write("\n")
        pipe(zombie.stdin).flush()
        zombie.send_signal(signal.SIGCONT)
        said = await asyncio.to_thread(pipe(zombie.stdout).readline)
        assert said.startswith("fenced: message m-1")
        unit = inbox.unit("billing", "m-1", successor)
        await (await unit.transaction()).execute("INSERT INTO effects VALUES (1)")
        unit.send(Outbound("catga.evt.Done.1", "m-1.1", b"1"))
        assert await unit.commit(Recorded(0, b"1")) == Recorded(0, b"1")
        await inbox.close()
    assert done(path) == [1]


async def test_a_process_that_dies_in_its_transaction_lets_the_others_go_on(path: Path) -> None:
    holder = f"""
import asyncio, sys
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.effects import Fence
async def main():
    inbox = SqliteInbox({str(path)!r}, transaction_timeout=60.0)
    await inbox.open()
    await (await inbox.unit("billing", "m-1", Fence(3, 100)).transaction()).execute("INSERT INTO effects VALUES (1)")
    print("holds", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    inbox = SqliteInbox(path)
    await inbox.open()
    with subprocess.Popen(
        [sys.executable, "-c", holder],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert await asyncio.to_thread(pipe(process.stdout).readline) == "holds\n"
        waiting = asyncio.ensure_future(inbox.unit("billing", "m-2", FENCE).commit(Recorded(0, b"2")))
        await asyncio.sleep(0)
        assert not waiting.done()
        process.kill()
        assert await waiting == Recorded(0, b"2")
    assert await inbox.fetch("SELECT * FROM effects") == []
    assert await inbox.find("billing", "m-1") is None
    await inbox.close()
