"""The file of an inbox: opened, shared with other processes, and watched, so that each trouble has a clear text."""

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from catga_bus.clock import Clock
from catga_bus.durability.inbox.base import InboxError
from catga_bus.durability.inbox.sqlite_store import SqliteStore
from catga_bus.errors import ConfigurationError

Synchronous: TypeAlias = Literal["normal", "full"]

_OLDEST: Final = (3, 24, 0)
# The first with UPSERT.

_COPY_BYTES: Final = 4_194_304
# SQLite's own bound, 1,000 pages: then what the log holds is copied into the file.

_COPY_PATIENCE_MS: Final = 250
# For writers, and for readers that still look into the log: while it waits for those, nobody writes.

_FIRST_PAUSE: Final = 0.0002
_LAST_PAUSE: Final = 0.001
# Short: SQLite keeps no queue, so who looks rarely is passed by. With three processes that write without a pause the
# slowest percentile of 768 units in flight waits 80 ms at 1 ms, and 190 ms at 5 ms (measured).


_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

_TROUBLES: Final = {
    sqlite3.SQLITE_FULL: "the disk is full: make room, nothing was lost",
    sqlite3.SQLITE_READONLY: "it cannot be written: give this user the right to write to the file and to its directory",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that it is a file, and the rights on it and its directory",
    sqlite3.SQLITE_PERM: "it cannot be opened: give this user the right to read and write it",
    sqlite3.SQLITE_IOERR: "the disk failed: see the system's log",
    sqlite3.SQLITE_CORRUPT: "it is damaged: stop all nodes, then restore a copy or run `sqlite3 FILE .recover`",
    sqlite3.SQLITE_NOTADB: "it is no SQLite database: name another file",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
}


def is_busy(error: sqlite3.Error) -> bool:
    """Whether somebody else has what is needed, for the moment."""
    return _code(error) in _BUSY


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


class SqliteFile:
    """The way to a store in a file; all but `reader` belong to the thread that writes.

    Decided: the log is copied into the file by us, with the right to write in hand (`wal_checkpoint(TRUNCATE)`), and
    never by SQLite itself. Up to 3.51.2 a copy that runs beside a commit can lose commits ("WAL-reset bug",
    sqlite.org/wal.html), and distributions ship such versions.

    Args:
        path: The file.
        clock: Measures how long others are waited for.
        utc: Seconds since 1970.
        create: Whether to make a file that is not there.
        synchronous: See `SqliteInbox`.
        busy_timeout: See `SqliteInbox`.
        sleep: Waits in the thread.

    Raises:
        ConfigurationError: An option is out of its bounds.
    """

    def __init__(
        self,
        path: Path,
        clock: Clock,
        utc: Clock,
        *,
        create: bool = True,
        synchronous: Synchronous = "normal",
        busy_timeout: float = 15.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if synchronous not in get_args(Synchronous):
            raise ConfigurationError(f"synchronous must be 'normal' or 'full', got {synchronous!r}")
        if not 0.1 <= busy_timeout <= 3_600:
            raise ConfigurationError(f"busy_timeout must be 0.1 to 3,600 s, got {busy_timeout!r}")
        self.path = path.absolute()
        self.store_id = ""
        self.reader: sqlite3.Connection
        self._clock = clock
        self._utc = utc
        self._sleep = sleep
        self._create = create
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._identity = (0, 0)
        self._log = Path(f"{self.path}-wal")
        self._copy_at = _COPY_BYTES

    def open(self) -> SqliteStore:
        """Open the store and the connection that reads; the thread that calls is the one that writes."""
        self._check_place()
        try:
            connection = self._connect()
            store = SqliteStore(connection, self._utc)
            try:
                self._patiently(lambda: self._set_up(connection, store), "opening it")
                self.reader = self._connect()
                self.reader.execute("PRAGMA query_only = 1")
            except BaseException:
                connection.close()
                raise
        except sqlite3.Error as error:
            trouble = self.explained(error) or InboxError(f"{self.path}: cannot be opened: {error}")
            raise (ConfigurationError(str(trouble)) if _code(error) == sqlite3.SQLITE_NOTADB else trouble) from error
        self._identity = self._find_identity()
        return store

    def begin(self, store: SqliteStore) -> None:
        """Begin a transaction, waiting for other processes."""
        if self._find_identity() != self._identity:
            raise InboxError(
                f"{self.path}: the file was deleted or replaced while this process had it open, and what it knows may "
                f"be gone: put it back (a copy will do that is newer than every message that can still arrive), and "
                f"restart the nodes of this host"
            )
        self._patiently(store.begin, "writing to it")

    def end(self, store: SqliteStore) -> None:
        """Let others write, and copy the log into the file when it has grown."""
        size = self._log_bytes()
        if size < self._copy_at:
            return
        with suppress(sqlite3.Error):  # what is committed is safe in the log; the next commit tells what is wrong
            store.copy_log(_COPY_PATIENCE_MS)
        self._copy_at = self._log_bytes() + _COPY_BYTES

    def close(self, store: SqliteStore) -> None:
        """Close both connections; the last one of a file copies what the log still holds."""
        self.reader.close()
        store.close()

    def explained(self, error: sqlite3.Error) -> InboxError | None:
        """Say what a failure of the file means; None for one that a statement is to blame for."""
        code = _code(error)
        if code in _BUSY:
            return InboxError(f"{self.path}: it is locked by {holder(self.path)} ({error})")
        trouble = _TROUBLES.get(code)
        return InboxError(f"{self.path}: {trouble} ({error})") if trouble else None

    def _check_place(self) -> None:
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ConfigurationError(f"SQLite {sqlite3.sqlite_version} is too old for an inbox; it takes 3.24 or newer")
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"{self.path}: there is no directory {self.path.parent}: make it, or mount it")
        if self.path.is_dir():
            raise ConfigurationError(f"{self.path}: it is a directory; name a file in it, such as {self.path}/inbox.db")
        if not self._create and not self.path.exists():
            raise ConfigurationError(
                f"{self.path}: there is no such file, and create=False: is its volume mounted? "
                f"Only the first start of a service has nothing to remember"
            )

    def _connect(self) -> sqlite3.Connection:
        address = f"{self.path.as_uri()}?mode={'rwc' if self._create else 'rw'}"
        return sqlite3.connect(address, uri=True, timeout=0.0, isolation_level=None, check_same_thread=False)

    def _set_up(self, connection: sqlite3.Connection, store: SqliteStore) -> None:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise ConfigurationError(f"{self.path}: its file system has no shared memory for SQLite; take a local disk")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        store.begin()
        try:
            self.store_id = store.prepare()
            store.commit()
        except ConfigurationError as error:
            store.abort()
            raise ConfigurationError(f"{self.path} {error}") from error
        except sqlite3.Error:
            store.abort()
            raise

    def _patiently(self, step: Callable[[], None], doing: str) -> None:
        """Take a step that needs the file, again and again while others have it."""
        deadline = self._clock() + self._busy_timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return step()
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                if self._clock() >= deadline:
                    raise InboxError(
                        f"{self.path}: locked for {self._busy_timeout} s by {holder(self.path)}, {doing} was given up: "
                        f"it may be stopped or be in a long transaction; end it, or raise busy_timeout"
                    ) from error
            self._sleep(pause)
            pause = min(_LAST_PAUSE, pause * 2)

    def _find_identity(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)
        except OSError:
            return (0, 0)
        return (found.st_dev, found.st_ino)

    def _log_bytes(self) -> int:
        try:
            return os.stat(self._log).st_size
        except OSError:
            return 0


_WRITE_LOCK_BYTE = "120"
# Of the shared memory: sqlite/src/os_unix.c, UNIX_SHM_BASE + WAL_WRITE_LOCK.


def holder(path: Path) -> str:
    """Name the process that has the right to write to a store, for people, as far as the system tells."""
    try:
        shared = os.stat(f"{path}-shm")
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process"
    file = f"{os.major(shared.st_dev):02x}:{os.minor(shared.st_dev):02x}:{shared.st_ino}"
    for line in lines:
        # 1: POSIX  ADVISORY  WRITE 4711 fd:01:123456 120 120
        fields = line.split()
        if fields[1:2] != ["->"] and fields[3:4] == ["WRITE"] and fields[5:7] == [file, _WRITE_LOCK_BYTE]:
            return f"process {fields[4]}"
    return "another process"
