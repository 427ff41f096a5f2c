"""What a node knows when it plans, and what it is to do next: pure, and asked again whenever something changes."""

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from catga_bus.partition.joins import joins_at
from catga_bus.partition.owners import Holding, Incarnation, merge_owners
from catga_bus.partition.plan import Plan, make_plan, takers_among
from catga_bus.partition.steps import Steps, steps_of


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the service, as this one sees it; this one is among them."""

    id: str
    incarnation: Incarnation
    is_live: bool
    """Not found dead; suspects live."""

    is_draining: bool = False
    epochs: Mapping[int, int] = {}
    """What it says it owns."""

    types: frozenset[str] = frozenset()
    """Types of the domain that it handles: a node without any owns nothing."""


class Decision(msgspec.Struct, frozen=True):
    """What follows from a view."""

    plan: Plan
    steps: Steps
    due: float
    """When time alone may change it; infinite if it cannot."""


class Planner:
    """Plans for one node and one domain.

    Args:
        partitions: P.
        me: Id of this node.
        incarnation: Its present life; asked when needed, because it is not known before the node has joined.
        timeout: Seconds of silence after which an owner of whom nobody has heard is dead.
    """

    def __init__(self, partitions: int, me: str, incarnation: Callable[[], Incarnation], timeout: float) -> None:
        self.partitions = partitions
        self._me = me
        self._incarnation = incarnation
        self._timeout = timeout
        self._seen: dict[str, float] = {}  # since when each node lives without a break
        self._absent: dict[str, float] = {}  # since when an owner is missing of whom nothing was heard

    def decide(
        self,
        now: float,
        peers: Sequence[Peer],
        held: Mapping[int, Holding],
        owned: Mapping[int, int],
        routed: Collection[str] = frozenset(),
    ) -> Decision:
        """Return the plan and the steps of this node.

        Args:
            now: The present instant.
            peers: The nodes of the service, this one included.
            held: The records as last read.
            owned: Partitions that this node works on, each with its epoch.
            routed: Types that every owner should know; who does not owns nothing unless nobody does.
        """
        able = [peer for peer in peers if peer.types]
        live = {peer.id for peer in able if peer.is_live} | {self._me}
        self._note(now, live, {peer.id for peer in peers}, held)
        unheard = {node for node, since in self._absent.items() if now < since + self._timeout}
        joins = joins_at(now, self._seen, {peer.id for peer in able if peer.is_live and peer.epochs})
        lives = {peer.id: peer.incarnation for peer in able if peer.is_live} | {self._me: self._incarnation()}
        announced = {peer.id: peer.epochs for peer in able if peer.is_live} | {self._me: owned}
        owners = merge_owners(self.partitions, held, announced, lives)
        takers = takers_among(
            live,
            draining={peer.id for peer in able if peer.is_draining},
            eligible={peer.id for peer in able if peer.types.issuperset(routed)} if routed else None,
            waiting=joins.waiting,
        )
        plan = make_plan(self.partitions, owners, live | unheard, takers=takers)
        steps = steps_of(plan, self._me, owners, owned)
        due = min(
            [joins.due, *(since + self._timeout for since in self._absent.values() if now < since + self._timeout)]
        )
        return Decision(plan, steps, due)

    def _note(self, now: float, live: Collection[str], known: Collection[str], held: Mapping[int, Holding]) -> None:
        for node in [node for node in self._seen if node not in live]:
            del self._seen[node]
        for node in live:
            self._seen.setdefault(node, now)
        missing = {one.node for one in held.values() if one.node is not None} - set(known) - {self._me}
        for node in [node for node in self._absent if node not in missing]:
            del self._absent[node]
        for node in missing:
            self._absent.setdefault(node, now)

    def may_be_claimed(self, now: float, holding: Holding, peers: Sequence[Peer]) -> bool:
        """Whether a record that was just read leaves its partition to this node: nobody alive holds it."""
        owner = holding.node
        if owner is None:
            return True
        if owner == self._me:
            return True  # a former life of this node, or a claim of its own whose outcome it does not know
        peer = next((peer for peer in peers if peer.id == owner), None)
        if peer is not None:
            return not peer.is_live or peer.incarnation != holding.incarnation
        return now >= self._absent.setdefault(owner, now) + self._timeout
