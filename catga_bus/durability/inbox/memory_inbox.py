"""The inbox in memory: for tests, and for services whose work may be forgotten when their process ends."""

import sqlite3
from typing import ClassVar

from catga_bus.clock import Clock, monotonic
from catga_bus.durability.inbox.base import InboxError
from catga_bus.durability.inbox.sql_inbox import DEFAULT_RETENTION, SqlInbox, wall_clock
from catga_bus.durability.inbox.sqlite_store import SqliteStore


class MemoryInbox(SqlInbox):
    """An inbox in a SQLite database that lies in this process: handlers run the same statements as on a file.

    Nodes of one process share it by being given the same instance. It keeps what it holds when it is closed, and
    forgets it with the instance.

    Args:
        retention: Seconds for which results are kept, at least 60.
        transaction_timeout: Seconds for which one handler may have the transaction; 0.01 to 3,600.

    Raises:
        ConfigurationError: An option is out of its bounds.
    """

    max_units: ClassVar[int] = 1
    # One connection writes and reads: with one unit in a transaction, all that can be found is committed.

    def __init__(
        self,
        *,
        retention: float = DEFAULT_RETENTION,
        transaction_timeout: float = 5.0,
        clock: Clock = monotonic,
        utc: Clock = wall_clock,
    ) -> None:
        super().__init__(_Image(utc), retention=retention, transaction_timeout=transaction_timeout, clock=clock)

    def __repr__(self) -> str:
        return "<MemoryInbox>"


class _Image:
    """The database: a connection while it is open, an image of its pages in between."""

    def __init__(self, utc: Clock) -> None:
        self._utc = utc
        self._pages: bytes | None = None
        self.store_id = ""

    def open(self) -> SqliteStore:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        if self._pages is not None:
            connection.deserialize(self._pages)
        store = SqliteStore(connection, self._utc)
        store.begin()
        self.store_id = store.prepare()
        store.commit()
        return store

    def begin(self, store: SqliteStore) -> None:
        store.begin()

    def end(self, store: SqliteStore) -> None:
        """Nobody waits."""

    def close(self, store: SqliteStore) -> None:
        self._pages = store.image()
        store.close()

    def explained(self, error: sqlite3.Error) -> InboxError | None:
        """Memory does not fail: the statement is to blame."""
        return None
