"""Connections of commands: one for one message without a bus, and a bus that asks on behalf of a person."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

from catga_bus.bus import Bus
from catga_bus.cli.door import Door, DoorEvents
from catga_bus.config import BusConfig, server_urls
from catga_bus.embedded import EmbeddedServer
from catga_bus.transport.nats_servers import parse_server
from catga_bus.wire import Names, token

if TYPE_CHECKING:
    from catga_bus.transport.nats_core import NatsTransport

CONNECT_TIMEOUT = 2.0
"""How long one call looks for a server, in seconds; a bus takes 5, but here somebody sits and waits."""

SERVICE: Final = "catga-cli"
"""The service of commands whose address names no user."""

COMMAND_KEY: Final = "catga.command"
"""Metadata of the nodes that are commands: which one. Such nodes come and go, and nobody runs them."""


def command_bus(command: str, url: str | None, namespace: str) -> Bus:
    """Return a bus for a command. It is a client, and so a node that others see while the command runs.

    Its service and its inbox are named after the user in the address, if there is one: `deploy/nats` permits users
    what is theirs, and no more.

    Args:
        command: Name of the command.
        url: As `Bus` takes it.
        namespace: First token of all subjects.

    Raises:
        ConfigurationError: The address or the namespace cannot be used.
    """
    first = server_urls(url)[0]
    return Bus(
        user_of(first) or SERVICE,
        url=url,
        namespace=namespace,
        metadata={COMMAND_KEY: command},
        inbox_prefix=inbox_of(first),
        connect_timeout=CONNECT_TIMEOUT,
    )


def user_of(url: str) -> str | None:
    """Return the user that an address names; None without one."""
    if url.startswith(("memory://", "embedded://")):
        return None
    server = parse_server(url)
    return server.user if server.password is not None else None  # by itself it is a token, which is a secret


def inbox_of(url: str) -> str:
    """Return the root of the inboxes of an address' user: its own, which lies within whatever `_INBOX.>` permits."""
    user = user_of(url)
    return "_INBOX" if user is None else f"_INBOX.{token(user)}"


@asynccontextmanager
async def open_transport(url: str | None, name: str) -> AsyncIterator[tuple["NatsTransport", DoorEvents]]:
    """Connect, and close in the end; what was published by then is sent.

    Args:
        url: As `Bus` takes it, but for `memory://`, where nobody outside this process could be.
        name: Of the connection, as the server shows it.

    Raises:
        DisconnectedError: No server answers.
        AuthenticationError: The server refuses the credentials.
        ConfigurationError: The address cannot be used.
    """
    urls = server_urls(url)
    config = BusConfig(inbox_prefix=inbox_of(urls[0]), connect_timeout=CONNECT_TIMEOUT)
    async with AsyncExitStack() as stack:
        if urls[0].startswith("embedded://"):
            server = await stack.enter_async_context(EmbeddedServer.parse(urls[0]))
            urls = (server.url,)
        from catga_bus.transport.nats_core import NatsTransport  # here: other commands need not wait for it

        events = DoorEvents()
        transport = NatsTransport(config.connection(urls, name), events)
        try:
            await transport.connect()
            yield transport, events
        finally:
            await transport.close()


@asynccontextmanager
async def open_door(url: str | None, namespace: str) -> AsyncIterator[Door]:
    """Connect for one message; otherwise as `open_transport`.

    Args:
        url: As `Bus` takes it.
        namespace: First token of all subjects.
    """
    names = Names(namespace)
    async with open_transport(url, "catga/cli") as (transport, events):
        yield Door(transport, names, events)
