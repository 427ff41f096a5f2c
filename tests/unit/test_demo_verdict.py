"""The verdict: nothing that went wrong with the effects is left uncounted."""

import pytest

from catga_bus.demo.data import SHIPPED, Figures, Flight, in_schedule_order, read_flights
from catga_bus.demo.effects import Effect
from catga_bus.demo.ledger import Execution
from catga_bus.demo.verdict import Tally, count_runs, judge, tally


@pytest.fixture(scope="module")
def flights() -> list[Flight]:
    return in_schedule_order(read_flights(SHIPPED))[:1_500]


def done(flights: list[Flight]) -> list[Effect]:
    return [
        Effect(row + 1, row, one.aircraft, one.dep_delay, one.distance, f"desk-{row % 3}", row % 16, 7, row / 100)
        for row, one in enumerate(flights)
    ]


def test_each_flight_once_and_in_order_is_good(flights):
    verdict = judge(done(flights), flights)
    assert verdict.is_good
    assert verdict.counted == verdict.expected
    assert verdict.effects == Tally(written=1_500, lost=0, out_of_order=0, doubled=0, foreign=0)


def test_aircraft_may_overtake_each_other():
    assert tally([(1, "b"), (0, "a"), (3, "a"), (2, "b")], range(4)).is_good


@pytest.mark.parametrize(
    ("entries", "lost", "out_of_order", "doubled", "foreign"),
    [
        ([(0, "a"), (2, "a")], 1, 0, 0, 0),
        ([(0, "a"), (2, "a"), (1, "a")], 0, 1, 0, 0),
        ([(2, "a"), (0, "a"), (1, "a")], 0, 2, 0, 0),
        ([(0, "a"), (1, "a"), (2, "a"), (0, "a")], 0, 0, 1, 0),
        ([(0, "a"), (0, "a"), (0, "a"), (1, "a"), (2, "a")], 0, 0, 2, 0),
        ([(0, "a"), (1, "a"), (2, "a"), (3, "a")], 0, 0, 0, 1),
        ([(1, "a"), (1, "a"), (0, "a"), (9, "b")], 1, 1, 1, 1),
        ([], 3, 0, 0, 0),
    ],
)
def test_what_is_wrong_is_counted(entries, lost, out_of_order, doubled, foreign):
    found = tally(entries, range(3))
    assert found == Tally(written=len(entries), lost=lost, out_of_order=out_of_order, doubled=doubled, foreign=foreign)
    assert not found.is_good


def test_a_lost_effect_is_bad(flights):
    verdict = judge(done(flights)[1:], flights)
    assert not verdict.is_good
    assert verdict.effects.lost == 1


def test_a_doubled_effect_is_bad(flights):
    effects = done(flights)
    verdict = judge([*effects, effects[5]._replace(id=1_501)], flights)
    assert not verdict.is_good
    assert verdict.effects.doubled == 1


def test_two_effects_of_one_aircraft_that_changed_places_are_bad(flights):
    effects = done(flights)
    first, second = [row for row, flight in enumerate(flights) if flight.aircraft == "N711MQ"][:2]
    effects[first], effects[second] = effects[second], effects[first]
    verdict = judge(effects, flights)
    assert not verdict.is_good
    assert verdict.effects.out_of_order == 1
    assert verdict.counted == verdict.expected


def test_mistakes_that_cancel_each_other_out_are_bad(flights):
    effects = done(flights)
    twins = [flights[0], flights[0], *flights[2:]]
    effects[1] = effects[0]._replace(id=2)
    verdict = judge(effects, twins)
    assert verdict.counted == verdict.expected
    assert not verdict.is_good
    assert (verdict.effects.lost, verdict.effects.doubled) == (1, 1)


@pytest.mark.parametrize("change", [{"dep_delay": 1_000}, {"distance": 3}, {"aircraft": "N0"}])
def test_a_value_that_changed_on_the_way_is_bad(flights, change):
    effects = done(flights)
    effects[5] = effects[5]._replace(**change)
    verdict = judge(effects, flights)
    assert not verdict.is_good
    assert verdict.changed == 1


def test_a_flight_that_the_file_does_not_have_is_bad(flights):
    verdict = judge([*done(flights), Effect(1_501, 1_500, "N0", None, 0, "desk-1", 1, 7, 3.0)], flights)
    assert not verdict.is_good
    assert verdict.effects.foreign == 1


def test_an_effect_of_an_owner_that_has_lost_its_partition_is_bad(flights):
    effects = done(flights)
    effects[20] = effects[20]._replace(epoch=9)  # of partition 4; all that follow in it have 7 again
    verdict = judge(effects, flights)
    assert not verdict.is_good
    assert verdict.epochs_fell == sum(effect.partition == 4 and effect.row > 20 for effect in effects)
    risen = [effect._replace(epoch=7 + effect.row) for effect in effects]
    assert judge(risen, flights).is_good


def test_an_empty_log_is_bad(flights):
    verdict = judge([], flights)
    assert not verdict.is_good
    assert verdict.counted == Figures()


def ran(effects: list[Effect]) -> list[Execution]:
    return [Execution(f"id-{one.row}", one.node, one.row, one.partition, one.epoch) for one in effects]


def test_runs_are_counted_by_node_and_repeats_by_command(flights):
    effects = done(flights)
    executions = ran(effects)
    executions += [Execution("id-3", "desk-9", 3, 3, 8)] * 2  # which first ran on desk-0
    executions.append(Execution("id-4", "desk-9", 4, 4, 8))  # first on desk-1
    runs = count_runs(executions, effects, {"desk-0"})
    assert (runs.executions, runs.repeated, runs.repeated_on_faulted, runs.unlogged) == (1_503, 2, 1, 0)
    assert runs.per_node == {"desk-0": 500, "desk-1": 500, "desk-2": 500, "desk-9": 3}


def test_an_effect_without_an_execution_is_told(flights):
    effects = done(flights)
    assert count_runs(ran(effects)[2:], effects, ()).unlogged == 2
