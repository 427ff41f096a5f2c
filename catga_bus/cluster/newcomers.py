"""Newcomers: nodes that were heard and are not believed yet. Anybody may write a beat, so each is asked first."""

from catga_bus.cluster.allowance import Allowance
from catga_bus.cluster.records import NodeInfo

MAX_WAITING = 1_000
"""Newcomers that wait to be asked; beyond it the one heard longest ago has to beat again. About 500 KB."""

QUESTIONS_PER_SECOND = 100.0
"""Questions after a burst, whatever is written to the common subject: 1 % of a core."""

LOST_AFTER = 1.0
"""Seconds after which a question is lost; whoever beats on is asked again."""

_Name = tuple[str, str]


class Newcomers:
    """Who waits to be asked, and who was asked; by service and id, so that no forged service hides a true one.

    The last one heard is asked first: a burst of forged ids, which are not heard again, holds nobody up that lives.

    Args:
        now: The present instant.
    """

    def __init__(self, now: float) -> None:
        self._allowance = Allowance(now, QUESTIONS_PER_SECOND)
        self._waiting: dict[_Name, None] = {}
        self._asked: dict[_Name, tuple[int, float]] = {}  # the number of the question, and when it was asked
        self._numbers: dict[int, _Name] = {}

    def __len__(self) -> int:
        """How many wait for a question or an answer."""
        return len(self._waiting) + len(self._asked)

    def hear(self, info: NodeInfo) -> bool:
        """Take a beat of a node that is not known; return whether there was room for it without forgetting another."""
        name = info.service, info.id
        if name in self._asked:
            return True
        self._waiting.pop(name, None)
        self._waiting[name] = None
        if len(self._waiting) <= MAX_WAITING:
            return True
        del self._waiting[next(iter(self._waiting))]
        return False

    def take(self, now: float) -> _Name | None:
        """Return the service and id of who is to be asked now; None if nobody is."""
        if not self._waiting or not self._allowance.take(now):
            return None
        return self._waiting.popitem()[0]

    def asked(self, now: float, name: _Name, number: int) -> None:
        """A question is on its way."""
        self._asked[name] = number, now
        self._numbers[number] = name

    def end(self, number: int) -> _Name | None:
        """Return whom a question asked, which is over now; None if it asked no newcomer, or is over already."""
        name = self._numbers.pop(number, None)
        if name is not None:
            del self._asked[name]
        return name

    def expire(self, now: float) -> None:
        """Forget the questions that nobody answered."""
        for number, asked_at in list(self._asked.values()):
            if now - asked_at < LOST_AFTER:
                return  # they were asked in this order
            self.end(number)

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()
        self._asked.clear()
        self._numbers.clear()
