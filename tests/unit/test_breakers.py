"""The table of breakers: made on failure, bounded, and gone when there is nothing left to remember."""

import pytest

from catga_bus.errors import ConfigurationError
from catga_bus.resilience.breakers import Breakers
from catga_bus.resilience.circuit_breaker import ORDINARY, BreakerChange, BreakerOptions, BreakerState

OPTIONS = BreakerOptions(min_calls=2, window=10.0, open_seconds=1.0, probes=1, successes=1)
QUOTE = ("Quote", "n1")
OTHER = ("Quote", "n2")


@pytest.fixture
def changes() -> list[BreakerChange]:
    return []


@pytest.fixture
def breakers(changes: list[BreakerChange]) -> Breakers:
    return Breakers(OPTIONS, on_change=changes.append, limit=2)


def test_without_failures_there_is_no_breaker(breakers: Breakers) -> None:
    breakers.succeeded(QUOTE, 0.0, 1_000)
    assert breakers.allow(QUOTE, 0.0) == ORDINARY
    breakers.end_probe(QUOTE, 1, 0.0, succeeded=False)
    assert not breakers.by_key
    assert breakers.statistics(0.0) == []


def test_a_key_is_open_from_its_trip_until_it_closes(breakers: Breakers, changes: list[BreakerChange]) -> None:
    breakers.failed(QUOTE, 0.0)
    assert breakers.open_keys == set()
    breakers.failed(QUOTE, 0.0)
    assert breakers.open_keys == {QUOTE}
    assert breakers.allow(QUOTE, 0.5) is None
    assert breakers.allow(OTHER, 0.5) == ORDINARY
    probe = breakers.allow(QUOTE, 1.0)
    assert probe
    assert breakers.open_keys == {QUOTE}
    breakers.end_probe(QUOTE, probe, 1.0, succeeded=True)
    assert breakers.open_keys == set()
    assert [(one.type_name, one.node, one.after) for one in changes] == [
        ("Quote", "n1", BreakerState.OPEN),
        ("Quote", "n1", BreakerState.HALF_OPEN),
        ("Quote", "n1", BreakerState.CLOSED),
    ]
    assert breakers.trips == 1


def test_successes_count_once_there_is_a_breaker(breakers: Breakers) -> None:
    breakers.failed(QUOTE, 0.0)
    breakers.succeeded(QUOTE, 0.0, 8)
    breakers.failed(QUOTE, 0.0)
    (seen,) = breakers.statistics(0.0)
    assert (seen.type_name, seen.node, seen.successes, seen.failures) == ("Quote", "n1", 8, 2)
    assert breakers.open_keys == set()


def test_a_new_breaker_knows_the_successes_before_the_first_failure(breakers: Breakers) -> None:
    breakers.succeeded(QUOTE, 0.0, 100)
    breakers.succeeded(QUOTE, 4.0, 8)
    breakers.failed(QUOTE, 9.5, 25)
    (seen,) = breakers.statistics(9.5)
    assert (seen.successes, seen.failures, seen.trips) == (108, 25, 0)
    breakers.failed(QUOTE, 10.5)  # the hundred have left the window
    assert breakers.open_keys == {QUOTE}


def test_successes_count_for_the_bucket_in_which_they_come(breakers: Breakers) -> None:
    breakers.succeeded(QUOTE, 0.0)
    breakers.succeeded(QUOTE, 1.0, 8)  # the second bucket begins
    breakers.failed(QUOTE, 10.5)
    assert breakers.statistics(10.5)[0].successes == 8


def test_successes_before_the_window_are_not_known(breakers: Breakers) -> None:
    breakers.succeeded(QUOTE, 0.0, 100)
    breakers.failed(QUOTE, 10.0, 2)
    assert breakers.open_keys == {QUOTE}


def test_a_breaker_that_was_forgotten_leaves_its_successes(breakers: Breakers) -> None:
    breakers.failed(QUOTE, 0.0)
    breakers.succeeded(QUOTE, 8.0, 8)
    breakers.forget_quiet(10.0)
    assert not breakers.by_key
    breakers.failed(QUOTE, 10.0, 8)
    (seen,) = breakers.statistics(10.0)
    assert (seen.successes, seen.failures, seen.trips) == (8, 8, 1)


def test_successes_are_kept_of_no_more_than_the_limit_those_that_came_first_go_first(breakers: Breakers) -> None:
    for key in (QUOTE, OTHER, ("Third", None)):
        breakers.succeeded(key, 0.0, 8)
        breakers.succeeded(key, 0.0, 8)
    assert len(breakers._calm) == 2
    breakers.failed(QUOTE, 0.0)
    breakers.failed(OTHER, 0.0)
    assert [(one.node, one.successes) for one in breakers.statistics(0.0)] == [("n1", 0), ("n2", 16)]


def test_successes_that_have_left_the_window_take_no_room(breakers: Breakers) -> None:
    breakers.succeeded(QUOTE, 0.0)
    breakers.succeeded(OTHER, 5.0)
    breakers.forget_quiet(9.0)
    assert set(breakers._calm) == {QUOTE, OTHER}
    breakers.forget_quiet(10.0)
    assert set(breakers._calm) == {OTHER}


def test_the_closed_one_that_failed_the_longest_ago_makes_room(breakers: Breakers) -> None:
    breakers.failed(QUOTE, 0.0)
    breakers.failed(OTHER, 1.0)
    breakers.succeeded(QUOTE, 1.5, 8)
    breakers.failed(QUOTE, 2.0)
    breakers.failed(("Third", None), 3.0)
    assert set(breakers.by_key) == {QUOTE, ("Third", None)}


def test_one_that_has_to_stay_open_is_not_given_up(breakers: Breakers) -> None:
    breakers.failed(QUOTE, 0.0, 2)
    breakers.failed(OTHER, 0.5, 2)
    breakers.failed(("Third", None), 0.75, 3)
    assert breakers.open_keys == {QUOTE, OTHER}
    assert breakers.unguarded == 3
    breakers.failed(("Third", None), 1.0)  # the time of the first is over
    assert set(breakers.by_key) == {OTHER, ("Third", None)}
    assert breakers.open_keys == {OTHER}


def test_that_one_was_given_up_while_it_was_not_closed_is_told(
    breakers: Breakers, changes: list[BreakerChange]
) -> None:
    breakers.failed(QUOTE, 0.0, 2)
    breakers.failed(OTHER, 0.5, 2)
    breakers.failed(("Third", None), 1.25)
    (change,) = [one for one in changes if one.after is BreakerState.CLOSED]
    assert (change.type_name, change.node, change.before, change.at) == ("Quote", "n1", BreakerState.OPEN, 1.25)
    assert [(one.node, one.after) for one in breakers.last_changes()] == [("n2", BreakerState.OPEN)]
    assert breakers.trips == 2


def test_a_closed_one_that_is_given_up_is_no_news(breakers: Breakers, changes: list[BreakerChange]) -> None:
    for key in (QUOTE, OTHER, ("Third", None)):
        breakers.failed(key, 0.0)
    assert changes == []


def test_a_breaker_without_failures_in_its_window_is_forgotten(breakers: Breakers) -> None:
    breakers.failed(QUOTE, 0.0)
    breakers.failed(OTHER, 0.0, 2)
    breakers.forget_quiet(9.0)
    assert set(breakers.by_key) == {QUOTE, OTHER}
    breakers.forget_quiet(10.0)
    assert set(breakers.by_key) == {OTHER}  # open, however long nothing has failed


def test_a_breaker_that_closed_a_moment_ago_still_knows_that_it_tripped(breakers: Breakers) -> None:
    breakers.failed(QUOTE, 0.0, 2)
    probe = breakers.allow(QUOTE, 20.0)
    assert probe
    breakers.end_probe(QUOTE, probe, 20.0, succeeded=True)
    breakers.forget_quiet(29.0)
    assert set(breakers.by_key) == {QUOTE}
    breakers.forget_quiet(30.0)
    assert not breakers.by_key


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, 1_000_001])
def test_a_limit_out_of_its_bounds_is_refused(limit: int) -> None:
    with pytest.raises(ConfigurationError, match="limit must be an integer from 1 to 1,000,000, got"):
        Breakers(OPTIONS, limit=limit)
