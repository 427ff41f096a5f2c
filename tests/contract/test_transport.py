"""Both carriers keep the promises of `catga_bus.transport.base`."""

from collections.abc import AsyncIterator

import pytest

from catga_bus.testing import Carrier, TransportContract
from tests.contract.carriers import MemoryCarrier, NatsCarrier
from tests.servers import NatsServer


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    async def carrier(self) -> AsyncIterator[Carrier]:
        async with MemoryCarrier() as carrier:
            yield carrier


@pytest.mark.nats
class TestNatsTransport(TransportContract):
    @pytest.fixture
    async def carrier(self, nats_server: NatsServer) -> AsyncIterator[Carrier]:
        async with NatsCarrier(nats_server) as carrier:
            yield carrier
