"""A server that speaks just enough NATS to misbehave on cue, and keeps what its clients write."""

import asyncio
import json
from typing import Any, Self

INFO = {
    "server_id": "FAKE",
    "server_name": "fake",
    "version": "2.15.1",
    "headers": True,
    "max_payload": 1_048_576,
    "proto": 1,
}


class FakeNats:
    """One listening socket; an asynchronous context manager.

    Args:
        info: More fields of INFO.
        is_mute: Whether it takes connections and says nothing at all.
        before_first_pong: What it writes between CONNECT and the first PONG of each connection.
    """

    def __init__(self, info: dict[str, Any] | None = None, *, is_mute: bool = False, before_first_pong: bytes = b""):
        self.lines: list[bytes] = []
        """Every line of every client, payloads as lines of their own, without its end."""

        self.connections: list[asyncio.StreamWriter] = []
        """All that were ever made, in order."""

        self._info = {**INFO, **(info or {})}
        self.is_mute = is_mute
        self._before_first_pong = before_first_pong
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.sockets[0].getsockname()
        return f"nats://{host}:{port}"

    def say(self, text: bytes) -> None:
        """Write to the youngest connection."""
        self.connections[-1].write(text)

    def interests(self, subject: bytes) -> list[bytes]:
        """The SUB lines for a subject, of all connections."""
        return [line for line in self.lines if line.startswith(b"SUB " + subject + b" ")]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self.connections:
            writer.transport.abort()
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_mute:
            await reader.read()
            return
        writer.write(b"INFO " + json.dumps(self._info).encode() + b"\r\n")
        is_first = True
        while line := await reader.readline():
            self.lines.append(line.rstrip())
            if line.startswith(b"PING"):
                writer.write((self._before_first_pong if is_first else b"") + b"PONG\r\n")
                is_first = False
        writer.transport.abort()
