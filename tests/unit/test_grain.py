"""How many requests may travel together."""

from hypothesis import given
from hypothesis import strategies as st

from catga_bus.requests.grain import BATCH_SECONDS, grain, smoothed


def test_fast_handlers_get_the_largest_batches() -> None:
    assert grain(0.0, 0, 64) == 64
    assert grain(0.000_005, 1_024, 64) == 64


def test_slow_handlers_get_one_message_at_a_time_until_many_are_in_flight() -> None:
    assert grain(0.005, 192, 64) == 1
    assert grain(0.005, 1_024, 64) == 4


@given(st.floats(0, 100), st.integers(0, 1_000_000), st.integers(1, 1_024))
def test_a_grain_is_within_its_bounds_and_never_grows_with_the_handlers_time(
    seconds: float, in_flight: int, largest: int
) -> None:
    size = grain(seconds, in_flight, largest)
    assert 1 <= size <= largest
    assert grain(seconds * 2, in_flight, largest) <= size
    if in_flight < 256 and seconds > 0:
        assert size == 1 or size * seconds <= BATCH_SECONDS * 1.000_001


def test_the_mean_follows_what_is_measured() -> None:
    mean = smoothed(0.0, 1.0)
    assert mean == 1.0
    for _ in range(30):
        mean = smoothed(mean, 0.0)
    assert mean < 0.01
