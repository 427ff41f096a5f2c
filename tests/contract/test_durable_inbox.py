"""A bus with an inbox: what handlers send goes with their effects, and a store that fails costs no attempt."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import Bus, Command, ConfigurationError, Context, Event, Ok, RetryOptions
from catga_bus.durability.durable import Durable
from catga_bus.durability.inbox.memory_inbox import MemoryInbox
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.testing import eventually

MakeBus = Callable[..., Bus]

QUICK = RetryOptions(first=0.05, longest=0.1)


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int


class Credit(Command[int], partition_by="account"):
    account: str
    cents: int


class Debited(Event, partition_by="account"):
    account: str
    cents: int


@pytest.fixture(params=["memory", "nats"])
def url(request: pytest.FixtureRequest) -> str:
    """A broker in memory, or the server of the session."""
    if request.param == "memory":
        return f"memory://{uuid4().hex}"
    return str(request.getfixturevalue("server_url"))


@pytest.fixture
async def make_bus(url: str) -> AsyncIterator[MakeBus]:
    """Make as many buses as a test needs, all in a namespace of its own; they are closed at its end."""
    namespace = f"t{uuid4().hex[:10]}"
    buses: list[Bus] = []

    def make(service: str = "billing", **options: Any) -> Bus:
        options = {
            "partitions": 4,
            "command_max_bytes": 16_777_216,
            "event_max_bytes": 16_777_216,
            "dead_letter_max_bytes": 16_777_216,
            "heartbeat_interval": 0.1,
            "heartbeat_timeout": 0.5,
            "namespace": namespace,
        } | options
        buses.append(Bus(service, url=url, **options))
        return buses[-1]

    yield make
    for bus in buses:
        await bus.close()


@pytest.fixture
async def store(tmp_path: Path) -> Path:
    """A store with a table for debits."""
    path = tmp_path / "inbox.db"
    inbox = SqliteInbox(path)
    await inbox.open()
    await inbox.script(["CREATE TABLE debits (account TEXT, cents INTEGER)"])
    await inbox.close()
    return path


def rows(store: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute(query).fetchall()


class Shop:
    """Handlers that debit in the store, and credit and tell of it."""

    def __init__(self) -> None:
        self.credits: list[tuple[str, int]] = []
        self.told: list[int] = []
        self.runs = 0
        self.failures = 0

    def on(self, bus: Bus, **options: Any) -> Bus:
        @bus.handler(retry=QUICK, **options)
        async def debit(command: Debit, ctx: Context) -> int:
            self.runs += 1
            transaction = await ctx.transaction()
            await transaction.execute("INSERT INTO debits VALUES (?, ?)", (command.account, command.cents))
            await ctx.enqueue(Credit(f"to {command.account}", command.cents))
            await ctx.publish(Debited(command.account, command.cents))
            if self.failures:
                self.failures -= 1
                raise RuntimeError("after everything was sent")
            return command.cents

        @bus.handler(retry=QUICK)
        async def credit(command: Credit, ctx: Context) -> int:
            self.credits.append((ctx.message_id, command.cents))
            return command.cents

        return bus

    def listen(self, bus: Bus) -> Bus:
        @bus.handler(retry=QUICK)
        async def on_debited(event: Debited) -> None:
            self.told.append(event.cents)

        return bus


async def test_what_a_handler_sends_is_published_with_the_commit_and_not_before(make_bus: MakeBus, store: Path) -> None:
    shop = Shop()
    shop.failures = 2
    async with shop.on(make_bus(inbox=f"sqlite://{store}")) as bus, shop.listen(make_bus("mail")):
        for cents in range(1, 31):
            assert await bus.send(Debit("a", cents), timeout=20.0) == Ok(cents)
        await eventually(lambda: len(shop.credits) >= 30 and len(shop.told) >= 30, timeout=10.0)
    assert shop.runs == 32
    assert rows(store, "SELECT cents FROM debits") == [(cents,) for cents in range(1, 31)]
    assert [cents for _, cents in shop.credits] == list(range(1, 31))
    assert shop.told == list(range(1, 31))
    assert all(message_id.endswith(".1") for message_id, _ in shop.credits)
    assert rows(store, "SELECT * FROM catga_outbox") == []


async def test_what_a_dead_node_had_committed_is_published_by_its_successor(
    make_bus: MakeBus, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop()
    client = make_bus("client")  # a broker in memory lives as long as somebody is connected
    await client.start()
    first = shop.on(make_bus(inbox=f"sqlite://{store}"))
    await first.start()
    assert first._node is not None
    relay = first._node.durable._relay

    async def stuck(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(relay, "_publish", stuck)
    for cents in (1, 2, 3):
        assert await first.send(Debit("a", cents), timeout=20.0) == Ok(cents)
    assert rows(store, "SELECT count(*) FROM catga_outbox") == [(6,)]
    await first.close()
    assert shop.credits == []
    async with shop.on(make_bus(inbox=f"sqlite://{store}")):
        await eventually(lambda: len(shop.credits) >= 3, timeout=20.0)
        await eventually(lambda: rows(store, "SELECT count(*) FROM catga_outbox") == [(0,)], timeout=10.0)
    assert [cents for _, cents in shop.credits] == [1, 2, 3]
    assert shop.runs == 3


async def test_a_store_that_fails_costs_no_attempt(make_bus: MakeBus, store: Path) -> None:
    shop = Shop()
    inbox = SqliteInbox(store, busy_timeout=0.1, transaction_timeout=0.05)
    async with shop.on(make_bus(inbox=inbox), max_attempts=1) as bus:
        assert await bus.send(Debit("a", 1), timeout=20.0) == Ok(1)
        with closing(sqlite3.connect(store, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            runs = shop.runs
            await bus.enqueue(Debit("a", 2))
            await eventually(lambda: shop.runs >= runs + 3, timeout=20.0, what="three runs against a locked store")
            other.execute("COMMIT")
        await eventually(lambda: 2 in {cents for _, cents in shop.credits}, timeout=20.0)
    assert rows(store, "SELECT cents FROM debits") == [(1,), (2,)]
    assert len(dict.fromkeys(shop.credits)) == 2  # they may run again, and count once


async def test_an_inbox_that_forgets_before_the_log_does_not_start(make_bus: MakeBus) -> None:
    bus = Shop().listen(make_bus(inbox=MemoryInbox(retention=86_400.0)))
    with pytest.raises(ConfigurationError, match=r"results for 86,400 s and the stream .* keeps messages for 7 days"):
        await bus.start()


async def test_what_is_sent_with_a_commit_has_no_place_yet_and_cannot_be_delayed(
    make_bus: MakeBus, store: Path
) -> None:
    seen: list[Any] = []
    bus = make_bus(inbox=f"sqlite://{store}")

    @bus.handler
    async def debit(command: Debit, ctx: Context) -> int:
        seen.append(await ctx.enqueue(Credit("b", 1)))
        with pytest.raises(ConfigurationError, match="what is sent with a commit cannot be delayed"):
            await ctx.enqueue(Credit("b", 2), delay=1.0)
        return 1

    @bus.handler
    async def credit(command: Credit) -> int:
        return command.cents

    async with bus:
        assert await bus.send(Debit("a", 1), timeout=20.0) == Ok(1)
    assert (seen[0].sequence, seen[0].index, seen[0].duplicate) == (0, 0, False)
    assert seen[0].stream.endswith("-cmd-billing")


async def test_two_stores_that_meet_later_are_said_to(
    make_bus: MakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As two do that have started on either side of a cut."""
    monkeypatch.setattr(Durable, "_check_stores", lambda _: None)
    buses = [Shop().on(make_bus(inbox=f"sqlite://{tmp_path}/{name}.db", node_id=name)) for name in ("one", "two")]
    for bus in buses:
        await bus.start()
    await eventually(lambda: "node 'two' of service 'billing' has the inbox store" in caplog.text)
    assert "give both the same inbox=" in caplog.text
