"""catga_bus with commands whose effects are counted: nodes with one inbox in a file, and a steady producer."""

import asyncio
import random
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from benchmarks.takeovers import Effect
from catga_bus import Bus, CallError, Command, Context

SERVICE = "ledger"
PARTITIONS = 16

_TABLE = """CREATE TABLE effects (
    id INTEGER PRIMARY KEY, account TEXT NOT NULL, number INTEGER NOT NULL,
    node TEXT NOT NULL, partition INTEGER NOT NULL, epoch INTEGER NOT NULL, at REAL NOT NULL)"""
_INSERT = "INSERT INTO effects (account, number, node, partition, epoch, at) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT account, number, node, partition, epoch, at FROM effects ORDER BY id"
_SIZES = {"command_max_bytes": 1 << 28, "event_max_bytes": 1 << 28, "dead_letter_max_bytes": 1 << 26}

_TICK_SECONDS = 0.0025


class Book(Command[int], partition_by="account"):
    """Enter the next number of an account; answered with it."""

    account: str
    number: int


def create_ledger(path: Path) -> None:
    """Make the file of the effects, which is that of the inbox as well."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(_TABLE)


def read_ledger(path: Path) -> list[Effect]:
    """Return all effects in the order in which they were committed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [Effect(*row) for row in connection.execute(_SELECT)]


class Node:
    """A node whose handler writes one row for each command, in the transaction of the inbox.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        path: The file of the effects.
        replicas: Servers that hold each stream.
    """

    def __init__(self, url: str, namespace: str, path: str, replicas: int) -> None:
        inbox = f"sqlite://{quote(path)}"
        self._bus = Bus(
            SERVICE,
            url=url,
            namespace=namespace,
            inbox=inbox,
            partitions=PARTITIONS,
            stream_replicas=replicas,
            **_SIZES,
        )
        self._is_started = False

        @self._bus.handler
        async def book(command: Book, ctx: Context) -> int:
            assert ctx.fence is not None, "commands have one"
            transaction = await ctx.transaction()
            row = (command.account, command.number, ctx.node, ctx.fence.partition, ctx.fence.epoch)
            await transaction.execute(_INSERT, (*row, time.monotonic()))
            return command.number

    async def __aenter__(self) -> Self:
        """Be there with everything imported; `join` starts the bus."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the bus if it was started."""
        if self._is_started:
            await self._bus.drain()

    async def join(self) -> str:
        """Start the bus, and return the id of its node."""
        self._is_started = True
        await self._bus.start()
        return self._bus.node_id

    async def owned(self) -> int:
        """Return how many partitions this node works on."""
        return self._bus.statistics().stored.work.partitions


@dataclass(frozen=True, slots=True)
class Handed:
    """What a producer has handed in."""

    accepted: dict[str, list[int]]
    """The numbers that are stored, by account."""

    unknown: dict[str, list[int]]
    """Those of which the producer was told that nobody knows."""

    failures: list[str]
    """How calls failed, of both kinds."""


class Producer:
    """Hands in so many commands a second, each account's in the order of its numbers.

    Args:
        url: Where the server is.
        namespace: The nodes'.
        accounts: How many there are.
        timeout: Seconds until a call is given up.
        send_every: Each so many-th command is sent, and its result waited for; the others are enqueued.
    """

    def __init__(self, url: str, namespace: str, accounts: int, timeout: float, send_every: int) -> None:
        self._bus = Bus("ledger-producer", url=url, namespace=namespace)
        self._next = {f"account-{number}": 0 for number in range(accounts)}
        self._names = list(self._next)
        self._timeout = timeout
        self._send_every = send_every
        self._handed = Handed({name: [] for name in self._names}, {name: [] for name in self._names}, [])
        self._slowest = 0.0
        self._waiting: set[asyncio.Task[None]] = set()
        self._sending: asyncio.Task[None] | None = None
        self._rng = random.Random(1)

    async def __aenter__(self) -> Self:
        """Start the bus."""
        await self._bus.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the bus."""
        await self._bus.__aexit__(kind, error, traceback)

    async def begin(self, rate: float) -> None:
        """Hand in so many commands a second from now on."""
        self._sending = asyncio.create_task(self._send(rate))

    async def end(self) -> Handed:
        """Hand in no more, and return what was when all of it has an end."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
        if self._waiting:
            await asyncio.wait(self._waiting)
        return self._handed

    async def slowest(self) -> float:
        """Return the longest that a call has taken since the last question, in seconds."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest

    async def _send(self, rate: float) -> None:
        started = time.monotonic()
        sent = 0
        while True:
            while sent < (time.monotonic() - started) * rate:
                name = self._rng.choice(self._names)
                task = asyncio.create_task(self._book(name, self._next[name], is_sent=sent % self._send_every == 0))
                self._next[name] += 1
                self._waiting.add(task)
                task.add_done_callback(self._waiting.discard)
                sent += 1
            await asyncio.sleep(_TICK_SECONDS)

    async def _book(self, name: str, number: int, *, is_sent: bool) -> None:
        began = time.monotonic()
        command = Book(name, number)
        try:
            if is_sent:
                (await self._bus.send(command, timeout=self._timeout)).unwrap()
            else:
                await self._bus.enqueue(command, timeout=self._timeout)
        except CallError as error:
            self._handed.failures.append(f"{'send' if is_sent else 'enqueue'}: {error.outcome} {error.code}")
            if error.outcome != "not_run":
                self._handed.unknown[name].append(number)
        else:
            self._handed.accepted[name].append(number)
        self._slowest = max(self._slowest, time.monotonic() - began)
