"""The murmur3 ring: which node a partition would go to if only its name counted. Each node stands on it many times."""

from bisect import bisect
from collections.abc import Collection, Iterator
from typing import Final

from catga_bus.partition.hashing import murmur3

VIRTUAL_NODES: Final = 64
"""Points of each node. Quotas balance the load, so this decides only how well the partitions of a dead node spread over
the others at once; points cost time. Changing it would not hurt a running cluster of one version, and would make two
versions disagree about what is homeless until one of them is gone."""


class Ring:
    """Nodes on a circle of 2**32 hashes.

    Args:
        nodes: At least one; their order does not count.
    """

    def __init__(self, nodes: Collection[str]) -> None:
        points = sorted((murmur3(f"{node}#{point}".encode()), node) for node in nodes for point in range(VIRTUAL_NODES))
        self._hashes = [place for place, _ in points]
        self._nodes = [node for _, node in points]

    def first(self, partition: int) -> str:
        """Return the node whose point comes next after that of a partition."""
        return self._nodes[self._start(partition)]

    def walk(self, partition: int) -> Iterator[str]:
        """Yield nodes in the order of their points after that of a partition, once around; each comes many times."""
        start = self._start(partition)
        for index in range(start, start + len(self._nodes)):
            yield self._nodes[index % len(self._nodes)]

    def _start(self, partition: int) -> int:
        return bisect(self._hashes, murmur3(b"p%d" % partition)) % len(self._nodes)
