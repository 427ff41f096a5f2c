"""The plan: who should own each partition. What it says is a wish; the compare-and-set of a claim says who does.

    plan = make_plan(P, owners, live, takers=takers_among(live, ...))
    steps = steps_of(plan, me, owners, owned)                            # what this node claims, asks for, hands over

Three laws, each a property that is tested:

1. Every partition has one planned owner, and each taker floor(P/n) or ceil(P/n) of them.
2. What can stay stays. So many partitions move as no other plan of that balance could avoid; when one node joins or
   leaves, nothing moves between two others. Planning again from the result moves nothing.
3. The same view gives the same plan, in whatever order its parts come, in every process.

Views may differ for a moment. Then two nodes may claim the same partition, and one loses the compare-and-set. A living
owner gives nothing away unless its own plan says the same, so nodes that never agree on who may own come to rest all
the same. Only a verdict is not asked about: a node that goes on taking a living one for dead takes its partitions again
and again. Nothing is lost by that; to be right about deaths is the business of the detector.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from catga_bus.errors import ConfigurationError
from catga_bus.partition.hashing import MAX_PARTITIONS
from catga_bus.partition.ring import Ring


class Move(msgspec.Struct, frozen=True, gc=False):
    """A partition that should change hands."""

    partition: int
    source: str | None
    """The living node that owns it and is to be asked; None if nobody does."""

    target: str


class Plan(msgspec.Struct, frozen=True):
    """Who should own what."""

    owners: tuple[str | None, ...]
    """By partition; None only if nobody takes any."""

    moves: tuple[Move, ...]
    """In the order of partitions."""

    takers: frozenset[str]
    """Who may own."""

    def agrees(self, partition: int, source: str, target: str) -> bool:
        """Whether `source` should hand a partition over to `target`, which asks for it.

        A node that must not own gives to any taker: it is on its way out, and has no time until all views are one.
        """
        return self.owners[partition] == target or (source not in self.takers and target in self.takers)


def takers_among(
    live: Collection[str],
    *,
    draining: Collection[str] = frozenset(),
    eligible: Collection[str] | None = None,
    waiting: Collection[str] = frozenset(),
) -> frozenset[str]:
    """Return which nodes may own partitions.

    All that live and do not drain; of those the ones that know every routed type, if there are any (a rolling deploy);
    of those the ones that have been there long enough, if there are any (a first start does not wait).

    Args:
        live: Nodes not found dead; suspects count.
        draining: Nodes that leave: they own nothing new, and keep what they have until it is handed over.
        eligible: Nodes that know every routed type; None if all do.
        waiting: Nodes that have just joined (`joins_at`).
    """
    staying = frozenset(live) - frozenset(draining)
    able = staying if eligible is None else staying & frozenset(eligible) or staying
    return able - frozenset(waiting) or able


def make_plan(
    partitions: int,
    owners: Mapping[int, str],
    live: Collection[str],
    *,
    takers: Collection[str] | None = None,
) -> Plan:
    """Return who should own each partition.

    A taker keeps what it owns up to its quota. What is above a quota and what no taker owns goes to the first node on
    the ring that has room. Of those that own too much, what the ring gives to a node with room leaves first, so a node
    that comes back under its old id gets most of what it had (83 to 96 % on average; 42 to 83 % if the ring had no
    say in what leaves).

    Args:
        partitions: P, 1 to `MAX_PARTITIONS`.
        owners: Who owns what at present (`merge_owners`); the dead may be among them.
        live: Nodes not found dead; suspects count, and so does an owner that was never heard, until it has been silent
            for a whole timeout.
        takers: Those that may own (`takers_among`); all that live when None.

    Raises:
        ConfigurationError: There cannot be so many partitions.
    """
    if not 0 < partitions <= MAX_PARTITIONS:
        raise ConfigurationError(f"partitions must be 1 to {MAX_PARTITIONS:,}, got {partitions!r}")
    living = frozenset(live)
    able = living if takers is None else living & frozenset(takers)
    if not able:
        return Plan((None,) * partitions, (), able)
    targets = _targets(partitions, owners, able)
    moves = []
    for partition, target in enumerate(targets):
        owner = owners.get(partition)
        if owner != target:
            moves.append(Move(partition, owner if owner in living else None, target))
    return Plan(tuple(targets), tuple(moves), able)


class _Seats:
    """Room for exactly P: floor(P/n) for each node, and one more for the first P mod n that want one."""

    def __init__(self, partitions: int, nodes: Collection[str]) -> None:
        self._floor, self._extra = divmod(partitions, len(nodes))
        self._taken = dict.fromkeys(nodes, 0)

    def take(self, node: str) -> bool:
        """Seat one more partition at a node; False if there is no room."""
        taken = self._taken[node]
        if taken >= self._floor + (self._extra > 0):
            return False
        self._extra -= taken == self._floor
        self._taken[node] = taken + 1
        return True

    def has_room(self, node: str) -> bool:
        """Whether one more partition could be seated at a node."""
        return self._taken[node] < self._floor + (self._extra > 0)


def _targets(partitions: int, owners: Mapping[int, str], takers: frozenset[str]) -> list[str]:
    kept = {partition: owner for partition in range(partitions) if (owner := owners.get(partition)) in takers}
    seats = _Seats(partitions, takers)
    # 1. Nobody has too much, as in a cluster at rest and after a death: the ring has no say in who keeps what.
    if all(seats.take(owner) for owner in kept.values()):
        stay = kept
    # 2. Somebody has: what the ring gives to a node with room leaves first.
    else:
        seats = _Seats(partitions, takers)
        stay = {
            partition: kept[partition]
            for partition in _by_claim(partitions, kept, takers)
            if seats.take(kept[partition])
        }
    loose = [partition for partition in range(partitions) if partition not in stay]
    if loose:
        # Nodes without room are left out: to skip them on the way round would find the same.
        ring = Ring([node for node in takers if seats.has_room(node)])
        for partition in loose:
            stay[partition] = next(filter(seats.take, ring.walk(partition)))
    return [stay[partition] for partition in range(partitions)]


def _by_claim(partitions: int, kept: Mapping[int, str], takers: frozenset[str]) -> Iterable[int]:
    """Return what takers own, the strongest claim to stay first: what the ring gives to a node with room is last."""
    ring = Ring(takers)
    load = Counter(kept.values())
    floor = partitions // len(takers)
    return sorted(kept, key=lambda partition: (load[ring.first(partition)] < floor, partition))
