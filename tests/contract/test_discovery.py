"""Both discoveries keep the promises of `catga_bus.cluster.discovery`."""

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from catga_bus.clock import monotonic
from catga_bus.cluster.discovery import MemoryDiscovery, NatsDiscovery
from catga_bus.cluster.heartbeat import Gauge
from catga_bus.codec import Gate
from catga_bus.pulse import Pulse
from catga_bus.testing import RecordedEvents
from catga_bus.testing.discovery_contract import DiscoveryContract, Make
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.memory import MemoryTransport
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.vitals import Vitals
from catga_bus.wire import Names

INTERVAL = 0.05


def gauge() -> Gauge:
    pulse = Pulse(monotonic, lambda _: None)
    pulse.start()
    return Gauge(pulse, Vitals(), monotonic, 0.5)


class TestMemoryDiscovery(DiscoveryContract):
    @pytest.fixture
    async def make(self) -> AsyncIterator[Make]:
        url, names = f"memory://{secrets.token_hex(4)}", Names()
        async with AsyncExitStack() as stack:

            async def make(node_id: str) -> MemoryDiscovery:
                transport = MemoryTransport(ConnectionOptions(urls=(url,)), RecordedEvents())
                await transport.connect()
                stack.push_async_callback(transport.close)
                return MemoryDiscovery(
                    transport,
                    names,
                    Gate(),
                    monotonic,
                    gauge=gauge(),
                    allow=lambda _: True,
                    node_id=node_id,
                    interval=INTERVAL,
                )

            yield make


@pytest.mark.nats
class TestNatsDiscovery(DiscoveryContract):
    @pytest.fixture
    async def make(self, server_url: str) -> AsyncIterator[Make]:
        names = Names(f"t{secrets.token_hex(6)}")
        options = ConnectionOptions(urls=(server_url,))
        async with AsyncExitStack() as stack:

            async def make(node_id: str) -> NatsDiscovery:
                transport = NatsTransport(options, RecordedEvents())
                await transport.connect()
                stack.push_async_callback(transport.close)
                return NatsDiscovery(
                    transport,
                    names,
                    Gate(),
                    monotonic,
                    gauge=gauge(),
                    allow=lambda _: True,
                    connect=lambda events: NatsTransport(options, events),
                    node_id=node_id,
                    interval=INTERVAL,
                )

            yield make
