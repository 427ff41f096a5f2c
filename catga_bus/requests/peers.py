"""Peers: what the request lane asks about other nodes, and the answers of one that knows none."""

from collections.abc import Callable, Collection
from typing import Any, Protocol

Address = tuple[str, str]
"""Service and id of a node: what its own subject is made of."""

Choice = Callable[[Any], bool]
"""Which nodes may take a request: given a `NodeInfo`, whether that node may."""


OwnerOf = Callable[[str, str], Address | None]
"""Given a request type and a key, the live node that owns the key's partition of the service's work queue, or None."""


class Peers(Protocol):
    """The view of the other nodes; the directory of the cluster is one.

    Attributes:
        troubled: Names of request types of which some node is not to be trusted (suspect, stalled, or faulted and not
            yet evicted by the server): their requests are addressed to live nodes one by one, because the queue group
            would give some to that node. Empty while all is well, which is all that the hot path looks at.
    """

    troubled: Collection[str]

    def pick(self, type_name: str, avoid: Collection[str] = (), choice: Choice | None = None) -> Address | None:
        """Return the less loaded of two random live nodes that handle a type.

        Args:
            type_name: The type.
            avoid: Ids of nodes that must not be taken.
            choice: Which nodes may be taken; None for all.

        Returns:
            None when no node is left that is live, ready and heard of lately.
        """
        ...

    def address(self, node_id: str) -> Address | None:
        """Return the address of a node, dead or alive; None if it is not known."""
        ...

    def is_stalled(self, node_id: str) -> bool:
        """Whether a node says that its event loop stands still: it answers nothing now, and has what it has."""
        ...

    def doubtful(self, type_name: str) -> list[Address]:
        """Return the nodes that may hold a request of this type which nobody answers: those not heard of lately.

        All that handle the type while no doubt points to one; at most a few.
        """
        ...


def no_owner(type_name: str, key: str) -> Address | None:
    """Nobody owns anything."""
    del type_name, key
    return None


class NoPeers:
    """The view of a caller that knows no other node: everything goes to the queue group."""

    troubled: Collection[str] = ()

    def pick(self, type_name: str, avoid: Collection[str] = (), choice: Choice | None = None) -> Address | None:
        """There is nobody to pick."""
        del type_name, avoid, choice
        return None

    def address(self, node_id: str) -> Address | None:
        """Nobody is known."""
        del node_id
        return None

    def is_stalled(self, node_id: str) -> bool:
        """Nobody is known to be."""
        del node_id
        return False

    def doubtful(self, type_name: str) -> list[Address]:
        """Nobody is known."""
        del type_name
        return []
