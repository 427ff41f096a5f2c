"""A crowd of nodes in one process: the beats of each are those of a real node, and each hears all others.

The beats come from the very class that a node beats with, all over one connection; it answers probes too. What each
node would hear goes to a connection of its own that throws it away: the server has the work of a real cluster.
"""

import asyncio
import random
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit

from catga_bus.clock import monotonic
from catga_bus.cluster.beats import Identity, Report
from catga_bus.cluster.directory import MAX_BEATS_PER_SECOND
from catga_bus.cluster.heartbeat import Beacon, Gauge
from catga_bus.config import BusConfig
from catga_bus.pulse import Pulse
from catga_bus.testing import RecordedEvents
from catga_bus.transport.carriers import make_transport
from catga_bus.vitals import Vitals
from catga_bus.wire import Names

_TYPES = ("bench.Order", "bench.Cancel", "bench.Quote")
_DEFAULT_PORT = 4222
_LEAST_INTERVAL = BusConfig().heartbeat_interval


class Crowd:
    """So many nodes besides the one that listens.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        nodes: How many.
    """

    def __init__(self, url: str, namespace: str, nodes: int) -> None:
        self._urls = tuple(url.split(","))
        self._namespace = namespace
        self._nodes = nodes
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Begin to beat, spread over an interval as real nodes are; returns when all do."""
        config = BusConfig(namespace=self._namespace)
        names = Names(self._namespace)
        transport = make_transport(config.connection(self._urls, "catga/crowd"), RecordedEvents())
        await transport.connect()
        self._stack.push_async_callback(transport.close)
        pulse = Pulse(monotonic, lambda _: None)
        pulse.start()
        self._stack.callback(pulse.stop)
        interval = max(_LEAST_INTERVAL, (self._nodes + 1) / MAX_BEATS_PER_SECOND)
        started = asyncio.get_running_loop().time()
        for number in range(self._nodes):
            await self._listen(names.heartbeats())
            gauge = Gauge(pulse, Vitals(monotonic), monotonic, config.stall_timeout)
            beacon = Beacon(transport, names, gauge, lambda _: True, interval)
            beacon.report = Report(is_ready=True)
            await asyncio.sleep(started + interval * number / self._nodes - asyncio.get_running_loop().time())
            identity = Identity("crowd", f"crowd-{number}", "1.0.0", {"host": "bench"}, "zone-1", "region-1", _TYPES)
            await beacon.start(identity, (1, random.getrandbits(32)))
            self._stack.push_async_callback(beacon.stop)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Say good-bye for all."""
        await self._stack.aclose()

    async def _listen(self, subject: str) -> None:
        address = urlsplit(self._urls[0])
        host, port = address.hostname or "127.0.0.1", address.port or _DEFAULT_PORT
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: _Deaf(subject), host, port)
        self._stack.callback(transport.close)


class _Deaf(asyncio.BufferedProtocol):
    """Subscribes, answers the pings of the server, and throws away what comes."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._buffer = memoryview(bytearray(65_536))
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Subscribe."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self._transport.write(
            b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB %s 1\r\nPING\r\n' % self._subject.encode()
        )

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go: over the last ones."""
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Answer a ping at the end of what came; one that is missed is asked again, and two may be."""
        if bytes(self._buffer[max(0, nbytes - 6) : nbytes]) == b"PING\r\n":
            self._transport.write(b"PONG\r\n")
