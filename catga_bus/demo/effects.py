"""The effect log: one row per effect, from which the verdict is computed.

What a node holds in memory proves nothing about a bus: it dies with the node. So the handler of a flight writes one row
into a table, through the transaction of its command: `ctx.transaction()`. SQLite has one writer at a time, so the ids
of the rows are the order in which they were committed. Nothing in the table keeps a row from being written twice, or at
the wrong time: that is what the bus has to do, and what is looked for in the end.
"""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

TABLE = """CREATE TABLE effects (
    id INTEGER PRIMARY KEY,
    row INTEGER NOT NULL, aircraft TEXT NOT NULL, dep_delay INTEGER, distance INTEGER NOT NULL,
    node TEXT NOT NULL, partition INTEGER NOT NULL, epoch INTEGER NOT NULL, at REAL NOT NULL)"""

INSERT = (
    "INSERT INTO effects (row, aircraft, dep_delay, distance, node, partition, epoch, at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)

_SELECT = (
    "SELECT id, row, aircraft, dep_delay, distance, node, partition, epoch, at FROM effects WHERE id > ? ORDER BY id"
)


class EffectLogError(Exception):
    """The effect log cannot be made or read; the text names the file."""


class Effect(NamedTuple):
    """One row of the log."""

    id: int
    """The order of commits."""

    row: int
    """Place of the flight in the schedule, counted from 0."""

    aircraft: str
    dep_delay: int | None
    """As the handler received it: so the verdict also covers what the wire did to the values."""

    distance: int
    node: str
    partition: int
    epoch: int
    """Of the partition, when the handler began: it rises with every owner."""

    at: float
    """Instant just before the row was written, on the monotonic clock, which all processes of one host share."""

    @property
    def values(self) -> tuple[object, ...]:
        """What `INSERT` takes."""
        return self[1:]


def create_effect_log(path: Path) -> None:
    """Make the file with its table; the inboxes of the nodes put their own tables beside it.

    Raises:
        EffectLogError: It cannot be made.
    """
    with _named(path, "made"), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # what the inbox wants as well: who reads waits for nobody
        connection.execute(TABLE)


class EffectLog:
    """Reads an effect log while others write to it. Close it, or use it in a `with` statement.

    Args:
        path: The file.

    Raises:
        EffectLogError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _named(path, "opened"):
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA query_only = 1")
        self._last = 0

    def more(self) -> Sequence[Effect]:
        """Return what was committed since the last call, in the order of commits.

        Raises:
            EffectLogError: The log cannot be read.
        """
        with _named(self._path, "read"):
            found = [Effect(*row) for row in self._connection.execute(_SELECT, (self._last,)).fetchall()]
        if found:
            self._last = found[-1].id
        return found

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> "EffectLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EffectCounts:
    """Counts the effects of a log while it grows.

    Args:
        log: Read by nobody else.
    """

    def __init__(self, log: EffectLog) -> None:
        self._log = log
        self._rows: set[int] = set()
        self._per_node: Counter[str] = Counter()

    def look(self) -> int:
        """Read what is new; return how many flights have an effect by now."""
        for effect in self._log.more():
            self._rows.add(effect.row)
            self._per_node[effect.node] += 1
        return len(self._rows)

    @property
    def flights(self) -> int:
        """Flights that had an effect at the last look."""
        return len(self._rows)

    @property
    def per_node(self) -> dict[str, int]:
        """Effects of each node at the last look."""
        return dict(self._per_node)


def read_effects(path: Path) -> Sequence[Effect]:
    """Read a whole effect log.

    Raises:
        EffectLogError: It cannot be read.
    """
    with EffectLog(path) as log:
        return log.more()


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise EffectLogError(f"{path}: cannot be {what}: {error}") from error
