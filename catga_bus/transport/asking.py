"""One plain request over a transport: for the server's own services and for clients that speak JSON."""

import asyncio
from collections.abc import Mapping

import msgspec

from catga_bus.transport.base import Transport
from catga_bus.wire import NO_RESPONDERS, STATUS_HEADER


class Reply(msgspec.Struct, frozen=True):
    """What came back."""

    payload: bytes
    headers: Mapping[str, str]

    @property
    def is_no_responders(self) -> bool:
        """Whether the server says that nobody listens."""
        return not self.payload and self.headers.get(STATUS_HEADER) == NO_RESPONDERS


async def ask(transport: Transport, subject: str, payload: bytes, timeout: float) -> Reply | None:
    """Publish a request and return the first reply, or None if none came within `timeout` seconds.

    Raises:
        DisconnectedError: There is no connection.
        TooLargeError: The payload exceeds what the server takes.
    """
    answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def sink(_: str, body: bytes, __: str, headers: Mapping[str, str] | None) -> None:
        if not answered.done():
            answered.set_result(Reply(body, headers or {}))

    inbox = transport.new_inbox()
    subscription = await transport.subscribe(inbox, sink)
    try:
        transport.publish(subject, payload, reply=inbox)
        async with asyncio.timeout(timeout):
            return await answered
    except TimeoutError:
        return None
    finally:
        await subscription.close()
