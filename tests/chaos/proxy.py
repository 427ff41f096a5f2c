"""A link that can be made bad: a TCP proxy between one process and the nats-server, switched while it runs.

TCP hides loss from programs: what is lost is sent again, so a lossy direction is one that stands still, and one that is
lost for good ends in a reset. The faults here are what programs see of the network's:

    delay       each chunk arrives that much later; chunks follow each other as before
    bandwidth   bytes pass at that rate
    one-way     one direction stands still, the other flows; when it heals all that was held goes on
    half-open   both ends stay open and nothing arrives: what is sent disappears; healing resets the connections,
                because the streams now have holes
    cut         connections are reset and new ones too
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum, auto

from catga_bus.clock import monotonic

CHUNK_BYTES = 65_536
HELD_CHUNKS = 64
# Per direction of a connection: then the sender is held back, as it would be by the kernel.


class Direction(Enum):
    """Of bytes; `UP` is towards the server."""

    UP = auto()
    DOWN = auto()


class Proxy:
    """Forwards connections from a port of its own to a server. Belongs to one event loop; close it.

    Attributes:
        delay: Seconds that every chunk takes in each direction.
        bandwidth: Bytes per second in each direction of each connection; None without a bound.
        hits: What became of what came along, counted since its owner last cleared it: bytes that `passed`, were
            `delayed`, `held` or `lost`, each `up` or `down`; connections that were `reset` or `refused`.
    """

    def __init__(self, server: tuple[str, int], host: str = "127.0.0.1") -> None:
        self.delay = 0.0
        self.bandwidth: float | None = None
        self.hits: Counter[str] = Counter()
        self._target = server
        self._host = host
        self._server: asyncio.Server | None = None
        self._is_cut = False
        self._swallows = False
        self._flows = {direction: asyncio.Event() for direction in Direction}
        for flow in self._flows.values():
            flow.set()
        self._ends: set[asyncio.StreamWriter] = set()
        self._links: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, self._host, 0)

    @property
    def address(self) -> str:
        """`host:port`."""
        assert self._server is not None, "the proxy was not started"
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._links)

    def cut(self) -> None:
        """Reset all connections, and every new one until `heal`."""
        self._is_cut = True
        self.hits["reset"] += len(self._links)
        self._reset()

    def half_open(self) -> None:
        """Let everything disappear, and keep connections open, until `heal`."""
        self._swallows = True

    def hold(self, *directions: Direction) -> None:
        """Let these directions stand still until `heal`."""
        for direction in directions:
            self._flows[direction].clear()

    def heal(self) -> None:
        """End every fault."""
        self.delay = 0.0
        self.bandwidth = None
        self._is_cut = False
        for flow in self._flows.values():
            flow.set()
        if self._swallows:
            self._swallows = False
            self._reset()

    async def close(self) -> None:
        """Reset all connections and listen no more."""
        if self._server is not None:
            self._server.close()
        self._reset()
        for link in list(self._links):
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _reset(self) -> None:
        for end in list(self._ends):
            end.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        self._ends.add(writer)
        try:
            await self._link(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end may go at any time, and the proxy with it: that is what it is for
        finally:
            writer.transport.abort()
            self._ends.discard(writer)
            self._links.discard(link)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            self.hits["refused"] += 1
            return
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        self._ends.add(server_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, server_writer, Direction.UP)),
            asyncio.create_task(self._pump(server_reader, writer, Direction.DOWN)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server_writer.transport.abort()
            self._ends.discard(server_writer)
            await _end(pumps)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        """Carry one direction of a connection until its sender ends it."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD_CHUNKS)
        sending = asyncio.create_task(self._send(held, writer, direction))
        try:
            while True:
                chunk = await reader.read(CHUNK_BYTES)
                if self._swallows and chunk:
                    self._count("lost", direction, chunk)
                    continue
                if self.delay:
                    self._count("delayed", direction, chunk)
                await held.put((monotonic() + self.delay, chunk))
                if not chunk:
                    await sending
                    return
        finally:
            await _end([sending])

    async def _send(
        self, held: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        while True:
            due, chunk = await held.get()
            await asyncio.sleep(max(0.0, due - monotonic()))
            if self.bandwidth is not None:
                await asyncio.sleep(len(chunk) / self.bandwidth)
            if not self._flows[direction].is_set():
                self._count("held", direction, chunk)
                await self._flows[direction].wait()
            if self._swallows:
                self._count("lost", direction, chunk)
                if not chunk:
                    await asyncio.Future()  # the end is not told either; the reset will end this
                continue
            if not chunk:
                return
            self._count("passed", direction, chunk)
            writer.write(chunk)
            await writer.drain()

    def _count(self, fate: str, direction: Direction, chunk: bytes) -> None:
        self.hits[f"{fate} {direction.name.lower()}"] += len(chunk)


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(OSError, asyncio.CancelledError):
            await task
