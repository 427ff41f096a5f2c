"""The places of a bulkhead, and the middleware around them."""

import asyncio
from typing import Any

import pytest

from catga_bus import Bulkhead, ConfigurationError, Err, Ok, Outcome, Outgoing, Request, Result
from catga_bus.resilience.bulkhead import Places
from catga_bus.testing import eventually


class Work(Request[int]):
    name: str = ""


class Other(Request[int]):
    pass


class Rig:
    """A bulkhead, and work that goes on until it is told to end."""

    def __init__(self, **options: Any) -> None:
        self.bulkhead = Bulkhead(**options)
        self.running: dict[str, asyncio.Future[Result]] = {}
        self.tasks: dict[str, asyncio.Task[Result]] = {}

    def start(self, *names: str, timeout: float | None = None) -> None:
        for name in names:
            ctx = Outgoing("send", timeout, None, None)
            self.tasks[name] = asyncio.create_task(self._through(Work(name), ctx))

    async def _through(self, message: Work, ctx: Outgoing) -> Result:
        return await self.bulkhead(message, ctx, self._work)

    async def _work(self, message: Work) -> Result:
        self.running[message.name] = asyncio.get_running_loop().create_future()
        try:
            return await self.running[message.name]
        finally:
            del self.running[message.name]

    def end(self, name: str) -> None:
        self.running[name].set_result(Ok(1))

    async def is_at(self, *running: str, waiting: int = 0) -> None:
        def holds() -> bool:
            statistics = self.bulkhead.statistics()
            is_right = (statistics.running, statistics.waiting) == (len(running), waiting)
            return is_right and list(self.running) == list(running)

        await eventually(holds, what=f"{running} running and {waiting} waiting")

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.gather(self.tasks[name], return_exceptions=True)


def test_a_place_that_is_left_goes_to_the_first_who_waits() -> None:
    places: Places[str] = Places(1, 2)
    assert places.enter()
    assert not places.enter()
    assert [places.queue(name) for name in "abc"] == [True, True, False]
    places.give_up("a")
    assert places.leave() == "b"
    assert places.running == 1
    assert places.leave() is None
    assert places.running == 0


async def test_so_many_run_so_many_wait_and_the_rest_is_refused() -> None:
    rig = Rig(max_running=2, max_waiting=1)
    rig.start("a", "b", "c", "d")
    assert await rig.tasks["d"] == Err(
        "OVERLOADED",
        "the bulkhead is full: 2 running and 1 waiting",
        None,
        Outcome.NOT_RUN,
        retryable=True,
    )
    await rig.is_at("a", "b", waiting=1)
    rig.end("a")
    await rig.is_at("b", "c")
    rig.end("b")
    rig.end("c")
    await rig.is_at()
    statistics = rig.bulkhead.statistics()
    assert (statistics.passed, statistics.refused) == (3, 1)


async def test_those_that_wait_go_in_order() -> None:
    rig = Rig(max_running=1, max_waiting=3)
    rig.start("a", "b", "c", "d")
    for name in "abcd":
        await eventually(lambda name=name: list(rig.running) == [name])  # type: ignore[misc]
        rig.end(name)
    await rig.is_at()


async def test_what_raises_leaves_its_place() -> None:
    bulkhead = Bulkhead(max_running=1)

    async def fail(_: Any) -> Result:
        raise ValueError("x")

    for _ in range(3):
        with pytest.raises(ValueError, match="x"):
            await bulkhead(Work(), Outgoing("send", None, None, None), fail)
    assert bulkhead.statistics().running == 0


async def test_who_is_cancelled_while_running_or_waiting_leaves_nothing_behind() -> None:
    rig = Rig(max_running=1, max_waiting=3)
    rig.start("a", "b", "c")
    await rig.is_at("a", waiting=2)
    await rig.cancel("b")
    await rig.is_at("a", waiting=1)
    await rig.cancel("a")
    await rig.is_at("c")
    await rig.cancel("c")
    await rig.is_at()


async def test_who_is_cancelled_in_the_moment_of_its_turn_hands_the_place_on() -> None:
    rig = Rig(max_running=1, max_waiting=3)
    rig.start("a", "b", "c")
    await rig.is_at("a", waiting=2)
    rig.end("a")
    asyncio.get_running_loop().call_soon(rig.tasks["b"].cancel)  # after a has left, before b is awake
    await rig.is_at("c")
    assert rig.tasks["b"].cancelled()
    rig.end("c")
    await rig.is_at()


async def test_a_place_left_while_the_first_in_line_is_being_cancelled_goes_to_the_second() -> None:
    rig = Rig(max_running=1, max_waiting=3)
    rig.start("a", "b", "c")
    await rig.is_at("a", waiting=2)
    rig.tasks["a"].cancel()
    rig.tasks["b"].cancel()
    await rig.is_at("c")
    rig.end("c")
    await rig.is_at()


async def test_nobody_waits_beyond_its_deadline() -> None:
    rig = Rig(max_running=1, max_waiting=1)
    rig.start("a")
    await rig.is_at("a")
    rig.start("b", timeout=0.01)
    result = await rig.tasks["b"]
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("OVERLOADED", Outcome.NOT_RUN)
    await rig.is_at("a")
    rig.end("a")
    await rig.is_at()


async def test_other_classes_than_it_is_for_are_not_counted() -> None:
    bulkhead = Bulkhead(max_running=1, only=(Work,))

    async def nested(_: Any) -> Result:
        return Ok(bulkhead.statistics().running)

    ctx = Outgoing("send", None, None, None)
    assert await bulkhead(Other(), ctx, nested) == Ok(0)
    assert await bulkhead(Work(), ctx, nested) == Ok(1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_running": 0}, "max_running must be an integer from 1 to 100,000, got 0"),
        ({"max_running": 2.0}, "got 2.0"),
        ({"max_running": 1, "max_waiting": -1}, "max_waiting must be an integer from 0 to 1,000,000, got -1"),
        ({"max_running": 1, "only": "Quote"}, "Bulkhead: only must be a tuple of message classes"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Bulkhead(**options)
    assert text in str(caught.value)
