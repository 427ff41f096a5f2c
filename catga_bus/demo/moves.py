"""How partitions moved from node to node, read off the effect log. Pure."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from catga_bus.demo.effects import Effect


class Move(msgspec.Struct, frozen=True):
    """A partition whose next effect came from another node."""

    partition: int
    source: str
    target: str
    last: float
    """Instant of the last effect of the source."""

    first: float
    """Instant of the first effect of the target."""

    @property
    def pause(self) -> float:
        """Seconds without an effect; also those in which nobody had anything to do are in it."""
        return max(0.0, self.first - self.last)


def moves_of(effects: Iterable[Effect]) -> list[Move]:
    """Return the moves that effects show, in the order of their commits."""
    latest: dict[int, Effect] = {}
    found = []
    for effect in effects:
        before = latest.get(effect.partition)
        if before is not None and before.node != effect.node:
            found.append(Move(effect.partition, before.node, effect.node, before.at, effect.at))
        latest[effect.partition] = effect
    return found


def takeovers(moves: Sequence[Move], node: str, at: float, until: float) -> list[float]:
    """Return how long it took until others had effects on the partitions of a node that could not work, sorted.

    Args:
        moves: All of them.
        node: The node that was killed or frozen.
        at: When.
        until: When it could work again; infinite for a killed one.

    Returns:
        Seconds from `at` to the first effect of the next owner, one for each partition that has one.
    """
    return sorted(move.first - at for move in moves if move.source == node and move.first > at and move.last < until)


def standstill(effects: Sequence[Effect], at: float, until: float) -> float | None:
    """Return the longest time in which no partition at all had an effect; None if there are not two effects.

    Args:
        effects: All of them.
        at: When the stretch begins that is looked at; the pause that it lies in counts whole.
        until: When it ends.
    """
    instants = sorted(effect.at for effect in effects)
    around = instants[max(0, bisect_right(instants, at) - 1) : bisect_left(instants, until) + 1]
    return max((after - before for before, after in pairwise(around)), default=None)


def hand_overs(moves: Sequence[Move], node: str, at: float) -> list[float]:
    """Return the pauses of the partitions that a node gave away from an instant on, in seconds, sorted."""
    return sorted(move.pause for move in moves if move.source == node and move.first > at)
