"""The token bucket, with time passed in, and the middleware around it."""

import asyncio
import math
from typing import Any

import pytest

from catga_bus import ConfigurationError, Err, Event, Ok, Outcome, Outgoing, RateLimiter, Request, Result
from catga_bus.resilience.rate_limiter import TokenBucket
from catga_bus.testing import eventually


class Quote(Request[int]):
    sku: str = "a"


class Other(Request[int]):
    pass


def outgoing(timeout: float | None = None) -> Outgoing:
    return Outgoing("send", timeout, None, None)


async def answer(_: Any) -> Result:
    return Ok(1)


# -- the bucket ------------------------------------------------------------------------------------------------


def test_a_full_bucket_gives_its_burst_and_then_what_comes() -> None:
    bucket = TokenBucket(2.0, 3, 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(now) for now in (0.25, 0.5, 0.5, 1.0)] == [False, True, False, True]


def test_a_quiet_time_fills_it_to_the_burst_and_no_further() -> None:
    bucket = TokenBucket(2.0, 3, 0.0)
    assert [bucket.take(1_000.0) for _ in range(4)] == [True, True, True, False]


def test_it_says_how_long_the_next_tokens_take() -> None:
    bucket = TokenBucket(4.0, 1, 0.0)
    assert bucket.seconds_until(1, 0.0) == 0.0
    assert bucket.take(0.0)
    assert bucket.seconds_until(1, 0.0) == 0.25
    assert bucket.seconds_until(3, 0.125) == 0.625


def test_who_comes_when_it_is_due_gets_a_token_whatever_adding_up_has_lost() -> None:
    bucket = TokenBucket(1_000.0, 1, 0.1)
    now = 0.1
    assert bucket.take(now)
    for _ in range(10_000):
        now += bucket.seconds_until(1, now)
        assert bucket.take(now)


def test_a_token_given_back_is_there_again_but_never_above_the_burst() -> None:
    bucket = TokenBucket(1.0, 1, 0.0)
    assert bucket.take(0.0)
    bucket.give_back()
    bucket.give_back()
    assert [bucket.take(0.0), bucket.take(0.0)] == [True, False]


# -- the middleware --------------------------------------------------------------------------------------------


async def test_over_the_limit_is_an_answer_that_names_it_and_when_to_come_again() -> None:
    now = 100.0
    limiter = RateLimiter(rate=0.5, burst=2, clock=lambda: now)
    assert [await limiter(Quote(), outgoing(), answer) for _ in range(2)] == [Ok(1)] * 2
    assert await limiter(Quote(), outgoing(), answer) == Err(
        "OVERLOADED",
        "the limit of 0.5 per second (burst 2) is reached; try again in 2,000 ms",
        {"retry_after_ms": 2_000},
        Outcome.NOT_RUN,
        retryable=True,
    )
    now = 102.0
    assert await limiter(Quote(), outgoing(), answer) == Ok(1)
    statistics = limiter.statistics()
    assert (statistics.passed, statistics.refused, statistics.waiting) == (3, 1, 0)


async def test_other_classes_than_it_is_for_are_not_counted() -> None:
    limiter = RateLimiter(rate=0.001, burst=1, only=(Quote,))
    assert [await limiter(Other(), outgoing(), answer) for _ in range(5)] == [Ok(1)] * 5
    assert await limiter(Quote(), outgoing(), answer) == Ok(1)
    assert isinstance(await limiter(Quote(), outgoing(), answer), Err)


async def test_those_that_wait_go_in_order_and_a_newcomer_does_not_overtake() -> None:
    limiter = RateLimiter(rate=200.0, burst=1, max_wait=60.0)
    order: list[str] = []

    async def note(message: Quote) -> Result:
        order.append(message.sku)
        return Ok(1)

    names = [str(number) for number in range(8)]
    results = await asyncio.gather(*(limiter(Quote(name), outgoing(60.0), note) for name in names))
    assert results == [Ok(1)] * 8
    assert order == names
    assert limiter.statistics().waiting == 0


async def test_who_could_not_be_served_in_time_does_not_wait() -> None:
    limiter = RateLimiter(rate=0.1, burst=1, max_wait=60.0)
    assert await limiter(Quote(), outgoing(), answer) == Ok(1)
    over_deadline = await limiter(Quote(), outgoing(5.0), answer)  # the token takes ten seconds
    assert isinstance(over_deadline, Err)
    limiter.max_wait = 5.0
    over_patience = await limiter(Quote(), outgoing(60.0), answer)
    assert isinstance(over_patience, Err)
    assert limiter.statistics().waiting == 0


async def test_the_number_of_those_that_wait_is_bounded() -> None:
    limiter = RateLimiter(rate=1.0, burst=1, max_wait=3_600.0, max_waiting=2)
    tasks = [asyncio.create_task(_sent(limiter)) for _ in range(5)]
    await eventually(lambda: limiter.statistics().refused == 2)
    assert limiter.statistics().waiting == 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert limiter.statistics().waiting == 0


async def _sent(limiter: RateLimiter) -> Result:
    return await limiter(Quote(), outgoing(), answer)


async def test_a_newcomer_does_not_overtake_who_waits_even_when_a_token_is_there() -> None:
    now = 0.0
    limiter = RateLimiter(rate=1.0, burst=1, max_wait=60.0, clock=lambda: now)
    assert await _sent(limiter) == Ok(1)
    first = asyncio.create_task(_sent(limiter))
    await eventually(lambda: limiter.statistics().waiting == 1)
    now = 1.0  # a token is there, and the timer of the first has not run yet
    second = asyncio.create_task(_sent(limiter))
    await eventually(lambda: limiter.statistics().waiting == 2)
    limiter._serve()
    assert await first == Ok(1)
    assert not second.done()
    now = 2.0
    limiter._serve()
    assert await second == Ok(1)


async def test_who_is_cancelled_in_the_middle_of_the_line_is_not_counted_any_more() -> None:
    limiter = RateLimiter(rate=0.1, burst=1, max_wait=3_600.0)
    assert await _sent(limiter) == Ok(1)
    tasks = [asyncio.create_task(_sent(limiter)) for _ in range(3)]
    await eventually(lambda: limiter.statistics().waiting == 3)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert limiter.statistics().waiting == 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_is_cancelled_leaves_its_place_to_those_behind() -> None:
    now = 0.0
    limiter = RateLimiter(rate=1.0, burst=1, max_wait=60.0, clock=lambda: now)
    assert await _sent(limiter) == Ok(1)
    first, second = asyncio.create_task(_sent(limiter)), asyncio.create_task(_sent(limiter))
    await eventually(lambda: limiter.statistics().waiting == 2)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    now = 1.0
    limiter._serve()
    assert await second == Ok(1)
    assert limiter.statistics().passed == 2


async def test_who_is_cancelled_in_the_moment_of_its_turn_gives_the_token_to_the_next() -> None:
    now = 0.0
    limiter = RateLimiter(rate=1.0, burst=1, max_wait=60.0, clock=lambda: now)
    assert await _sent(limiter) == Ok(1)
    first, second = asyncio.create_task(_sent(limiter)), asyncio.create_task(_sent(limiter))
    await eventually(lambda: limiter.statistics().waiting == 2)
    now = 1.0
    limiter._serve()
    first.cancel()
    assert await second == Ok(1)
    assert first.cancelled()
    assert limiter.statistics().waiting == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": 0}, "rate must be 0.001 to 1,000,000, got 0"),
        ({"rate": math.inf}, "got inf"),
        ({"rate": "5/s"}, "got '5/s'"),
        ({"rate": 1.0, "burst": 0}, "burst must be an integer from 1 to 1,000,000, got 0"),
        ({"rate": 1.0, "max_wait": -1}, "max_wait must be 0 to 3,600, got -1"),
        ({"rate": 1.0, "max_waiting": 0}, "max_waiting must be an integer from 1 to 1,000,000, got 0"),
        ({"rate": 1.0, "only": (int,)}, "RateLimiter: only must be a tuple of message classes"),
        ({"rate": 1.0, "only": ()}, "only must be a tuple of message classes, such as (Quote,), got ()"),
        ({"rate": 1.0, "only": Quote}, "only must be a tuple of message classes"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RateLimiter(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize(("rate", "burst"), [(0.5, 1), (100.0, 100), (2.5, 2)])
def test_the_burst_is_a_second_of_the_rate_unless_it_is_given(rate: float, burst: int) -> None:
    assert RateLimiter(rate=rate).burst == burst


def test_an_event_class_may_be_limited() -> None:
    class Tick(Event, durable=False):
        pass

    assert repr(RateLimiter(rate=3.0, only=[Tick])) == "RateLimiter(rate=3, burst=3, max_wait=0)"
