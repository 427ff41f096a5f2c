"""The conversations that claim, amend and release a partition, with a broker whose answers the test chooses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from catga_bus.partition.protocol import (
    FOREIGN_ROUNDS,
    Claimed,
    CreateBucket,
    CreateConsumer,
    DeleteConsumer,
    Done,
    FindFirst,
    ListConsumers,
    Operation,
    Outcome,
    Ownership,
    Party,
    Pull,
    Read,
    ReadPosition,
    Refused,
    Steps,
    Unknown,
    Write,
)
from catga_bus.partition.records import Domain, Held, Mark, OwnerRecord, StaleError, consumer_of, write_record
from catga_bus.transport.jetstream import ApiError, ConsumerConfig, JetStreamRefusedError
from catga_bus.wire import Names
from tests.ownership.broker import BUCKET, SimulatedBroker, bucket_config, bucket_subject

NAMES = Names("catga")
QUEUE = Domain(names=NAMES, service="shop")
LOG = Domain(names=NAMES, service="shop", types=("Debited",), start=1)
P = 3


def anybody(_: OwnerRecord) -> bool:
    return True


class Desk:
    """A broker, and those who talk to it."""

    def __init__(self, domain: Domain = QUEUE) -> None:
        self.broker = SimulatedBroker(domain)
        self.domain = domain
        self.asked: list[Operation] = []
        self.before: Callable[[Operation], Outcome | None] = lambda _: None

    def party(self, node: str, life: int = 1, first_sequence: int = 500) -> Ownership:
        nonces = itertools.count(1)
        me = Party(node, (1, life), lambda: f"{node}.{life}-{next(nonces)}", lambda: first_sequence)
        return Ownership(me, self.domain, P)

    def drive(self, steps: Steps[Any]) -> Any:
        """Carry it through; `before` may answer instead of the broker."""
        outcome: Any = None
        for _ in range(200):
            try:
                operation = steps.send(outcome)
            except StopIteration as end:
                return end.value
            self.asked.append(operation)
            outcome = self.before(operation)
            if outcome is None:
                outcome = self.broker.perform(0.0, P, operation)
        raise AssertionError(f"it goes round in circles: {self.asked[-10:]}")

    def claim(self, party: Ownership, **options: Any) -> Claimed:
        claimed: Claimed = self.drive(party.claim(anybody, **options))
        return claimed

    def store(self, count: int = 1) -> None:
        """Let records wait in the partition."""
        for _ in range(count):
            self.broker.model.publish(0.0, self.domain.filters(P)[0], b"record")

    @property
    def held(self) -> Held:
        return self.broker.held(0.0, P)

    @property
    def consumers(self) -> list[str]:
        return self.broker.consumers(0.0)

    def lose_bucket(self) -> None:
        self.broker.model.delete_stream(0.0, BUCKET)

    def kinds(self) -> list[str]:
        return [type(operation).__name__ for operation in self.asked]


def once(kind: type, outcome: Outcome, then: Callable[[], object] = lambda: None) -> Callable[[Operation], Any]:
    """Answer the first operation of a kind instead of the broker."""
    left = [outcome]

    def before(operation: Operation) -> Outcome | None:
        if isinstance(operation, kind) and left:
            then()
            return left.pop()
        return None

    return before


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_claim_on_a_queue_asks_for_these_things_in_this_order() -> None:
    desk = Desk()
    claimed = desk.claim(desk.party("a"))
    assert desk.kinds() == ["Read", "FindFirst", "Write", "CreateConsumer", "Pull", "Read"]
    assert (claimed.epoch, claimed.consumer, claimed.continues) == (100, desk.consumers[0], False)
    assert desk.held == claimed.held


def test_a_claim_on_a_log_lists_and_asks_for_positions_before_it_writes_and_deletes_last() -> None:
    desk = Desk(LOG)
    old = desk.claim(desk.party("a"))
    desk.asked.clear()
    new = desk.claim(desk.party("b"))
    assert desk.kinds() == [
        "Read", "ListConsumers", "ReadPosition", "FindFirst", "Write", "CreateConsumer", "DeleteConsumer", "Pull",
        "Read",
    ]  # fmt: skip
    assert old.consumer != new.consumer
    assert desk.consumers == [new.consumer]


def test_a_claim_deletes_the_consumer_of_the_owner_before_and_has_a_higher_epoch() -> None:
    desk = Desk()
    old, new = desk.claim(desk.party("a")), desk.claim(desk.party("b"))
    assert new.epoch > old.epoch
    assert DeleteConsumer(old.consumer) in desk.asked
    assert desk.consumers == [new.consumer]


def test_whom_the_record_names_may_be_spared() -> None:
    desk = Desk()
    desk.claim(desk.party("a"))
    written = desk.held
    with pytest.raises(StaleError, match="owned by a"):
        desk.drive(desk.party("b").claim(lambda record: record.node != "a"))
    assert desk.held == written


def test_a_claim_that_is_known_to_be_surpassed_asks_for_more() -> None:
    desk = Desk()
    assert desk.claim(desk.party("a"), above=2_000).epoch == 2_001
    assert desk.claim(desk.party("b")).epoch == 2_002


def test_what_cannot_be_read_as_a_record_is_nobodys() -> None:
    desk = Desk()
    desk.broker.model.publish(0.0, bucket_subject(QUEUE, P), b"something else")
    assert desk.claim(desk.party("a")).epoch == 101


def test_a_write_whose_answer_was_lost_is_found_by_its_nonce() -> None:
    desk = Desk()

    def before(operation: Operation) -> Outcome | None:
        if isinstance(operation, Write) and not desk.held.revision:
            desk.broker.perform(0.0, P, operation)
            return Unknown()
        return None

    desk.before = before
    claimed = desk.claim(desk.party("a"))
    assert (claimed.epoch, desk.kinds().count("Write")) == (100, 1)


def test_a_write_that_was_lost_on_its_way_is_written_again() -> None:
    desk = Desk()
    desk.before = once(Write, Unknown())
    assert desk.claim(desk.party("a")).epoch == 100
    assert desk.kinds().count("Write") == 2


def test_who_was_slower_writes_nothing_and_makes_no_consumer() -> None:
    desk = Desk()
    slow = desk.party("slow").claim(anybody)
    outcome = desk.broker.perform(0.0, P, next(slow))
    winner = desk.claim(desk.party("fast"))
    with pytest.raises(StaleError, match="by fast"):
        _finish(desk, slow, outcome)
    assert desk.consumers == [winner.consumer]
    assert desk.held == winner.held


def test_who_was_overtaken_before_it_began_deletes_its_own_consumer() -> None:
    desk = Desk()
    loser, winner = desk.party("loser"), desk.party("winner")
    granted: list[Claimed] = []

    def before(operation: Operation) -> Outcome | None:
        if isinstance(operation, Pull) and not granted:
            desk.before = lambda _: None
            granted.append(desk.claim(winner))
        return None

    desk.before = before
    with pytest.raises(StaleError, match="before it began"):
        desk.claim(loser)
    assert desk.consumers == [granted[0].consumer]


def test_a_consumer_of_a_lower_epoch_that_nobody_speaks_of_is_deleted() -> None:
    desk = Desk()
    relic = "shop-p3-e7-00000000"
    desk.broker.perform(0.0, P, CreateConsumer(relic, 1))
    claimed = desk.claim(desk.party("a"))
    assert desk.consumers == [claimed.consumer]


def test_a_consumer_of_a_higher_epoch_is_a_relic_if_the_record_is_still_mine() -> None:
    desk = Desk()
    desk.broker.perform(0.0, P, CreateConsumer("shop-p3-e900-00000000", 1))
    claimed = desk.claim(desk.party("a"))
    assert claimed.epoch == 901
    assert desk.consumers == [claimed.consumer]


def test_a_consumer_that_is_not_the_buss_is_named_and_left_alone() -> None:
    desk = Desk()
    model = desk.broker.model
    model.create_consumer(0.0, QUEUE.stream, ConsumerConfig(name="somebody", filters=QUEUE.filters(P)))
    with pytest.raises(JetStreamRefusedError, match="is not the bus's") as caught:
        desk.claim(desk.party("a"))
    assert caught.value.code == ApiError.CONSUMER_FILTER_NOT_UNIQUE
    assert desk.consumers == ["somebody"]
    assert desk.kinds().count("CreateConsumer") == FOREIGN_ROUNDS


@pytest.mark.parametrize("kind", [Read, FindFirst, Write, CreateConsumer, DeleteConsumer, Pull])
def test_what_the_server_refuses_for_good_ends_the_claim(kind: type) -> None:
    desk = Desk()
    desk.claim(desk.party("a"))
    desk.before = once(kind, Refused(10_039, "not for you"))
    with pytest.raises(JetStreamRefusedError, match="not for you"):
        desk.claim(desk.party("b"))


@pytest.mark.parametrize("kind", [ListConsumers, ReadPosition])
def test_on_a_log_as_well(kind: type) -> None:
    desk = Desk(LOG)
    desk.claim(desk.party("a"))
    desk.before = once(kind, Refused(10_039, "not for you"))
    with pytest.raises(JetStreamRefusedError, match="not for you"):
        desk.claim(desk.party("b"))


@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
@pytest.mark.parametrize("does_it", [False, True])
def test_every_step_may_be_of_unknown_outcome_whether_it_was_done_or_not(domain: Domain, does_it: bool) -> None:
    desk = Desk(domain)
    desk.claim(desk.party("a"))
    desk.store(2)
    asked: list[Operation] = []

    def before(operation: Operation) -> Outcome | None:
        if operation in asked:
            return None
        asked.append(operation)
        if does_it:
            desk.broker.perform(0.0, P, operation)
        return Unknown()

    desk.before = before
    claimed = desk.claim(desk.party("b"))
    assert desk.held == claimed.held
    assert desk.consumers == [claimed.consumer]


@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
def test_a_consumer_without_a_leader_is_replaced_under_a_new_epoch(domain: Domain) -> None:
    desk = Desk(domain)
    desk.store(2)
    former = desk.claim(desk.party("a"))
    late: list[CreateConsumer] = []

    def before(operation: Operation) -> Outcome | None:
        if not isinstance(operation, CreateConsumer) or len(late) >= 5:
            return None
        late.append(operation)
        desk.broker.perform(0.0, P, operation)
        return Done(False)

    desk.before = before
    claimed = desk.claim(desk.party("b"))
    assert [create.patience for create in late] == [1.0, 1.0, 1.0, 2.0, 4.0]
    assert len({claimed.consumer, *(create.consumer for create in late)}) == 6, "a delayed delete meets another name"
    assert claimed.epoch > former.epoch + 5
    assert desk.held == claimed.held
    assert desk.consumers == [claimed.consumer]
    assert claimed.record.deaths == 1, "it counts as one claim"
    asked = {operation.consumer for operation in desk.asked if isinstance(operation, ReadPosition)}
    assert asked.isdisjoint(create.consumer for create in late), "whoever has no leader does not answer"


# -- the log -----------------------------------------------------------------------------------------------------------


def acknowledge(desk: Desk, consumer: str, count: int) -> None:
    """Have records delivered and acknowledged."""
    desk.broker.model.pull(0.0, desk.domain.stream, consumer, "me", count)
    for sent in desk.broker.model.run(0.0):
        desk.broker.model.acknowledge(0.0, sent.content.reply)  # type: ignore[union-attr]


def start_of(desk: Desk, claimed: Claimed) -> int:
    info = desk.broker.model.consumer(0.0, desk.domain.stream, claimed.consumer)
    assert info is not None
    return info.config.start_sequence


def test_a_claim_on_a_log_goes_on_behind_what_is_acknowledged() -> None:
    desk = Desk(LOG)
    desk.store(5)
    old = desk.claim(desk.party("a"))
    assert start_of(desk, old) == 1
    acknowledge(desk, old.consumer, 3)
    new = desk.claim(desk.party("b"))
    assert start_of(desk, new) == 4
    assert (new.record.floor, new.record.first) == (3, 4)


def test_without_a_consumer_the_record_knows_where_to_go_on() -> None:
    desk = Desk(LOG)
    desk.store(5)
    old = desk.claim(party := desk.party("a"))
    desk.drive(party.amend(old, old.held, floor=2, is_released=True))
    desk.broker.model.delete_consumer(0.0, LOG.stream, old.consumer)
    assert start_of(desk, desk.claim(desk.party("b"))) == 3


def test_without_anything_the_owner_itself_knows() -> None:
    desk = Desk(LOG)
    desk.store(5)
    old = desk.claim(party := desk.party("a"))
    desk.broker.model.delete_consumer(0.0, LOG.stream, old.consumer)
    desk.lose_bucket()
    assert start_of(desk, desk.drive(party.reclaim(old.epoch, floor=4))) == 5


def test_a_service_without_a_position_begins_where_it_is_told() -> None:
    desk = Desk(Domain(names=NAMES, service="shop", types=("Debited",), start=3))
    desk.store(5)
    claimed = desk.claim(desk.party("a"))
    assert (start_of(desk, claimed), claimed.record.floor) == (3, 2)


def test_a_consumer_that_was_made_after_the_others_were_listed_is_deleted_too() -> None:
    desk = Desk(LOG)
    first, second = desk.party("first").claim(anybody), desk.party("second").claim(anybody)

    def step(steps: Steps[Any], outcome: Any) -> tuple[Operation, Any]:
        operation = steps.send(outcome)
        return operation, desk.broker.perform(0.0, P, operation)

    outcome: Any = None
    operation: Any = None
    while not isinstance(operation, Write):
        operation, outcome = step(first, outcome)  # it has claimed, and made no consumer yet
    listed: Any = None
    operation = None
    while not isinstance(operation, ListConsumers):
        operation, listed = step(second, listed)
    old: Claimed = _finish(desk, first, outcome)
    new: Claimed = _finish(desk, second, listed)
    assert old.epoch < new.epoch
    assert desk.consumers == [new.consumer]


def _finish(desk: Desk, steps: Steps[Any], outcome: Any) -> Any:
    try:
        while True:
            outcome = desk.broker.perform(0.0, P, steps.send(outcome))
    except StopIteration as end:
        return end.value


# -- a bucket that is lost ---------------------------------------------------------------------------------------------


def test_a_bucket_that_was_lost_is_made_again_above_every_epoch() -> None:
    desk = Desk()
    old = desk.claim(desk.party("a"), above=5_000)
    desk.lose_bucket()
    new = desk.claim(desk.party("b", first_sequence=1))
    assert new.epoch > old.epoch
    assert CreateBucket(old.epoch + 1) in desk.asked
    assert desk.consumers == [new.consumer]


def test_the_clock_is_above_every_epoch_as_well() -> None:
    desk = Desk()
    desk.lose_bucket()
    assert desk.claim(desk.party("a", first_sequence=777)).epoch == 777


def test_a_bucket_that_somebody_else_has_made_meanwhile_is_as_good() -> None:
    desk = Desk()
    desk.lose_bucket()
    desk.before = once(
        CreateBucket,
        Refused(ApiError.STREAM_NAME_IN_USE, "in use"),
        lambda: desk.broker.model.create_stream(0.0, bucket_config(9)),
    )
    assert desk.claim(desk.party("a")).epoch == 9


def test_a_bucket_that_cannot_be_made_ends_the_claim() -> None:
    desk = Desk()
    desk.lose_bucket()
    desk.before = once(CreateBucket, Refused(10_023, "no room"))
    with pytest.raises(JetStreamRefusedError, match="no room"):
        desk.claim(desk.party("a"))


def test_an_owner_whose_bucket_was_lost_goes_on_as_the_first_who_writes() -> None:
    desk = Desk()
    old = desk.claim(party := desk.party("a"))
    desk.lose_bucket()
    new: Claimed = desk.drive(party.reclaim(old.epoch))
    assert new.epoch > old.epoch
    assert desk.consumers == [new.consumer]


# -- amendments --------------------------------------------------------------------------------------------------------


def test_an_amendment_keeps_the_epoch_and_has_a_nonce_of_its_own() -> None:
    desk = Desk()
    claimed = desk.claim(party := desk.party("a"))
    held: Held = desk.drive(party.amend(claimed, claimed.held, mark=Mark(5, 1)))
    assert held == desk.held
    assert held.record is not None
    assert (held.record.mark, held.record.epoch, held.record.last) == (Mark(5, 1), claimed.epoch, claimed.consumer)
    assert held.record.nonce != claimed.record.nonce
    assert held.epoch == claimed.epoch


def test_an_amendment_is_made_by_the_owner_alone() -> None:
    desk = Desk()
    claimed = desk.claim(party := desk.party("a"))
    desk.claim(desk.party("b"))
    written = desk.held
    for is_released in (False, True):
        with pytest.raises(StaleError, match="by b"):
            desk.drive(party.amend(claimed, claimed.held, is_released=is_released))
    assert desk.held == written


def test_an_amendment_whose_answer_was_lost_is_found_by_its_nonce() -> None:
    desk = Desk()
    claimed = desk.claim(party := desk.party("a"))

    def before(operation: Operation) -> Outcome | None:
        desk.before = lambda _: None
        desk.broker.perform(0.0, P, operation)
        return Unknown()

    desk.before = before
    assert desk.drive(party.amend(claimed, claimed.held, is_released=True)) == desk.held


def test_a_record_that_was_deleted_by_hand_is_nobodys() -> None:
    desk = Desk()
    claimed = desk.claim(party := desk.party("a"))
    desk.broker.model.publish(0.0, bucket_subject(QUEUE, P), b"")
    with pytest.raises(StaleError, match="by nobody"):
        desk.drive(party.amend(claimed, claimed.held))
    assert desk.drive(party.reclaim(claimed.epoch)).epoch > claimed.epoch


def test_after_a_release_the_next_claim_deletes_the_consumer_that_the_record_names() -> None:
    desk = Desk()
    old = desk.claim(party := desk.party("a"))
    desk.drive(party.amend(old, old.held, is_released=True))
    new = desk.claim(desk.party("b"))
    assert new.epoch > old.epoch + 1  # above the revision of the release
    assert desk.consumers == [new.consumer]


def test_who_owns_it_is_not_robbed_by_its_own_doubt() -> None:
    desk = Desk()
    old = desk.claim(party := desk.party("a"))
    again: Claimed = desk.drive(party.reclaim(old.epoch))
    assert again.continues
    desk.claim(desk.party("b"))
    with pytest.raises(StaleError, match="owned by b"):
        desk.drive(party.reclaim(again.epoch))


def test_a_former_life_of_a_node_is_somebody_else() -> None:
    desk = Desk()
    desk.claim(desk.party("a", life=1))
    with pytest.raises(StaleError):
        desk.drive(desk.party("a", life=2).reclaim())
    assert not desk.claim(desk.party("a", life=2)).continues


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_deaths_at_the_same_record_are_counted_and_from_two_an_owner_is_careful() -> None:
    desk = Desk()
    desk.store()
    claims = [desk.claim(desk.party(f"n{number}")) for number in range(4)]
    assert [claimed.record.deaths for claimed in claims] == [0, 1, 2, 3]
    assert [claimed.is_careful for claimed in claims] == [False, False, True, True]
    assert {claimed.record.first for claimed in claims} == {1}


def test_deaths_are_forgotten_when_something_was_done() -> None:
    desk = Desk()
    desk.store(2)
    for number in range(3):
        last = desk.claim(desk.party(f"n{number}"))
    acknowledge(desk, last.consumer, 1)
    assert desk.claim(desk.party("next")).record.deaths == 0


def test_without_a_record_that_waits_nobody_dies_of_one() -> None:
    desk = Desk()
    claims = [desk.claim(desk.party(f"n{number}")) for number in range(4)]
    assert {claimed.record.deaths for claimed in claims} == {0}


def test_a_hand_over_is_no_death_and_neither_is_an_epoch_of_ones_own() -> None:
    desk = Desk()
    desk.store()
    desk.claim(desk.party("a"))
    second = desk.claim(party := desk.party("b"))
    again: Claimed = desk.drive(party.reclaim(second.epoch))
    assert (second.record.deaths, again.record.deaths) == (1, 1)
    desk.drive(party.amend(again, again.held, is_released=True))
    assert desk.claim(desk.party("c")).record.deaths == 0


def test_a_mark_is_passed_on_until_somebody_amends_it_and_given_to_whoever_takes_over() -> None:
    desk = Desk()
    desk.store()
    old = desk.claim(party := desk.party("a"))
    desk.drive(party.amend(old, old.held, mark=Mark(1, 4)))
    again: Claimed = desk.drive(party.reclaim(old.epoch))
    assert (again.record.mark, desk.asked[-2]) == (Mark(1, 4), Pull(again.consumer, None))
    for node in ("b", "c"):
        claimed = desk.claim(desk.party(node))
        assert (claimed.record.mark, desk.asked[-2]) == (Mark(1, 4), Pull(claimed.consumer, Mark(1, 4)))


def test_the_consumer_of_a_claim_follows_from_its_record() -> None:
    desk = Desk()
    claimed = desk.claim(desk.party("a"))
    assert consumer_of("shop", P, desk.held) == claimed.consumer
    assert write_record(claimed.record)
