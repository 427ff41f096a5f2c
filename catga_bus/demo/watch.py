"""How a bus sees the nodes: the only file of the demo that asks the directory."""

from collections.abc import AsyncIterator

from catga_bus.bus import Bus


def statuses(bus: Bus, service: str) -> dict[str, str]:
    """Return the status of each node of a service, by id."""
    return {node.id: str(node.status) for node in bus.nodes(service)}


async def watch_statuses(bus: Bus) -> AsyncIterator[tuple[str, str]]:
    """Yield the id and the status of each node that changes, for as long as the bus is started."""
    async for change in bus.watch_nodes():
        if change.node is not None:  # where changes were missed, the present state follows
            yield change.node.id, str(change.node.status)
