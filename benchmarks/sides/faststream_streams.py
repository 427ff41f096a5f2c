"""FastStream on JetStream: a typed message in pydantic, stored, and taken by a pull subscriber. No order per key.

Its own `publish(stream=...)` waits for the acknowledgement of each message; a pull subscriber fetches 256 at a time.
"""

import asyncio
from dataclasses import replace
from types import TracebackType
from typing import Self

from faststream.nats import JStream, NatsBroker, PullSub
from pydantic import BaseModel

from benchmarks.load import LoadClient, Run
from benchmarks.sides.stores import make_work_queue, wait_empty

_BATCH = 256
_MEMO = "m" * 25


class Debit(BaseModel):
    """Take money from an account."""

    account: str
    cents: int
    memo: str


class _Connected:
    """Holds a started broker while it is entered."""

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._broker = NatsBroker(url.split(","), logger=None)
        self._stream = f"{namespace}-faststream"
        self._subject = f"{namespace}.faststream.debit"

    async def __aenter__(self) -> Self:
        """Make the work queue, connect and start."""
        await make_work_queue(self._url, self._stream, self._subject, 1)
        await self._broker.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the broker."""
        await self._broker.stop(kind, error, traceback)


class Worker(_Connected):
    """A pull subscriber.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
    """

    def __init__(self, url: str, namespace: str) -> None:
        super().__init__(url, namespace)

        @self._broker.subscriber(
            self._subject,
            stream=JStream(self._stream, declare=False),
            durable="bench",
            pull_sub=PullSub(batch_size=_BATCH, timeout=1.0),
        )
        async def debit(command: Debit) -> None:
            pass


class Client(_Connected, LoadClient):
    """Stores messages; a measurement ends when the last one is acknowledged by the worker.

    Args:
        url: Where the server is.
        namespace: The worker's.
    """

    def __init__(self, url: str, namespace: str) -> None:
        _Connected.__init__(self, url, namespace)
        LoadClient.__init__(self)

    async def call(self) -> None:
        """Have one message stored."""
        order = next(self.orders)
        command = Debit(account=f"account-{order % 1_000:03}", cents=order, memo=_MEMO)
        await self._broker.publish(command, self._subject, stream=self._stream, timeout=30.0)

    async def measure(self, in_flight: int, requests: int) -> Run:
        """Measure until all is handled."""
        await wait_empty(self._url, self._stream)
        started = asyncio.get_running_loop().time()
        run = await super().measure(in_flight, requests)
        await wait_empty(self._url, self._stream)
        return replace(run, seconds=asyncio.get_running_loop().time() - started)
