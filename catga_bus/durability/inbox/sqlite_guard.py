"""What users' statements may do in a transaction that they share with the inbox: everything but end it.

A handler that committed by itself would keep its effects without the mark that the message is done; one that wrote to
the inbox's tables could undo the marks of others. Both are refused when the statement is prepared, by SQLite itself.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = re.compile(r"\bOR\s+ROLLBACK\b|\bON\s+CONFLICT\s+ROLLBACK\b|\bRAISE\s*\(\s*ROLLBACK\b", re.IGNORECASE)
# A conflict or trigger that rolls back the whole transaction, with the effects of other handlers in it.

_KNOWN_TEXTS = 1_024

_READING_PRAGMAS = frozenset({"table_info", "table_xinfo", "index_list", "index_info", "foreign_key_list"})

_TRANSACTIONS = (sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT)
_FILES = (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH)
_WRITES = (
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_INDEX,
)
_ON_TABLES = (sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_CREATE_TEMP_TRIGGER)


class Guard:
    """Watches what is prepared on a connection while a user's statement is run.

    Args:
        connection: Its authorizer is the guard from now on. SQLite asks it once for each text, not for each run.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._is_on = False
        self._refused = ""
        self._checked: set[str] = set()
        connection.set_authorizer(self._authorize)

    @contextmanager
    def on(self, sql: str) -> Iterator[None]:
        """Refuse what users may not do, until the end of the block.

        Raises:
            sqlite3.ProgrammingError: The statement does it; the text names what and the fix.
        """
        self._check(sql)
        self._is_on, self._refused = True, ""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not self._refused:
                raise
            raise sqlite3.ProgrammingError(f"{self._refused}: {sql[:200]!r}") from error
        finally:
            self._is_on = False

    def _check(self, sql: str) -> None:
        if sql in self._checked:
            return
        if _ENDING.search(sql):
            raise sqlite3.ProgrammingError(
                f"a handler's statement must not roll back what others have done; use ABORT or IGNORE: {sql[:200]!r}"
            )
        if "/* catga */" in sql:
            raise sqlite3.ProgrammingError(f"leave the comment out: the inbox's own statements have it: {sql[:200]!r}")
        if len(self._checked) >= _KNOWN_TEXTS:
            self._checked.clear()
        self._checked.add(sql)

    def _authorize(self, action: int, first: str | None, second: str | None, *_: object) -> int:
        if not self._is_on:
            return sqlite3.SQLITE_OK
        self._refused = _refusal(action, first or "", second or "")
        return sqlite3.SQLITE_DENY if self._refused else sqlite3.SQLITE_OK


def _refusal(action: int, first: str, second: str) -> str:
    """Why a user's statement may not do something, or nothing."""
    if action in _TRANSACTIONS:
        return "a handler does not begin or end its transaction: the inbox does, with the mark that the message is done"
    if action in _FILES:
        return "a handler may not attach another file: its effects would not be in one transaction with the inbox"
    if action == sqlite3.SQLITE_PRAGMA and first.lower() not in _READING_PRAGMAS:
        return "a handler may not change the settings of the store"
    if action in _WRITES and first.lower().startswith("catga_"):
        return f"the table {first} belongs to the inbox"
    if action in _ON_TABLES and second.lower().startswith("catga_"):
        return f"the table {second} belongs to the inbox"
    return ""
