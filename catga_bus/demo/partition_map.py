"""Which node owns which partition, as a row of cells. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_letters
from typing import TypeAlias

Owners: TypeAlias = tuple[str | None, ...]
"""The owner of each partition, None where nobody alive owns it."""

_MARKS = "123456789" + ascii_letters
_GROUP = 4


def owners_of(claims: Iterable[tuple[str, Mapping[int, int]]], count: int) -> Owners:
    """Return who owns what; of several that say so, the one with the highest epoch does.

    Args:
        claims: Id of each node that lives, and its partitions with their epochs.
        count: How many partitions there are.
    """
    owners: list[str | None] = [None] * count
    highest = [0] * count
    for node, partitions in claims:
        for partition, epoch in partitions.items():
            if partition < count and epoch > highest[partition]:
                owners[partition], highest[partition] = node, epoch
    return tuple(owners)


def is_shared_out(owners: Owners, nodes: Sequence[str]) -> bool:
    """Whether every partition has an owner, and no two of these nodes differ by more than one partition."""
    shares = [owners.count(node) for node in nodes]
    return sum(shares) == len(owners) and max(shares) - min(shares) <= 1


def number_of(node: str) -> int:
    """Return the number at the end of a node's id; 0 if there is none."""
    number = node.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else 0


def mark_of(node: str | None) -> str:
    """Return the one character that stands for a node: the number of its id, `·` for nobody."""
    if node is None:
        return "·"
    number = number_of(node)
    return _MARKS[number - 1] if 0 < number <= len(_MARKS) else "?"


def text_of_map(owners: Owners) -> str:
    """Return the map as text, in groups of four.

    Example:
        >>> text_of_map(("desk-1", "desk-1", None, "desk-2", "desk-3"))
        '11·2 3'
    """
    cells = "".join(map(mark_of, owners))
    return " ".join(cells[at : at + _GROUP] for at in range(0, len(cells), _GROUP))
