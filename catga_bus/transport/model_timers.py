"""Instants at which something is due, earliest first. Pure: it holds no clock."""

import heapq
import math
from typing import Final, Generic, TypeVar

Owner = TypeVar("Owner")

_SLACK: Final = 64
# Entries of the forgotten that may lie about beyond twice those that count.


class Timers(Generic[Owner]):
    """At most one instant for each owner that counts; one that comes too early only costs a look."""

    def __init__(self) -> None:
        self._at: dict[Owner, float] = {}
        self._heap: list[tuple[float, int, Owner]] = []
        self._count = 0

    def wake(self, owner: Owner, instant: float) -> None:
        """Look at an owner at an instant, unless it is looked at earlier anyway; infinity is never."""
        if instant < self._at.get(owner, math.inf):
            self._at[owner] = instant
            self._count += 1
            heapq.heappush(self._heap, (instant, self._count, owner))

    def due(self, now: float) -> list[Owner]:
        """Return whom to look at, and forget that it was to be."""
        owners = []
        while self._heap and self._heap[0][0] <= now:
            instant, _, owner = heapq.heappop(self._heap)
            if self._at.get(owner) == instant:
                del self._at[owner]
                owners.append(owner)
        return owners

    def next(self) -> float:
        """Return the earliest instant; infinity if there is none."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def forget(self, owner: Owner) -> None:
        """Look at an owner no more."""
        self._at.pop(owner, None)
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = [entry for entry in self._heap if self._at.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
