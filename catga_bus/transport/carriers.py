"""Which carrier an address means."""

from catga_bus.clock import Clock
from catga_bus.transport.base import ConnectionOptions, Transport, TransportEvents
from catga_bus.transport.jetstream import JetStream
from catga_bus.transport.memory import MemoryTransport
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.transport.nats_jetstream import NatsJetStream


def make_transport(options: ConnectionOptions, events: TransportEvents) -> Transport:
    """Return the carrier for the scheme of the first address, not yet connected."""
    carrier = MemoryTransport if options.urls[0].startswith("memory://") else NatsTransport
    return carrier(options, events)


def make_jetstream(transport: Transport, clock: Clock) -> JetStream:
    """Return JetStream over a carrier: the broker in memory serves it on the same subjects as a nats-server."""
    return NatsJetStream(transport, clock)
