"""The tables of an inbox in SQLite, and every statement that touches them. Used by one thread at a time.

    catga_meta    one row per fact about the store: its id, its version
    catga_inbox   what is done: one row per service and message, with the result
    catga_fence   the highest epoch seen, per service, domain and partition
    catga_outbox  what was committed for sending and is not known to be stored

The tables of the users lie in the same database, so that their rows and ours are one transaction.
"""

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from catga_bus.clock import Clock
from catga_bus.durability.inbox.base import FencedError, Outbound, Recorded
from catga_bus.durability.inbox.sqlite_guard import Guard
from catga_bus.errors import ConfigurationError
from catga_bus.partition.work import Fence
from catga_bus.wire import Status

SCHEMA_VERSION = 1

LOOKED_AT_ONCE = 256
"""Ids in one look; a record has at most as many frames."""

_MARKED_AT_ONCE = (64, 8, 1)
# Rows of one INSERT. One statement of 64 rows lets go of the interpreter's lock once, where 64 statements would each
# fight the event loop for it.

SWEPT_AT_ONCE = 1_000
"""Results that one call of `sweep` forgets at most: some ten milliseconds in which nobody else writes."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS catga_meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS catga_inbox (
        place INTEGER PRIMARY KEY, service TEXT NOT NULL, message_id TEXT NOT NULL,
        status INTEGER NOT NULL, body BLOB NOT NULL,
        domain TEXT NOT NULL, partition INTEGER NOT NULL, epoch INTEGER NOT NULL, done_at REAL NOT NULL,
        UNIQUE (service, message_id))""",
    """CREATE TABLE IF NOT EXISTS catga_fence (
        service TEXT, domain TEXT, partition INTEGER, epoch INTEGER NOT NULL,
        PRIMARY KEY (service, domain, partition)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS catga_outbox (
        place INTEGER PRIMARY KEY AUTOINCREMENT, service TEXT NOT NULL,
        domain TEXT NOT NULL, partition INTEGER NOT NULL,
        message_id TEXT NOT NULL, subject TEXT NOT NULL, target TEXT NOT NULL, frame BLOB NOT NULL,
        UNIQUE (service, message_id))""",
    """CREATE INDEX IF NOT EXISTS catga_outbox_order ON catga_outbox (service, domain, partition, place)""",
)
# `place` of the inbox rises with time as well as it matters to the sweep, which therefore needs no index of its own.

_MARK = "INSERT INTO catga_inbox (service, message_id, status, body, domain, partition, epoch, done_at) VALUES "
_MARK_ROW = "(?, ?, ?, ?, ?, ?, ?, ?)"
_REPLACE = (  # a dead letter; the mark goes to the end, where the sweep looks for the young ones
    " ON CONFLICT (service, message_id) DO UPDATE SET place = (SELECT MAX(place) + 1 FROM catga_inbox),"
    " status = excluded.status, body = excluded.body, domain = excluded.domain, partition = excluded.partition,"
    f" epoch = excluded.epoch, done_at = excluded.done_at WHERE status = {int(Status.FAILED)}"
)
_MARKS = {rows: _MARK + ", ".join([_MARK_ROW] * rows) + _REPLACE for rows in _MARKED_AT_ONCE}
_FIND = "SELECT message_id, status, body FROM catga_inbox WHERE service = ? AND message_id IN ({})"
_FINDS = {count: _FIND.format(", ".join("?" * count)) for count in (1, 4, 16, 64, LOOKED_AT_ONCE)}
# A handful of texts, so that each is prepared once.

_RAISE = (
    "INSERT INTO catga_fence VALUES (?, ?, ?, ?)"
    " ON CONFLICT DO UPDATE SET epoch = excluded.epoch WHERE excluded.epoch > epoch"
)
_SEND = (
    "INSERT INTO catga_outbox (service, domain, partition, message_id, subject, target, frame)"
    " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
_UNSENT = (
    "SELECT subject, message_id, frame, target FROM catga_outbox"
    " WHERE service = ? AND domain = ? AND partition = ? ORDER BY place LIMIT ?"
)


class Finished(NamedTuple):
    """An execution that is to be committed."""

    service: str
    message_id: str
    fence: Fence
    result: Recorded
    outbound: Sequence[Outbound]


def find(connection: sqlite3.Connection, service: str, message_ids: Sequence[str]) -> dict[str, Recorded]:
    """Return the recorded results of those messages that are done."""
    found: dict[str, Recorded] = {}
    for start in range(0, len(message_ids), LOOKED_AT_ONCE):
        chunk = list(message_ids[start : start + LOOKED_AT_ONCE])
        size = next(size for size in _FINDS if size >= len(chunk))
        padding = chunk[-1:] * (size - len(chunk))
        for message_id, status, body in connection.execute(_FINDS[size], [service, *chunk, *padding]).fetchall():
            found[message_id] = Recorded(status, body)
    return found


class SqliteStore:
    """A connection that writes to a store: transactions, units within them, marks, fences and the outbox.

    Between `begin` and `commit` no other connection writes, so what was read stays true.

    Args:
        connection: In autocommit mode (`isolation_level=None`); it belongs to the store from now on.
        utc: Returns seconds since 1970.
    """

    def __init__(self, connection: sqlite3.Connection, utc: Clock) -> None:
        self._connection = connection
        self._utc = utc
        self._guard = Guard(connection)
        self._epochs: dict[tuple[str, str, int], int] = {}

    def prepare(self) -> str:
        """Make the tables that are missing, in an open transaction; return the id of the store.

        Raises:
            ConfigurationError: The tables are of a newer version.
        """
        run = self._connection.execute
        for statement in _SCHEMA:
            run(statement)
        facts = (("store_id", secrets.token_hex(16)), ("version", str(SCHEMA_VERSION)))
        self._connection.executemany("INSERT INTO catga_meta VALUES (?, ?) ON CONFLICT DO NOTHING", facts)
        known = dict(run("SELECT name, value FROM catga_meta").fetchall())
        if not known["version"].isdecimal() or int(known["version"]) > SCHEMA_VERSION:
            raise ConfigurationError(
                f"has tables of version {known['version']}, this program reads version {SCHEMA_VERSION}: "
                f"a newer catga_bus made them; update this one, or give it a file of its own"
            )
        return str(known["store_id"])

    def watch(self, is_late: Callable[[], bool], steps: int) -> None:
        """Break off a statement as soon as `is_late`, which is asked every so many steps of SQLite's machine."""
        self._connection.set_progress_handler(is_late, steps)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open: some failures roll it back by themselves."""
        return self._connection.in_transaction

    def begin(self) -> None:
        """Begin a transaction, taking the right to write at once; raises `sqlite3.OperationalError` if it is taken."""
        self._connection.execute("BEGIN IMMEDIATE /* catga */")
        self._epochs.clear()

    def commit(self) -> None:
        """Commit the transaction."""
        self._connection.execute("COMMIT /* catga */")

    def abort(self) -> None:
        """Roll the transaction back, if one is open."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK /* catga */")

    def enter(self) -> None:
        """Begin a unit within the transaction."""
        self._connection.execute("SAVEPOINT catga_unit /* catga */")

    def leave(self) -> None:
        """End the unit and keep what it wrote."""
        self._connection.execute("RELEASE catga_unit /* catga */")

    def undo(self) -> None:
        """End the unit and forget what it wrote."""
        self._connection.execute("ROLLBACK TO catga_unit /* catga */")
        self.leave()
        self._epochs.clear()

    def execute(self, sql: str, parameters: Any) -> int:
        """Run a user's statement; return how many rows it changed."""
        with self._guard.on(sql):
            return max(0, self._connection.execute(sql, parameters).rowcount)

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a user's statement for each row; return how many rows it changed."""
        with self._guard.on(sql):
            return max(0, self._connection.executemany(sql, rows).rowcount)

    def fetch(self, sql: str, parameters: Any) -> list[tuple[Any, ...]]:
        """Run a user's query."""
        with self._guard.on(sql):
            return self._connection.execute(sql, parameters).fetchall()

    def find(self, service: str, message_ids: Sequence[str]) -> dict[str, Recorded]:
        """Return the recorded results of those messages that are done."""
        return find(self._connection, service, message_ids)

    def finish(self, unit: Finished) -> Recorded | FencedError:
        """End the unit that was entered: keep it with its mark, or undo it if it is stale or done already."""
        if (stale := self._stale(unit)) is not None:
            self.undo()
            return stale
        if self._mark([unit]):
            self._send([unit])
            self.leave()
            return unit.result
        self.undo()
        self._raise(unit.service, unit.fence)
        return self.find(unit.service, [unit.message_id])[unit.message_id]

    def record(self, units: Sequence[Finished]) -> list[Recorded | FencedError]:
        """Record units that have written nothing of their own; return what became of each, in order."""
        self.enter()
        stale = [self._stale(unit) for unit in units]
        fresh = [unit for unit, error in zip(units, stale, strict=True) if error is None]
        if self._mark(fresh):
            self._send(fresh)
            self.leave()
            return [error or unit.result for unit, error in zip(units, stale, strict=True)]
        # One of them was done already, which is rare: find out which.
        self.undo()
        return [self._record_alone(unit) for unit in units]

    def _record_alone(self, unit: Finished) -> Recorded | FencedError:
        self.enter()
        return self.finish(unit)

    def unsent(self, service: str, fence: Fence, limit: int) -> list[Outbound]:
        """Raise the fence and return what waits to be sent in its partition, the oldest first."""
        if (stale := self._check(service, fence)) is not None:
            raise stale
        rows = self._connection.execute(_UNSENT, (service, fence.domain, fence.partition, limit)).fetchall()
        return [Outbound(subject, message_id, frame, target) for subject, message_id, frame, target in rows]

    def sent(self, service: str, message_ids: Sequence[str]) -> None:
        """Forget messages of the outbox."""
        rows = [(service, message_id) for message_id in message_ids]
        self._connection.executemany("DELETE FROM catga_outbox WHERE service = ? AND message_id = ?", rows)

    def sweep(self, before_utc: float) -> int:
        """Forget the oldest results, up to the first that is younger than an instant; return how many."""
        rows = self._connection.execute(
            "SELECT place, done_at FROM catga_inbox ORDER BY place LIMIT ?", (SWEPT_AT_ONCE,)
        ).fetchall()
        last, count = None, 0
        for place, done_at in rows:
            if done_at >= before_utc:
                break
            last, count = place, count + 1
        if last is not None:
            self._connection.execute("DELETE FROM catga_inbox WHERE place <= ?", (last,))
        return count

    def copy_log(self, patience_ms: int) -> None:
        """Copy the log into the file and empty it, while nobody writes; outside a transaction."""
        self._connection.execute(f"PRAGMA busy_timeout = {patience_ms}")
        try:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._connection.execute("PRAGMA busy_timeout = 0")

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        self._connection.close()

    def image(self) -> bytes:
        """Return the whole database as bytes."""
        return self._connection.serialize()

    def _stale(self, unit: Finished) -> FencedError | None:
        return self._check(unit.service, unit.fence, unit.message_id)

    def _check(self, service: str, fence: Fence, message_id: str = "") -> FencedError | None:
        """Raise the fence to an epoch, or say why not."""
        partition, epoch, domain = fence
        highest = self._epochs.get((service, domain, partition))
        if highest is None:
            row = self._connection.execute(
                "SELECT epoch FROM catga_fence WHERE service = ? AND domain = ? AND partition = ?",
                (service, domain, partition),
            ).fetchone()
            highest = self._epochs[service, domain, partition] = row[0] if row else 0
        if epoch < highest:
            of = f"message {message_id}" if message_id else "the outbox"
            return FencedError(
                f"{of} of service {service!r}: epoch {epoch} of partition {domain}.{partition} is stale, "
                f"the store has seen {highest}: another node owns the partition",
                highest,
            )
        if epoch > highest:
            self._raise(service, fence)
        return None

    def _raise(self, service: str, fence: Fence) -> None:
        self._connection.execute(_RAISE, (service, fence.domain, fence.partition, fence.epoch))
        known = self._epochs.get((service, fence.domain, fence.partition), 0)
        self._epochs[service, fence.domain, fence.partition] = max(known, fence.epoch)

    def _mark(self, units: Sequence[Finished]) -> bool:
        """Mark units as done; return whether none of them was. If one was, the caller undoes the others."""
        now = self._utc()
        start = 0
        while start < len(units):
            size = next(size for size in _MARKED_AT_ONCE if size <= len(units) - start)
            values: list[Any] = []
            for service, message_id, (partition, epoch, domain), result, _ in units[start : start + size]:
                values += (service, message_id, result.status, result.body, domain, partition, epoch, now)
            if self._connection.execute(_MARKS[size], values).rowcount != size:
                return False
            start += size
        return True

    def _send(self, units: Sequence[Finished]) -> None:
        rows = [
            (unit.service, unit.fence.domain, unit.fence.partition, out.message_id, out.subject, out.service, out.frame)
            for unit in units
            for out in unit.outbound
        ]
        if rows:
            self._connection.executemany(_SEND, rows)
