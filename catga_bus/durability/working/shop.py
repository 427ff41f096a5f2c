"""The shop floor: what all partitions of a node share to run what is stored, and the counts of what was done."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Gate
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.durability.inbox.base import Inbox
from catga_bus.durability.inbox.outbox import Relay
from catga_bus.durability.letters.letters import DeadLetter
from catga_bus.durability.working.jobs import Place
from catga_bus.rarely import RareLog
from catga_bus.requests.answers import Answers


class DeadLetters(Protocol):
    """Where dead letters go."""

    async def bury(self, letter: DeadLetter) -> object:
        """Return when a letter is stored. The same one may come again."""
        ...


class WaitingKey(msgspec.Struct, frozen=True):
    """A key that is held back by one of its messages."""

    partition: int
    stream: str
    key: str
    """The id of the message if that has no key."""

    type_name: str
    message_id: str
    seconds: float
    """Since the message should have gone through."""

    failures: int
    """Attempts that failed."""

    error: str
    """The last one, for people."""


class WorkStatistics(msgspec.Struct, frozen=True):
    """What a node has done with what is stored; counts since start."""

    handled: int
    """Messages whose handler returned."""

    refused: int
    """Messages that their handler refused."""

    retries: int
    """Attempts beyond the first of their message."""

    dead_letters: dict[str, int]
    """Dead letters that were stored, by reason."""

    duplicates: int
    """Messages that were done before: answered again, not run."""

    repeated: int
    """Results that were said once more, to senders who asked."""

    fenced: int
    """Effects that the inbox refused, because another node owns the partition."""

    delayed: int
    """Messages put off without being started: a limit was reached, or the inbox could not be read."""

    stuck: int
    """Messages whose thread runs on past its deadline now: they keep their keys."""

    partitions: int
    """Partitions that are at work: owned and not paused."""

    records: int
    """Records in hand."""

    frames: int
    """Messages in hand."""

    waiting_keys: int
    """Keys that are held back by a message that fails, or that nobody handles."""

    oldest: WaitingKey | None
    """The one that has waited longest."""


class Counts(msgspec.Struct):
    """What was done; see `WorkStatistics`."""

    handled: int = 0
    refused: int = 0
    retries: int = 0
    duplicates: int = 0
    repeated: int = 0
    fenced: int = 0
    delayed: int = 0
    stuck: int = 0
    dead_letters: Counter[str] = msgspec.field(default_factory=Counter)


class Shop:
    """Tools and counts, and the tasks of all workers.

    Args:
        dispatcher: Runs the handlers.
        gate: Takes records apart.
        answers: The ways back to senders.
        letters: Where dead letters go.
        inbox: Knows what is done; None: effects may happen again.
        relay: Publishes what was committed for sending; None if nothing is.
        service: The service that this node belongs to.
        node_id: The id of this node.
        max_payload: Returns how many bytes the server takes.
        unroutable_after: Seconds after which a message that no node of the service handles is a dead letter.
        clock: Monotonic seconds.
        utc: Seconds since 1970.
        rng: Draws the pauses between attempts.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        gate: Gate,
        answers: Answers,
        letters: DeadLetters,
        inbox: Inbox | None,
        relay: Relay | None,
        *,
        service: str,
        node_id: str,
        max_payload: Callable[[], int],
        unroutable_after: float,
        clock: Clock,
        utc: Clock,
        rng: random.Random,
    ) -> None:
        self.dispatcher = dispatcher
        self.gate = gate
        self.answers = answers
        self.letters = letters
        self.inbox = inbox
        self.relay = relay
        self.service = service
        self.node_id = node_id
        self.max_payload = max_payload
        self.unroutable_after = unroutable_after
        self.clock = clock
        self.utc = utc
        self.rng = rng
        self.loop = asyncio.get_running_loop()
        self.rare_log = RareLog(logging.getLogger("catga_bus.durability"), clock)
        self.counts = Counts()
        self.places: dict[str, Place] = {}
        self.careful_turn = asyncio.Lock()
        """Whose message is the one that is marked, of all partitions that are careful."""

        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in a task of this room; it handles its own errors."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.rare_log.write(logging.ERROR, "task", "a task of the worker failed", error=error)

    async def close(self) -> None:
        """Cancel the tasks and wait for their end."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
