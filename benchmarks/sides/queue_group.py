"""A bare queue group under faults: nats-py request and reply, nothing that knows who lives."""

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self

import nats
from nats.aio.msg import Msg

from benchmarks.executions import ExecutionLog
from benchmarks.outages import OK
from benchmarks.steady import SteadyCaller

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient


class _Connected:
    """Holds a connection while it is entered."""

    def __init__(self, url: str, namespace: str) -> None:
        self._servers = url.split(",")
        self._subject = f"{namespace}.group.order"
        self._connection: NatsClient

    async def __aenter__(self) -> Self:
        """Connect."""
        self._connection = await nats.connect(servers=self._servers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection."""
        await self._connection.close()


class Member(_Connected):
    """A member of a queue group whose handler waits a little, many of them side by side.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        directory: Where it notes what it executes.
        handler_seconds: How long the handler waits.
    """

    def __init__(self, url: str, namespace: str, directory: str, handler_seconds: float) -> None:
        super().__init__(url, namespace)
        self._log = ExecutionLog(directory)
        self._handler_seconds = handler_seconds
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Connect and subscribe; the server has seen the subscription when this returns."""
        await super().__aenter__()
        await self._connection.subscribe(self._subject, queue="bench", cb=self._take)
        await self._connection.flush()
        return self

    async def _take(self, message: Msg) -> None:
        task = asyncio.create_task(self._answer(message))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, message: Msg) -> None:
        self._log.note(int(message.data))
        await asyncio.sleep(self._handler_seconds)
        await self._connection.publish(message.reply, message.data)


class Caller(_Connected, SteadyCaller):
    """Asks steadily with `request`.

    Args:
        url: Where the server is.
        namespace: The members'.
    """

    def __init__(self, url: str, namespace: str) -> None:
        _Connected.__init__(self, url, namespace)
        SteadyCaller.__init__(self)

    async def call(self, order: int, timeout: float) -> str:
        """Send one order, and check that the answer is its own."""
        try:
            answer = await self._connection.request(self._subject, b"%d" % order, timeout=timeout)
        except TimeoutError:
            return "timeout"
        return OK if int(answer.data) == order else "wrong answer"
