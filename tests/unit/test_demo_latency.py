"""Percentiles from buckets, beside those of the values themselves."""

import random

import pytest

from catga_bus.demo.latency import LatencyHistogram


def test_percentiles_are_within_one_percent_of_the_exact_ones():
    rng = random.Random(7)
    values = sorted(rng.lognormvariate(-6, 1) for _ in range(5_000))
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    for percent in (1, 50, 99, 100):
        exact = values[max(0, round(len(values) * percent / 100) - 1)]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.011)


def test_there_is_no_percentile_before_the_first_duration():
    assert LatencyHistogram().percentile(50) is None


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, 1e-6), (-1.0, 1e-6), (1e9, 1e3)])
def test_durations_outside_the_range_land_at_its_ends(seconds, shown):
    histogram = LatencyHistogram()
    histogram.add(seconds)
    assert histogram.percentile(50) == pytest.approx(shown, rel=0.05)


def test_a_percentage_above_hundred_is_refused():
    histogram = LatencyHistogram()
    histogram.add(1.0)
    with pytest.raises(ValueError, match="at most 100"):
        histogram.percentile(101)


def test_the_longest_is_exact():
    histogram = LatencyHistogram()
    assert histogram.longest is None
    for seconds in (0.5, 2_000.25, 0.75):
        histogram.add(seconds)
    assert histogram.longest == 2_000.25
