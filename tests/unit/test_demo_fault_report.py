"""What the report says of faults, and which of them keep a demo from succeeding."""

import msgspec
import pytest

from catga_bus.demo.effects import Effect
from catga_bus.demo.fault_report import FaultReport, Newcomer, fault_problems, fault_reports, newcomers_of
from catga_bus.demo.faults import FaultPlan, FaultRecord, Moment, What

RECORD = FaultRecord(
    plan=FaultPlan(
        killed="desk-2", replacement="desk-4", frozen="desk-3", rolled="desk-1", successor="desk-5", spares=1
    ),
    moments=(
        Moment(3.0, "desk-2", What.KILLED),
        Moment(3.25, "desk-2", What.SUSPECT),
        Moment(3.75, "desk-2", What.FAULTED),
        Moment(4.0, "desk-4", What.STARTED),
        Moment(4.5, "desk-4", What.READY),
        Moment(6.0, "desk-3", What.FROZEN),
        Moment(7.0, "desk-3", What.SUSPECT),
        Moment(9.0, "desk-3", What.THAWED),
        Moment(9.25, "desk-3", What.ONLINE),
        Moment(10.0, "desk-1", What.ROLLED),
        Moment(10.125, "desk-1", What.DRAINING),
        Moment(10.25, "desk-1", What.LEFT),
        Moment(10.5, "desk-1", What.ENDED),
        Moment(10.5, "desk-5", What.STARTED),
        Moment(11.5, "desk-5", What.READY),
    ),
    exit_code=-9,
    was_stopped=True,
    rolled_exit_code=0,
)


def effects() -> list[Effect]:
    told = [
        (2.5, 0, "desk-1"),
        (2.5, 1, "desk-2"),
        (2.75, 2, "desk-2"),
        (2.75, 3, "desk-3"),
        (3.75, 1, "desk-1"),
        (4.0, 2, "desk-3"),
        (5.5, 0, "desk-1"),
        (7.5, 3, "desk-4"),
        (8.0, 2, "desk-4"),
        (9.5, 1, "desk-1"),
        (9.75, 0, "desk-1"),
        (10.25, 1, "desk-4"),
        (10.25, 0, "desk-3"),
    ]
    return [
        Effect(number, number, "N1", 0, 0, node, partition, 1, at) for number, (at, partition, node) in enumerate(told)
    ]


def reported(record: FaultRecord | None) -> list[FaultReport]:
    return fault_reports(record, effects())


def problems(record: FaultRecord | None) -> list[str]:
    return list(fault_problems(record, reported(record)))


def without(*kinds: What, node: str = "") -> FaultRecord:
    return msgspec.structs.replace(
        RECORD,
        moments=tuple(one for one in RECORD.moments if one.what not in kinds or (node and one.node != node)),
    )


def test_each_fault_has_its_times():
    assert reported(RECORD) == [
        FaultReport(
            kind="killed",
            node="desk-2",
            at=3.0,
            mended_after=1.5,
            noticed_after=0.25,
            gone_after=0.75,
            moved=[0.75, 1.0],
            standstill=1.5,
        ),
        FaultReport(
            kind="frozen",
            node="desk-3",
            at=6.0,
            mended_after=3.0,
            noticed_after=1.0,
            gone_after=None,
            moved=[1.5, 2.0],
            standstill=2.0,
        ),
        FaultReport(
            kind="rolled",
            node="desk-1",
            at=10.0,
            mended_after=1.5,
            noticed_after=0.125,
            gone_after=0.25,
            moved=[0.5, 0.75],
            standstill=0.5,
        ),
    ]
    assert newcomers_of(RECORD) == [
        Newcomer(node="desk-4", place_of="desk-2", started_at=4.0, ready_after=0.5),
        Newcomer(node="desk-5", place_of="desk-1", started_at=10.5, ready_after=1.0),
    ]


def test_a_good_record_has_no_problems():
    assert problems(RECORD) == []


def test_a_peaceful_day_has_nothing_to_tell():
    assert reported(None) == []
    assert newcomers_of(None) == []
    assert problems(None) == []


def test_a_doubt_before_the_fault_does_not_count_as_noticing_it():
    record = without(What.SUSPECT, What.FAULTED, node="desk-2")
    record = msgspec.structs.replace(record, moments=(Moment(1.0, "desk-2", What.SUSPECT), *record.moments))
    assert reported(record)[0].noticed_after is None
    assert problems(record) == ["nobody noticed that node desk-2 was killed"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            without(What.FROZEN, What.THAWED, What.SUSPECT, node="desk-3"),
            "node desk-3 was to be frozen, but the replay",
        ),
        (without(What.ROLLED), "node desk-1 was to be rolled, but the replay"),
        (without(What.SUSPECT, node="desk-3"), "nobody noticed that node desk-3 was frozen"),
        (without(What.READY, node="desk-4"), "node desk-4, in the place of desk-2, did not begin to answer"),
        (without(What.READY, node="desk-5"), "node desk-5, in the place of desk-1, did not begin to answer"),
        (msgspec.structs.replace(RECORD, exit_code=None), "desk-2 was not ended by SIGKILL: its exit code is None"),
        (msgspec.structs.replace(RECORD, exit_code=1), "desk-2 was not ended by SIGKILL: its exit code is 1"),
        (msgspec.structs.replace(RECORD, was_stopped=False), "desk-3 did not stand still"),
        (msgspec.structs.replace(RECORD, rolled_exit_code=None), "desk-1 did not finish and end when it was rolled"),
        (msgspec.structs.replace(RECORD, rolled_exit_code=1), "its exit code is 1"),
    ],
)
def test_a_fault_that_was_not_real_or_not_noticed_is_a_problem(record, problem):
    (found,) = problems(record)
    assert problem in found


def test_a_node_whose_partitions_nobody_took_over_is_a_problem():
    left = [effect for effect in effects() if effect.at < 3.0 or effect.partition in (0, 3)]
    assert list(fault_problems(RECORD, fault_reports(RECORD, left))) == [
        "no partition of node desk-2 went on elsewhere when it was killed"
    ]


def test_a_replay_that_was_too_short_for_any_fault_says_so_of_each():
    record = msgspec.structs.replace(RECORD, moments=(), exit_code=None, was_stopped=False, rolled_exit_code=None)
    assert [problem.partition(",")[0] for problem in problems(record)] == [
        "node desk-2 was to be killed",
        "node desk-3 was to be frozen",
        "node desk-1 was to be rolled",
    ]
    assert reported(record) == []


def test_a_fault_without_an_end_is_measured_to_the_end_of_the_replay():
    found = reported(without(What.READY))[0]
    assert found.mended_after is None
    assert found.standstill == 2.0  # the longest there is after the fault, also where it is another one's
