"""Bugs that a process of the rig can be given, to test who finds them. By name, from the environment: `CHAOS_BUG`.

Each is one that could have been written: it replaces one step of the bus by a plausible wrong one, in that process
alone. `FOUND` says which trial finds it, and by which check; what needs a server that loses or reorders what it sends
is found by the simulation of ownership instead.
"""

import asyncio
import secrets
from collections.abc import Callable, Generator
from typing import Any

import msgspec

from catga_bus.durability.inbox.sqlite_store import SqliteStore
from catga_bus.durability.letters.dead_letters import DeadLetters
from catga_bus.durability.sending import postings, writer
from catga_bus.durability.working.lookup import Lookup
from catga_bus.durability.working.outcomes import Outcomes
from catga_bus.durability.working.worker import Worker
from catga_bus.partition import records
from catga_bus.partition.broker import Broker
from catga_bus.partition.lanes import Lanes, State
from catga_bus.partition.protocol import Ownership
from catga_bus.partition.records import Held
from catga_bus.wire import partition_consumer

LEAVING = 0.02
"""Seconds in which what was written leaves the process, before it is killed."""

BUGS: dict[str, Callable[[], None]] = {}


def plant(name: str) -> None:
    """Give this process a bug; an empty name gives it none."""
    if name:
        BUGS[name]()


def _bug(function: Callable[[], None]) -> Callable[[], None]:
    BUGS[function.__name__.replace("_", "-")] = function
    return function


# -- effects and acknowledgements --------------------------------------------------------------------------------------


@_bug
def acknowledge_before_commit() -> None:
    """What is acknowledged and then not committed is lost."""
    commit = Outcomes._commit

    async def wrong(self: Outcomes, job: Any, *rest: Any) -> None:
        self._keeping.done(job.record.sequence)
        await asyncio.sleep(LEAVING)
        await commit(self, job, *rest)

    Outcomes._commit = wrong  # type: ignore[method-assign]


@_bug
def no_fence_check() -> None:
    """A former owner that stood still commits what it had begun."""
    SqliteStore._check = lambda *_: None  # type: ignore[assignment, method-assign]


@_bug
def mark_outside_the_transaction() -> None:
    """The effects are committed, and the mark that the message is done is lost when the process dies then."""
    SqliteStore._mark = lambda *_: True  # type: ignore[assignment, method-assign]


@_bug
def inbox_not_asked() -> None:
    """What is done is run again when it comes again; only its effects are refused."""
    Lookup.add = lambda self, job: self._found(job, None)  # type: ignore[method-assign]


@_bug
def dead_letter_after_acknowledgement() -> None:
    """A message whose dead letter is not stored when the process dies is lost."""
    bury = Outcomes._bury

    async def wrong(self: Outcomes, job: Any, doom: Any) -> None:
        self._keeping.done(job.record.sequence)
        await asyncio.sleep(LEAVING)
        await bury(self, job, doom)

    Outcomes._bury = wrong  # type: ignore[method-assign]


@_bug
def dead_letter_without_an_identity() -> None:
    """A message that is given up twice, because its process died in between, has two dead letters."""

    async def wrong(self: DeadLetters, subject: str, mark: str, payload: bytes) -> Any:
        other = f"{subject.rpartition('.')[0]}.{secrets.token_hex(8)}"
        return await self._jetstream.publish(other, payload, message_id=secrets.token_hex(8))

    DeadLetters._store = wrong  # type: ignore[method-assign]


# -- order -------------------------------------------------------------------------------------------------------------


@_bug
def failing_lets_others_pass() -> None:
    """What failed is tried again later, as with nak, and what comes behind it in its key does not wait."""
    again = Worker.again

    def wrong(self: Worker, job: Any, error: str, seconds: float) -> None:
        last, following = self._lanes._last, job.next
        if following is None:
            del last[job.key]
        job.key, job.next = f"{job.key} {job.message.id}", None
        last[job.key] = job
        again(self, job, error, seconds)
        if following is not None:
            following.state = State.READY
            self._offer(following)

    Worker.again = wrong  # type: ignore[method-assign]


@_bug
def keys_side_by_side() -> None:
    """Every message has a lane of its own."""
    take = Lanes.take

    def wrong(self: Any, record: Any) -> Any:
        for frame in record.frames:
            frame.key = frame.message.id
        return take(self, record)

    Lanes.take = wrong  # type: ignore[method-assign]


@_bug
def second_record_in_flight() -> None:
    """A sender does not wait until a record is stored before it writes the next of its partition (in producers)."""

    def wrong(self: writer.Writer, stream: str, partition: int) -> postings.Line:
        return postings.Line(stream, self._bounds)

    writer.Writer.line = wrong  # type: ignore[method-assign]


@_bug
def hand_over_without_finishing() -> None:
    """What runs when a partition is given away is forgotten, and run again by the next owner."""

    async def wrong(self: Worker, *, below: bool) -> None:
        self.drop()

    Worker.finish = wrong  # type: ignore[method-assign]


# -- ownership ---------------------------------------------------------------------------------------------------------


@_bug
def no_confirming_read() -> None:
    """A claimant that was overtaken while it stood still begins."""

    def wrong(*_: Any) -> Generator[Any, Any, None]:
        yield from ()

    Ownership._confirm = wrong  # type: ignore[assignment, method-assign]


@_bug
def epoch_not_raised() -> None:
    """Whoever takes a partition over goes on with the epoch of the owner before."""
    record_of = Ownership._next_record

    def wrong(self: Ownership, seen: Held, start: int, first: int, above: int) -> Any:
        record = record_of(self, seen, start, first, above)
        return msgspec.structs.replace(record, epoch=max(1, seen.record.epoch if seen.record is not None else 1))

    def epoch(self: Held) -> int:
        return self.record.epoch if self.record is not None else self.revision

    Ownership._next_record = wrong  # type: ignore[method-assign]
    Held.epoch = property(epoch)  # type: ignore[assignment, method-assign]


@_bug
def consumer_reused_across_epochs() -> None:
    """The consumer of a partition is named without its epoch: a former owner's acknowledgements reach it."""
    records.consumer_name = lambda service, partition, *_: partition_consumer(service, partition, 1, 0)


@_bug
def deaths_not_counted() -> None:
    """A message that kills its process does so for ever."""
    Ownership._deaths = lambda *_: 0  # type: ignore[assignment, method-assign]


@_bug
def log_goes_on_behind_what_was_delivered() -> None:
    """Whoever takes a partition of the event log over begins behind what the owner before had in hand."""

    async def wrong(self: Broker, consumer: str) -> int:
        info = await self._jetstream.consumer(self._domain.stream, consumer)
        return 0 if info is None else max(info.delivered + 1, info.config.start_sequence)

    Broker._position = wrong  # type: ignore[method-assign]


FOUND: dict[str, tuple[str, str]] = {
    "acknowledge-before-commit": ("commit", "nothing_accepted_is_lost"),
    "no-fence-check": ("zombie", "epochs_never_fall"),
    "mark-outside-the-transaction": ("committed", "effects_are_never_doubled"),
    "inbox-not-asked": ("committed", "done_is_done"),
    "dead-letter-after-acknowledgement": ("burying", "nothing_accepted_is_lost"),
    "dead-letter-without-an-identity": ("buried", "dead_letters_are_exact"),
    "failing-lets-others-pass": ("order", "keys_are_in_order"),
    "keys-side-by-side": ("order", "keys_are_in_order"),
    "second-record-in-flight": ("server", "keys_are_in_order"),
    "hand-over-without-finishing": ("roll", "executions_are_excused"),
    "no-confirming-read": ("claim", "grants_are_the_last_word"),
    "epoch-not-raised": ("commit", "an_epoch_has_one_owner"),
    "consumer-reused-across-epochs": ("commit", "a_consumer_has_one_epoch"),
    "deaths-not-counted": ("killer", "dead_letters_are_exact"),
    "log-goes-on-behind-what-was-delivered": ("events", "nothing_accepted_is_lost"),
}
"""Of each bug the trial that finds it, and the check by which it does."""
