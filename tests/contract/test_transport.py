"""Both carriers keep the promises of `catga_bus.transport.base`."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest

from catga_bus.testing import Carrier, TransportContract, broker_of
from catga_bus.transport.base import ConnectionOptions, Transport, TransportEvents
from catga_bus.transport.memory import MemoryTransport


class MemoryCarrier(Carrier):
    can_stall = True

    def __init__(self) -> None:
        super().__init__()
        self.name = f"contract-{secrets.token_hex(4)}"

    def make(self, events: TransportEvents, **options: Any) -> Transport:
        urls = (f"memory://{self.name}",)
        return MemoryTransport(ConnectionOptions(urls=urls, **options), events)

    async def cut(self) -> None:
        broker_of(self.name).cut()

    async def heal(self) -> None:
        broker_of(self.name).heal()

    async def stall(self) -> None:
        broker_of(self.name).stall()

    async def resume(self) -> None:
        broker_of(self.name).resume()


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    async def carrier(self) -> AsyncIterator[Carrier]:
        async with MemoryCarrier() as carrier:
            yield carrier
