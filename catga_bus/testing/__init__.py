"""What users test their code with: conditions to wait for, brokers to break, carriers to prove.

Importing this needs nothing but the package itself; the contracts need pytest and are loaded when they
are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from catga_bus.testing.carrier import Carrier, Received, RecordedEvents
from catga_bus.testing.waiting import eventually
from catga_bus.transport.memory_broker import MemoryBroker, broker_of

if TYPE_CHECKING:
    from catga_bus.testing.discovery_contract import DiscoveryContract
    from catga_bus.testing.inbox_contract import InboxContract
    from catga_bus.testing.jetstream_contract import JetStreamContract
    from catga_bus.testing.transport_contract import TransportContract

__all__ = [
    "Carrier",
    "DiscoveryContract",
    "InboxContract",
    "JetStreamContract",
    "MemoryBroker",
    "Received",
    "RecordedEvents",
    "TransportContract",
    "broker_of",
    "eventually",
]


def __getattr__(name: str) -> Any:
    if name == "TransportContract":
        return import_module("catga_bus.testing.transport_contract").TransportContract
    if name == "DiscoveryContract":
        return import_module("catga_bus.testing.discovery_contract").DiscoveryContract
    if name == "JetStreamContract":
        return import_module("catga_bus.testing.jetstream_contract").JetStreamContract
    if name == "InboxContract":
        return import_module("catga_bus.testing.inbox_contract").InboxContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
