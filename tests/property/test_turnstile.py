"""Callers for whom a route must be read: whoever goes through goes in the order in which they came, and all end."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from catga_bus.durability.sending.turnstile import Turnstile
from tests.virtual_time import clock, run

PATIENCE = 1.0


class SlowOutlets:
    """Outlets whose routes take a while to be read, some of them for ever; each is good for a moment."""

    def __init__(self, delays: list[float], good_for: float) -> None:
        self._delays = delays
        self._good_for = good_for
        self._until: dict[Any, float] = {}
        self.finding = 0

    def is_ready(self, outlet: Any, now: float) -> bool:
        return now < self._until.get(outlet, -1.0)

    async def make_ready(self, outlet: Any, deadline: float) -> None:
        if self.is_ready(outlet, clock()):
            return
        self.finding += 1
        assert self.finding == 1, "one after another"
        try:
            async with asyncio.timeout(deadline - clock()):
                await asyncio.sleep(self._delays[outlet])
        finally:
            self.finding -= 1
        self._until[outlet] = clock() + self._good_for


caller = st.tuples(
    st.integers(0, 2),  # its outlet
    st.sampled_from((0.0, 0.0, 0.0, 0.01, 0.3)),  # pause before it
    st.sampled_from((None, None, 0.0, 0.005, 0.1)),  # when it is cancelled
    st.integers(0, 2),  # how often it comes back
)


@settings(max_examples=300, deadline=None)
@given(
    callers=st.lists(caller, min_size=1, max_size=25),
    delays=st.lists(st.sampled_from((0.0, 0.01, 0.2, 5.0)), min_size=3, max_size=3),
    good_for=st.sampled_from((0.0, 0.05, 60.0)),
)
def test_order_is_kept_and_nobody_is_left_behind(
    callers: list[tuple[int, float, float | None, int]], delays: list[float], good_for: float
) -> None:
    run(_scenario(callers, delays, good_for))


async def _scenario(callers: list[tuple[int, float, float | None, int]], delays: list[float], good_for: float) -> None:
    outlets = SlowOutlets(delays, good_for)
    turnstile = Turnstile(outlets, clock)  # type: ignore[arg-type]
    came: list[tuple[int, int]] = []
    went: list[tuple[int, int]] = []

    async def one(number: int, outlet: int, times: int) -> None:
        for turn in range(times + 1):
            came.append((number, turn))
            try:
                await turnstile.enter(outlet, clock() + PATIENCE)  # type: ignore[arg-type]
            except TimeoutError:
                continue
            went.append((number, turn))

    tasks = []
    for number, (outlet, pause, cancelled_after, times) in enumerate(callers):
        await asyncio.sleep(pause)
        task = asyncio.ensure_future(one(number, outlet, times))
        tasks.append(task)
        if cancelled_after is not None:
            asyncio.get_running_loop().call_later(cancelled_after, task.cancel)
    await asyncio.wait(tasks, timeout=60 * PATIENCE)

    assert all(task.done() for task in tasks)
    places = {who: place for place, who in enumerate(came)}
    assert [places[who] for who in went] == sorted(places[who] for who in went)
    assert turnstile.count == 0
    assert not turnstile._waiting
    assert (turnstile._is_finding, turnstile._passing) == (False, 0)
