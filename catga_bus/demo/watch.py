"""How a bus sees the nodes: the only file of the demo that asks the directory."""

from collections.abc import AsyncIterator
from typing import Any

from catga_bus.bus import Bus


def statuses(bus: Bus, service: str) -> dict[str, str]:
    """Return the status of each node of a service, by id."""
    nodes: Any = getattr(bus, "nodes", None)
    return {} if nodes is None else {node.id: str(node.status) for node in nodes(service)}


async def watch_statuses(bus: Bus) -> AsyncIterator[tuple[str, str]]:
    """Yield the id and the status of each node that changes, for as long as the bus is started."""
    watch_nodes: Any = getattr(bus, "watch_nodes", None)
    if watch_nodes is None:
        return
    async for change in watch_nodes():
        if change.node is not None:  # where changes were missed, the present state follows
            yield change.node.id, str(change.node.status)
