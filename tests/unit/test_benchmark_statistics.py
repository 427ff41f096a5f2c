import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.statistics import (
    Spread,
    Target,
    Verdict,
    growth_percent,
    percentile,
    ratio_by_round,
    requests_for,
    spread,
)

_VALUES = st.lists(st.floats(0.001, 1e9), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.25, 1.0), (0.5, 2.0), (0.75, 3.0), (0.76, 4.0), (1.0, 4.0)]
)
def test_a_percentile_is_the_value_of_the_nearest_rank(share, expected):
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected


@given(_VALUES, st.floats(0.0, 1.0))
def test_a_percentile_was_measured_and_enough_values_do_not_exceed_it(values, share):
    result = percentile(values, share)
    assert result in values
    assert sum(value <= result for value in values) >= share * len(values) - 1e-9


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.1, 99.0])
def test_a_share_outside_of_0_to_1_is_refused_and_named(share):
    with pytest.raises(ValueError, match=str(share)):
        percentile([1.0], share)


def test_a_spread_has_the_median_and_both_ends():
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


def test_ratios_are_taken_per_round_before_their_median():
    # The machine was slow in the second round: both sides were, and their ratio is what it always is.
    assert ratio_by_round([300.0, 30.0, 300.0], [100.0, 10.0, 100.0]) == Spread(3.0, 3.0, 3.0)
    assert ratio_by_round([10.0, 90.0, 40.0], [10.0, 30.0, 20.0]) == Spread(2.0, 1.0, 3.0)


def test_rounds_that_lack_one_side_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        ratio_by_round([1.0, 2.0], [1.0])


def test_growth_is_in_percent_of_the_first():
    assert growth_percent(200.0, 210.0) == pytest.approx(5.0)
    assert growth_percent(200.0, 190.0) == pytest.approx(-5.0)
    with pytest.raises(ValueError, match="got 0"):
        growth_percent(0, 1)


def test_as_many_requests_are_sent_as_fit_the_time():
    assert requests_for(1000.0, 1.5, in_flight=16) == 1500


def test_there_are_never_fewer_than_four_requests_per_one_in_flight():
    assert requests_for(10.0, 0.1, in_flight=256) == 1024


@pytest.mark.parametrize(("rate", "seconds", "in_flight"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_can_be_planned_without_rate_time_and_requests(rate, seconds, in_flight):
    with pytest.raises(ValueError, match="must be positive"):
        requests_for(rate, seconds, in_flight=in_flight)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(5.0, Verdict.AIM), (4.9, Verdict.REACHED), (2.5, Verdict.REACHED), (2.4, Verdict.MISSED)],
)
def test_a_target_to_exceed_is_judged_from_below(value, verdict):
    assert Target(2.5, aim=5.0).verdict(value) is verdict


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(1.1, Verdict.AIM), (1.2, Verdict.REACHED), (1.3, Verdict.REACHED), (1.4, Verdict.MISSED)],
)
def test_a_target_to_stay_under_is_judged_from_above(value, verdict):
    assert Target(1.3, aim=1.1, higher_is_better=False).verdict(value) is verdict


def test_a_target_without_an_aim_is_only_reached_or_not():
    assert Target(64.0, higher_is_better=False).verdict(0.0) is Verdict.REACHED
