"""The file of an inbox in trouble: each has a text that names the file and the fix, and nothing is half done."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from catga_bus.durability.inbox.base import InboxError, Recorded
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.effects import Fence
from catga_bus.errors import ConfigurationError

DONE = Recorded(0, b"\xa4done")
FENCE = Fence(3, 100)

is_root = os.geteuid() == 0
needs_mounts = pytest.mark.skipif(not is_root, reason="mounts a file system: needs root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "inbox.db"


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., SqliteInbox]]:
    made: list[SqliteInbox] = []

    def make(path: Path, **options: object) -> SqliteInbox:
        inbox = SqliteInbox(path, **{"busy_timeout": 0.3, "transaction_timeout": 0.2, **options})  # type: ignore[arg-type]
        made.append(inbox)
        return inbox

    yield make
    for inbox in made:
        await inbox.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def mark(inbox: SqliteInbox, message_id: str, body: bytes = b"") -> Recorded:
    return await inbox.unit("billing", message_id, FENCE).commit(Recorded(0, body))


async def refusal(inbox: SqliteInbox, error: type[Exception] = InboxError) -> str:
    """Open an inbox that cannot be opened; return what is said."""
    with pytest.raises(error) as caught:
        await inbox.open()
    return str(caught.value)


# -- what cannot be opened


async def test_a_missing_directory(make: Callable[..., SqliteInbox], tmp_path: Path) -> None:
    said = await refusal(make(tmp_path / "nowhere" / "inbox.db"), ConfigurationError)
    assert f"there is no directory {tmp_path}/nowhere" in said
    assert not (tmp_path / "nowhere").exists()


async def test_a_directory(make: Callable[..., SqliteInbox], tmp_path: Path) -> None:
    assert f"{tmp_path}: it is a directory; name a file in it" in await refusal(make(tmp_path), ConfigurationError)


async def test_a_missing_file_where_none_is_to_be_made(make: Callable[..., SqliteInbox], path: Path) -> None:
    said = await refusal(make(path, create=False), ConfigurationError)
    assert f"{path}: there is no such file, and create=False" in said
    assert not path.exists()
    first = make(path)
    await first.open()
    second = make(path, create=False)
    await second.open()
    assert second.store_id == first.store_id


async def test_a_file_that_is_no_database(make: Callable[..., SqliteInbox], path: Path) -> None:
    path.write_bytes(b"name;cents\n" * 1_000)
    said = await refusal(make(path), ConfigurationError)
    assert f"{path}: it is no SQLite database: name another file" in said
    assert path.read_bytes() == b"name;cents\n" * 1_000


async def test_tables_of_a_newer_version(make: Callable[..., SqliteInbox], path: Path) -> None:
    inbox = make(path)
    await inbox.open()
    await inbox.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE catga_meta SET value = '2' WHERE name = 'version'")
    said = await refusal(make(path), ConfigurationError)
    assert f"{path} has tables of version 2, this program reads version 1" in said
    assert "update" in said


async def test_a_database_of_the_users_own_gets_the_tables(make: Callable[..., SqliteInbox], path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE accounts (id TEXT)")
        connection.execute("INSERT INTO accounts VALUES ('a-1')")
    inbox = make(path)
    await inbox.open()
    assert await inbox.fetch("SELECT id FROM accounts") == [("a-1",)]


@needs_mounts
async def test_a_read_only_disk(make: Callable[..., SqliteInbox], small_disk: Path) -> None:
    inbox = make(small_disk / "inbox.db")
    await inbox.open()
    await inbox.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = await refusal(make(small_disk / "inbox.db"))
    assert f"{small_disk}/inbox.db: it cannot be" in said
    assert "right" in said
    said = await refusal(make(small_disk / "other.db"))
    assert f"{small_disk}/other.db: it cannot be opened" in said


async def test_many_open_a_new_file_at_once(make: Callable[..., SqliteInbox], path: Path) -> None:
    inboxes = [make(path, busy_timeout=10.0) for _ in range(8)]
    await asyncio.gather(*(inbox.open() for inbox in inboxes))
    assert len({inbox.store_id for inbox in inboxes}) == 1


# -- what goes wrong while it is used


LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
"""


async def test_a_locked_file(make: Callable[..., SqliteInbox], path: Path) -> None:
    inbox = make(path)
    await inbox.open()
    await mark(inbox, "m-1", b"1")
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as locker:
        assert locker.stdout is not None
        assert locker.stdin is not None
        assert locker.stdout.readline() == "locked\n"
        units = [asyncio.ensure_future(mark(inbox, f"n-{number}")) for number in range(3)]
        effect = inbox.unit("billing", "m-2", FENCE)
        with pytest.raises(InboxError, match=f"{path}: locked for 0.3 s by process {locker.pid}, .*busy_timeout"):
            await (await effect.transaction()).execute("CREATE TABLE t (x)")
        await effect.rollback()
        for unit in units:
            with pytest.raises(InboxError, match="locked for"):
                await unit
        assert await inbox.find("billing", "m-1") == Recorded(0, b"1")  # readers do not wait
        late = make(path)
        assert f"locked for 0.3 s by process {locker.pid}, opening it was given up" in await refusal(late)
        locker.stdin.write("\n")
        locker.stdin.flush()
        locker.wait()
    assert await mark(inbox, "n-1") == Recorded(0, b"")


async def test_a_short_lock_is_waited_for(make: Callable[..., SqliteInbox], path: Path) -> None:
    inbox = make(path, busy_timeout=10.0)
    await inbox.open()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.ensure_future(mark(inbox, "m-1", b"1"))
        assert await inbox.find("billing", "m-1") is None  # the event loop goes on
        other.execute("COMMIT")
        assert await waiting == Recorded(0, b"1")


@pytest.mark.parametrize("replaced_by", ["nothing", "an empty file", "a copy"])
async def test_a_file_that_is_deleted_or_replaced(
    make: Callable[..., SqliteInbox], path: Path, replaced_by: str
) -> None:
    inbox = make(path)
    await inbox.open()
    await mark(inbox, "m-1")
    copy = path.read_bytes()
    path.unlink()
    if replaced_by != "nothing":
        held = path.with_suffix(".other")  # so that the number of the deleted file is not given to the new one
        held.touch()
        path.write_bytes(copy if replaced_by == "a copy" else b"")
    for message_id in ("m-2", "m-3"):
        with pytest.raises(InboxError, match=f"{path}: the file was deleted or replaced .* restart"):
            await mark(inbox, message_id)
    assert path.exists() == (replaced_by != "nothing")


async def test_a_damaged_file(make: Callable[..., SqliteInbox], path: Path) -> None:
    inbox = make(path)
    await inbox.open()
    await asyncio.gather(*(mark(inbox, f"m-{number}", b"x" * 100) for number in range(2_000)))
    await inbox.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4_096 * 8)
        file.write(b"\xff" * (size - 4_096 * 8))
    await inbox.open()
    with pytest.raises(InboxError, match=f"{path}: it is damaged: stop all nodes.*recover"):
        await inbox.find_many("billing", [f"m-{number}" for number in range(2_000)])
    results = await asyncio.gather(*(mark(inbox, f"n-{number}") for number in range(20)), return_exceptions=True)
    assert any("it is damaged" in str(result) for result in results)


@needs_mounts
async def test_a_full_disk(make: Callable[..., SqliteInbox], small_disk: Path) -> None:
    path = small_disk / "inbox.db"
    inbox = make(path)
    await inbox.open()
    await inbox.script(["CREATE TABLE payments (name TEXT, blob BLOB)"])
    done: list[int] = []

    async def pay(number: int) -> None:
        unit = inbox.unit("billing", f"m-{number}", FENCE)
        try:
            transaction = await unit.transaction()
            await transaction.execute("INSERT INTO payments VALUES (?, ?)", (f"m-{number}", b"x" * 20_000))
            await unit.commit(DONE)
        except InboxError:
            await unit.rollback()
            raise
        done.append(number)

    async def pay_many() -> None:
        for number in range(200):
            await pay(number)

    with pytest.raises(InboxError, match=f"{path}: the disk is full: make room"):
        await pay_many()
    assert 0 < len(done) < 200
    found = await inbox.find_many("billing", [f"m-{number}" for number in range(200)])
    paid = [name for (name,) in await inbox.fetch("SELECT name FROM payments ORDER BY rowid")]
    assert sorted(found) == sorted(paid) == sorted(f"m-{number}" for number in done)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    await pay(len(done))  # it goes on as soon as there is room
    await inbox.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM payments").fetchone() == (len(done),)


async def test_the_log_is_copied_into_the_file_before_it_grows_large(
    make: Callable[..., SqliteInbox], path: Path
) -> None:
    inbox = make(path)
    await inbox.open()
    for number in range(40):
        await mark(inbox, f"m-{number}", bytes(500_000))
    assert path.stat().st_size > 16_000_000
    assert Path(f"{path}-wal").stat().st_size < 6_000_000


async def test_a_reader_that_stays_does_not_stop_the_writers(make: Callable[..., SqliteInbox], path: Path) -> None:
    inbox = make(path)
    await inbox.open()
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM catga_inbox").fetchall()
        for number in range(10):
            await mark(inbox, f"m-{number}", bytes(500_000))
        reader.execute("COMMIT")
    for number in range(10, 20):
        await mark(inbox, f"m-{number}", bytes(500_000))
    assert Path(f"{path}-wal").stat().st_size < 6_000_000
