"""What a run leaves on a server of somebody else's: its streams, removed in the end."""

from catga_bus.clock import monotonic
from catga_bus.config import BusConfig, server_urls
from catga_bus.demo import board, node
from catga_bus.transport.carriers import make_jetstream, make_transport
from catga_bus.wire import Names


class _Quiet:
    """Wants to know nothing of the connection: what fails is raised by the calls."""

    def on_disconnected(self, reason: str) -> None: ...

    def on_reconnected(self, url: str) -> None: ...

    def on_denied(self, subject: str, text: str) -> None: ...

    def on_error(self, text: str) -> None: ...


def streams_of(namespace: str) -> list[str]:
    """Return the names of all streams that a run may have made."""
    names = Names(namespace)
    streams = [names.event_stream(), *(f"KV_{bucket}" for bucket in (names.owners_bucket(), names.routes_bucket()))]
    for service in (node.SERVICE, board.SERVICE):
        streams += [names.command_stream(service), names.dead_letter_stream(service), names.schedule_stream(service)]
    return streams


async def remove_streams(url: str, namespace: str) -> int:
    """Remove the streams of a run, when its nodes have ended.

    Args:
        url: Address of the server.
        namespace: The namespace of the run.

    Returns:
        How many there were.

    Raises:
        CatgaError: The server cannot be reached, or refuses.
    """
    config = BusConfig(namespace=namespace)
    transport = make_transport(config.connection(server_urls(url), "catga/demo"), _Quiet())
    await transport.connect()
    try:
        jetstream = make_jetstream(transport, monotonic)
        try:
            return sum([await jetstream.delete_stream(stream) for stream in streams_of(namespace)])
        finally:
            await jetstream.close()
    finally:
        await transport.close()
