"""The departures board: another service, which hears of every late flight and shows each once.

It has an inbox of its own. So whatever is delivered again after a fault leaves one row in its table, and those of one
aircraft come in the order of the schedule.
"""

import asyncio
import contextlib
import sqlite3
from pathlib import Path

from catga_bus.bus import Bus
from catga_bus.context import Context
from catga_bus.demo.messages import FlightDelayed
from catga_bus.demo.options import BUS_OPTIONS, inbox_at

SERVICE = "departures-board"

_TABLE = "CREATE TABLE IF NOT EXISTS shown (id INTEGER PRIMARY KEY, row INTEGER NOT NULL, aircraft TEXT NOT NULL)"
_INSERT = "INSERT INTO shown (row, aircraft) VALUES (?, ?)"
_SELECT = "SELECT row, aircraft FROM shown ORDER BY id"
_POLL = 0.05


class DeparturesBoard:
    """A node of the board.

    Args:
        url: Address of the server.
        namespace: Keeps this run apart from all others on the same server.
        path: The file of its inbox and of what it shows; made if it is not there.
    """

    def __init__(self, url: str, namespace: str, path: Path) -> None:
        self._path = path
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(_TABLE)
        self.bus = Bus(SERVICE, url=url, namespace=namespace, inbox=inbox_at(path), **BUS_OPTIONS)

        @self.bus.handler(start="all")
        async def show(event: FlightDelayed, ctx: Context) -> None:
            transaction = await ctx.transaction()
            await transaction.execute(_INSERT, (event.row, event.aircraft))

    def shown(self) -> list[tuple[int, str]]:
        """Return row and aircraft of what was shown, in the order of the commits."""
        with contextlib.closing(sqlite3.connect(self._path)) as connection:
            return connection.execute(_SELECT).fetchall()

    async def wait_shown(self, count: int, patience: float) -> None:
        """Wait until so many late flights are shown, or nothing new has been for `patience` seconds."""
        loop = asyncio.get_running_loop()
        shown, since = len(self.shown()), loop.time()
        while shown < count and loop.time() - since < patience:
            await asyncio.sleep(_POLL)
            if (now := len(self.shown())) > shown:
                shown, since = now, loop.time()
