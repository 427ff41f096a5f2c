"""The detector, one rule at a time, by hand-made instants."""

from typing import Any

import pytest

from catga_bus.cluster import allowance, newcomers
from catga_bus.cluster import detector as rules
from catga_bus.cluster.detector import Detector, Probe, Step
from catga_bus.cluster.proof import RESUME_AFTER, ProvenClock
from catga_bus.cluster.records import NodeInfo, NodeStatus
from tests.cluster_simulation import INTERVAL, TIMEOUT, info

ME = (1, 5)


class Rig:
    """A detector that hears itself, and hands out time."""

    def __init__(self, **limits: int) -> None:
        self.now = 100.0
        self.seqs: dict[str, int] = {}
        self.detector = Detector(self.now, "me", timeout=TIMEOUT, **limits)
        self.detector.announced(ME)
        self.deaf = False
        self.changes: list[tuple[str, str]] = []
        self.probes: list[Probe] = []
        self.beat("me", ME)

    def take(self, step: Step) -> None:
        self.changes += [(str(change.kind), change.node.id) for change in step.changes if change.node is not None]
        self.probes += step.probes

    def beat(self, node_id: str, incarnation: tuple[int, int] = (1, 1), seq: int | None = None, **facts: Any) -> None:
        if seq is None:
            seq = self.seqs[node_id] = self.seqs.get(node_id, 0) + 1
        self.take(self.detector.beat(self.now, info(node_id, incarnation, **facts), seq))

    def answer(self, probe: Probe, incarnation: tuple[int, int] = (1, 1), **facts: Any) -> None:
        seq = self.seqs[probe.node_id] = self.seqs.get(probe.node_id, 0) + 1
        self.take(self.detector.answered(self.now, info(probe.node_id, incarnation, **facts), seq, probe.number))

    def join(self, node_id: str, incarnation: tuple[int, int] = (1, 1), **facts: Any) -> None:
        """Let a node beat for the first time, and answer."""
        self.beat(node_id, incarnation, **facts)
        self.answer(self.probes.pop(), incarnation, **facts)

    def nobody(self, probe: Probe) -> None:
        self.take(self.detector.no_responders(self.now, probe.node_id, probe.number))

    def run(self, seconds: float, *beating: str) -> None:
        """Let time pass while this node and some others beat."""
        for _ in range(round(seconds / 0.05)):
            self.now += 0.05
            if round(self.now / 0.05) % 5 == 0 and not self.deaf:
                self.beat("me", ME)
                for node_id in beating:
                    self.beat(node_id)
            self.take(self.detector.tick(self.now))

    def status(self, node_id: str = "a") -> NodeStatus | None:
        peer = self.detector.peers.get(node_id)
        return None if peer is None else peer.info.status

    def info(self, node_id: str = "a") -> NodeInfo:
        return self.detector.peers[node_id].info


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.join("a")
    rig.run(1.0, "a")
    rig.changes.clear()
    return rig


def test_a_missed_beat_is_asked_about_and_an_answer_brings_it_back(rig: Rig) -> None:
    rig.run(0.4)
    assert rig.status() is NodeStatus.SUSPECT
    [probe] = rig.probes
    rig.answer(probe)
    assert rig.status() is NodeStatus.ONLINE
    assert rig.changes == [("updated", "a"), ("updated", "a")]


def test_who_is_not_there_is_avoided_at_once_and_dead_when_asked_again(rig: Rig) -> None:
    rig.run(0.4)
    rig.nobody(rig.probes[-1])
    assert (rig.status(), rig.info().evicted) == (NodeStatus.SUSPECT, True)
    rig.run(0.1)
    assert len(rig.probes) == 1
    rig.run(0.15)
    assert len(rig.probes) == 2
    rig.nobody(rig.probes[-1])
    assert (rig.status(), rig.info().evicted) == (NodeStatus.FAULTED, True)
    assert rig.detector.deaths == 1
    rig.run(5.0)
    assert len(rig.probes) == 2  # the server has said it


def test_an_answer_to_another_question_counts_for_nothing(rig: Rig) -> None:
    rig.run(0.4)
    stale = Probe("a", "shop", rig.probes[-1].number + 1)
    rig.nobody(stale)
    rig.answer(stale)
    assert rig.status() is NodeStatus.SUSPECT
    assert not rig.info().evicted
    assert rig.detector.rejected == {"late": 1}


def test_silence_is_death_and_the_silent_dead_are_asked_every_second(rig: Rig) -> None:
    rig.run(0.9)
    assert rig.status() is NodeStatus.SUSPECT
    rig.run(0.4)
    assert (rig.status(), rig.info().evicted) == (NodeStatus.FAULTED, False)
    before = len(rig.probes)
    rig.run(5.0)
    assert 3 <= len(rig.probes) - before <= 5
    rig.nobody(rig.probes[-1])
    assert rig.info().evicted
    before = len(rig.probes)
    rig.run(5.0)
    assert len(rig.probes) == before


def test_a_dead_node_that_beats_recovers_once_it_answers(rig: Rig) -> None:
    rig.run(1.5)
    assert rig.status() is NodeStatus.FAULTED
    rig.run(1.2, "a")
    assert rig.status() is NodeStatus.FAULTED
    rig.answer(rig.probes[-1])
    assert rig.changes[-1] == ("recovered", "a")
    assert rig.detector.recoveries == 1


def test_a_longer_interval_is_given_four_of_them() -> None:
    rig = Rig()
    rig.join("a", interval=1.0)
    rig.run(1.1)
    assert rig.status() is NodeStatus.ONLINE
    rig.run(2.5)
    assert rig.status() is NodeStatus.SUSPECT
    rig.run(1.0)
    assert rig.status() is NodeStatus.FAULTED


def test_silence_does_not_count_while_this_node_does_not_hear_itself(rig: Rig) -> None:
    rig.deaf = True
    rig.run(60.0)
    assert rig.status() is not NodeStatus.FAULTED
    rig.deaf = False
    rig.run(0.9)
    assert rig.status() is not NodeStatus.FAULTED
    rig.run(1.5)
    assert rig.status() is NodeStatus.FAULTED


def test_nobody_is_dead_while_the_own_connection_is_lost_nor_just_after(rig: Rig) -> None:
    rig.detector.disconnected(rig.now)
    rig.deaf = True
    rig.run(30.0)
    rig.detector.reconnected(rig.now)
    rig.deaf = False
    for _ in range(20):
        rig.take(rig.detector.hint(rig.now, "a"))
        for probe in rig.probes:
            rig.nobody(probe)
        rig.run(0.05)
    assert rig.status() is NodeStatus.ONLINE
    rig.run(1.2)
    for probe in rig.probes[-1:]:
        rig.nobody(probe)
    rig.run(0.25)
    rig.nobody(rig.probes[-1])
    assert rig.status() is NodeStatus.SUSPECT  # it may still be on its way back
    for _ in range(8):
        rig.run(0.25)
        rig.nobody(rig.probes[-1])
    assert rig.status() is NodeStatus.FAULTED


def test_two_hints_at_once_are_one_question(rig: Rig) -> None:
    """A node has two connections, and both may be cut and come back: that nobody is there is asked again later."""
    for _ in range(2):
        rig.take(rig.detector.hint(rig.now, "a"))
        for probe in rig.probes:
            rig.nobody(probe)
    assert len(rig.probes) == 1
    assert rig.status() is NodeStatus.SUSPECT
    rig.run(rules.CONFIRM_AFTER + 0.05)
    rig.answer(rig.probes[-1])
    assert len(rig.probes) == 2
    assert rig.status() is NodeStatus.ONLINE


def test_a_hint_is_a_question_and_no_verdict(rig: Rig) -> None:
    rig.take(rig.detector.hint(rig.now, "a"))
    assert [probe.node_id for probe in rig.probes] == ["a"]
    assert rig.status() is NodeStatus.ONLINE
    rig.take(rig.detector.hint(rig.now, "nobody"))
    assert len(rig.probes) == 1


def test_when_most_are_silent_each_is_dead_only_after_a_question_of_its_own() -> None:
    rig = Rig()
    for name in "abc":
        rig.join(name)
    rig.run(1.0, *"abc")
    rig.run(1.25)
    assert {rig.status(name) for name in "abc"} == {NodeStatus.SUSPECT}
    rig.run(1.0)
    assert {rig.status(name) for name in "abc"} == {NodeStatus.FAULTED}


def test_a_replayed_beat_changes_nothing(rig: Rig) -> None:
    rig.beat("a", seq=1, is_ready=False)
    assert rig.info().is_ready
    assert rig.detector.rejected == {"replayed": 1}


def test_a_beat_far_ahead_is_a_question_and_true_beats_go_on_counting(rig: Rig) -> None:
    rig.beat("a", seq=2**50, interval=60.0)
    assert [probe.node_id for probe in rig.probes] == ["a"]
    assert rig.info().interval == INTERVAL
    rig.run(2.0, "a")
    assert rig.status() is NodeStatus.ONLINE
    assert rig.detector.rejected == {}
    rig.run(1.3)
    assert rig.status() is NodeStatus.FAULTED


def test_beats_a_little_ahead_are_set_right_by_an_answer(rig: Rig) -> None:
    rig.beat("a", seq=rules.MAX_JUMP)
    rig.beat("a")
    assert rig.detector.rejected == {"replayed": 1}
    rig.answer(rig.probes[-1])
    rig.beat("a", is_ready=False)
    assert not rig.info().is_ready


def test_a_true_jump_is_believed_when_it_answers(rig: Rig) -> None:
    rig.seqs["a"] = 10**6
    rig.beat("a")
    rig.answer(rig.probes[-1])
    rig.beat("a", is_ready=False)
    assert not rig.info().is_ready


def test_a_longer_interval_is_believed_when_it_answers_unless_it_is_as_long_as_the_own_one(rig: Rig) -> None:
    rig.beat("a", interval=60.0)
    assert rig.info().interval == INTERVAL
    rig.answer(rig.probes[-1], interval=60.0)
    assert rig.info().interval == 60.0
    rig.beat("a", interval=INTERVAL)
    rig.detector.interval = 2.0
    rig.beat("a", interval=2.5)
    assert (rig.info().interval, len(rig.probes)) == (2.5, 1)


def test_what_never_changes_in_a_life_cannot_be_changed_by_a_beat(rig: Rig) -> None:
    for facts in ({"types": ("U",)}, {"service": "x"}, {"version": "2"}, {"zone": "z"}, {"metadata": {"a": "b"}}):
        rig.beat("a", **facts)
    for facts in ({"commands": ("U",)}, {"events": ("U",)}, {"store": "x"}):
        rig.beat("a", **facts)
    assert rig.detector.rejected == {"forged": 8}
    assert (rig.info().types, rig.info().service) == (("T",), "shop")
    assert len(rig.probes) == 1


@pytest.mark.parametrize("field", ["partitions", "event_partitions"])
def test_a_change_of_what_a_node_owns_is_told(rig: Rig, field: str) -> None:
    for owned in ({3: 41}, {3: 41}, {3: 42}, {}):
        rig.beat("a", **{field: owned})
        assert dict(getattr(rig.info(), field)) == owned
    assert rig.changes == [("updated", "a")] * 3


def test_doubtful_beats_put_no_other_question_off_and_no_answer_is_lost_to_them(rig: Rig) -> None:
    rig.run(0.4)
    [probe] = rig.probes
    rig.beat("a", seq=1)
    assert rig.probes == [probe]
    rig.answer(probe)
    rig.run(1.0, "a")
    rig.beat("a", seq=1)
    rig.beat("a", (2, 9), seq=1)
    assert len(rig.probes) == 3
    rig.answer(rig.probes[-1], (2, 9))
    assert rig.info().incarnation == (2, 9)


def test_an_own_beat_that_is_forged_does_not_make_the_listener_seem_proven(rig: Rig) -> None:
    rig.beat("me", ME, interval=60.0)
    rig.deaf = True
    rig.run(5.0)
    assert rig.status() is not NodeStatus.FAULTED


def test_who_is_new_is_known_when_it_has_answered() -> None:
    rig = Rig()
    rig.beat("a")
    rig.beat("a")
    assert (rig.status(), rig.detector.newcomers) == (None, 1)
    [probe] = rig.probes
    rig.answer(Probe("a", "shop", 77))
    assert rig.status() is None
    rig.answer(probe)
    assert (rig.status(), rig.detector.newcomers) == (NodeStatus.ONLINE, 0)
    assert rig.changes[-1] == ("joined", "a")


def test_who_is_new_and_not_there_is_asked_again_only_when_it_beats_again() -> None:
    rig = Rig()
    rig.beat("a")
    rig.nobody(rig.probes[-1])
    assert rig.detector.newcomers == 0
    assert [(one.id, one.status, one.evicted) for one in rig.detector.unproven] == [("a", NodeStatus.SUSPECT, True)]
    rig.beat("a")
    rig.run(newcomers.LOST_AFTER + 0.1)  # nobody answers
    assert (len(rig.probes), rig.detector.newcomers) == (2, 0)
    rig.beat("a")
    assert [one.evicted for one in rig.detector.unproven] == [False]
    rig.answer(rig.probes[-1])
    assert rig.status() is NodeStatus.ONLINE
    assert rig.detector.unproven == []


def test_a_forged_service_hides_no_new_node() -> None:
    rig = Rig()
    rig.beat("a", service="forged")
    rig.beat("a")
    assert [probe.service for probe in rig.probes] == ["forged", "shop"]
    rig.answer(rig.probes[0])  # of another service than was asked
    assert rig.status() is None
    rig.answer(rig.probes[1])
    assert rig.info().service == "shop"


def test_a_burst_of_new_ids_is_asked_slowly_and_pushes_nobody_out(rig: Rig) -> None:
    for number in range(10_000):
        rig.beat(f"x{number}")
    assert len(rig.probes) == allowance.BURST
    assert rig.detector.newcomers <= allowance.BURST + newcomers.MAX_WAITING
    assert set(rig.detector.peers) == {"a"}
    rig.run(2.0, "a")
    for probe in rig.probes:
        rig.nobody(probe)
    assert len(rig.detector.unproven) == newcomers.MAX_UNPROVEN
    assert len(rig.probes) <= allowance.BURST + 2.1 * newcomers.QUESTIONS_PER_SECOND
    for probe in rig.probes:
        rig.nobody(probe)
    rig.beat("b")
    rig.run(0.05, "a")
    rig.answer(next(probe for probe in rig.probes if probe.node_id == "b"))  # it waits for none of them
    assert set(rig.detector.peers) == {"a", "b"}
    rig.run(20.0, "a", "b")
    assert rig.detector.newcomers == 0
    assert rig.detector.unproven == []
    assert set(rig.detector.peers) == {"a", "b"}


def test_the_view_is_bounded_in_bytes() -> None:
    rig = Rig(max_bytes=100_000)
    rig.join("a", partitions={})
    rig.beat("b", types=("x" * 1_000,) * 60)
    rig.answer(rig.probes[-1], types=("x" * 1_000,) * 60)
    assert rig.status("b") is NodeStatus.ONLINE
    rig.beat("c", types=("x" * 1_000,) * 60)
    assert rig.detector.rejected == {"full": 1}
    rig.beat("a", partitions=dict.fromkeys(range(1_000), 1), is_ready=False)
    assert rig.detector.rejected == {"full": 2}
    assert (rig.info().is_ready, dict(rig.info().partitions)) == (False, {})
    rig.beat("a", event_partitions=dict.fromkeys(range(1_000), 1))
    assert rig.detector.rejected == {"full": 3}
    assert (rig.info().is_ready, dict(rig.info().event_partitions)) == (True, {})
    rig.run(1.3)
    rig.run(rules.FORGET_SILENT + 2.0)
    assert rig.detector._bytes == 0


def test_a_good_bye_is_believed_when_nobody_is_there(rig: Rig) -> None:
    rig.beat("a", status=NodeStatus.LEFT, is_ready=False)
    assert rig.status() is NodeStatus.ONLINE
    rig.nobody(rig.probes[-1])
    assert rig.status() is None
    assert rig.changes == [("left", "a")]
    assert rig.detector.is_departed("a")
    rig.beat("a")
    assert rig.status() is None
    assert rig.detector.rejected == {"ancient": 1}
    assert rig.detector.deaths == 0


def test_a_forged_good_bye_is_answered_by_who_lives(rig: Rig) -> None:
    rig.beat("a", seq=2**50, status=NodeStatus.LEFT)
    rig.answer(rig.probes[-1])
    assert rig.status() is NodeStatus.ONLINE
    rig.run(2.0, "a")  # its beats count again
    assert rig.status() is NodeStatus.ONLINE
    assert rig.changes == []


def test_a_good_bye_that_nobody_denies_is_believed_after_the_timeout(rig: Rig) -> None:
    rig.beat("a", status=NodeStatus.LEFT)
    rig.run(1.2)
    assert rig.status() is None


def test_a_new_incarnation_is_believed_when_it_answers(rig: Rig) -> None:
    rig.beat("a", (2, 9), seq=1)
    assert rig.info().incarnation == (1, 1)
    rig.answer(rig.probes[-1], (2, 9))
    assert rig.info().incarnation == (2, 9)
    assert rig.changes == [("left", "a"), ("joined", "a")]
    rig.beat("a", (1, 1), seq=10**6)  # the old one
    assert rig.info().incarnation == (2, 9)
    assert rig.detector.rejected == {"ancient": 1}


def test_an_older_incarnation_is_not_even_asked_about_while_the_newer_lives(rig: Rig) -> None:
    rig.beat("a", (0, 9), seq=10**6)
    assert rig.probes == []
    assert rig.detector.rejected == {"ancient": 1}


def test_a_new_start_of_a_dead_node_is_taken_whatever_its_number(rig: Rig) -> None:
    rig.run(1.5)
    assert rig.status() is NodeStatus.FAULTED
    rig.run(1.0)
    rig.beat("a", (1, 0), seq=1)
    rig.answer(rig.probes[-1], (1, 0))
    assert (rig.status(), rig.info().incarnation) == (NodeStatus.ONLINE, (1, 0))


def test_departed_incarnations_are_forgotten_after_ten_minutes_and_bounded(rig: Rig) -> None:
    rig.beat("a", status=NodeStatus.LEFT)
    rig.nobody(rig.probes[-1])
    rig.now += rules.REMEMBER_DEPARTED + 2.0
    rig.take(rig.detector.tick(rig.now))
    assert rig.detector.departed == {}
    small = Rig(max_nodes=3)
    for number in range(10):
        small.join(f"n{number}")
        small.beat(f"n{number}", status=NodeStatus.LEFT)
        small.nobody(small.probes[-1])
    assert list(small.detector.departed) == ["n7", "n8", "n9"]


def test_the_view_is_bounded() -> None:
    rig = Rig(max_nodes=2)
    for name in "ab":
        rig.join(name)
    rig.beat("c")
    assert set(rig.detector.peers) == {"a", "b"}
    assert rig.detector.rejected == {"full": 1}


def test_the_dead_are_forgotten_in_the_end(rig: Rig) -> None:
    rig.run(0.4)
    rig.nobody(rig.probes[-1])
    rig.run(0.25)
    rig.nobody(rig.probes[-1])
    rig.run(rules.FORGET_EVICTED - 5.0)
    assert rig.status() is NodeStatus.FAULTED
    rig.run(7.0)
    assert rig.status() is None


def test_somebody_with_the_own_id_is_a_rival_only_if_it_answers() -> None:
    rig = Rig()
    rig.beat("me", (7, 7), seq=1)
    assert rig.detector.rejected == {"rival": 1}
    [probe] = rig.probes
    rig.beat("me", (7, 7), seq=2)
    assert len(rig.probes) == 1  # asked once a second
    rig.answer(probe, ME)
    assert rig.detector.rival is None
    rig.answer(probe, (7, 7))
    assert rig.detector.rival is not None


def test_draining_is_told_once_and_a_draining_node_may_be_missed() -> None:
    rig = Rig()
    rig.join("a")
    rig.beat("a", status=NodeStatus.DRAINING, is_ready=False)
    rig.beat("a", status=NodeStatus.DRAINING, is_ready=False)
    assert rig.changes[1:] == [("joined", "a"), ("draining", "a")]
    rig.run(1.5)
    assert rig.status() is NodeStatus.FAULTED


def test_the_proven_clock_stands_still_and_never_goes_back() -> None:
    clock = ProvenClock(0.0)
    assert clock.read(5.0) == 0.0  # not heard yet
    clock.own_beat(5.0, INTERVAL)
    clock.own_beat(5.25, INTERVAL)
    assert clock.read(5.25) == pytest.approx(0.25)
    assert clock.read(9.0) == pytest.approx(0.75)  # two intervals, then it stands still
    assert not clock.is_proven(9.0)
    clock.own_beat(9.0, INTERVAL)
    assert clock.read(9.0 + RESUME_AFTER) == pytest.approx(0.75)
    for number in range(1, 9):
        clock.own_beat(9.0 + number * INTERVAL, INTERVAL)
    assert clock.read(11.0) == pytest.approx(0.75 + 1.0)
    clock.stop(11.0)
    assert clock.read(20.0) == pytest.approx(1.75)
