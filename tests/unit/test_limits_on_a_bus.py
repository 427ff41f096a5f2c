"""Limits around handlers and calls: what they turn away has not run, and the caller goes to another node."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import (
    Bulkhead,
    Bus,
    CallNext,
    Context,
    Err,
    Event,
    Ok,
    Outcome,
    Outgoing,
    OverloadedError,
    RateLimiter,
    RegistrationError,
    Request,
    Result,
    Router,
)
from catga_bus.testing import eventually


class Quote(Request[str]):
    pass


class Tick(Event, durable=False):
    pass


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[Bus]:
    """A client whose messages go to the members of a queue group in turn, the first one first."""
    async with Bus("client", url=url) as bus:
        turns = itertools.cycle((0.0, 0.5))
        bus._transport._rng.random = lambda: next(turns)  # type: ignore[union-attr]
        yield bus


def quoting(name: str, url: str, *middleware: Any, **options: Any) -> tuple[Bus, list[str]]:
    """A node that answers quotes with its id, and the ids of those that it ran."""
    bus, ran = Bus("shop", url=url, node_id=name), []

    @bus.handler(middleware=middleware, **options)
    async def quote(request: Quote, ctx: Context) -> str:
        ran.append(ctx.message_id)
        return name

    return bus, ran


# -- a refused request goes elsewhere --------------------------------------------------------------------------


async def test_what_the_limit_of_one_node_refuses_another_one_runs(url: str, client: Bus) -> None:
    limited, ran_limited = quoting("shop-1", url, RateLimiter(rate=0.001, burst=1))
    free, ran_free = quoting("shop-2", url)
    async with limited, free:
        assert await client.send(Quote()) == Ok("shop-1")
        assert await client.send(Quote()) == Ok("shop-2")
        assert await client.send(Quote()) == Ok("shop-2")  # asked the first one, which refused
        (station,) = limited.statistics().handlers.handlers
        assert (station.ok, station.turned_away, station.failed, station.refused) == (1, 1, 0, 0)
    assert (len(ran_limited), len(ran_free)) == (1, 2)
    assert client.statistics().calls.retries == 1


async def test_what_a_full_bulkhead_refuses_another_node_runs(url: str, client: Bus) -> None:
    gate = asyncio.Event()

    async def hold(message: Any, ctx: Context, call_next: CallNext) -> Result:
        result = await call_next(message)
        await gate.wait()
        return result

    full, ran_full = quoting("shop-1", url, Bulkhead(max_running=1), hold)
    free, ran_free = quoting("shop-2", url)
    async with full, free:
        first = asyncio.create_task(client.send(Quote()))
        await eventually(lambda: len(ran_full) == 1)
        assert await client.send(Quote()) == Ok("shop-2")
        assert await client.send(Quote()) == Ok("shop-2")
        gate.set()
        assert await first == Ok("shop-1")
    assert (len(ran_full), len(ran_free)) == (1, 2)


async def test_when_every_node_refuses_the_answer_is_overloaded_and_nothing_has_run(url: str, client: Bus) -> None:
    node, ran = quoting("shop-1", url, RateLimiter(rate=0.001, burst=1))
    async with node:
        assert await client.send(Quote()) == Ok("shop-1")
        result = await client.send(Quote())
    assert isinstance(result, Err)
    assert (result.code, result.outcome, result.retryable) == ("OVERLOADED", Outcome.NOT_RUN, True)
    assert (result.attempts, result.node) == (3, "shop-1")
    assert "the limit of 0.001 per second (burst 1) is reached; try again in" in result.message
    assert 0 < result.details["retry_after_ms"] <= 1_000_000
    assert len(ran) == 1


async def test_a_limit_for_the_whole_node_counts_all_of_its_handlers(url: str, client: Bus) -> None:
    node, ran = quoting("shop-1", url)
    node.middleware(RateLimiter(rate=0.001, burst=2))
    ticks: list[Tick] = []

    @node.handler
    async def tick(event: Tick) -> None:
        ticks.append(event)

    async with node:
        await client.publish(Tick())
        await eventually(lambda: len(ticks) == 1)
        assert await client.send(Quote()) == Ok("shop-1")
        assert isinstance(await client.send(Quote()), Err)
    assert len(ran) == 1


async def test_an_event_over_the_limit_is_dropped_and_counted(url: str, client: Bus) -> None:
    node, ticks = Bus("shop", url=url), []

    @node.handler(middleware=[RateLimiter(rate=0.001, burst=1)])
    async def tick(event: Tick) -> None:
        ticks.append(event)

    async with node:
        for _ in range(3):
            await client.publish(Tick())
        await eventually(lambda: node.statistics().events.dropped == 2)
        assert len(ticks) == 1


# -- what a reserved code stands for ---------------------------------------------------------------------------


def turn_away(code: str, outcome: Outcome, *, after: bool) -> Any:
    async def middleware(message: Any, ctx: Context, call_next: CallNext) -> Result:
        if after:
            await call_next(message)
        return Err(code, "not now", outcome=outcome)

    return middleware


@pytest.mark.parametrize(
    ("code", "outcome", "after", "is_busy"),
    [
        ("OVERLOADED", Outcome.NOT_RUN, False, True),
        ("CIRCUIT_OPEN", Outcome.NOT_RUN, False, True),
        ("OVERLOADED", Outcome.NOT_RUN, True, False),  # untrue: the handler has run
        ("OVERLOADED", Outcome.REFUSED, False, False),  # does not say that nothing ran
        ("DISCONNECTED", Outcome.NOT_RUN, False, False),  # nothing that another node would change
    ],
)
async def test_only_what_says_truly_that_nothing_ran_is_busy(
    url: str, client: Bus, code: str, outcome: Outcome, *, after: bool, is_busy: bool
) -> None:
    node, ran = quoting("shop-1", url, turn_away(code, outcome, after=after))
    async with node:
        result = await client.send(Quote(), timeout=10.0)
        (station,) = node.statistics().handlers.handlers
    assert isinstance(result, Err)
    if is_busy:
        assert (result.code, result.outcome) == ("OVERLOADED", Outcome.NOT_RUN)
        assert (station.turned_away, station.failed) == (3, 0)  # the first attempt and two retries
    else:
        assert (result.code, result.outcome) == ("HANDLER_ERROR", Outcome.FAILED)
        assert f"reserved code {code}" in result.message
        assert (station.turned_away, station.failed) == (0, 1)
    assert len(ran) == after


async def test_a_handler_that_returns_a_reserved_code_behind_a_limit_is_a_handler_error(url: str, client: Bus) -> None:
    node = Bus("shop", url=url)

    @node.handler(middleware=[RateLimiter(rate=100.0), Bulkhead(max_running=5)])
    async def quote(request: Quote) -> str | Err:
        return Err("OVERLOADED", "me", outcome=Outcome.NOT_RUN)

    async with node:
        result = await client.send(Quote())
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("HANDLER_ERROR", Outcome.FAILED)


async def test_what_waits_for_a_place_until_its_deadline_has_not_run(url: str, client: Bus) -> None:
    """Cut off while only middleware had seen it: it did not run, so it is tried again, and the caller learns that."""

    async def wait(message: Any, ctx: Context, call_next: CallNext) -> Result:
        await asyncio.Event().wait()
        return await call_next(message)

    node, ran = quoting("shop-1", url, wait, timeout=0.02)
    async with node:
        result = await client.send(Quote(), timeout=10.0)
        statistics = node.statistics().handlers
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("TIMEOUT", Outcome.NOT_RUN)
    assert (statistics.expired, statistics.handlers[0].failed, ran) == (3, 0, [])


async def test_limits_go_around_a_handler_in_a_thread(url: str, client: Bus) -> None:
    node = Bus("shop", url=url)

    @node.handler(middleware=[RateLimiter(rate=0.001, burst=1)])
    def quote(request: Quote) -> str:
        return "thread"

    async with node:
        assert await client.send(Quote()) == Ok("thread")
        assert isinstance(await client.send(Quote()), Err)


# -- calls -----------------------------------------------------------------------------------------------------


async def test_a_limit_on_calls_refuses_before_anything_is_sent(url: str) -> None:
    node, ran = quoting("shop-1", url)
    caller = Bus("client", url=url)
    caller.middleware(RateLimiter(rate=0.001, burst=2, only=(Quote,)), side="outbound")
    caller.middleware(RateLimiter(rate=0.001, burst=1, only=(Tick,)), side="outbound")
    async with node, caller:
        assert [await caller.send(Quote()) for _ in range(2)] == [Ok("shop-1")] * 2
        result = await caller.send(Quote())
        assert isinstance(result, Err)
        assert (result.code, result.outcome, result.attempts) == ("OVERLOADED", Outcome.NOT_RUN, 0)
        assert result.details["retry_after_ms"] > 0
        await caller.publish(Tick())
        with pytest.raises(OverloadedError, match=r"the limit of 0\.001 per second") as caught:
            await caller.publish(Tick())
        assert caught.value.outcome is Outcome.NOT_RUN
    assert len(ran) == 2


async def test_a_call_waits_for_a_place_no_longer_than_its_deadline(url: str) -> None:
    gate = asyncio.Event()
    node = Bus("shop", url=url)

    @node.handler
    async def quote(request: Quote) -> str:
        await gate.wait()
        return "done"

    caller = Bus("client", url=url)
    bulkhead = Bulkhead(max_running=1, max_waiting=5)
    caller.middleware(bulkhead, side="outbound")
    async with node, caller:
        first = asyncio.create_task(caller.send(Quote()))
        await eventually(lambda: bulkhead.statistics().running == 1)
        result = await caller.send(Quote(), timeout=0.02)
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("OVERLOADED", Outcome.NOT_RUN)
        gate.set()
        assert await first == Ok("done")
    assert bulkhead.statistics().running == 0


async def test_outbound_middleware_sees_the_time_that_is_left(url: str) -> None:
    seen: list[float] = []
    caller = Bus("client", url=url)

    @caller.middleware(side="outbound")
    async def look(message: Any, ctx: Outgoing, call_next: CallNext) -> Result:
        seen.append(ctx.remaining)
        await eventually(lambda: ctx.remaining < seen[0])
        return Err("ENOUGH")

    async with caller:
        await caller.send(Quote(), timeout=60.0)
        assert 0.0 < seen[0] <= 60.0
    assert Outgoing("publish", None, None, None).remaining == float("inf")


# -- registration ----------------------------------------------------------------------------------------------


async def test_the_middleware_of_a_handler_goes_inside_that_of_its_router_and_bus(url: str, client: Bus) -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        async def middleware(message: Any, ctx: Context, call_next: CallNext) -> Result:
            order.append(name)
            return await call_next(message)

        return middleware

    router, bus = Router(), Bus("shop", url=url)

    @router.handler(middleware=[named("own 1"), named("own 2")])
    async def quote(request: Quote) -> str:
        return "x"

    router.middleware(named("router"))
    bus.middleware(named("bus"))
    bus.include(router)
    async with bus:
        await client.send(Quote())
    assert order == ["bus", "router", "own 1", "own 2"]


async def quote(request: Quote) -> str:
    return "x"


@pytest.mark.parametrize(
    ("middleware", "text"),
    [
        (RateLimiter(rate=1.0), r"quote: middleware must be a list, such as \[RateLimiter\(rate=100.0\)\], got Rate"),
        ([RateLimiter], r"got the class RateLimiter; pass an object of it: RateLimiter\(\.\.\.\)"),
        ([3], "middleware is `async def audit.*, got 3"),
        (None, "middleware must be a list, .* got None"),
    ],
)
def test_what_is_no_list_of_middleware_is_refused(middleware: Any, text: str) -> None:
    router = Router()
    with pytest.raises(RegistrationError, match=text):
        router.handler(middleware=middleware)(quote)
    assert not router._collected.registry.handlers()


def test_an_object_without_an_async_call_is_refused() -> None:
    class Plain:
        def __call__(self, message: Any, ctx: Any, call_next: Any) -> Any: ...

    with pytest.raises(RegistrationError, match=r"Plain.__call__ .*is not `async def`"):
        Router().middleware(Plain(), side="outbound")
