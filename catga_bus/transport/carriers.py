"""Which carrier an address means."""

from catga_bus.transport.base import ConnectionOptions, Transport, TransportEvents
from catga_bus.transport.memory import MemoryTransport
from catga_bus.transport.nats_core import NatsTransport


def make_transport(options: ConnectionOptions, events: TransportEvents) -> Transport:
    """Return the carrier for the scheme of the first address, not yet connected."""
    carrier = MemoryTransport if options.urls[0].startswith("memory://") else NatsTransport
    return carrier(options, events)
