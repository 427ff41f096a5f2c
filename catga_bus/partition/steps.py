"""What a node does about the plan: claim what nobody holds, ask for what others hold, hand over what is asked for.

The successor acts and the owner waits to be asked: it goes on working until somebody is there to take over, and needs
to be right about nothing but itself.
"""

from collections.abc import Collection, Mapping

import msgspec

from catga_bus.partition.plan import Plan


class Steps(msgspec.Struct, frozen=True):
    """Partitions by what a node is to do about them; each is in one place at most, in ascending order."""

    claim: tuple[int, ...]
    """Nobody alive holds them, or this node according to a record that it knows nothing of (a claim whose answer was
    lost): claim them now."""

    ask: Mapping[str, tuple[int, ...]]
    """By their living owner, who is to be asked for them until it hands over or the plan changes. An owner that does
    not agree yet says so, and one that does not work on them says that they may be claimed."""

    give: Mapping[str, tuple[int, ...]]
    """By the node that will ask for them: to be handed over then and not before. What a node that drains has left when
    its time is over, it releases."""

    doubt: tuple[int, ...]
    """This node works on them and another has a higher epoch: start nothing, read the record."""


def steps_of(plan: Plan, me: str, owners: Mapping[int, str], owned: Collection[int]) -> Steps:
    """Return what a node is to do.

    Args:
        plan: Its plan.
        me: Its id.
        owners: What the plan was made from.
        owned: What it works on in this life, those among it that it is about to hand over.
    """
    working = frozenset(owned)
    doubt = frozenset(partition for partition in working if owners.get(partition, me) != me)
    sources = {move.partition: move.source for move in plan.moves}
    claim: list[int] = []
    ask: dict[str, list[int]] = {}
    give: dict[str, list[int]] = {}
    for partition, target in enumerate(plan.owners):
        source = sources.get(partition)
        if partition in doubt or target is None:
            continue
        if target != me:
            if partition in working:
                give.setdefault(target, []).append(partition)
        elif source is not None:
            ask.setdefault(source, []).append(partition)
        elif partition not in working:
            claim.append(partition)
    return Steps(tuple(claim), _frozen(ask), _frozen(give), tuple(sorted(doubt)))


def _frozen(by_node: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {node: tuple(partitions) for node, partitions in by_node.items()}
