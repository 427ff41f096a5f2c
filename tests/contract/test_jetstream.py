"""The broker in memory and nats-server serve JetStream alike; `catga_bus.transport.jetstream` is the promise."""

from collections.abc import AsyncIterator, Callable

import pytest

from catga_bus.testing import Carrier, broker_of
from catga_bus.testing.jetstream_contract import JetStreamContract
from tests.contract.carriers import MemoryCarrier, NatsCarrier
from tests.servers import NatsServer


class TestMemoryJetStream(JetStreamContract):
    @pytest.fixture
    async def carrier(self) -> AsyncIterator[Carrier]:
        async with MemoryCarrier() as carrier:
            yield carrier

    @pytest.fixture
    async def no_jetstream(self) -> AsyncIterator[Carrier]:
        async with MemoryCarrier() as carrier:
            await carrier.connect()
            broker_of(carrier.name).jetstream.is_on = False
            yield carrier


@pytest.mark.nats
class TestNatsJetStream(JetStreamContract):
    @pytest.fixture
    async def carrier(self, start_server: Callable[..., NatsServer]) -> AsyncIterator[Carrier]:
        async with NatsCarrier(start_server(jetstream=True)) as carrier:
            yield carrier

    @pytest.fixture
    async def no_jetstream(self, start_server: Callable[..., NatsServer]) -> AsyncIterator[Carrier]:
        async with NatsCarrier(start_server()) as carrier:
            yield carrier
