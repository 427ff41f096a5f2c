"""The plan of the faults and the record of what happened, by values alone."""

import pytest

from catga_bus.demo import faults
from catga_bus.demo.faults import Act, Chronicle, FaultPlan, Moment, What, first, plan_faults, state_of

PLAN = FaultPlan(killed="desk-2", replacement="desk-4", frozen="desk-3", rolled="desk-1", successor="desk-5", spares=1)
TIGHT = FaultPlan(killed="desk-2", replacement="desk-3", frozen="desk-1", rolled="desk-3", successor="desk-4", spares=0)

KILLED = Moment(2.0, "desk-2", What.KILLED)
STARTED = Moment(3.0, "desk-4", What.STARTED)
READY = Moment(3.5, "desk-4", What.READY)
REPLACED = [KILLED, STARTED, READY]
FROZEN = Moment(6.0, "desk-3", What.FROZEN)
THAWED = Moment(9.0, "desk-3", What.THAWED)
MENDED = [*REPLACED, FROZEN, THAWED]
ROLLED = Moment(10.0, "desk-1", What.ROLLED)
ENDED = Moment(10.5, "desk-1", What.ENDED)
FOLLOWED = Moment(10.5, "desk-5", What.STARTED)


@pytest.mark.parametrize(
    ("part", "now", "moments", "acts"),
    [
        (0.0, 0.0, [], []),
        (0.14, 1.9, [], []),
        (0.15, 2.0, [], [Act.KILL]),
        (0.16, 2.1, [KILLED], []),
        (0.2, 3.0, [KILLED], [Act.REPLACE]),
        (0.21, 3.1, [KILLED, STARTED], []),
        (0.4, 6.0, REPLACED, [Act.FREEZE]),
        (0.4, 6.0, [KILLED, STARTED], [Act.FREEZE]),  # the third node is still there
        (0.6, 8.9, [*REPLACED, FROZEN], []),
        (0.65, 9.0, [*REPLACED, FROZEN], [Act.THAW]),
        (0.69, 9.5, MENDED, []),
        (0.7, 10.0, MENDED, [Act.ROLL]),
        (0.8, 10.0, [*REPLACED, FROZEN], [Act.THAW]),  # a deployment begins with a healthy service
        (0.8, 10.0, [KILLED, STARTED, FROZEN, THAWED], []),
        (0.8, 10.4, [*MENDED, ROLLED], []),
        (0.8, 10.5, [*MENDED, ROLLED, ENDED], [Act.SUCCEED]),
        (0.8, 39.9, [*MENDED, ROLLED], []),
        (0.8, 40.0, [*MENDED, ROLLED], [Act.SUCCEED]),  # it does not end
        (0.9, 11.0, [*MENDED, ROLLED, ENDED, FOLLOWED], []),
        (0.5, 0.2, [], [Act.KILL, Act.FREEZE]),  # a replay faster than the plan
    ],
)
def test_each_fault_has_its_time(part, now, moments, acts):
    assert PLAN.due(part, now, moments) == acts


def test_nothing_begins_after_the_replay_but_what_has_begun_is_mended():
    assert PLAN.due(1.0, 20.0, []) == []
    assert PLAN.due(1.0, 20.0, [KILLED]) == [Act.REPLACE]
    assert PLAN.due(1.0, 20.0, [KILLED, STARTED, FROZEN]) == [Act.THAW]
    assert PLAN.due(1.0, 20.0, MENDED) == []
    assert PLAN.due(1.0, 20.0, [*MENDED, ROLLED, ENDED]) == [Act.SUCCEED]


def test_with_two_nodes_the_freeze_waits_until_the_replacement_answers():
    killed, started = Moment(3.0, "desk-2", What.KILLED), Moment(4.0, "desk-3", What.STARTED)
    assert TIGHT.due(0.6, 5.0, [killed, started]) == []
    assert TIGHT.due(0.6, 5.0, [killed, started, Moment(4.9, "desk-3", What.READY)]) == [Act.FREEZE]


@pytest.mark.parametrize(
    ("moments", "is_open"),
    [
        ([], False),
        ([KILLED], True),
        ([KILLED, STARTED], False),
        ([KILLED, STARTED, FROZEN], True),
        ([KILLED, FROZEN, THAWED], True),
        ([KILLED, STARTED, FROZEN, THAWED], False),
        ([*MENDED, ROLLED], True),
        ([*MENDED, ROLLED, ENDED], True),
        ([*MENDED, ROLLED, ENDED, FOLLOWED], False),
    ],
)
def test_a_fault_is_open_until_it_is_mended(moments, is_open):
    assert PLAN.is_open(moments) is is_open


@pytest.mark.parametrize(
    ("nodes", "frozen", "rolled", "spares"),
    [(2, "desk-1", "desk-8", 0), (3, "desk-3", "desk-1", 1), (5, "desk-3", "desk-1", 3)],
)
def test_no_node_suffers_twice(nodes, frozen, rolled, spares):
    plan = plan_faults([f"desk-{number}" for number in range(1, nodes + 1)], "desk-8", "desk-9")
    assert plan == FaultPlan(
        killed="desk-2", replacement="desk-8", frozen=frozen, rolled=rolled, successor="desk-9", spares=spares
    )


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


def test_a_chronicle_tells_each_moment_in_seconds_since_the_beginning():
    clock, told = Hands(), []
    chronicle = Chronicle(clock, told.append)
    clock.at += 5
    chronicle.begin()
    clock.at += 1.5
    chronicle.add("desk-2", What.KILLED)
    chronicle.add("desk-2", What.SUSPECT, at=1.75)
    assert chronicle.now() == 1.5
    assert list(chronicle.moments) == told
    assert [str(moment) for moment in told] == [
        "1.50 s: desk-2 is killed (SIGKILL)",
        "1.75 s: desk-2 is seen as suspect",
    ]


def test_a_view_is_written_down_only_when_it_is_news():
    chronicle = Chronicle(Hands())
    for status in ("online", "online", "suspect", "suspect", "faulted", "online", "online"):
        chronicle.see("desk-2", status)
    chronicle.see("desk-3", "online")
    assert [moment.what for moment in chronicle.moments] == [What.SUSPECT, What.FAULTED, What.ONLINE]


def test_a_chronicle_does_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(faults, "MAX_MOMENTS", 3)
    chronicle = Chronicle(Hands())
    for _ in range(5):
        chronicle.add("desk-1", What.SUSPECT)
    assert len(chronicle.moments) == 3


def test_the_first_moment_of_a_kind_is_found_from_an_instant_on():
    moments = [
        Moment(1.0, "desk-2", What.SUSPECT),
        Moment(3.0, "desk-2", What.KILLED),
        Moment(3.1, "desk-1", What.SUSPECT),
        Moment(3.4, "desk-2", What.SUSPECT),
        Moment(4.0, "desk-2", What.FAULTED),
    ]
    assert first(moments, "desk-2", What.SUSPECT, What.FAULTED) == 1.0
    assert first(moments, "desk-2", What.SUSPECT, What.FAULTED, since=3.0) == 3.4
    assert first(moments, "desk-2", What.LEFT) is None


def test_the_state_of_a_node_is_what_was_done_to_it_last_and_how_it_is_seen():
    moments = [FROZEN, Moment(6.4, "desk-3", What.SUSPECT), Moment(7.0, "desk-3", What.FAULTED)]
    assert state_of("desk-3", moments) == "frozen at 6.0 s, seen as faulted"
    assert state_of("desk-3", [*moments, THAWED]) == "thawed at 9.0 s, seen as faulted"
    assert state_of("desk-1", moments) == ""
