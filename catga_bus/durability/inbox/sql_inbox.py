"""What the inboxes on SQLite have in common: all but where the database lies."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from catga_bus.clock import Clock, monotonic, utc_now
from catga_bus.durability.inbox.base import InboxError, Outbound, Recorded, SlowTransactionError
from catga_bus.durability.inbox.sqlite_jobs import Kind, Turn
from catga_bus.durability.inbox.sqlite_store import SWEPT_AT_ONCE, Finished, SqliteStore
from catga_bus.durability.inbox.sqlite_writer import MAX_UNITS, Door, Writer
from catga_bus.errors import ConfigurationError
from catga_bus.partition.work import Fence

T = TypeVar("T")

DEFAULT_RETENTION = 8 * 86_400.0
"""Eight days: a day longer than the event log keeps events by default, for clocks that differ."""


def wall_clock() -> float:
    """Return seconds since 1970."""
    return utc_now().timestamp()


class IdentifiedDoor(Door, Protocol):
    """The way to a store that says which one it is."""

    @property
    def store_id(self) -> str:
        """The store's id, known once it was opened."""
        ...


class SqlInbox:
    """An inbox on SQLite; `SqliteInbox` and `MemoryInbox` say where it lies.

    Args:
        door: The way to the store.
        retention: Seconds for which results are kept, at least 60.
        transaction_timeout: Seconds for which one handler may have the transaction, for which all others wait;
            0.01 to 3,600.
        clock: Measures it.

    Raises:
        ConfigurationError: An option is out of its bounds.
    """

    max_units: ClassVar[int] = MAX_UNITS

    def __init__(
        self,
        door: IdentifiedDoor,
        *,
        retention: float = DEFAULT_RETENTION,
        transaction_timeout: float = 5.0,
        clock: Clock = monotonic,
    ) -> None:
        if not retention >= 60:
            raise ConfigurationError(f"retention must be at least 60 s, got {retention!r}")
        if not 0.01 <= transaction_timeout <= 3_600:
            raise ConfigurationError(f"transaction_timeout must be 0.01 to 3,600 s, got {transaction_timeout!r}")
        self._door = door
        self._retention = retention
        self._transaction_timeout = transaction_timeout
        self._clock = clock
        self._opens = 0
        self._lock = asyncio.Lock()
        self._writer: Writer | None = None

    @property
    def store_id(self) -> str:
        """Random, made with the store; known once it was opened."""
        return self._door.store_id

    @property
    def retention(self) -> float:
        """Seconds for which results are kept, at least."""
        return self._retention

    async def open(self) -> None:
        """Open the store; opened n times, it is closed by the n-th `close`."""
        async with self._lock:
            if self._writer is None:
                writer = Writer(
                    self._door,
                    self._clock,
                    transaction_timeout=self._transaction_timeout,
                    max_units=self.max_units,
                )
                await writer.start()
                self._writer = writer
            self._opens += 1

    async def close(self) -> None:
        """Close the store: what was handed to it is committed first."""
        async with self._lock:
            self._opens = max(0, self._opens - 1)
            if self._opens or self._writer is None:
                return
            writer, self._writer = self._writer, None
            await writer.end()

    async def find(self, service: str, message_id: str) -> Recorded | None:
        """Return the recorded result of a message, or None if it is not done."""
        return (await self.find_many(service, (message_id,))).get(message_id)

    async def find_many(self, service: str, message_ids: Sequence[str]) -> dict[str, Recorded]:
        """Return the recorded results of those messages that are done."""
        return await self._put(Kind.LOOK, lambda store: store.find(service, message_ids))

    def unit(self, service: str, message_id: str, fence: Fence) -> "SqlUnit":
        """Begin one execution; touches nothing until it commits or its transaction runs a statement."""
        return SqlUnit(self._open_writer(), service, message_id, fence)

    async def unsent(self, service: str, fence: Fence, limit: int) -> list[Outbound]:
        """Return what was committed for sending in a partition and is not known to be stored, in order of commits."""
        return await self._call(lambda store: store.unsent(service, fence, limit))

    async def sent(self, service: str, message_ids: Sequence[str]) -> None:
        """Forget what is stored by now."""
        if message_ids:
            await self._call(lambda store: store.sent(service, message_ids))

    async def sweep(self, now_utc: float) -> int:
        """Forget results that are older than the retention; return how many."""
        before, total = now_utc - self._retention, 0
        while True:
            count = await self._call(lambda store: store.sweep(before))
            total += count
            if count < SWEPT_AT_ONCE:
                return total

    async def script(self, statements: Sequence[str]) -> None:
        """Run statements in a transaction of their own, outside of any execution: to make the handlers' tables.

        Example:
            await inbox.script(["CREATE TABLE IF NOT EXISTS accounts (id TEXT PRIMARY KEY, cents INTEGER)"])
        """
        await self._call(lambda store: [store.execute(statement, ()) for statement in statements])

    async def fetch(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query outside of any execution; it sees what is committed."""
        return await self._call(lambda store: store.fetch(sql, parameters))

    async def _call(self, call: Callable[[SqliteStore], T]) -> T:
        return await self._put(Kind.CALL, call)

    async def _put(self, kind: Kind, call: Callable[[SqliteStore], T]) -> T:
        result: T = await self._open_writer().put(kind, Turn(""), call=call)
        return result

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise InboxError("the inbox is not open")
        return self._writer


class SqlTransaction:
    """What a handler writes through. Its turn comes with its first statement."""

    def __init__(self, writer: Writer, turn: Turn) -> None:
        self._writer = writer
        self._turn = turn
        self.has_begun = False
        self.failure: InboxError | None = None

    async def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> int:
        """Run a statement that writes; return the number of rows it changed."""
        return await self._state(lambda store: store.execute(sql, parameters))

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement once for each row; return the number of rows changed."""
        return await self._state(lambda store: store.execute_many(sql, rows))

    async def fetch(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query, which sees what this transaction has written, and return its rows."""
        return await self._state(lambda store: store.fetch(sql, parameters))

    async def _state(self, call: Callable[[SqliteStore], T]) -> T:
        if self._turn.is_ended:
            raise InboxError(f"the transaction of message {self._turn.message_id} has ended: its handler has returned")
        self.has_begun = True
        try:
            result: T = await self._writer.put(Kind.STATEMENT, self._turn, call=call)
        except InboxError as error:
            self.failure = blamed_on_store(error)
            raise
        return result


def blamed_on_store(error: InboxError) -> InboxError | None:
    """Return an error that no handler is to blame for."""
    return None if isinstance(error, SlowTransactionError) else error


class SqlUnit:
    """One execution of a handler, and what is to be committed for it."""

    __slots__ = ("_failure", "_fence", "_message_id", "_outbound", "_service", "_transaction", "_turn", "_writer")

    def __init__(self, writer: Writer, service: str, message_id: str, fence: Fence) -> None:
        self._writer = writer
        self._service = service
        self._message_id = message_id
        self._fence = fence
        self._turn = Turn(message_id)
        self._transaction: SqlTransaction | None = None
        self._outbound: list[Outbound] = []
        self._failure: InboxError | None = None

    @property
    def outbound(self) -> Sequence[Outbound]:
        """What was given to `send`, in order."""
        return self._outbound

    @property
    def failure(self) -> InboxError | None:
        """Why it failed, if the store is to blame."""
        return self._failure or (self._transaction.failure if self._transaction is not None else None)

    async def transaction(self) -> SqlTransaction:
        """Return the transaction of this execution, always the same one; it begins with its first statement."""
        if self._transaction is None:
            self._transaction = SqlTransaction(self._writer, self._turn)
        return self._transaction

    def send(self, outbound: Outbound) -> None:
        """Send a message with the commit."""
        self._outbound.append(outbound)

    async def commit(self, result: Recorded) -> Recorded:
        """Commit everything, with the result; return it, or the recorded one if the message was done meanwhile."""
        self._end()
        unit = Finished(self._service, self._message_id, self._fence, result, self._outbound)
        try:
            committed: Recorded = await self._writer.put(Kind.FINISH, self._turn, unit=unit)
        except InboxError as error:
            self._failure = blamed_on_store(error)
            raise
        return committed

    async def rollback(self) -> None:
        """Forget everything; does nothing once the unit has ended."""
        if self._turn.is_ended:
            return
        self._turn.is_ended = True
        if self._transaction is not None and self._transaction.has_begun:
            await self._writer.put(Kind.FORGET, self._turn)

    def _end(self) -> None:
        if self._turn.is_ended:
            raise InboxError(f"the unit of message {self._message_id} has ended: it is committed or rolled back once")
        self._turn.is_ended = True
