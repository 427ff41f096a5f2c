"""How a bus sees the nodes: the only file of the demo that asks the directory."""

from collections.abc import AsyncIterator

from catga_bus.bus import Bus
from catga_bus.cluster.records import NodeStatus
from catga_bus.demo.partition_map import Owners, owners_of

_GONE = (NodeStatus.FAULTED, NodeStatus.LEFT)


def owners(bus: Bus, service: str, partitions: int) -> Owners:
    """Return which node of a service owns which partition, as far as the bus knows."""
    return owners_of(
        ((node.id, node.partitions) for node in bus.nodes(service) if node.status not in _GONE), partitions
    )


async def watch_statuses(bus: Bus) -> AsyncIterator[tuple[str, str]]:
    """Yield the id and the status of each node that changes, for as long as the bus is started."""
    async for change in bus.watch_nodes():
        if change.node is not None:  # where changes were missed, the present state follows
            yield change.node.id, str(change.node.status)
