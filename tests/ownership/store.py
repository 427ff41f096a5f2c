"""Where effects go: the product's own store of the inbox, shared by all nodes, and what has come through it."""

import sqlite3
from typing import NamedTuple

from catga_bus.durability.inbox.base import FencedError, Recorded
from catga_bus.durability.inbox.sqlite_store import Finished, SqliteStore
from catga_bus.effects import Fence

SERVICE = "shop"


class Effect(NamedTuple):
    """Something that was committed."""

    node: str
    """Name of the process."""

    fence: Fence
    message_id: str


class Store:
    """The store."""

    def __init__(self) -> None:
        self._store = SqliteStore(sqlite3.connect(":memory:", isolation_level=None), lambda: 0.0)
        self._store.begin()
        self._store.prepare()
        self._store.commit()
        self._count = 0

    def find(self, message_id: str) -> bool:
        """Return whether a message is done."""
        return bool(self._store.find(SERVICE, [message_id]))

    def commit(self, message_id: str, fence: Fence) -> bool | FencedError:
        """Commit the effect of a message; return whether it was new, or why it was refused."""
        self._count += 1
        result = Recorded(0, b"%d" % self._count)
        self._store.begin()
        self._store.enter()
        recorded = self._store.finish(Finished(SERVICE, message_id, fence, result, ()))
        self._store.commit()
        return recorded if isinstance(recorded, FencedError) else recorded == result

    def close(self) -> None:
        """Close it."""
        self._store.close()
