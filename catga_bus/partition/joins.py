"""Newcomers wait a moment before they are given partitions, so that ten that start together move things once.

A death is never waited for: `joins_at` says of whom the plan does not yet make an owner, and nothing else.
"""

import math
from collections.abc import Collection, Mapping

import msgspec

QUIET = 1.0
"""Seconds without another newcomer after which those that wait are let in: what a `rollout` starts, it starts within
that. At half of it a burst of starts on a busy machine falls into two; at twice it a new node idles longer than it
takes to replace a dead one."""

LONGEST = 5.0
"""Seconds that a newcomer waits at most, however many follow it."""


class Joins(msgspec.Struct, frozen=True):
    """Who waits."""

    waiting: frozenset[str]
    due: float
    """When the next of them is let in, infinite if none waits."""


def joins_at(
    now: float,
    seen: Mapping[str, float],
    owning: Collection[str] = frozenset(),
    *,
    quiet: float = QUIET,
    longest: float = LONGEST,
) -> Joins:
    """Return which nodes are too new to be given partitions.

    Newcomers are let in together: when nobody has come for `quiet`, or `longest` after the first of them. Whoever comes
    later waits with the next. A node that owns something is not new, whenever it was first seen: so a node that has
    just started, to which all are new, sees the same newcomers as the others.

    Views differ by the time a heartbeat takes, and by more when nodes see different joins. That is harmless: a newcomer
    asks for what its own view gives it, and an owner that does not agree yet is asked again.

    Args:
        now: The present instant.
        seen: Since when each node lives without a break, in the view of this one; a node that was dead starts again.
        owning: Nodes that own partitions.
        quiet: Seconds.
        longest: Seconds.
    """
    waiting: set[str] = set()
    due = math.inf
    for node, admitted in _admissions(seen, quiet, longest).items():
        if admitted > now and node not in owning:
            waiting.add(node)
            due = min(due, admitted)
    return Joins(frozenset(waiting), due)


def _admissions(seen: Mapping[str, float], quiet: float, longest: float) -> dict[str, float]:
    """Return when each node is let in: with its group, whose end moves with each that joins it, up to a bound."""
    groups: list[list[str]] = []
    first = end = -math.inf
    ends: list[float] = []
    for node, instant in sorted(seen.items(), key=lambda item: item[1]):
        if instant >= end:
            groups.append([])
            ends.append(end)
            first = instant
        end = ends[-1] = min(instant + quiet, first + longest)
        groups[-1].append(node)
    return {node: end for group, end in zip(groups, ends, strict=True) for node in group}
