"""What a handler of a stored message sees, and one of a request does not: fence, transaction, derived ids."""

import asyncio
from typing import Any

import pytest

from catga_bus import BusStateError, Command, Context, Fence, Stored
from catga_bus.clock import monotonic
from catga_bus.context import BlockingContext, BlockingTransaction
from catga_bus.effects import Stake, Transaction


class Debit(Command[None]):
    account: str


class Calls:
    """Stores commands by saying so."""

    def __init__(self) -> None:
        self.ids: list[str | None] = []

    async def enqueue_from(
        self, parent: Context, command: Any, key: Any, timeout: float | None, delay: Any, at: Any
    ) -> Stored:
        self.ids.append(parent.take_id())
        return Stored("stream", len(self.ids), 0)


class Table:
    """A transaction on a list."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    async def execute(self, sql: str, parameters: Any = ()) -> int:
        self.said.append((sql, parameters))
        return 1

    async def execute_many(self, sql: str, rows: Any) -> int:
        self.said.append((sql, rows))
        return len(rows)

    async def fetch(self, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        return [(sql, parameters)]


class Unit:
    """Effects in a table."""

    def __init__(self) -> None:
        self.table = Table()

    async def transaction(self) -> Transaction:
        return self.table

    def send(self, outbound: Any) -> None: ...


def context(stake: Stake | None, *, calls: Any = None, message_id: str = "id") -> Context:
    return Context(
        calls,
        monotonic,
        message_id=message_id,
        message_type="Debit",
        key=None,
        attempt=1,
        node="node",
        sender="sender",
        trace=None,
        deadline=monotonic() + 10.0,
        stake=stake,
    )


async def test_a_request_has_no_fence_no_transaction_and_no_derived_ids() -> None:
    ctx = context(None)
    assert (ctx.fence, ctx.effects, ctx.take_id()) == (None, None, None)
    with pytest.raises(BusStateError, match="make Debit a Command or a durable Event"):
        await ctx.transaction()


async def test_without_an_inbox_there_is_no_transaction() -> None:
    ctx = context(Stake(Fence(3, 7), None))
    assert ctx.fence == (3, 7, "cmd")
    with pytest.raises(BusStateError, match="give it one"):
        await ctx.transaction()


async def test_every_execution_sends_the_same_ids() -> None:
    for _ in range(2):
        calls = Calls()
        ctx = context(Stake(Fence(3, 7), None), calls=calls)
        assert [(await ctx.enqueue(Debit("a"))).sequence for _ in range(3)] == [1, 2, 3]
        assert calls.ids == ["id.1", "id.2", "id.3"]


def test_derived_ids_of_derived_ids_stay_short_different_and_the_same() -> None:
    def chain(root: str) -> list[str]:
        ids = [root]
        for _ in range(300):
            ids.append(context(Stake(Fence(0, 1), None), message_id=ids[-1]).take_id() or "")
        return ids

    ids = chain("root")
    assert max(len(one) for one in ids) == 256
    assert len(set(ids) | set(chain("other"))) == 602
    assert chain("root") == ids


async def test_a_handler_in_a_thread_has_the_same_with_calls_that_block() -> None:
    unit, calls = Unit(), Calls()
    ctx = BlockingContext(context(Stake(Fence(3, 7), unit), calls=calls), asyncio.get_running_loop())

    def handle() -> tuple[Any, ...]:
        transaction = ctx.transaction()
        assert isinstance(transaction, BlockingTransaction)
        return (
            ctx.fence,
            ctx.enqueue(Debit("a")),
            transaction.execute("insert", (1,)),
            transaction.execute_many("insert", [(1,), (2,)]),
            transaction.fetch("select"),
        )

    assert await asyncio.to_thread(handle) == ((3, 7, "cmd"), Stored("stream", 1, 0), 1, 2, [("select", ())])
    assert unit.table.said == [("insert", (1,)), ("insert", [(1,), (2,)])]
