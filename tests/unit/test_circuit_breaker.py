"""The breaker's decisions, with time passed in."""

import math
from typing import Any

import pytest

from catga_bus.errors import ConfigurationError
from catga_bus.resilience.circuit_breaker import (
    ORDINARY,
    BreakerChange,
    BreakerOptions,
    BreakerState,
    CircuitBreaker,
    Window,
)

OPTIONS = BreakerOptions(min_calls=4, window=10.0, open_seconds=1.0, max_open_seconds=5.0, probes=2, successes=2)


class Watched:
    """A breaker and the changes that it has told of."""

    def __init__(self, options: BreakerOptions = OPTIONS, now: float = 0.0) -> None:
        self.changes: list[BreakerChange] = []
        self.breaker = CircuitBreaker(options, now, key=("Quote", "n1"), on_change=self.changes.append)

    @property
    def path(self) -> str:
        return " ".join(str(change.after) for change in self.changes)


def tripped(now: float = 0.0, options: BreakerOptions = OPTIONS) -> Watched:
    watched = Watched(options, now)
    watched.breaker.record(now, 0, options.min_calls)
    return watched


def half_open() -> tuple[Watched, int]:
    """One that tripped at 0 and let its first probe through at 1."""
    watched = tripped()
    probe = watched.breaker.allow(1.0)
    assert probe
    return watched, probe


# -- closed ----------------------------------------------------------------------------------------------------


def test_it_begins_closed_and_lets_everything_pass() -> None:
    breaker = CircuitBreaker(OPTIONS, 0.0)
    assert breaker.is_closed
    assert [breaker.allow(0.0) for _ in range(100)] == [ORDINARY] * 100


def test_it_trips_at_the_share_of_failures() -> None:
    watched = Watched()
    watched.breaker.record(0.0, 3, 2)
    assert watched.breaker.is_closed
    watched.breaker.record(0.0, 0, 1)
    assert watched.breaker.state is BreakerState.OPEN
    (change,) = watched.changes
    assert change == BreakerChange(
        "Quote", "n1", BreakerState.CLOSED, BreakerState.OPEN, 0.0, successes=3, failures=3, open_seconds=1.0
    )


def test_below_the_least_number_of_calls_it_does_not_trip() -> None:
    watched = Watched()
    watched.breaker.record(0.0, 0, 3)
    assert watched.breaker.is_closed
    watched.breaker.record(0.0, 0, 1)
    assert not watched.breaker.is_closed


def test_a_success_does_not_trip_it() -> None:
    watched = Watched()
    watched.breaker.record(0.0, 0, 3)
    watched.breaker.record(0.0, 1, 0)  # four calls, three failures: the share is over the limit
    assert watched.breaker.is_closed


def test_failures_that_have_left_the_window_do_not_count() -> None:
    watched = Watched()
    watched.breaker.record(0.5, 0, 3)
    watched.breaker.record(10.25, 0, 1)  # the bucket of 0 to 1 is forgotten from 10 on
    assert watched.breaker.is_closed
    watched.breaker.record(10.5, 0, 3)
    assert not watched.breaker.is_closed


def test_a_result_belongs_to_the_bucket_that_begins_as_it_comes() -> None:
    watched = Watched()
    watched.breaker.record(1.0, 0, 3)
    watched.breaker.record(10.5, 0, 1)  # the bucket of 0 to 1 is forgotten, that of 1 to 2 is not
    assert not watched.breaker.is_closed


# -- open ------------------------------------------------------------------------------------------------------


def test_open_lets_nothing_through_until_its_time_is_over() -> None:
    breaker = tripped().breaker
    assert [breaker.allow(now) for now in (0.0, 0.5, 0.999)] == [None] * 3
    assert breaker.snapshot(0.25).next_probe_in == 0.75
    assert breaker.allow(1.0)
    assert breaker.state is BreakerState.HALF_OPEN


def test_results_of_calls_from_before_the_trip_are_counted_and_change_nothing() -> None:
    watched = tripped()
    watched.breaker.record(0.5, 7, 100)
    seen = watched.breaker.snapshot(0.5)
    assert (seen.state, seen.successes, seen.failures, seen.trips) == (BreakerState.OPEN, 7, 104, 1)
    assert watched.breaker.allow(1.0)  # not a moment later for the failures


def test_each_trip_in_a_row_doubles_the_time_up_to_the_bound() -> None:
    watched = tripped()
    now = 0.0
    for _ in range(5):
        now += watched.breaker.snapshot(now).next_probe_in or math.nan
        probe = watched.breaker.allow(now)
        assert probe
        watched.breaker.end_probe(probe, now, succeeded=False)
    times = [change.open_seconds for change in watched.changes if change.after is BreakerState.OPEN]
    assert times == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def recovered_at(now: float) -> Watched:
    watched = tripped(now - 1.0)
    for _ in range(2):
        probe = watched.breaker.allow(now)
        assert probe
        watched.breaker.end_probe(probe, now, succeeded=True)
    return watched


def test_a_trip_soon_after_it_closed_still_doubles_the_time() -> None:
    watched = recovered_at(100.0)
    watched.breaker.record(109.75, 0, 4)
    assert watched.changes[-1].open_seconds == 2.0


def test_a_whole_window_closed_forgets_the_trips_before() -> None:
    watched = recovered_at(100.0)
    watched.breaker.record(110.0, 0, 4)
    assert watched.changes[-1].open_seconds == 1.0


def test_a_thousand_trips_in_a_row_are_no_overflow() -> None:
    watched = tripped(options=BreakerOptions(min_calls=1, open_seconds=0.01, max_open_seconds=0.01))
    for now in range(1, 2_000):
        probe = watched.breaker.allow(float(now))
        assert probe
        watched.breaker.end_probe(probe, float(now), succeeded=False)
    assert watched.breaker.trips == 2_000


# -- half-open -------------------------------------------------------------------------------------------------


def test_half_open_lets_only_its_probes_through() -> None:
    breaker = half_open()[0].breaker
    assert breaker.allow(1.0)
    assert breaker.allow(1.0) is None
    assert breaker.snapshot(1.25).next_probe_in == 0.75


def test_enough_probes_that_succeed_close_it_with_an_empty_window() -> None:
    watched, first = half_open()
    watched.breaker.end_probe(first, 1.0, succeeded=True)
    assert watched.breaker.state is BreakerState.HALF_OPEN
    second = watched.breaker.allow(1.0)
    assert second
    watched.breaker.end_probe(second, 1.0, succeeded=True)
    assert watched.breaker.is_closed
    assert watched.path == "open half_open closed"
    seen = watched.breaker.snapshot(1.0)
    assert (seen.successes, seen.failures, seen.next_probe_in) == (0, 0, None)


def test_one_probe_that_fails_opens_it_again() -> None:
    watched, first = half_open()
    second = watched.breaker.allow(1.0)
    assert second
    watched.breaker.end_probe(first, 1.0, succeeded=True)
    watched.breaker.end_probe(second, 1.0, succeeded=False)
    assert watched.path == "open half_open open"


def test_results_of_ordinary_calls_are_no_verdict_about_the_probes() -> None:
    watched, _ = half_open()
    watched.breaker.record(1.0, 50, 0)
    watched.breaker.record(1.0, 0, 50)
    assert watched.breaker.state is BreakerState.HALF_OPEN


def test_a_probe_of_an_earlier_phase_is_no_verdict_about_this_one() -> None:
    watched, late = half_open()
    other = watched.breaker.allow(1.0)
    assert other
    watched.breaker.end_probe(other, 1.0, succeeded=False)
    assert watched.breaker.allow(3.0)
    watched.breaker.end_probe(late, 3.0, succeeded=False)
    assert watched.breaker.state is BreakerState.HALF_OPEN
    assert watched.breaker.allow(3.0)
    assert watched.breaker.allow(3.0) is None  # nor did it free a slot


def test_a_probe_without_a_verdict_gives_its_slot_back() -> None:
    watched, first = half_open()
    assert watched.breaker.allow(1.0)
    watched.breaker.end_probe(first, 1.0, succeeded=None)
    assert watched.breaker.state is BreakerState.HALF_OPEN
    assert watched.breaker.allow(1.0)
    assert watched.breaker.allow(1.0) is None


def test_a_lost_probe_blocks_nothing_for_longer_than_the_open_time() -> None:
    watched, lost = half_open()
    assert watched.breaker.allow(1.5)
    assert watched.breaker.allow(1.75) is None
    assert watched.breaker.allow(2.0)
    assert watched.breaker.allow(2.0) is None
    watched.breaker.end_probe(lost, 2.25, succeeded=False)  # late, but it tells of this very phase
    assert watched.breaker.state is BreakerState.OPEN


def test_the_same_verdict_said_late_does_not_free_the_slot_of_another() -> None:
    watched, lost = half_open()
    assert watched.breaker.allow(1.0)
    assert watched.breaker.allow(2.0)  # in the place of `lost`
    watched.breaker.end_probe(lost, 2.0, succeeded=None)
    assert watched.breaker.allow(2.0)  # the second one is a second old, too
    assert watched.breaker.allow(2.0) is None


def test_failures_of_calls_from_before_it_closed_do_not_trip_it_again() -> None:
    watched = recovered_at(100.0)
    watched.breaker.record(101.0, 0, 1_000, admitted=98.5)
    assert watched.breaker.is_closed
    assert watched.breaker.snapshot(101.0).failures == 0
    watched.breaker.record(101.0, 0, 4, admitted=100.0)
    assert not watched.breaker.is_closed


def test_a_clock_that_steps_back_breaks_nothing() -> None:
    watched = Watched(now=100.0)
    watched.breaker.record(50.0, 1, 0)
    watched.breaker.record(100.0, 0, 3)
    assert watched.breaker.state is BreakerState.OPEN
    assert watched.breaker.snapshot(50.0).since == 0.0


# -- the window ------------------------------------------------------------------------------------------------


def test_the_window_forgets_a_bucket_at_a_time() -> None:
    window = Window(4.0, 4, 0.0)
    seen = []
    for now in range(4):
        window.advance(float(now))
        window.total_failures += 1
        seen.append(window.failures)
    for now in (4, 5, 6, 7):
        window.advance(float(now))
        seen.append(window.failures)
    assert seen == [1, 2, 3, 4, 3, 2, 1, 0]


def test_a_long_silence_empties_the_window_at_once() -> None:
    window = Window(4.0, 4, 0.0)
    window.total_successes += 5
    window.advance(1e9)
    assert window.successes == 0
    assert window.ends == 1e9 + 1.0


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("failure_rate", 0, "failure_rate must be 0.01 to 1, got 0"),
        ("failure_rate", "half", "failure_rate must be 0.01 to 1, got 'half'"),
        ("failure_rate", math.nan, "got nan"),
        ("min_calls", 0, "min_calls must be an integer from 1 to 1,000,000, got 0"),
        ("min_calls", 2.5, "got 2.5"),
        ("window", math.inf, "window must be 0.1 to 3,600, got inf"),
        ("buckets", 101, "buckets must be an integer from 1 to 100, got 101"),
        ("open_seconds", 0.0, "open_seconds must be 0.01 to 3,600, got 0.0"),
        ("max_open_seconds", 0.5, "max_open_seconds must be 1.0 to 86,400, got 0.5"),
        ("probes", True, "probes must be an integer from 1 to 1,000, got True"),
        ("successes", None, "successes must be an integer from 1 to 1,000, got None"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(option: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        BreakerOptions(**{option: value})
    assert text in str(caught.value)
