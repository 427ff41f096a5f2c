"""A service whose handlers write down what they did, for tests of what goes wrong under a running cluster."""

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from catga_bus import Bus, CallError, Command, Context, RetryOptions
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.node import Node
from catga_bus.transport.asking import ask
from catga_bus.transport.jetstream import JetStream
from catga_bus.wire import Names

NAMESPACE = "t"
NAMES = Names(NAMESPACE)
SERVICE = "billing"
QUEUE = NAMES.command_stream(SERVICE)
OWNERS = f"KV_{NAMES.owners_bucket()}"
ROUTES = f"KV_{NAMES.routes_bucket()}"

MakeBus = Callable[..., Bus]

OPTIONS: dict[str, Any] = {
    "partitions": 4,
    "command_max_bytes": 64 << 20,
    "event_max_bytes": 1 << 20,
    "dead_letter_max_bytes": 1 << 20,
    "heartbeat_interval": 0.1,
    "heartbeat_timeout": 0.5,
    "namespace": NAMESPACE,
}


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int
    ballast: str = ""


class Till:
    """What handlers did: for each account the amounts in order, and for each partition the epochs in order."""

    def __init__(self) -> None:
        self.entries: dict[str, list[int]] = defaultdict(list)
        self.epochs: dict[int, list[int]] = defaultdict(list)
        self.is_open = asyncio.Event()
        self.is_open.set()

    def on(self, bus: Bus, **options: Any) -> Bus:
        """Give a bus a handler that writes here, while the till is open."""

        @bus.handler(**{"retry": RetryOptions(first=0.05, longest=0.1)} | options)
        async def debit(command: Debit, ctx: Context) -> int:
            await self.is_open.wait()
            assert ctx.fence is not None
            self.entries[command.account].append(command.cents)
            self.epochs[ctx.fence.partition].append(ctx.fence.epoch)
            return command.cents

        return bus

    @property
    def count(self) -> int:
        """Effects so far, the second of a message included."""
        return sum(map(len, self.entries.values()))

    def check(self, accepted: dict[str, list[int]], *, may_repeat: bool = False) -> None:
        """Nothing accepted is lost, accounts are in order, epochs never fall; and nothing ran twice unless it may."""
        for account, amounts in accepted.items():
            done = self.entries[account]
            first = list(dict.fromkeys(done))
            assert first == sorted(first), f"{account} is out of order: {done}"
            assert set(amounts) <= set(done), f"{account}: accepted and lost: {sorted(set(amounts) - set(done))}"
            assert may_repeat or done == first, f"{account}: done twice: {done}"
        for partition, epochs in self.epochs.items():
            assert epochs == sorted(epochs), f"the epochs of partition {partition} fall: {epochs}"


class Customer:
    """Debits numbers from accounts, those of each account in order, and knows what was accepted."""

    def __init__(self, bus: Bus, *, accounts: int = 5, ballast: int = 0) -> None:
        self.accepted: dict[str, list[int]] = defaultdict(list)
        self.errors: list[CallError] = []
        self.is_over = False
        self._bus = bus
        self._accounts = [f"a-{number}" for number in range(accounts)]
        self._ballast = "x" * ballast
        self._next = 0

    @property
    def count(self) -> int:
        """Debits that were accepted so far."""
        return sum(map(len, self.accepted.values()))

    async def debit(self, timeout: float = 10.0) -> bool:
        """Debit the next number from every account; return whether all were accepted."""
        number, self._next = self._next, self._next + 1
        results = await asyncio.gather(*(self._one(account, number, timeout) for account in self._accounts))
        return all(results)

    async def debit_again(self, patience: float) -> None:
        """Debit until all of a number were accepted."""
        async with asyncio.timeout(patience):
            while not await self.debit():
                await asyncio.sleep(0.05)

    async def go_on(self) -> None:
        """Debit until `is_over`; whoever is cancelled would not know what became of the last number."""
        while not self.is_over:
            await self.debit(30.0)
            await asyncio.sleep(0.002)

    async def _one(self, account: str, number: int, timeout: float) -> bool:
        try:
            await self._bus.enqueue(Debit(account, number, self._ballast), timeout=timeout)
        except CallError as error:
            self.errors.append(error)
            return False
        self.accepted[account].append(number)
        return True


class Effects:
    """The table that the nodes write, in a store that they share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def address(self) -> str:
        return f"sqlite://{self.path}"

    async def make(self) -> None:
        inbox = SqliteInbox(self.path)
        await inbox.open()
        await inbox.script(["CREATE TABLE debits (account TEXT, cents INTEGER, partition INTEGER, epoch INTEGER)"])
        await inbox.close()

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Return them in the order of their commits."""
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute("SELECT * FROM debits ORDER BY rowid").fetchall()

    @property
    def count(self) -> int:
        return len(self.rows())

    def check(self, accepted: dict[str, list[int]]) -> None:
        """Every debit once and in order, and epochs never fall."""
        done: dict[str, list[int]] = defaultdict(list)
        epochs: dict[int, list[int]] = defaultdict(list)
        for account, cents, partition, epoch in self.rows():
            done[account].append(cents)
            epochs[partition].append(epoch)
        assert done == accepted
        for partition, rising in epochs.items():
            assert rising == sorted(rising), f"the epochs of partition {partition} fall: {rising}"


def node_of(bus: Bus) -> Node:
    """Return what a started bus is made of."""
    assert bus._node is not None
    return bus._node


def jetstream_of(bus: Bus) -> JetStream:
    """Return the streams as a bus sees them."""
    return node_of(bus).durable._jetstream


async def ask_api(bus: Bus, operation: str, request: Any) -> dict[str, Any]:
    """Ask the JetStream API for what the bus itself never does."""
    reply = await ask(node_of(bus).transport, f"$JS.API.{operation}", msgspec.json.encode(request), 10.0)
    assert reply is not None, operation
    answer: dict[str, Any] = msgspec.json.decode(reply.payload)
    assert "error" not in answer, answer
    return answer
