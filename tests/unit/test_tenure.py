"""One partition in the hands of one node: what follows from each thing that happens."""

from typing import Any

import pytest

from catga_bus.partition.protocol import Claimed
from catga_bus.partition.records import MAX_EPOCH, Held, Mark, OwnerRecord, Standing
from catga_bus.partition.tenure import NEWBORN, Do, Tenure
from catga_bus.transport.jetstream import DeliveredMessage

WINDOW = 4


def claimed(epoch: int, *, continues: bool = False, nonce: str = "", **fields: Any) -> Claimed:
    record = OwnerRecord(node="a", incarnation=(1, 1), nonce=nonce or f"a-{epoch}", epoch=epoch, **fields)
    return Claimed(Held(record, epoch), f"shop-p0-e{epoch}-00000000", continues)


class Deliveries:
    """A consumer that delivers to a tenure."""

    def __init__(self, tenure: Tenure, epoch: int = 7) -> None:
        self.tenure = tenure
        self.count = 0
        self.epoch = epoch

    def __call__(self, sequence: int, *, skip: int = 0, time: float | None = None) -> Do:
        self.count += 1 + skip
        reply = f"e{self.epoch}.{sequence}.{self.count}"
        when = float(sequence) if time is None else time
        return self.tenure.delivered(DeliveredMessage("s", b"", None, reply, sequence, self.count, 1, 0, when))


def active(epoch: int = 7, **fields: Any) -> tuple[Tenure, Deliveries]:
    tenure = Tenure(WINDOW)
    tenure.pulling(None)
    assert tenure.granted(claimed(epoch, **fields)) is Do.RESUME
    return tenure, Deliveries(tenure, epoch)


def again(tenure: Tenure, epoch: int, *, continues: bool = True) -> tuple[Do, Deliveries]:
    """A new epoch of one's own."""
    tenure.pulling(None)
    return tenure.granted(claimed(epoch, continues=continues)), Deliveries(tenure, epoch)


# -- claims ------------------------------------------------------------------------------------------------------------


def test_nothing_starts_before_the_claim_is_confirmed() -> None:
    tenure = Tenure(WINDOW)
    tenure.pulling(None)
    deliver = Deliveries(tenure)
    assert (tenure.standing, tenure.epoch, tenure.may_start) == (Standing.CLAIMING, 0, False)
    assert deliver(1) is Do.TAKE  # what comes early waits in the work
    assert tenure.granted(claimed(7)) is Do.RESUME
    assert (tenure.standing, tenure.epoch, tenure.fence, tenure.may_start) == (Standing.ACTIVE, 7, 7, True)


def test_a_doubt_that_arises_while_claiming_is_followed_when_it_is_granted() -> None:
    tenure = Tenure(WINDOW)
    tenure.pulling(None)
    deliver = Deliveries(tenure)
    assert deliver(1) is Do.TAKE
    assert deliver(3, skip=1) is Do.NOTHING
    assert deliver(4) is Do.NOTHING  # whatever comes behind a gap
    assert tenure.granted(claimed(7)) is Do.RECLAIM
    assert tenure.reason == "deliveries were lost"


def test_a_higher_epoch_that_was_heard_while_claiming_is_followed_too() -> None:
    tenure = Tenure(WINDOW)
    assert tenure.heard(9) is Do.NOTHING
    tenure.pulling(None)
    assert tenure.granted(claimed(7)) is Do.RECLAIM
    assert tenure.above == 9


def test_a_claim_that_nobody_wants_any_more_is_dropped() -> None:
    tenure = Tenure(WINDOW)
    tenure.ended("closed")
    assert tenure.granted(claimed(7)) is Do.DROP
    assert tenure.standing is Standing.GONE


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_gap_in_the_deliveries_is_a_doubt() -> None:
    tenure, deliver = active()
    assert [deliver(1), deliver(2)] == [Do.TAKE, Do.TAKE]
    assert deliver(9, skip=1) is Do.RECLAIM
    assert (tenure.standing, tenure.may_start) == (Standing.DOUBT, False)
    assert deliver(10) is Do.NOTHING


def test_what_is_delivered_again_is_kept_or_acknowledged_and_never_taken_twice() -> None:
    tenure, deliver = active()
    assert [deliver(1), deliver(2)] == [Do.TAKE, Do.TAKE]
    assert tenure.finished(1) == "e7.1.1"
    assert [deliver(1), deliver(2)] == [Do.ACKNOWLEDGE, Do.KEEP]
    assert tenure.finished(2) == "e7.2.4"  # the last delivery is the one to acknowledge
    assert tenure.finished(2) == ""


def test_in_a_new_epoch_what_is_in_hand_is_recognised_and_what_is_done_acknowledged() -> None:
    tenure, deliver = active()
    for sequence in (1, 2, 3):
        deliver(sequence)
    tenure.finished(2)
    assert tenure.doubt("told") is Do.RECLAIM
    assert tenure.finished(3) == "e7.3.3"  # it had been begun
    result, deliver = again(tenure, 8)
    assert result is Do.RESUME
    assert tenure.returning == 1
    assert [deliver(1), deliver(2), deliver(3), deliver(4)] == [Do.KEEP, Do.ACKNOWLEDGE, Do.ACKNOWLEDGE, Do.TAKE]
    assert tenure.returning == 0
    assert tenure.finished(1) == "e8.1.1"


def test_a_sequence_that_was_given_again_to_another_record_ends_the_tenure() -> None:
    tenure, deliver = active()
    deliver(5)
    assert deliver(5, time=99.0) is Do.DROP
    assert tenure.standing is Standing.GONE


def test_a_record_that_was_stored_after_a_done_one_of_its_sequence_is_another() -> None:
    tenure, deliver = active()
    deliver(5)
    tenure.finished(5)
    assert deliver(5, time=99.0) is Do.TAKE


def test_the_floor_is_below_what_is_in_hand_and_without_that_the_last_that_came() -> None:
    tenure, deliver = active()
    assert tenure.floor == 0
    for sequence in (3, 4, 6):
        deliver(sequence)
    assert tenure.floor == 2
    tenure.finished(3)
    assert tenure.floor == 3
    for sequence in (4, 6):
        tenure.finished(sequence)
    assert tenure.floor == 6


def test_what_a_tenure_that_is_over_has_in_hand_is_never_acknowledged() -> None:
    tenure, deliver = active()
    deliver(1)
    assert tenure.ended("another's") is Do.DROP
    assert tenure.finished(1) == ""
    assert deliver(2) is Do.NOTHING


# -- acknowledgements --------------------------------------------------------------------------------------------------


def test_before_a_release_the_last_acknowledgement_is_confirmed() -> None:
    tenure, deliver = active()
    assert tenure.unconfirmed() == []
    for sequence in (1, 2):
        deliver(sequence)
        tenure.finished(sequence)
    assert tenure.unconfirmed() == ["e7.2.2"]


def test_after_a_reconnect_as_many_are_sent_again_as_can_have_been_lost() -> None:
    tenure, deliver = active()
    for sequence in range(1, 7):
        deliver(sequence)
        tenure.finished(sequence)
    assert tenure.hand_over() is Do.FINISH
    assert tenure.reconnected() is Do.NOTHING  # it drains already
    assert tenure.unconfirmed() == [f"e7.{sequence}.{sequence}" for sequence in range(3, 7)]
    assert tenure.unconfirmed() == ["e7.6.6"]


def test_a_new_epoch_owes_the_old_one_no_acknowledgement() -> None:
    tenure, deliver = active()
    deliver(1)
    tenure.finished(1)
    assert tenure.reconnected() is Do.RECLAIM
    again(tenure, 8)
    assert tenure.unconfirmed() == []


# -- doubt -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [100, 404, 408])
def test_that_nothing_is_there_is_no_doubt(code: int) -> None:
    tenure, _ = active()
    assert tenure.status(code, "", 0.0) is Do.NOTHING
    assert tenure.standing is Standing.ACTIVE


def test_that_nobody_is_there_is_no_doubt_while_the_consumer_is_new() -> None:
    tenure, _ = active()
    assert tenure.status(503, "", NEWBORN / 2) is Do.PULL
    assert tenure.status(503, "", NEWBORN) is Do.RECLAIM


def test_everything_else_that_the_server_says_is() -> None:
    tenure, _ = active()
    assert tenure.status(409, "Consumer Deleted", 0.0) is Do.RECLAIM
    assert tenure.reason == "status 409: Consumer Deleted"


def test_a_doubt_within_a_doubt_is_followed_after_it_unless_it_is_older_than_the_new_pull() -> None:
    tenure, _ = active()
    assert tenure.doubt("first") is Do.RECLAIM
    assert tenure.doubt("second") is Do.NOTHING
    result, _ = again(tenure, 8)
    assert result is Do.RESUME
    tenure.doubt("third")
    tenure.pulling(None)
    tenure.doubt("fourth")
    assert tenure.granted(claimed(9, continues=True)) is Do.RECLAIM
    assert tenure.reason == "fourth"


def test_only_a_higher_epoch_is_of_interest() -> None:
    tenure, _ = active(7)
    assert [tenure.heard(epoch) for epoch in (3, 7, MAX_EPOCH + 1)] == [Do.NOTHING] * 3
    assert tenure.heard(8) is Do.RECLAIM
    assert tenure.heard(8) is Do.NOTHING
    assert tenure.above == 8


def test_a_refused_effect_is_a_doubt_and_the_next_epoch_is_a_fence_of_its_own() -> None:
    tenure, _ = active(7)
    assert tenure.fenced(12) is Do.RECLAIM
    assert tenure.above == 12
    assert again(tenure, 13)[0] is Do.RESUME
    assert tenure.fence == 13


def test_effects_carry_the_first_of_the_epochs_that_nobody_else_came_between() -> None:
    tenure, _ = active(7)
    tenure.doubt("told")
    again(tenure, 8)
    assert (tenure.epoch, tenure.fence) == (8, 7)
    tenure.doubt("told")
    again(tenure, 9, continues=False)
    assert (tenure.epoch, tenure.fence) == (9, 9)


def test_a_refused_effect_ends_a_tenure_that_drains() -> None:
    tenure, _ = active()
    tenure.hand_over()
    assert tenure.fenced(0) is Do.DROP


# -- pauses ------------------------------------------------------------------------------------------------------------


def test_after_a_pause_nothing_starts_until_the_record_was_read() -> None:
    tenure, deliver = active()
    assert tenure.suspend() is Do.PAUSE
    assert not tenure.may_start
    assert deliver(1) is Do.TAKE
    assert tenure.reread(claimed(7).held, tenure.pauses) is Do.RESUME
    assert tenure.may_start


def test_a_record_that_is_anothers_by_then_ends_it() -> None:
    tenure, _ = active()
    tenure.suspend()
    assert tenure.reread(claimed(8, nonce="b").held, tenure.pauses) is Do.DROP


def test_a_record_that_is_gone_is_a_doubt_but_lets_a_hand_over_go_on() -> None:
    tenure, _ = active()
    tenure.suspend()
    assert tenure.reread(Held(None, 0), tenure.pauses) is Do.RECLAIM
    tenure, _ = active()
    tenure.hand_over()
    tenure.suspend()
    assert tenure.reread(Held(None, 0), tenure.pauses) is Do.RESUME


def test_a_claim_that_is_granted_after_a_pause_starts_nothing() -> None:
    tenure = Tenure(WINDOW)
    tenure.pulling(None)
    tenure.suspend()
    assert tenure.granted(claimed(7)) is Do.NOTHING
    assert not tenure.may_start
    assert tenure.reread(claimed(7).held, tenure.pauses) is Do.RESUME


def test_what_was_read_before_a_second_pause_says_nothing_about_it() -> None:
    tenure, _ = active()
    tenure.suspend()
    asked_at = tenure.pauses
    tenure.suspend()  # the answer lay in the socket meanwhile
    assert tenure.reread(claimed(7).held, asked_at) is Do.NOTHING
    assert not tenure.may_start
    assert tenure.reread(claimed(7).held, tenure.pauses) is Do.RESUME


def test_what_is_gone_cannot_be_paused() -> None:
    tenure, _ = active()
    tenure.ended("closed")
    assert tenure.suspend() is Do.NOTHING
    assert tenure.reread(claimed(7).held, tenure.pauses) is Do.NOTHING


# -- deaths and the end ------------------------------------------------------------------------------------------------


def test_an_owner_is_careful_until_as_much_is_done_as_can_have_been_in_hand_at_a_death() -> None:
    tenure, deliver = active(deaths=2)
    assert tenure.is_careful
    for sequence in range(1, WINDOW):
        deliver(sequence)
        tenure.finished(sequence)
    assert tenure.is_careful
    deliver(WINDOW)
    tenure.finished(WINDOW)
    assert not tenure.is_careful


def test_a_new_epoch_does_not_begin_the_count_anew_and_one_without_deaths_ends_it() -> None:
    tenure, deliver = active(deaths=2)
    deliver(1)
    tenure.finished(1)
    tenure.pulling(None)
    tenure.granted(claimed(8, continues=True, deaths=2))
    assert tenure._careful == WINDOW - 1
    tenure.pulling(None)
    tenure.granted(claimed(9, continues=True))
    assert not tenure.is_careful


def test_the_frame_that_kills_is_known_across_epochs() -> None:
    tenure = Tenure(WINDOW)
    tenure.pulling(Mark(5, 2))
    tenure.granted(claimed(7, deaths=3))
    tenure.doubt("told")
    again(tenure, 8)
    assert [tenure.killer(sequence) for sequence in (4, 5)] == [None, 2]


def test_only_an_active_partition_is_handed_over() -> None:
    tenure, _ = active()
    tenure.doubt("told")
    assert tenure.hand_over() is Do.NOTHING
    again(tenure, 8)
    assert tenure.hand_over() is Do.FINISH
    assert (tenure.standing, tenure.may_start) == (Standing.DRAINING, True)
    assert tenure.hand_over() is Do.NOTHING


def test_while_it_drains_nothing_more_is_taken_and_nothing_doubted() -> None:
    tenure, deliver = active()
    deliver(1)
    tenure.hand_over()
    assert deliver(2) is Do.NOTHING
    assert tenure.doubt("told") is Do.NOTHING
    assert tenure.finished(1) == "e7.1.1"
