"""What the thread of an inbox is given to do, and how the event loops hear of the results."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from catga_bus.durability.inbox.base import InboxError
from catga_bus.durability.inbox.sqlite_store import Finished, SqliteStore


class Turn:
    """One unit. The thread's, but for `is_ended`: that is the event loop's, which hands nothing more in then."""

    __slots__ = ("error", "is_ended", "jobs", "message_id")

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self.is_ended = False
        self.error: InboxError | None = None
        self.jobs: deque[Job] = deque()


class Kind(Enum):
    """What is to be done."""

    STATEMENT = 0
    """In the unit's turn: something that the user wrote."""

    FINISH = 1
    """In the unit's turn, or at any time if it never had one: commit it."""

    FORGET = 2
    """Undo the unit."""

    CALL = 3
    """A turn of its own: work on the store that belongs to no execution."""

    LOOK = 4
    """At any time: read what is committed. Only where transactions are of one unit each, see `max_units`."""

    END = 5
    """Commit what there is and stop."""


class Answer(NamedTuple):
    """Where a job's result goes."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class Job(NamedTuple):
    """Something for the thread to do."""

    kind: Kind
    turn: Turn
    answer: Answer
    call: Callable[[SqliteStore], Any] | None = None
    unit: Finished | None = None


def new_answer() -> Answer:
    """Return where a result goes: to the loop that runs."""
    loop = asyncio.get_running_loop()
    return Answer(loop, loop.create_future())


def tell(answers: Sequence[tuple[Answer, Any]]) -> None:
    """Hand results to the loops that wait for them, those of one loop in one call; what is an exception is raised."""
    of_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for answer, value in answers:
        of_loop.setdefault(answer.loop, []).append((answer.future, value))
    for loop, results in of_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, results)
        except RuntimeError:
            continue  # the loop is closed: nobody waits any more


def _resolve(results: list[tuple["asyncio.Future[Any]", Any]]) -> None:
    for future, value in results:
        if future.done():
            continue  # cancelled
        if isinstance(value, BaseException):
            future.set_exception(value)
        else:
            future.set_result(value)
