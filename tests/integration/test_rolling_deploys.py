"""Deploys that add, remove or rename a command type, node after node: nothing accepted becomes a dead letter."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import Bus, Command
from catga_bus.errors import NoHandlerError
from catga_bus.testing import eventually
from tests.servers import NatsServer

OPTIONS: dict[str, Any] = {"partitions": 8, "reconnect_delay": 0.02, "unroutable_after": 1.0, "drain_timeout": 10.0}
# A second after the last node that knows a type, what is left of it would be dead.


class Debit(Command[int], partition_by="account"):
    account: str
    number: int


class Credit(Command[int], partition_by="account"):
    account: str
    number: int


class Transfer(Command[int], partition_by="account"):
    account: str
    number: int


Handled = list[tuple[str, str, int]]
"""Type, key and number of each command, in the order in which they were handled."""


class Deployment:
    """Nodes of one service, rolled from one version to the next under commands of all types."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url
        self.namespace = namespace
        self.handled: Handled = []
        self.accepted: Handled = []
        self.refused: dict[str, int] = {}
        self.nodes: list[Bus] = []
        self.stack = AsyncExitStack()

    async def start_node(self, types: Iterable[type]) -> Bus:
        bus = Bus("billing", url=self.url, namespace=self.namespace, **OPTIONS)
        for cls in types:
            self._handle(bus, cls)
        await self.stack.enter_async_context(bus)
        self.nodes.append(bus)
        return bus

    def _handle(self, bus: Bus, cls: Any) -> None:
        async def handle(command: Any) -> int:
            self.handled.append((type(command).__name__, command.account, command.number))
            return int(command.number)

        handle.__annotations__["command"] = cls
        bus.handler(handle)

    async def roll(self, types: Iterable[type]) -> None:
        """Replace node by node: the new one first, then the old one leaves."""
        types = tuple(types)
        for old in list(self.nodes):
            await self.start_node(types)
            self.nodes.remove(old)
            await old.drain()
            await old.close()

    async def call(self, caller: Bus, stop: asyncio.Event) -> None:
        """Enqueue commands of every type, numbered per type and key, until told to stop."""
        number = 0
        while not stop.is_set():
            number += 1
            for cls in (Debit, Credit, Transfer):
                key = f"{cls.__name__}-{number % 5}"
                try:
                    await caller.enqueue(cls(key, number))
                except NoHandlerError:
                    self.refused[cls.__name__] = self.refused.get(cls.__name__, 0) + 1
                else:
                    self.accepted.append((cls.__name__, key, number))
            await asyncio.sleep(0.002)

    def check(self) -> None:
        """All that was accepted was handled, once and in order per key."""
        assert sorted(self.handled) == sorted(self.accepted)
        last: dict[tuple[str, str], int] = {}
        for name, key, number in self.handled:
            assert last.get((name, key), 0) < number, "out of order"
            last[name, key] = number


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
async def deployment(request: pytest.FixtureRequest) -> AsyncIterator[Deployment]:
    if request.param == "memory":
        url = f"memory://{uuid4().hex}"
    else:
        start: Callable[..., NatsServer] = request.getfixturevalue("start_server")
        url = start(jetstream=True).url
    deployment = Deployment(url, f"d{uuid4().hex[:8]}")
    async with deployment.stack:
        yield deployment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param([Debit], [Debit, Credit], id="add"),
        pytest.param([Debit, Credit], [Debit], id="remove"),
        pytest.param([Debit, Credit], [Debit, Transfer], id="rename"),
    ],
)
async def test_nothing_accepted_becomes_a_dead_letter(
    deployment: Deployment, before: list[type], after: list[type]
) -> None:
    for _ in range(3):
        await deployment.start_node(before)
    caller = await deployment.stack.enter_async_context(
        Bus("web", url=deployment.url, namespace=deployment.namespace, **OPTIONS)
    )
    stop = asyncio.Event()
    calling = asyncio.ensure_future(deployment.call(caller, stop))
    await taken(deployment, before)

    await deployment.roll(after)
    await taken(deployment, after)
    await deployment.roll(before)  # and back
    await taken(deployment, before)

    stop.set()
    await calling
    await eventually(lambda: len(deployment.handled) >= len(deployment.accepted), 10.0)
    deployment.check()
    for cls in {Debit, Credit, Transfer} - set(before) - set(after):
        assert cls.__name__ not in {name for name, _, _ in deployment.accepted}


async def taken(deployment: Deployment, types: list[type]) -> None:
    """Wait until commands of these types are handled anew, and no others are accepted."""
    wanted = {cls.__name__ for cls in types}
    began = len(deployment.handled)
    await eventually(lambda: wanted <= {name for name, _, _ in deployment.handled[began:]}, 20.0)
    settled = len(deployment.accepted)
    await eventually(lambda: len(deployment.accepted) > settled + 20, 10.0)
    assert {name for name, _, _ in deployment.accepted[settled:]} == wanted
