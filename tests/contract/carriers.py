"""The carriers that the contracts are run against."""

import secrets
from typing import Any

from catga_bus.testing import Carrier, broker_of
from catga_bus.transport.base import ConnectionOptions, Transport, TransportEvents
from catga_bus.transport.memory import MemoryTransport
from catga_bus.transport.nats_core import NatsTransport
from tests.servers import NatsServer


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


class NatsCarrier(Carrier):
    can_stall = True

    def __init__(self, server: NatsServer) -> None:
        super().__init__()
        self._server = server

    def make(self, events: TransportEvents, **options: Any) -> Transport:
        urls = (self._server.url,)
        return NatsTransport(ConnectionOptions(urls=urls, reconnect_delay=0.02, **options), events)

    async def cut(self) -> None:
        self._server.kill()

    async def heal(self) -> None:
        self._server.start()

    async def stall(self) -> None:
        self._server.freeze()

    async def resume(self) -> None:
        self._server.thaw()
