"""The thread that writes to an inbox: what is committed together, and who suffers when something fails."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from catga_bus.clock import monotonic
from catga_bus.durability.inbox import sqlite_writer
from catga_bus.durability.inbox.base import InboxError, Recorded, SlowTransactionError, Unit
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.durability.inbox.sqlite_store import Finished, SqliteStore
from catga_bus.effects import Fence

FENCE = Fence(3, 100)
DONE = Recorded(0, b"done")


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[SqliteInbox]:
    inbox = SqliteInbox(tmp_path / "inbox.db", transaction_timeout=0.3)
    await inbox.open()
    await inbox.script(["CREATE TABLE effects (name TEXT PRIMARY KEY)"])
    yield inbox
    await inbox.close()


def commits(inbox: SqliteInbox) -> list[str]:
    """Return a list that grows by every commit."""
    seen: list[str] = []
    store(inbox)._connection.set_trace_callback(lambda sql: seen.append(sql) if sql.startswith("COMMIT") else None)
    return seen


def store(inbox: SqliteInbox) -> SqliteStore:
    assert inbox._writer is not None
    return inbox._writer._store


async def write(unit: Unit, name: str) -> None:
    await (await unit.transaction()).execute("INSERT INTO effects VALUES (?)", (name,))


async def do(inbox: SqliteInbox, name: str) -> Recorded:
    unit = inbox.unit("billing", name, FENCE)
    try:
        await write(unit, name)
        return await unit.commit(DONE)
    except BaseException:
        await unit.rollback()
        raise


async def mark(inbox: SqliteInbox, name: str) -> Recorded:
    return await inbox.unit("billing", name, FENCE).commit(DONE)


async def effects(inbox: SqliteInbox) -> list[str]:
    return [name for (name,) in await inbox.fetch("SELECT name FROM effects ORDER BY name")]


class Held:
    """Holds the thread in a statement until it is told to go on."""

    def __init__(self, inbox: SqliteInbox) -> None:
        self._go = threading.Event()
        store(inbox)._connection.create_function("hold", 0, self._go.wait)

    def let_go(self) -> None:
        self._go.set()


# -- what is committed together


async def test_a_lone_unit_is_committed_at_once(inbox: SqliteInbox) -> None:
    seen = commits(inbox)
    for number in range(3):
        await mark(inbox, f"m-{number}")
        await do(inbox, f"n-{number}")
    assert len(seen) == 6


async def test_marks_that_come_together_share_a_commit(inbox: SqliteInbox) -> None:
    seen = commits(inbox)
    await asyncio.gather(*(mark(inbox, f"m-{number}") for number in range(200)))
    assert len(seen) < 10


async def test_units_that_wait_for_a_turn_share_commits(inbox: SqliteInbox) -> None:
    seen = commits(inbox)
    await asyncio.gather(*(do(inbox, f"m-{number}") for number in range(200)))
    assert len(seen) < 100
    assert len(await effects(inbox)) == 200


async def test_marks_are_written_between_two_turns(inbox: SqliteInbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that has its turn may be rolled back: the marks of others must not be in its savepoint."""
    unit = inbox.unit("billing", "m-1", FENCE)
    await write(unit, "m-1")
    marks = [asyncio.ensure_future(mark(inbox, f"n-{number}")) for number in range(20)]
    await asyncio.sleep(0)
    await unit.rollback()
    assert await asyncio.gather(*marks) == [DONE] * 20
    assert len(await inbox.find_many("billing", [f"n-{number}" for number in range(20)])) == 20


async def test_one_transaction_takes_a_bounded_number_of_turns(inbox: SqliteInbox) -> None:
    assert inbox._writer is not None
    inbox._writer._max_units = 4
    seen = commits(inbox)
    await asyncio.gather(*(do(inbox, f"m-{number}") for number in range(40)))
    assert len(seen) >= 10


async def test_one_transaction_takes_turns_for_a_bounded_time(
    inbox: SqliteInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "MAX_SECONDS", 0.0)
    seen = commits(inbox)
    await asyncio.gather(*(do(inbox, f"m-{number}") for number in range(40)))
    assert len(seen) == 40


async def test_the_event_loop_goes_on_while_a_statement_runs(inbox: SqliteInbox) -> None:
    held = Held(inbox)
    unit = inbox.unit("billing", "m-1", FENCE)
    transaction = await unit.transaction()
    running = asyncio.ensure_future(transaction.fetch("SELECT hold()"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert await inbox.find("billing", "m-1") is None
    assert not running.done()
    held.let_go()
    assert await running == [(1,)]
    await unit.rollback()


# -- who suffers when something fails


async def test_a_failed_commit_fails_all_that_were_in_it_and_nobody_after(
    inbox: SqliteInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = SqliteStore.commit, iter((True,))

    def commit(self: SqliteStore) -> None:
        if next(failures, False):
            raise sqlite3.OperationalError("disk I/O error")
        real(self)

    monkeypatch.setattr(SqliteStore, "commit", commit)
    first = inbox.unit("billing", "m-1", FENCE)
    await write(first, "m-1")
    results = await asyncio.gather(
        first.commit(DONE), *(do(inbox, f"n-{number}") for number in range(5)), mark(inbox, "k"), return_exceptions=True
    )
    assert isinstance(results[0], InboxError)
    assert "disk I/O error" in str(results[0])
    assert first.failure is results[0]
    done = [f"n-{number}" for number in range(5) if results[1 + number] == DONE]
    assert await effects(inbox) == done
    assert await do(inbox, "m-1") == DONE


async def test_a_mistake_of_the_store_itself_leaves_the_thread_alive(
    inbox: SqliteInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = SqliteStore.finish, iter((True,))

    def finish(self: SqliteStore, unit: Finished) -> object:
        if next(failures, False):
            raise KeyError("oops")
        return real(self, unit)

    monkeypatch.setattr(SqliteStore, "finish", finish)
    with pytest.raises(InboxError, match="oops"):
        await do(inbox, "m-1")
    assert await do(inbox, "m-1") == DONE


async def test_a_statement_that_is_broken_off_takes_its_transaction_along_but_not_the_blame(
    inbox: SqliteInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite rolls everything back when it breaks a writing statement off: the others try again, uncounted."""
    monkeypatch.setattr(sqlite_writer, "MAX_SECONDS", 60.0)
    first, slow = inbox.unit("billing", "first", FENCE), inbox.unit("billing", "slow", FENCE)
    await write(first, "first")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO effects SELECT i FROM n"
    running = asyncio.ensure_future((await slow.transaction()).execute(endless))
    await asyncio.sleep(0)
    with pytest.raises(InboxError) as caught:  # in one transaction with the slow one, which waits for its turn
        await first.commit(DONE)
    assert not isinstance(caught.value, SlowTransactionError)
    assert first.failure is caught.value
    with pytest.raises(SlowTransactionError, match="slow was open for more than"):
        await running
    await slow.rollback()
    assert slow.failure is None
    assert await effects(inbox) == []
    assert await do(inbox, "first") == DONE


async def test_who_waits_in_vain_is_told_once_for_all(inbox: SqliteInbox, tmp_path: Path) -> None:
    """Who waits when a transaction cannot begin is told with the first, instead of each waiting in turn."""
    impatient = SqliteInbox(tmp_path / "inbox.db", busy_timeout=0.2, transaction_timeout=0.1)
    await impatient.open()
    unit = inbox.unit("billing", "m-1", FENCE)
    await write(unit, "m-1")
    began = monotonic()
    results = await asyncio.gather(
        *(do(impatient, f"n-{number}") for number in range(30)), mark(impatient, "k"), return_exceptions=True
    )
    assert all(isinstance(result, InboxError) for result in results)
    assert monotonic() - began < 3.0  # and not 30 times 0.2 s
    await unit.rollback()
    assert await mark(impatient, "k") == DONE
    await impatient.close()


async def test_a_loop_that_has_gone_is_not_told(inbox: SqliteInbox) -> None:
    loop = asyncio.new_event_loop()
    held = Held(inbox)

    async def ask() -> None:
        unit = inbox.unit("billing", "m-1", FENCE)
        asking = asyncio.ensure_future((await unit.transaction()).fetch("SELECT hold()"))
        await asyncio.sleep(0)
        asking.cancel()

    await asyncio.to_thread(loop.run_until_complete, ask())
    loop.close()
    held.let_go()
    assert await do(inbox, "m-2") == DONE  # when the time of the first is over


# -- what handlers may not do


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("COMMIT", "does not begin or end its transaction"),
        ("COMMIT /* catga */", "leave the comment out"),
        ("/* x */ ROLLBACK", "does not begin or end"),
        ("INSERT OR ROLLBACK INTO effects VALUES ('a')", "must not roll back"),
        ("INSERT INTO effects VALUES ('a') ON CONFLICT  ROLLBACK", "must not roll back"),
        (
            "CREATE TRIGGER t BEFORE INSERT ON effects BEGIN SELECT RAISE (rollback, 'no'); END",
            "must not roll back",
        ),
        ("ATTACH ':memory:' AS other", "may not attach"),
        ("PRAGMA synchronous = OFF", "may not change the settings"),
        ("PRAGMA journal_mode = DELETE", "may not change the settings"),
        ("INSERT INTO catga_outbox VALUES (1)", "catga_outbox belongs to the inbox"),
        ("DELETE FROM Catga_Inbox", "belongs to the inbox"),
        ("ALTER TABLE catga_inbox ADD COLUMN x", "belongs to the inbox"),
        ("CREATE TRIGGER t AFTER INSERT ON catga_inbox BEGIN SELECT 1; END", "belongs to the inbox"),
        ("DROP INDEX catga_outbox_order", "belongs to the inbox"),
    ],
)
async def test_what_would_break_the_promise_is_refused(inbox: SqliteInbox, statement: str, said: str) -> None:
    unit = inbox.unit("billing", "m-1", FENCE)
    await write(unit, "m-1")
    with pytest.raises(sqlite3.ProgrammingError, match=said) as caught:
        await (await unit.transaction()).execute(statement)
    assert repr(statement) in str(caught.value)
    assert await unit.commit(DONE) == DONE
    assert unit.failure is None
    assert await effects(inbox) == ["m-1"]


async def test_what_handlers_need_is_allowed(inbox: SqliteInbox) -> None:
    unit = inbox.unit("billing", "m-1", FENCE)
    transaction = await unit.transaction()
    await transaction.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT REFERENCES effects)")
    await transaction.execute("CREATE INDEX t_name ON t (name)")
    await transaction.execute("INSERT INTO t (name) VALUES ('a') RETURNING id")
    await transaction.execute("ALTER TABLE t ADD COLUMN cents INTEGER")
    assert len(await transaction.fetch("PRAGMA table_info(t)")) == 3
    assert await transaction.fetch("SELECT message_id FROM catga_inbox WHERE message_id = 'x'") == []
    assert await transaction.fetch("WITH n(i) AS (VALUES (1), (2)) SELECT sum(i) FROM n") == [(3,)]
    await transaction.execute("DROP TABLE t")
    await unit.commit(DONE)


@pytest.mark.parametrize("statement", ["SELEC 1", "SELECT 1; SELECT 2", "INSERT INTO effects VALUES (?)", "", "\x00"])
async def test_nonsense_is_the_handlers_own_error(inbox: SqliteInbox, statement: str) -> None:
    unit = inbox.unit("billing", "m-1", FENCE)
    await write(unit, "m-1")
    caught: list[BaseException] = []
    try:
        await (await unit.transaction()).execute(statement, (object(),) if "?" in statement else ())
    except Exception as error:
        caught.append(error)
    assert not any(isinstance(error, InboxError) for error in caught)
    assert await unit.commit(DONE) == DONE
    assert unit.failure is None
