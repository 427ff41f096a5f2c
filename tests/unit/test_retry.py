"""The pauses between attempts: they grow, end at the longest, and chance only shortens them."""

import random

import pytest

from catga_bus import ConfigurationError, RetryOptions
from catga_bus.resilience.retry import pause_before


def test_pauses_double_up_to_the_longest() -> None:
    pauses = [pause_before(retry, RetryOptions(), 0.0) for retry in range(1, 12)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


def test_chance_takes_off_at_most_the_jitter() -> None:
    rng = random.Random(4)
    options = RetryOptions(first=1.0, longest=1.0, jitter=0.25)
    pauses = [pause_before(3, options, rng.random()) for _ in range(500)]
    assert 0.75 <= min(pauses) < 0.76
    assert 0.99 < max(pauses) <= 1.0
    assert pause_before(3, options, 1.0) == 0.75


@pytest.mark.parametrize("first", [0.0, 0.1])
def test_a_thousand_retries_end_at_the_longest_pause(first: float) -> None:
    assert pause_before(2_000, RetryOptions(first=first, factor=100), 0.0) == (30.0 if first else 0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"first": -1}, "first must be 0 to 3,600, got -1"),
        ({"first": 4.0, "longest": 2.0}, "longest must be 4.0 to 3,600, got 2.0"),
        ({"factor": 0.5}, "factor must be 1 to 100, got 0.5"),
        ({"jitter": 1.5}, "jitter must be 0 to 1, got 1.5"),
        ({"first": float("nan")}, "got nan"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        RetryOptions(**options)
