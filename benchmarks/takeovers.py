"""What faults did to ordered partitions, from the record of all effects. Pure.

All instants are of one clock, `time.monotonic`, which the processes of a machine share.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple


class Effect(NamedTuple):
    """One committed effect; a list of them is in the order of commits."""

    account: str
    number: int
    node: str
    partition: int
    epoch: int
    at: float
    """Just before it was written."""


class Hit(NamedTuple):
    """What was done to a node, and when: taken before the signal."""

    kind: str
    """kill, freeze or roll."""

    node: str
    at: float


class Move(NamedTuple):
    """A partition that has changed its owner."""

    kind: str
    """Of the fault that made it; "hand-over" if the owner gave it up by itself."""

    partition: int
    seconds: float
    """From the fault, or from the last effect of a hand-over's old owner, to the first of the new one."""


@dataclass(frozen=True, slots=True)
class Count:
    """What must be nothing, over all effects."""

    effects: int
    accounts: int
    lost: int
    """Accepted, and without an effect."""

    doubled: int
    out_of_order: int
    """Effects with a lower number than an earlier one of their account."""

    falls: int
    """Effects with a lower epoch than an earlier one of their partition."""

    foreign: int
    """Effects of what nobody handed in."""

    @property
    def violations(self) -> int:
        """How many there are in all."""
        return self.lost + self.doubled + self.out_of_order + self.falls + self.foreign

    def as_json(self) -> dict[str, Any]:
        """Return all of it for the raw data."""
        return asdict(self)


def count(
    effects: Sequence[Effect], accepted: Mapping[str, Sequence[int]], unknown: Mapping[str, Sequence[int]]
) -> Count:
    """Compare the effects with what was handed in.

    Args:
        effects: In the order of commits.
        accepted: The numbers that were accepted, by account.
        unknown: Those of which the producer does not know: they may have an effect, or none.
    """
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    highest: dict[str, int] = {}
    epochs: dict[int, int] = {}
    out_of_order = falls = 0
    for effect in effects:
        seen[effect.account][effect.number] += 1
        out_of_order += effect.number < highest.get(effect.account, -1)
        highest[effect.account] = max(effect.number, highest.get(effect.account, -1))
        falls += effect.epoch < epochs.get(effect.partition, 0)
        epochs[effect.partition] = max(effect.epoch, epochs.get(effect.partition, 0))
    names = {*seen, *accepted}
    lost = foreign = doubled = 0
    for name in names:
        there, wanted = seen[name], set(accepted.get(name, ()))
        lost += len(wanted - set(there))
        foreign += len(set(there) - wanted - set(unknown.get(name, ())))
        doubled += sum(times - 1 for times in there.values())
    return Count(len(effects), len(seen), lost, doubled, out_of_order, falls, foreign)


def moves(effects: Sequence[Effect], hits: Sequence[Hit]) -> list[Move]:
    """Return every change of an owner, with the time that it took.

    A partition has moved when an effect in it is another node's than the one before. It was taken over if a kill or a
    freeze has hit the node before since its last effect there, or just before that.

    Args:
        effects: In the order of commits.
        hits: In the order of their instants.
    """
    by_node: dict[str, list[Hit]] = defaultdict(list)
    for hit in hits:
        if hit.kind != "roll":
            by_node[hit.node].append(hit)
    by_partition: dict[int, list[Effect]] = defaultdict(list)
    for effect in effects:
        by_partition[effect.partition].append(effect)
    found = []
    for partition, own in by_partition.items():
        for before, after in pairwise(own):
            if before.node == after.node:
                continue
            hit = next(
                (hit for hit in reversed(by_node[before.node]) if before.at - _AT_ONCE <= hit.at <= after.at), None
            )
            if hit is None:
                found.append(Move("hand-over", partition, max(0.0, after.at - before.at)))
            else:
                found.append(Move(hit.kind, partition, after.at - hit.at))
    return found


_AT_ONCE = 0.1
# An effect may be written just after the instant that was taken before its node's end was signalled.
