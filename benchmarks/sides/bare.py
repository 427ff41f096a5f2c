"""Bare nats-py: 64 bytes of anything, echoed. No types, no validation, nothing on top.

The worker answers with `publish(msg.reply, ...)`: `msg.respond()` would echo headers and cost more.
"""

from types import TracebackType
from typing import TYPE_CHECKING, Self

import nats
from nats.aio.msg import Msg

from benchmarks.load import REQUEST_TIMEOUT, LoadClient, WrongAnswerError

if TYPE_CHECKING:
    from nats.aio.client import Client as NatsClient

_PAYLOAD = b"x" * 64


class _Connected:
    """Holds a connection while it is entered."""

    def __init__(self, url: str, namespace: str) -> None:
        self._servers = url.split(",")
        self._subject = f"{namespace}.bare.echo"
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


class Worker(_Connected):
    """A member of a queue group that echoes.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
    """

    async def __aenter__(self) -> Self:
        """Connect and subscribe; the server has seen the subscription when this returns."""
        await super().__aenter__()
        await self._connection.subscribe(self._subject, queue="bench", cb=self._echo)
        await self._connection.flush()
        return self

    async def _echo(self, message: Msg) -> None:
        await self._connection.publish(message.reply, message.data)


class Client(_Connected, LoadClient):
    """Asks with `request`.

    Args:
        url: Where the server is.
        namespace: The worker's.
    """

    def __init__(self, url: str, namespace: str) -> None:
        _Connected.__init__(self, url, namespace)
        LoadClient.__init__(self)

    async def call(self) -> None:
        """Send 64 bytes and have them back."""
        answer = await self._connection.request(self._subject, _PAYLOAD, timeout=REQUEST_TIMEOUT)
        if answer.data != _PAYLOAD:
            raise WrongAnswerError(f"{_PAYLOAD!r} was answered with {answer.data!r}")
