"""Bare nats-py on JetStream: 64 bytes of anything, stored, and taken by one pull consumer. No types, no order per key.

Publishing with `publish_async` is its fastest way to store; 256 messages are fetched at a time, and acknowledged one by
one.
"""

import asyncio
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import nats
import nats.errors

from benchmarks.load import LoadClient, Run
from benchmarks.sides.stores import make_work_queue, wait_empty

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient
    from nats.js import JetStreamContext

_PAYLOAD = b"x" * 64
_BATCH = 256
_MOST_PENDING = 8_192  # above every number in flight that is measured


class _Connected:
    """Holds a connection and a work queue while it is entered."""

    def __init__(self, url: str, namespace: str, replicas: int) -> None:
        self._url = url
        self._replicas = replicas
        self._stream = f"{namespace}-bare"
        self._subject = f"{namespace}.bare.store"
        self._connection: NatsClient
        self._streams: JetStreamContext

    async def __aenter__(self) -> Self:
        """Connect, and make the work queue."""
        await make_work_queue(self._url, self._stream, self._subject, self._replicas)
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
    """Fetches messages and acknowledges each.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        replicas: Servers that hold the queue.
        is_away: Whether it only makes the work queue: then what is stored waits.
    """

    def __init__(self, url: str, namespace: str, replicas: int = 1, *, is_away: bool = False) -> None:
        super().__init__(url, namespace, replicas)
        self._is_away = is_away
        self._working: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connect and begin to fetch."""
        await super().__aenter__()
        if not self._is_away:
            self._working = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Fetch no more."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.wait({self._working})
        await super().__aexit__(kind, error, traceback)

    async def _work(self) -> None:
        subscription = await self._streams.pull_subscribe(self._subject, "bench", self._stream)
        while True:
            with suppress(nats.errors.Error, TimeoutError):  # as a rule that nothing came for a second
                for message in await subscription.fetch(_BATCH, timeout=1.0):
                    await message.ack()


class Client(_Connected, LoadClient):
    """Stores messages.

    Args:
        url: Where the server is.
        namespace: The worker's.
        replicas: Servers that hold the queue.
        how: "publish": one request for each message. "publish_async": nats-py's own way to have many in flight.
        is_handled: Whether a measurement ends when the last message is acknowledged by the worker.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        replicas: int = 1,
        how: Literal["publish", "publish_async"] = "publish_async",
        *,
        is_handled: bool = False,
    ) -> None:
        super().__init__(url, namespace, replicas)
        LoadClient.__init__(self)
        self._is_handled = is_handled
        self._is_async = how == "publish_async"

    async def call(self) -> None:
        """Have 64 bytes stored."""
        if self._is_async:
            await (await self._streams.publish_async(self._subject, _PAYLOAD))
        else:
            await self._streams.publish(self._subject, _PAYLOAD, timeout=30.0)

    async def measure(self, in_flight: int, requests: int) -> Run:
        """Measure; where handling counts, until all is handled."""
        if not self._is_handled:
            return await super().measure(in_flight, requests)
        await wait_empty(self._url, self._stream)
        started = asyncio.get_running_loop().time()
        run = await super().measure(in_flight, requests)
        await wait_empty(self._url, self._stream)
        return replace(run, seconds=asyncio.get_running_loop().time() - started)
