"""Bare nats-py on JetStream: 64 bytes of anything in a log, read by several pull consumers. No types, no order."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import nats
import nats.errors

from benchmarks.load import LoadClient, Run
from benchmarks.sides.stores import make_log, wait_read

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient
    from nats.js import JetStreamContext

_PAYLOAD = b"x" * 64
_BATCH = 256
_MOST_PENDING = 8_192


class _Connected:
    """Holds a connection and a log while it is entered."""

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._log = f"{namespace}-log"
        self._subject = f"{namespace}.bare.event"
        self._connection: NatsClient
        self._streams: JetStreamContext

    async def __aenter__(self) -> Self:
        """Connect, and make the log."""
        await make_log(self._url, self._log, self._subject)
        self._connection = await nats.connect(servers=self._url.split(","))
        self._streams = self._connection.jetstream(publish_async_max_pending=_MOST_PENDING)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self._connection.close()


class Worker(_Connected):
    """A consumer of its own, which fetches messages and acknowledges each.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        number: Which consumer: that of the next round goes on where this one has ended.
    """

    def __init__(self, url: str, namespace: str, number: int) -> None:
        super().__init__(url, namespace)
        self._name = f"reader-{number}"

    async def __aenter__(self) -> Self:
        """Connect and begin to fetch."""
        await super().__aenter__()
        self._working = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Fetch no more."""
        self._working.cancel()
        await asyncio.wait({self._working})
        await super().__aexit__(kind, error, traceback)

    async def _work(self) -> None:
        subscription = await self._streams.pull_subscribe(self._subject, self._name, self._log)
        while True:
            with suppress(nats.errors.Error, TimeoutError):  # as a rule that nothing came for a second
                for message in await subscription.fetch(_BATCH, timeout=1.0):
                    await message.ack()


class Client(_Connected, LoadClient):
    """Publishes with `publish_async`; a measurement ends when every consumer has acknowledged all.

    Args:
        url: Where the server is.
        namespace: The workers'.
    """

    def __init__(self, url: str, namespace: str) -> None:
        super().__init__(url, namespace)
        LoadClient.__init__(self)

    async def call(self) -> None:
        """Have 64 bytes stored."""
        await (await self._streams.publish_async(self._subject, _PAYLOAD))

    async def measure(self, in_flight: int, requests: int) -> Run:
        """Measure until all is handled."""
        await wait_read(self._url, self._log)
        started = asyncio.get_running_loop().time()
        run = await super().measure(in_flight, requests)
        await wait_read(self._url, self._log)
        return replace(run, seconds=asyncio.get_running_loop().time() - started)
