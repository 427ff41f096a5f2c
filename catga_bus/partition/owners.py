"""Who owns what at present, from two sources that may both be behind: the records in the KV and what nodes announce."""

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import msgspec

Incarnation: TypeAlias = tuple[int, int]
"""One life of a node id, as in its heartbeats."""


class Holding(msgspec.Struct, frozen=True, gc=False):
    """What the record of a partition says."""

    node: str | None
    """Who owns it; None if it was released."""

    epoch: int
    """Of the owner; of a release the revision of that write, which is above the epoch that it ends."""

    incarnation: Incarnation = (0, 0)
    """Of the owner."""


Announced: TypeAlias = Mapping[str, Mapping[int, int]]
"""By node: the partitions that it says it owns, each with its epoch. The node that plans is one of them."""


def merge_owners(
    partitions: int,
    held: Mapping[int, Holding],
    announced: Announced,
    lives: Mapping[str, Incarnation],
) -> dict[int, str]:
    """Return who owns each partition; those that nobody owns are left out.

    The highest epoch counts, whoever says it: it was granted last. Of two that say the same the record counts, and of
    two nodes (a bucket that was restored can grant an epoch twice) the lower id, so that all see the same. Whether an
    owner lives is not looked at; but what a former life of a live node held, nobody owns. Partitions from `partitions`
    on are left out: they were announced by a node with another configuration.

    Args:
        partitions: P.
        held: Records as last read; they need not be complete.
        announced: From the last heartbeat of each live node, this one's own claims included. A dead node's would be
            believed as well, and be planned away.
        lives: The incarnation of each live node.
    """
    best: dict[int, tuple[tuple[int, bool], str | None]] = {}
    for partition, rank, node in _claims(held, announced, lives):
        if 0 <= partition < partitions:
            present = best.get(partition)
            if present is None or rank > present[0] or (rank == present[0] and (node or "") < (present[1] or "")):
                best[partition] = (rank, node)
    return {partition: node for partition, (_, node) in best.items() if node is not None}


def _claims(
    held: Mapping[int, Holding], announced: Announced, lives: Mapping[str, Incarnation]
) -> Iterator[tuple[int, tuple[int, bool], str | None]]:
    for partition, record in held.items():
        is_former = record.node is not None and lives.get(record.node, record.incarnation) != record.incarnation
        yield partition, (record.epoch, True), None if is_former else record.node
    for node, epochs in announced.items():
        yield from ((partition, (epoch, False), node) for partition, epoch in epochs.items())
