"""What users test their code with: conditions to wait for, brokers to break, carriers to prove.

Importing this needs nothing but the package itself; `TransportContract` needs pytest and is loaded
when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from catga_bus.testing.carrier import Carrier, Received, RecordedEvents
from catga_bus.testing.waiting import eventually
from catga_bus.transport.memory_broker import MemoryBroker, broker_of

if TYPE_CHECKING:
    from catga_bus.testing.transport_contract import TransportContract

__all__ = [
    "Carrier",
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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
