"""What the report says of faults, and which of them keep a demo from succeeding."""

import msgspec
import pytest

from catga_bus.demo.failover import CallTimes
from catga_bus.demo.fault_report import FaultReport, Replacement, fault_problems, fault_reports, replacement_of
from catga_bus.demo.faults import FaultPlan, FaultRecord, Moment, What

RECORD = FaultRecord(
    plan=FaultPlan(killed="desk-2", replacement="desk-4", frozen="desk-3", spares=1),
    moments=(
        Moment(3.0, "desk-2", What.KILLED),
        Moment(3.25, "desk-2", What.SUSPECT),
        Moment(3.75, "desk-2", What.FAULTED),
        Moment(3.875, "desk-2", What.UNANIMOUS),
        Moment(4.0, "desk-4", What.STARTED),
        Moment(4.5, "desk-4", What.READY),
        Moment(6.0, "desk-3", What.FROZEN),
        Moment(7.0, "desk-3", What.SUSPECT),
        Moment(9.0, "desk-3", What.THAWED),
        Moment(9.25, "desk-3", What.ONLINE),
    ),
    exit_code=-9,
    was_stopped=True,
)


def calls() -> CallTimes:
    times = CallTimes()
    for sent, answered in ((2.5, 2.75), (2.75, 3.5), (3.25, 3.75), (5.0, 5.25), (6.0, 6.25), (6.5, 8.5), (9.5, 10.0)):
        times.add(sent, answered)
    return times


def without(*kinds: What, node: str = "") -> FaultRecord:
    return msgspec.structs.replace(
        RECORD,
        moments=tuple(one for one in RECORD.moments if one.what not in kinds or (node and one.node != node)),
    )


def test_each_fault_has_its_times():
    assert fault_reports(RECORD, calls(), median=0.25) == [
        FaultReport(
            kind="killed",
            node="desk-2",
            at=3.0,
            mended_after=1.5,
            noticed_after=0.25,
            faulted_after=0.75,
            unanimous_after=0.875,
            failover=0.5,
            longest_gap=1.5,
        ),
        FaultReport(
            kind="frozen",
            node="desk-3",
            at=6.0,
            mended_after=3.0,
            noticed_after=1.0,
            faulted_after=None,
            unanimous_after=None,
            failover=1.75,
            longest_gap=2.25,
        ),
    ]
    assert replacement_of(RECORD) == Replacement(node="desk-4", started_at=4.0, ready_after=0.5)


def test_a_good_record_has_no_problems():
    assert list(fault_problems(RECORD)) == []


def test_a_peaceful_day_has_nothing_to_tell():
    assert fault_reports(None, calls(), median=0.25) == []
    assert replacement_of(None) is None
    assert list(fault_problems(None)) == []


def test_a_doubt_before_the_fault_does_not_count_as_noticing_it():
    record = without(What.SUSPECT, What.FAULTED, node="desk-2")
    record = msgspec.structs.replace(record, moments=(Moment(1.0, "desk-2", What.SUSPECT), *record.moments))
    assert fault_reports(record, calls(), median=0.25)[0].noticed_after is None
    assert list(fault_problems(record)) == ["nobody noticed that node desk-2 was killed"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            without(What.FROZEN, What.THAWED, What.SUSPECT, node="desk-3"),
            "node desk-3 was to be frozen, but the replay",
        ),
        (without(What.SUSPECT, node="desk-3"), "nobody noticed that node desk-3 was frozen"),
        (without(What.READY), "the replacement desk-4 did not begin to answer"),
        (msgspec.structs.replace(RECORD, exit_code=None), "desk-2 was not ended by SIGKILL: its exit code is None"),
        (msgspec.structs.replace(RECORD, exit_code=1), "desk-2 was not ended by SIGKILL: its exit code is 1"),
        (msgspec.structs.replace(RECORD, was_stopped=False), "desk-3 did not stand still"),
    ],
)
def test_a_fault_that_was_not_real_or_not_noticed_is_a_problem(record, problem):
    (found,) = fault_problems(record)
    assert problem in found


def test_a_replay_that_was_too_short_for_any_fault_says_so_twice():
    record = msgspec.structs.replace(RECORD, moments=(), exit_code=None, was_stopped=False)
    assert [problem.partition(",")[0] for problem in fault_problems(record)] == [
        "node desk-2 was to be killed",
        "node desk-3 was to be frozen",
    ]
    assert fault_reports(record, calls(), median=0.25) == []


def test_a_fault_without_an_end_is_measured_to_the_end_of_the_replay():
    found = fault_reports(without(What.READY), calls(), median=0.25)[0]
    assert found.mended_after is None
    assert found.failover == 1.75  # the slowest of all later calls
