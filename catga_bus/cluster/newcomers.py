"""Newcomers: nodes that were heard and are not believed yet. Anybody may write a beat, so each is asked first."""

from collections.abc import Callable

from catga_bus.cluster.allowance import Allowance
from catga_bus.cluster.records import Incarnation, NodeInfo, NodeStatus

MAX_WAITING = 1_000
"""Newcomers that wait to be asked; beyond it the one heard longest ago has to beat again. About 500 KB."""

QUESTIONS_PER_SECOND = 100.0
"""Questions after a burst, whatever is written to the common subject: 1 % of a core."""

LOST_AFTER = 1.0
"""Seconds after which a question is lost; whoever beats on is asked again."""

MAX_UNPROVEN = 100
"""Newcomers that did not answer and are shown to people: of a node that lives it is a mistake in its permissions."""

SHOW_SECONDS = 5.0
"""For how long they are shown after the last question."""

_Name = tuple[str, str]
_Said = tuple[str, Incarnation, tuple[int, ...]]  # version, incarnation and wire versions: little, whatever was said


class Newcomers:
    """Who waits to be asked, and who was asked; by service and id, so that no forged service hides a true one.

    The last one heard is asked first: a burst of forged ids, which are not heard again, holds nobody up that lives.

    Args:
        now: The present instant.
    """

    def __init__(self, now: float) -> None:
        self._allowance = Allowance(now, QUESTIONS_PER_SECOND)
        self._waiting: dict[_Name, _Said] = {}
        self._asked: dict[_Name, tuple[int, float]] = {}  # the number of the question, and when it was asked
        self._numbers: dict[int, tuple[_Name, _Said]] = {}
        self._unproven: dict[_Name, tuple[NodeInfo, float]] = {}

    def __len__(self) -> int:
        """How many wait for a question or an answer."""
        return len(self._waiting) + len(self._asked)

    def hear(self, info: NodeInfo) -> bool:
        """Take a beat of a node that is not known; return whether there was room for it without forgetting another."""
        name = info.service, info.id
        if name in self._asked:
            return True
        self._waiting.pop(name, None)
        self._waiting[name] = info.version, info.incarnation, info.wire_versions
        if len(self._waiting) <= MAX_WAITING:
            return True
        del self._waiting[next(iter(self._waiting))]
        return False

    def take(self, now: float, ask: Callable[[str, str], int]) -> bool:
        """Ask the next one, if that is allowed now.

        Args:
            now: The present instant.
            ask: Asks a node, given its id and its service; returns the number of the question.
        """
        if not self._waiting or not self._allowance.take(now):
            return False
        name, said = self._waiting.popitem()
        number = ask(name[1], name[0])
        self._asked[name] = number, now
        self._numbers[number] = name, said
        return True

    def answered(self, number: int, info: NodeInfo) -> bool:
        """Return whether a newcomer was asked with this number and answered with this beat: it is none any more."""
        name = info.service, info.id
        if number not in self._numbers or self._numbers[number][0] != name:
            return False
        self._end(number)
        self._unproven.pop(name, None)
        return True

    def failed(self, now: float, number: int, *, evicted: bool) -> None:
        """Nobody is there to answer a question, or nobody does."""
        if number not in self._numbers:
            return
        name, (version, incarnation, wire_versions) = self._end(number)
        self._unproven.pop(name, None)
        if len(self._unproven) >= MAX_UNPROVEN:
            del self._unproven[next(iter(self._unproven))]
        info = NodeInfo(
            id=name[1],
            service=name[0],
            version=version,
            incarnation=incarnation,
            status=NodeStatus.SUSPECT,
            is_ready=False,
            wire_versions=wire_versions,
            last_beat=now,
            evicted=evicted,
        )
        self._unproven[name] = info, now

    @property
    def unproven(self) -> list[NodeInfo]:
        """Those that were heard lately and did not answer: true ones that cannot, and forged ones."""
        return [info for info, _ in self._unproven.values()]

    def expire(self, now: float) -> None:
        """Give up the questions that nobody answered; forget who is not heard any more."""
        for number, asked_at in list(self._asked.values()):
            if now - asked_at < LOST_AFTER:
                break  # they were asked in this order
            self.failed(now, number, evicted=False)
        for name, (_, failed_at) in list(self._unproven.items()):
            if now - failed_at < SHOW_SECONDS:
                break
            del self._unproven[name]

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()
        self._asked.clear()
        self._numbers.clear()
        self._unproven.clear()

    def _end(self, number: int) -> tuple[_Name, _Said]:
        name, said = self._numbers.pop(number)
        del self._asked[name]
        return name, said
