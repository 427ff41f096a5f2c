"""Who owns a partition: the conversation with the broker that claims and releases it. Pure.

Each method is a generator. It yields an operation, is sent its outcome (done, refused or unknown), and returns what
came of it; whoever drives it waits a moment after an unknown outcome. There is no clock, no randomness and no event
loop inside, so that a simulation may try every order of operations.

    claim     read - [event log: list, ask for positions] - find the first record that waits - compare-and-set
              - make mine the only consumer - pull - read again
    reclaim   the same for a partition that is owned already and in doubt: a new epoch
    amend     compare-and-set of something in one's own record; a release is one

What keeps two owners apart is the compare-and-set on the record. That the old owner's acknowledgements reach nobody is
due to the consumer, whose name has the epoch in it. The last read closes a hole: between a rival's delete and its
create a claimant that was overtaken can slip its own consumer in; without the read it would go on (4,190 of 5,352
orders of two claimants, tried on nats-server 2.15).
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from catga_bus.partition.owners import Incarnation
from catga_bus.partition.records import (
    CAREFUL_FROM,
    Consumers,
    Domain,
    Held,
    Mark,
    OwnerRecord,
    StaleError,
    consumer_of,
)
from catga_bus.transport.jetstream import ApiError, JetStreamRefusedError

# -- what is asked of the broker -------------------------------------------------------------------------------


class Read(msgspec.Struct, frozen=True):
    """Read the record, by the leader of the bucket. Done: `Held`. Refused with STREAM_NOT_FOUND: the bucket is gone."""


class Write(msgspec.Struct, frozen=True):
    """Write the record if its revision is still `last`. Done: the new revision. Refused: it is not."""

    record: OwnerRecord
    last: int


class CreateBucket(msgspec.Struct, frozen=True):
    """Make the bucket. Refused with STREAM_NAME_IN_USE: somebody else was faster."""

    first_sequence: int


class ListConsumers(msgspec.Struct, frozen=True):
    """Done: the names of all consumers of the domain's stream."""


class ReadPosition(msgspec.Struct, frozen=True):
    """Done: the sequence at which one that follows a consumer begins; 0 if the consumer is not there."""

    consumer: str


class FindFirst(msgspec.Struct, frozen=True):
    """Done: the sequence of the partition's first record from `start` on; 0 if there is none."""

    start: int


class DeleteConsumer(msgspec.Struct, frozen=True):
    """Delete a consumer; done as well if it is not there."""

    consumer: str


class CreateConsumer(msgspec.Struct, frozen=True):
    """Make the partition's consumer; done as well if it is there. Event log: it begins at `start`.

    Done: False if it is there and has no leader, so that it is of no use for a while. A leader answers as soon as there
    is one; without an answer the outcome is unknown after `patience` seconds, and whoever asks again hears.
    """

    consumer: str
    start: int
    patience: float = 1.0


class Pull(msgspec.Struct, frozen=True):
    """Have the consumer's records delivered; none of them is begun before the claim is over."""

    consumer: str
    killer: Mark | None
    """The frame that the last owner had begun when it was lost, if it was careful."""


Operation: TypeAlias = (
    Read | Write | CreateBucket | ListConsumers | ReadPosition | FindFirst | DeleteConsumer | CreateConsumer | Pull
)


class Done(NamedTuple):
    """It was done."""

    value: Any = None


class Refused(NamedTuple):
    """It was not done."""

    code: int
    text: str = ""


class Unknown(NamedTuple):
    """It may have been done, or may still be."""


Outcome: TypeAlias = Done | Refused | Unknown
T = TypeVar("T")
Steps: TypeAlias = Generator[Operation, Outcome, T]

# -- what comes of it ------------------------------------------------------------------------------------------


class Party(msgspec.Struct, frozen=True):
    """Who claims."""

    node: str
    incarnation: Incarnation
    nonce: Callable[[], str]
    """Returns a text that nobody else ever gets."""

    first_sequence: Callable[[], int]
    """Returns milliseconds since 1970: where the revisions of a new bucket begin."""


class Claimed(msgspec.Struct, frozen=True):
    """The partition is owned."""

    held: Held
    """The record as written."""

    consumer: str
    continues: bool
    """Whether nobody else has owned it since this party wrote its last record."""

    @property
    def epoch(self) -> int:
        """The epoch that was granted."""
        return self.held.epoch

    @property
    def record(self) -> OwnerRecord:
        """The record as written."""
        assert self.held.record is not None
        return self.held.record

    @property
    def is_careful(self) -> bool:
        """Whether owners were lost at the first record that waits, again and again."""
        return self.record.deaths >= CAREFUL_FROM


MayClaim: TypeAlias = Callable[[OwnerRecord], bool]
"""Whether the partition may be taken from whom the record names."""

FIRST_PATIENCE: Final = 1.0
LAST_PATIENCE: Final = 8.0
HASTY_ROUNDS: Final = 3
"""Seconds for which the leader of a new consumer is waited for: 60 to 170 ms are usual, for 16 at once on one machine.
nats-server 2.15 draws the first leader of a replicated consumer from all servers, one that has just died included; then
it takes an election of 4 to 9 seconds until there is one. Another consumer is another draw, so the first rounds are
short; the later ones are twice as long each time, for servers that are slow."""

FOREIGN_ROUNDS: Final = 5
"""How often the server may say that the filter is taken while no other consumer of ours is to be seen. A rival that
deletes and creates in between explains one; more than that is a consumer that is not the bus's."""


class Ownership:
    """The conversation about one partition.

    Args:
        party: Who claims.
        domain: Of the partition.
        partition: Which.
    """

    def __init__(self, party: Party, domain: Domain, partition: int) -> None:
        self.party = party
        self.domain = domain
        self.partition = partition

    def claim(self, may_claim: MayClaim, above: int = 0) -> Steps[Claimed]:
        """Take the partition over, or take it if nobody owns it.

        Args:
            may_claim: Asked about the record that is there.
            above: An epoch that is known to have been given; the claim's will be higher.

        Raises:
            StaleError: Somebody else was faster, or may not be robbed.
            JetStreamRefusedError: The server will not have it; `code` says why.
        """
        seen = yield from self.read(above)
        if seen.record is not None and not may_claim(seen.record):
            raise StaleError(f"partition {self.partition} is owned by {seen.record.node}")
        return (yield from self._claim_from(seen, above, 0))

    def reclaim(self, above: int = 0, floor: int = 0) -> Steps[Claimed]:
        """Start a new epoch of the partition, which this party owns, unless somebody else does by now.

        Args:
            above: An epoch that is known to have been given.
            floor: Event log: everything up to this sequence is done.

        Raises:
            StaleError: Somebody else has claimed it.
            JetStreamRefusedError: The server will not have it.
        """
        seen = yield from self.read(above)
        # Without a record (lost, deleted, overwritten with something else) whoever writes first goes on.
        if seen.record is not None and not self._is_mine(seen.record):
            raise StaleError(f"partition {self.partition} is owned by {seen.record.node}")
        return (yield from self._claim_from(seen, above, floor))

    def amend(
        self, claimed: Claimed, held: Held, *, mark: Mark | None = None, floor: int = 0, is_released: bool = False
    ) -> Steps[Held]:
        """Change something in one's own record.

        Args:
            claimed: The present epoch.
            held: The record as it was last written.
            mark: The frame that is about to be run, if it is to be known.
            floor: Event log: everything up to this sequence is done.
            is_released: From here on anybody may claim.

        Raises:
            StaleError: Somebody else has claimed it.
            JetStreamRefusedError: The server will not have it.
        """
        record = msgspec.structs.replace(
            claimed.record,
            nonce=self.party.nonce(),
            state="released" if is_released else "owned",
            last=claimed.consumer,
            epoch=claimed.epoch,
            floor=max(claimed.record.floor, floor),
            mark=mark,
        )
        return Held(record, (yield from self.write(record, held.revision)))

    def read(self, above: int = 0) -> Steps[Held]:
        """Read the record; a bucket that is gone is made again, with revisions above every epoch given so far."""
        while True:
            outcome = yield from known(Read())
            if isinstance(outcome, Done):
                held: Held = outcome.value
                return held
            if outcome.code != ApiError.STREAM_NOT_FOUND:
                raise JetStreamRefusedError(outcome.code, outcome.text)
            given = (yield from self._consumers()).highest_epoch
            outcome = yield from known(CreateBucket(max(self.party.first_sequence(), given + 1, above + 1)))
            # Another node was faster: its bucket is as good. Should its revisions be too low, a claim asks for more.
            if isinstance(outcome, Refused) and outcome.code != ApiError.STREAM_NAME_IN_USE:
                raise JetStreamRefusedError(outcome.code, outcome.text)

    def write(self, record: OwnerRecord, last: int) -> Steps[int]:
        """Compare-and-set with a known outcome; return the new revision.

        Raises:
            StaleError: The record is another's by now.
            JetStreamRefusedError: The server will not have it.
        """
        while True:
            outcome = yield Write(record, last)
            if isinstance(outcome, Done):
                revision: int = outcome.value
                return revision
            if isinstance(outcome, Refused) and outcome.code != ApiError.WRONG_LAST_SEQUENCE:
                raise JetStreamRefusedError(outcome.code, outcome.text)
            # Refused, perhaps because of one's own earlier try; or unknown. The nonce tells.
            now = yield from self.read(record.epoch)
            if now.record is not None and now.record.nonce == record.nonce:
                return now.revision
            if now.revision == 0:
                last = 0  # the bucket was lost: who writes first goes on
            elif now.revision != last:
                owner = now.record.node if now.record is not None else "nobody"
                raise StaleError(f"partition {self.partition}: revision {last} became {now.revision}, by {owner}")

    # -- the steps of a claim ----------------------------------------------------------------------------------

    def _claim_from(self, seen: Held, above: int, floor: int) -> Steps[Claimed]:
        continues = seen.record is not None and self._is_mine(seen.record)
        killer = seen.record.mark if seen.record is not None and not continues else None
        barren: set[str] = set()  # consumers of this claim that have no leader: nobody has pulled from them
        while True:
            older: Mapping[str, int] = {}
            start = 1
            if self.domain.is_log:
                older = (yield from self._consumers()).of(self.partition)
                start = yield from self._position(seen, [name for name in older if name not in barren], floor)
                above = max(above, *older.values(), 0)
            first = yield from done(FindFirst(start))
            record = self._next_record(seen, start, first, above)
            held = Held(record, (yield from self.write(record, seen.revision)))
            create = CreateConsumer(self._name(held), start, _patience(len(barren)))
            if self.domain.is_log:
                again = yield from self._install_on_log(create, older, seen, held)
            else:
                again = yield from self._install_on_queue(create, seen, held)
            if not again:
                break
            barren.add(create.consumer)
            seen, above = held, again
        consumer = create.consumer
        yield from done(Pull(consumer, killer))
        yield from self._confirm(held, consumer)
        return Claimed(held, consumer, continues)

    def _install_on_queue(self, create: CreateConsumer, seen: Held, held: Held) -> Steps[int]:
        """Make mine the only consumer; return 0, or the epoch of a consumer above which the claim must be repeated.

        It is one's own if it has no leader.

        A work queue takes no second consumer on a filter, so the old one goes first.
        """
        old = consumer_of(self.domain.service, self.partition, seen)
        doomed = [old] if old is not None else []
        refusal = Refused(ApiError.CONSUMER_FILTER_NOT_UNIQUE)
        for _ in range(FOREIGN_ROUNDS):
            for name in doomed:
                yield from done(DeleteConsumer(name))
            outcome = yield from known(create)
            if isinstance(outcome, Done):
                return held.epoch if outcome.value is False else 0
            refusal = outcome
            if outcome.code != ApiError.CONSUMER_FILTER_NOT_UNIQUE:
                raise JetStreamRefusedError(outcome.code, outcome.text)
            others = (yield from self._consumers()).of(self.partition)
            doomed = [name for name, epoch in others.items() if epoch < held.epoch]
            if doomed:
                continue
            # A higher epoch, or mine by another claim. If the record is still mine, they are relics of a bucket that
            # was lost; otherwise they are my successor's.
            if not (yield from self._is_last_word(held)):
                raise StaleError(f"partition {self.partition}: epoch {held.epoch} was overtaken, by {sorted(others)}")
            if others:
                return max(others.values())
        subject = self.domain.filters(self.partition)[0]
        text = f"{refusal.text}; delete the consumer on {subject} that is not the bus's"
        raise JetStreamRefusedError(refusal.code, text)

    def _install_on_log(self, create: CreateConsumer, older: Mapping[str, int], seen: Held, held: Held) -> Steps[int]:
        """Make mine the only consumer; return as `_install_on_queue` does.

        A log keeps no two apart, and the old one has the position: it goes last. That of the claim before this one may
        have been made after the others were listed.
        """
        if (yield from done(create)) is False:
            return held.epoch
        last = consumer_of(self.domain.service, self.partition, seen)
        doomed = [*older] if last is None or last in older else [*older, last]
        for name in doomed:
            yield from done(DeleteConsumer(name))
        return 0

    def _position(self, seen: Held, older: Iterable[str], floor: int) -> Steps[int]:
        """Return where to go on in the log.

        Consumers know best: a server that lost its last writes has lost the same in the stream. If somebody has deleted
        them, what is known here and what the record says is older and lasts longer. Where nothing says anything the
        service begins.
        """
        starts: list[int] = []
        for name in older:
            start: int = yield from done(ReadPosition(name))
            if start:  # it was not deleted meanwhile
                starts.append(start)
        if not starts and seen.record is not None:
            starts.append(max(seen.record.floor, floor) + 1)
        if not starts and floor:
            starts.append(floor + 1)
        return max(starts, default=self.domain.start)

    def _confirm(self, held: Held, mine: str) -> Steps[None]:
        """Look once more before the first record is begun: is the claim still the last word?"""
        if not (yield from self._is_last_word(held)):
            yield from done(DeleteConsumer(mine))
            raise StaleError(f"partition {self.partition}: epoch {held.epoch} was overtaken before it began")

    def _is_last_word(self, held: Held) -> Steps[bool]:
        now = yield from self.read(held.epoch)
        return now.record is not None and held.record is not None and now.record.nonce == held.record.nonce

    def _consumers(self) -> Steps[Consumers]:
        return Consumers(self.domain.service, (yield from done(ListConsumers())))

    # -- what is written ---------------------------------------------------------------------------------------

    def _is_mine(self, record: OwnerRecord) -> bool:
        return record.is_by(self.party.node, self.party.incarnation)

    def _name(self, held: Held) -> str:
        name = consumer_of(self.domain.service, self.partition, held)
        assert name is not None, "a record that was written stands for a consumer"
        return name

    def _next_record(self, seen: Held, start: int, first: int, above: int) -> OwnerRecord:
        return OwnerRecord(
            node=self.party.node,
            incarnation=self.party.incarnation,
            nonce=self.party.nonce(),
            epoch=max(seen.epoch, above) + 1,
            floor=start - 1,
            deaths=self._deaths(seen, first),
            first=first,
            mark=seen.record.mark if seen.record is not None else None,
        )

    def _deaths(self, seen: Held, first: int) -> int:
        """Return how many owners in a row were lost with the same record first in the queue."""
        record = seen.record
        if record is None or record.state == "released" or not first or record.first != first:
            return 0
        return record.deaths if self._is_mine(record) else record.deaths + 1


def _patience(rounds: int) -> float:
    """Return how long to wait for the leader of a consumer, after so many that had none."""
    return min(FIRST_PATIENCE * 2.0 ** max(0, rounds - HASTY_ROUNDS + 1), LAST_PATIENCE)


def known(operation: Operation) -> Steps[Done | Refused]:
    """Repeat an operation, which must be idempotent, while its outcome is unknown."""
    while isinstance(outcome := (yield operation), Unknown):
        pass
    return outcome


def done(operation: Operation) -> Steps[Any]:
    """Do an idempotent operation that nobody should refuse; return its value."""
    outcome = yield from known(operation)
    if isinstance(outcome, Refused):
        raise JetStreamRefusedError(outcome.code, outcome.text)
    return outcome.value
