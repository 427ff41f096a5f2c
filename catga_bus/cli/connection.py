"""A connection for one message, without a bus."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from catga_bus.cli.door import Door, DoorEvents
from catga_bus.config import BusConfig, server_urls
from catga_bus.embedded import EmbeddedServer
from catga_bus.wire import Names

CONNECT_TIMEOUT = 2.0
"""How long one call looks for a server, in seconds; a bus takes 5, but here somebody sits and waits."""


@asynccontextmanager
async def open_door(url: str | None, namespace: str) -> AsyncIterator[Door]:
    """Connect, and close in the end; what was published by then is sent.

    Args:
        url: As `Bus` takes it, but for `memory://`, where nobody outside this process could be.
        namespace: First token of all subjects.

    Raises:
        DisconnectedError: No server answers.
        AuthenticationError: The server refuses the credentials.
        ConfigurationError: The address or the namespace cannot be used.
    """
    names = Names(namespace)
    urls = server_urls(url)
    async with AsyncExitStack() as stack:
        if urls[0].startswith("embedded://"):
            server = await stack.enter_async_context(EmbeddedServer.parse(urls[0]))
            urls = (server.url,)
        from catga_bus.transport.nats_core import NatsTransport  # here: other commands need not wait for it

        events = DoorEvents()
        transport = NatsTransport(BusConfig(connect_timeout=CONNECT_TIMEOUT).connection(urls, "catga/cli"), events)
        try:
            await transport.connect()
            yield Door(transport, names, events)
        finally:
            await transport.close()
