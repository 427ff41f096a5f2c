"""The pulse: gaps of a loop, told once and in whichever order the loop comes to itself."""

import pytest

from catga_bus.pulse import GAP, TICK, Pulse
from catga_bus.testing import eventually


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def test_a_gap_is_told_once_with_its_length(clock: _Clock) -> None:
    gaps: list[float] = []
    pulse = Pulse(clock, gaps.append)
    clock.now += TICK + GAP * 0.9
    pulse.beat(clock.now)
    assert gaps == []
    clock.now += 3.0
    assert clock.now > pulse.late_at
    pulse.beat(clock.now)
    pulse.beat(clock.now)
    assert gaps == [pytest.approx(3.0 - TICK)]


def test_stall_grows_while_the_loop_does_not_tick(clock: _Clock) -> None:
    pulse = Pulse(clock, lambda gap: None)
    assert pulse.stall(clock.now + TICK) == 0.0
    assert pulse.stall(clock.now + 5.0) == pytest.approx(5.0 - 2 * TICK)
    pulse.beat(clock.now + 5.0)
    assert pulse.stall(clock.now + 5.0) == 0.0


def test_the_longest_delay_is_taken_once(clock: _Clock) -> None:
    pulse = Pulse(clock, lambda gap: None)
    pulse.beat(clock.now + TICK + 0.2)
    pulse.beat(clock.now + TICK * 2 + 0.3)
    assert pulse.take_longest() == pytest.approx(0.2)
    assert pulse.take_longest() == 0.0


async def test_it_ticks_on_the_loop_until_it_is_stopped(clock: _Clock) -> None:
    pulse = Pulse(clock, lambda gap: None)
    pulse.start()
    clock.now += 7.0
    await eventually(lambda: pulse.last == 107.0)
    pulse.stop()
