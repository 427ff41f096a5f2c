"""What a user sees of a bus, on the broker inside the process."""

import asyncio
import contextvars
import gc
import math
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import (
    BlockingBus,
    BlockingContext,
    Bus,
    BusStateError,
    CallError,
    CallNext,
    Command,
    ConfigurationError,
    Context,
    DisconnectedError,
    Err,
    Event,
    InvalidMessageError,
    Ok,
    Outgoing,
    Refused,
    RegistrationError,
    Request,
    Result,
    Router,
    TooLargeError,
)
from catga_bus.codec import Gate
from catga_bus.testing import broker_of, eventually
from catga_bus.wire import Kind, Status, join_batch


class Price(msgspec.Struct):
    cents: int


@dataclass
class Size:
    width: int


class Quote(Request[Price]):
    sku: str


class Measure(Request[Size | None]):
    sku: str


class Wait(Request[str]):
    seconds: float


class Pay(Request[None], idempotent=False):
    cents: int


class Block(Request[str]):
    seconds: float


class Tick(Event, durable=False):
    number: int


class Flushed(Event):
    number: int


class Stored(Event):
    number: int


class Debit(Command[None]):
    cents: int


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[Bus]:
    async with Bus("client", url=url) as bus:
        yield bus


def service(url: str, **options: Any) -> Bus:
    """A bus with one handler of each kind."""
    bus = Bus("shop", url=url, **options)

    @bus.handler
    async def quote(request: Quote) -> Price:
        return Price(len(request.sku))

    @bus.handler
    async def measure(request: Measure) -> Size | None:
        return Size(len(request.sku)) if request.sku else None

    return bus


# -- requests ----------------------------------------------------------------------------------------------


async def test_a_request_is_answered_with_its_type(url: str, client: Bus) -> None:
    async with service(url):
        assert await client.send(Quote("sku-9")) == Ok(Price(5))
        assert (await client.send(Measure("abc"))).unwrap() == Size(3)
        assert (await client.send(Measure(""))).unwrap() is None


async def test_many_requests_at_once_share_batches_and_each_gets_its_own_answer(url: str, client: Bus) -> None:
    async with service(url):
        results = await asyncio.gather(*(client.send(Quote("x" * n)) for n in range(500)))
        assert [result.unwrap().cents for result in results] == list(range(500))
        sent = client.statistics().sent
        assert sent.frames == 500
        assert sent.batches == math.ceil(500 / 64)


async def test_a_refusal_is_a_value_whether_returned_or_raised(url: str, client: Bus) -> None:
    bus = Bus("shop", url=url)

    @bus.handler
    async def pay(request: Pay) -> Err | None:
        if request.cents > 100:
            return Err("TOO_MUCH", "over the limit", {"limit": 100})
        raise Refused("TOO_LITTLE", "under the limit", retryable=True)

    async with bus:
        much, little = await client.send(Pay(200)), await client.send(Pay(1))
    assert isinstance(much, Err)
    assert (much.code, much.message, much.details, much.outcome) == (
        "TOO_MUCH",
        "over the limit",
        {"limit": 100},
        "refused",
    )
    assert isinstance(little, Err)
    assert (little.code, little.outcome, little.retryable, little.node) == ("TOO_LITTLE", "refused", True, bus.node_id)
    with pytest.raises(Refused, match="TOO_LITTLE"):
        little.unwrap()


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("raise", "raised ValueError: no"),
        ("wrong type", "returned the wrong type: expected Price, got str"),
        ("reserved", "reserved code TIMEOUT"),
        ("unencodable", "cannot be encoded"),
        ("cancel", "was cancelled"),
        ("wrong inside", "answered what the message does not promise"),
    ],
)
async def test_what_a_handler_does_wrong_is_a_handler_error(url: str, client: Bus, action: str, text: str) -> None:
    bus = Bus("shop", url=url)

    @bus.handler
    async def quote(request: Quote) -> Any:
        match action:
            case "raise":
                raise ValueError("no")
            case "wrong type":
                return "cheap"
            case "reserved":
                return Err("TIMEOUT", "not yours")
            case "unencodable":
                return Price(object())  # type: ignore[arg-type]
            case "wrong inside":
                return Price("cheap")  # type: ignore[arg-type]
        raise asyncio.CancelledError

    async with bus:
        result = await client.send(Quote("a"))
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("HANDLER_ERROR", "failed")
    assert text in result.message


async def test_a_wrong_field_is_named_with_what_was_expected(url: str, client: Bus) -> None:
    async with service(url):
        result = await client.send(Quote(3))  # type: ignore[arg-type]
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("INVALID_MESSAGE", "not_run")
    assert "sku" in result.message
    assert "expected `str`, got `int`" in result.message


async def test_a_request_that_cannot_be_encoded_never_leaves(url: str, client: Bus) -> None:
    result = await client.send(Quote(object()))  # type: ignore[arg-type]
    assert isinstance(result, Err)
    assert (result.code, result.outcome, result.attempts) == ("INVALID_MESSAGE", "not_run", 0)
    assert client.statistics().calls.in_flight == 0


async def test_what_is_too_large_is_refused_before_the_wire(url: str, client: Bus) -> None:
    async with service(url):
        result = await client.send(Quote("x" * 2_000_000))
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("TOO_LARGE", "not_run")
        assert await client.send(Quote("x")) == Ok(Price(1))


async def test_an_answer_that_is_too_large_has_failed(url: str, client: Bus) -> None:
    bus = Bus("shop", url=url)

    @bus.handler
    async def wait(request: Wait) -> str:
        return "x" * 2_000_000

    async with bus:
        result = await client.send(Wait(0))
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("TOO_LARGE", "failed")


async def test_an_unknown_type_has_no_handler(client: Bus) -> None:
    result = await client.send(Quote("a"))
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("NO_HANDLER", "not_run")
    assert result.attempts > 1


async def test_a_handler_that_appears_within_the_patience_is_found(url: str, client: Bus) -> None:
    call = asyncio.create_task(client.send(Quote("abc")))
    await eventually(lambda: client.statistics().calls.in_flight == 1)
    async with service(url):
        assert await call == Ok(Price(3))


async def test_a_handler_is_cut_off_at_the_callers_deadline(url: str, client: Bus) -> None:
    bus, cut = Bus("shop", url=url), asyncio.Event()

    @bus.handler
    async def wait(request: Wait) -> str:
        try:
            await asyncio.sleep(request.seconds)
        except asyncio.CancelledError:
            cut.set()
            raise
        return "done"

    async with bus:
        result = await client.send(Wait(60), timeout=0.05)
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("TIMEOUT", "unknown")
        await asyncio.wait_for(cut.wait(), 5)
        assert await client.send(Wait(0.0)) == Ok("done")


async def test_a_handlers_own_timeout_is_shorter_than_the_callers(url: str, client: Bus) -> None:
    bus = Bus("shop", url=url)

    @bus.handler(timeout=0.05)
    async def wait(request: Wait) -> str:
        await asyncio.sleep(request.seconds)
        return "done"

    async with bus:
        result = await client.send(Wait(60), timeout=30)
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("TIMEOUT", "unknown")
    assert "cut off" in result.message


async def test_expired_requests_are_not_started(url: str, client: Bus) -> None:
    bus, started = Bus("shop", url=url), []

    @bus.handler(concurrency=1)
    async def wait(request: Wait) -> str:
        started.append(request.seconds)
        await asyncio.sleep(request.seconds)
        return "done"

    async with bus:
        first = asyncio.create_task(client.send(Wait(0.3), timeout=5))
        await eventually(lambda: started == [0.3])
        late = await client.send(Wait(0.0), timeout=0.05)
        assert isinstance(late, Err)
        assert late.code == "TIMEOUT"
        assert await first == Ok("done")
        await eventually(lambda: bus.statistics().handlers.intake == 0)
        assert started == [0.3]
        assert bus.statistics().handlers.expired == 1


async def test_concurrency_bounds_how_many_run_at_once(url: str, client: Bus) -> None:
    bus, now, most = Bus("shop", url=url), 0, 0

    @bus.handler(concurrency=3)
    async def wait(request: Wait) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return "done"

    async with bus:
        results = await asyncio.gather(*(client.send(Wait(0)) for _ in range(50)))
    assert all(result == Ok("done") for result in results)
    assert most == 3


async def test_over_its_bounds_a_node_is_busy_and_callers_hear_of_it(url: str, client: Bus) -> None:
    bus, gate = Bus("shop", url=url, intake=4), asyncio.Event()

    @bus.handler
    async def wait(request: Wait) -> str:
        await gate.wait()
        return "done"

    async with bus:
        calls = [asyncio.create_task(client.send(Wait(0), timeout=20)) for _ in range(10)]
        await eventually(lambda: sum(call.done() for call in calls) == 6)
        refused = [call.result() for call in calls if call.done()]
        assert all(isinstance(one, Err) and one.code == "OVERLOADED" and one.outcome == "not_run" for one in refused)
        assert bus.statistics().handlers.busy >= 6
        gate.set()
        assert [await call for call in calls].count(Ok("done")) == 4


async def test_the_intake_is_bounded_in_bytes(url: str, client: Bus) -> None:
    bus, gate = Bus("shop", url=url, intake_bytes=65_536), asyncio.Event()

    @bus.handler
    async def quote(request: Quote) -> Price:
        await gate.wait()
        return Price(1)

    async with bus:
        calls = [asyncio.create_task(client.send(Quote("x" * 30_000), timeout=20)) for _ in range(4)]
        await eventually(lambda: sum(call.done() for call in calls) == 2)
        assert bus.statistics().handlers.intake_bytes <= 65_536
        gate.set()
        assert sum([isinstance(await call, Ok) for call in calls]) == 2


async def test_a_busy_node_is_tried_again(url: str, client: Bus) -> None:
    bus = Bus("shop", url=url, intake=1)

    @bus.handler
    async def wait(request: Wait) -> str:
        await asyncio.sleep(0.01)
        return "done"

    async with bus:
        results = await asyncio.gather(*(client.send(Wait(0)) for _ in range(2)))
    assert results == [Ok("done"), Ok("done")]
    assert client.statistics().calls.retries >= 1


async def test_a_cancelled_call_leaves_nothing_behind(url: str, client: Bus) -> None:
    bus, gate = Bus("shop", url=url), asyncio.Event()

    @bus.handler
    async def wait(request: Wait) -> str:
        await gate.wait()
        return "done"

    async with bus:
        call = asyncio.create_task(client.send(Wait(0)))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert client.statistics().calls.in_flight == 0
        gate.set()
        await eventually(lambda: client.statistics().calls.late_answers == 1)


async def test_one_node_can_be_named(url: str, client: Bus) -> None:
    async with service(url) as one, service(url, node_id="odd name.*>") as two:
        for bus in (one, two):
            for _ in range(5):
                assert await client.send(Quote("a"), node=bus.node_id) == Ok(Price(1))
            assert bus.statistics().requests.requests == 5
        result = await client.send(Quote("a"), node="nobody", timeout=0.1)
        assert isinstance(result, Err)
        assert result.code == "NO_HANDLER"
        assert "nobody" in result.message


async def test_a_named_node_without_the_handler_says_so(url: str, client: Bus) -> None:
    async with service(url) as bus:
        result = await client.send(Wait(0), node=bus.node_id)
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("NO_HANDLER", "not_run")


async def test_nodes_of_a_service_share_the_requests(url: str, client: Bus) -> None:
    async with service(url) as one, service(url) as two:
        for _ in range(200):
            await client.send(Quote("a"))
        shares = [bus.statistics().requests.requests for bus in (one, two)]
    assert sum(shares) == 200
    assert min(shares) > 50  # each gets half; 50 of 200 is seven standard deviations away


@pytest.mark.parametrize("name", ["", "x" * 5_120])
def test_a_type_name_has_bounds(name: str) -> None:
    with pytest.raises(ConfigurationError, match="type_name must be 1 to 1,024"):

        class Odd(Request[int], type_name=name): ...


@pytest.mark.parametrize("name", ["a.b", "with space", "*", ">", "\x00\n", "ü" * 100, "x" * 1_024])
async def test_any_type_name_travels(url: str, client: Bus, name: str) -> None:
    class Odd(Request[str], type_name=name):
        pass

    bus = Bus("shop", url=url)

    @bus.handler
    async def odd(request: Odd, ctx: Context) -> str:
        return ctx.message_type

    async with bus:
        assert await client.send(Odd()) == Ok(name)
        assert await client.send(Odd(), node=bus.node_id) == Ok(name)


# -- threads -----------------------------------------------------------------------------------------------


async def test_a_def_handler_runs_in_a_thread_with_a_blocking_context(url: str, client: Bus) -> None:
    bus = service(url)

    @bus.handler
    def block(request: Block, ctx: BlockingContext) -> str:
        inner = ctx.send(Quote("four"))
        return f"{threading.current_thread() is threading.main_thread()} {inner.unwrap().cents} {ctx.node}"

    async with bus:
        assert await client.send(Block(0)) == Ok(f"False 4 {bus.node_id}")


async def test_a_thread_that_runs_on_keeps_its_slot_and_is_counted(url: str, client: Bus) -> None:
    bus, release = Bus("shop", url=url), threading.Event()

    @bus.handler(concurrency=1, timeout=0.05)
    def block(request: Block) -> str:
        if request.seconds:
            release.wait(10)
        return "done"

    async with bus:
        result = await client.send(Block(1))
        assert isinstance(result, Err)
        assert result.code == "TIMEOUT"
        (station,) = bus.statistics().handlers.handlers
        assert (station.stuck, station.running) == (1, 1)
        waiting = asyncio.create_task(client.send(Block(0)))
        await eventually(lambda: bus.statistics().handlers.handlers[0].waiting == 1)
        release.set()
        assert await waiting == Ok("done")
        await eventually(lambda: bus.statistics().handlers.handlers[0].stuck == 0)


async def test_threads_see_the_context_variables_of_the_middleware(url: str, client: Bus) -> None:
    bus: Bus = Bus("shop", url=url)
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    @bus.middleware
    async def tag(message: Any, ctx: Context, call_next: CallNext) -> Result:
        variable.set(ctx.message_id)
        return await call_next(message)

    @bus.handler
    def block(request: Block, ctx: BlockingContext) -> str:
        return str(variable.get() == ctx.message_id)

    async with bus:
        assert await client.send(Block(0)) == Ok("True")


# -- context -----------------------------------------------------------------------------------------------


async def test_the_context_tells_what_it_is_about_and_continues_deadline_and_trace(url: str, client: Bus) -> None:
    bus = Bus("shop", url=url)
    seen: dict[str, Context] = {}
    inner_remaining: list[float] = []

    @bus.handler
    async def wait(request: Wait, ctx: Context) -> str:
        seen["wait"] = ctx
        result = await ctx.send(Quote("a"), timeout=60)
        await ctx.broadcast(Flushed(1))
        await ctx.publish(Tick(2))
        return str(result.unwrap().cents)

    @bus.handler
    async def quote(request: Quote, ctx: Context) -> Price:
        inner_remaining.append(ctx.remaining)
        seen["quote"] = ctx
        return Price(7)

    @bus.handler
    async def flushed(event: Flushed, ctx: Context) -> None:
        seen["flushed"] = ctx

    @bus.handler
    async def tick(event: Tick, ctx: Context) -> None:
        seen["tick"] = ctx

    async with bus:
        assert await client.send(Wait(0), timeout=2.0) == Ok("7")
        await eventually(lambda: len(seen) == 4)
    outer = seen["wait"]
    assert (outer.attempt, outer.node, outer.sender, outer.message_type) == (1, bus.node_id, client.node_id, "Wait")
    assert 0 < inner_remaining[0] <= 2.0
    assert 0 < seen["flushed"].remaining <= 30.0
    assert len({ctx.message_id for ctx in seen.values()}) == 4
    assert "Wait" in repr(outer)


async def test_the_key_travels(url: str, client: Bus) -> None:
    class Keyed(Request[str], partition_by="account"):
        account: int

    bus = Bus("shop", url=url)

    @bus.handler
    async def keyed(request: Keyed, ctx: Context) -> str:
        return repr(ctx.key)

    async with bus:
        assert await client.send(Keyed(42)) == Ok("'42'")


# -- events ------------------------------------------------------------------------------------------------


async def test_a_broadcast_reaches_every_node_and_a_tick_one_of_each_service(url: str, client: Bus) -> None:
    seen: dict[str, list[str]] = {}

    def node(name: str, of: str) -> Bus:
        bus = Bus(of, url=url, node_id=name)
        seen[name] = []

        @bus.handler
        async def tick(event: Tick) -> None:
            seen[name].append(f"tick{event.number}")

        @bus.handler
        async def flushed(event: Flushed) -> None:
            seen[name].append(f"flushed{event.number}")

        return bus

    async with node("a1", "a"), node("a2", "a"), node("b1", "b"):
        await client.broadcast(Flushed(1))
        for number in range(20):
            await client.publish(Tick(number))
        await eventually(lambda: sum(map(len, seen.values())) == 3 + 40)
    assert all(names.count("flushed1") == 1 for names in seen.values())
    assert sorted(seen["a1"] + seen["a2"]) == sorted(["flushed1"] * 2 + [f"tick{n}" for n in range(20)])
    assert len(seen["b1"]) == 21


async def test_broadcasts_of_one_sender_are_handled_one_after_the_other(url: str, client: Bus) -> None:
    bus, order, running = Bus("shop", url=url), [], 0

    @bus.handler
    async def flushed(event: Flushed) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0.002 if event.number % 2 else 0)
        order.append(event.number)
        running -= 1

    async with bus:
        for number in range(50):
            await client.broadcast(Flushed(number))
        await eventually(lambda: len(order) == 50)
    assert order == list(range(50))


async def test_broadcasts_of_two_senders_do_not_wait_for_each_other(url: str, client: Bus) -> None:
    bus, gate, seen = Bus("shop", url=url), asyncio.Event(), []

    @bus.handler
    async def flushed(event: Flushed) -> None:
        if event.number == 0:
            await gate.wait()
        seen.append(event.number)

    async with bus, Bus("other", url=url) as other:
        await client.broadcast(Flushed(0))
        await client.broadcast(Flushed(1))
        await other.broadcast(Flushed(2))
        await eventually(lambda: seen == [2])
        gate.set()
        await eventually(lambda: seen == [2, 0, 1])


async def test_several_handlers_of_a_tick_each_get_it(url: str, client: Bus) -> None:
    bus, seen = Bus("shop", url=url), []

    @bus.handler
    async def one(event: Tick) -> None:
        seen.append("one")

    @bus.handler
    async def two(event: Tick) -> None:
        seen.append("two")

    async with bus:
        await client.publish(Tick(1))
        await eventually(lambda: sorted(seen) == ["one", "two"])


async def test_what_a_call_cannot_carry_is_refused_with_the_fix(client: Bus) -> None:
    with pytest.raises(ConfigurationError, match="Quote is a Request"):
        await client.broadcast(Quote("a"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Quote is a Request"):
        await client.enqueue(Quote("a"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Tick is an Event"):
        await client.enqueue(Tick(1))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Debit is a Command"):
        await client.publish(Debit(1))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is not stored"):
        await client.publish(Tick(1), key="a")
    with pytest.raises(ConfigurationError, match="leave out key="):
        await client.send(Quote("a"), key="b")
    with pytest.raises(ConfigurationError, match="is not a message class"):
        await client.send("hello")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Tick"):
        await client.send(Tick(1))  # type: ignore[arg-type]


async def test_events_too_large_or_not_encodable_raise(client: Bus) -> None:
    class Big(Event, durable=False):
        text: Any

    with pytest.raises(TooLargeError):
        await client.publish(Big("x" * 2_000_000))
    with pytest.raises(InvalidMessageError):
        await client.broadcast(Big(object()))


# -- middleware --------------------------------------------------------------------------------------------


async def test_middleware_wraps_handlers_and_calls_from_the_outside_in(url: str) -> None:
    bus, caller = Bus("shop", url=url), Bus("client", url=url)
    order: list[str] = []

    def inbound(name: str) -> Any:
        async def middleware(message: Any, ctx: Context, call_next: CallNext) -> Result:
            order.append(f"{name}>")
            result = await call_next(message)
            order.append(f"<{name} {type(result).__name__}")
            return result

        return middleware

    bus.middleware(inbound("outer"))
    bus.middleware(inbound("inner"))

    @caller.middleware(side="outbound")
    async def doubled(message: Any, ctx: Outgoing, call_next: CallNext) -> Result:
        order.append(f"{ctx.operation}>")
        if isinstance(message, Quote):
            message = Quote(message.sku * 2)
        return await call_next(message)

    @bus.handler
    async def quote(request: Quote) -> Price:
        if not request.sku:
            raise ValueError("empty")
        return Price(len(request.sku))

    @bus.handler
    async def tick(event: Tick) -> None:
        order.append("tick")

    async with bus, caller:
        assert await caller.send(Quote("ab")) == Ok(Price(4))
        assert order == ["send>", "outer>", "inner>", "<inner Ok", "<outer Ok"]
        order.clear()
        result = await caller.send(Quote(""))
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("HANDLER_ERROR", "failed")
        assert "raised ValueError: empty" in result.message
        assert order[-1] == "<outer Err"
        order.clear()
        await caller.publish(Tick(1))
        await eventually(lambda: order[-1:] == ["<outer Ok"])
        assert order[:3] == ["publish>", "outer>", "inner>"]


async def test_middleware_may_answer_itself(url: str, client: Bus) -> None:
    bus = service(url)

    @bus.middleware
    async def guard(message: Any, ctx: Context, call_next: CallNext) -> Result:
        return Err("FORBIDDEN", "not today")

    async with bus:
        result = await client.send(Quote("a"))
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("FORBIDDEN", "refused")


async def test_a_router_brings_its_handlers_and_middleware(url: str, client: Bus) -> None:
    router, bus, seen = Router(), service(url), []

    @router.middleware
    async def note(message: Any, ctx: Context, call_next: CallNext) -> Result:
        seen.append(type(message).__name__)
        return await call_next(message)

    @router.handler
    async def wait(request: Wait) -> str:
        return "routed"

    bus.include(router)
    async with bus:
        assert await client.send(Wait(0)) == Ok("routed")
        assert await client.send(Quote("a")) == Ok(Price(1))
    assert seen == ["Wait"]


# -- life --------------------------------------------------------------------------------------------------


async def test_a_bus_says_what_state_it_is_in(url: str) -> None:
    bus = service(url)
    with pytest.raises(BusStateError, match="not started"):
        await bus.send(Quote("a"))
    async with bus:
        with pytest.raises(BusStateError, match="starts once"):
            await bus.start()
        with pytest.raises(RegistrationError, match="has started"):

            @bus.handler
            async def wait(request: Wait) -> str:
                return ""

    with pytest.raises(BusStateError, match="not started; make a new one"):
        await bus.send(Quote("a"))
    await bus.drain()
    await bus.close()


async def test_a_drain_answers_what_has_arrived(url: str, client: Bus) -> None:
    bus = Bus("shop", url=url)

    @bus.handler
    async def wait(request: Wait) -> str:
        await asyncio.sleep(request.seconds)
        return "done"

    await bus.start()
    calls = [asyncio.create_task(client.send(Wait(0.1))) for _ in range(5)]
    await eventually(lambda: bus.statistics().handlers.running == 5)
    await bus.drain()
    assert await asyncio.gather(*calls) == [Ok("done")] * 5


async def test_a_drain_ends_in_time_with_a_handler_that_never_does(url: str, client: Bus) -> None:
    bus, release = Bus("shop", url=url, drain_timeout=0.05), threading.Event()

    @bus.handler
    async def wait(request: Wait) -> str:
        while not release.is_set():
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                continue
        return ""

    await bus.start()
    call = asyncio.create_task(client.send(Wait(0), timeout=20))
    await eventually(lambda: bus.statistics().handlers.running == 1)
    began = time.monotonic()
    await bus.drain()
    assert time.monotonic() - began < 10
    call.cancel()
    release.set()
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            task.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_closing_ends_waiting_calls_honestly(url: str) -> None:
    caller = Bus("client", url=url)
    bus, gate = Bus("shop", url=url), asyncio.Event()

    @bus.handler
    async def wait(request: Wait) -> str:
        await gate.wait()
        return ""

    async with bus:
        await caller.start()
        call = asyncio.create_task(caller.send(Wait(0)))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        await caller.close()
        result = await call
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("DISCONNECTED", "unknown")
        gate.set()


async def test_an_operator_may_override_address_and_id_before_the_start(url: str) -> None:
    bus = service("memory://elsewhere")
    bus.override(url=url, node_id="shop-1")
    with pytest.raises(ConfigurationError, match="node_id"):
        bus.override(node_id="")
    async with bus, Bus("client", url=url) as client:
        assert await client.send(Quote("a"), node="shop-1") == Ok(Price(1))
        with pytest.raises(BusStateError, match="override before start"):
            bus.override(node_id="shop-2")


async def test_two_buses_of_a_process_share_nothing(url: str) -> None:
    async with service(url) as one, service(f"memory://{uuid4().hex}") as two:
        assert await one.send(Quote("a")) == Ok(Price(1))
        assert two.statistics().requests.requests == 0


async def test_namespaces_do_not_hear_each_other(url: str) -> None:
    async with service(url, namespace="blue"), Bus("client", url=url, namespace="green") as client:
        result = await client.send(Quote("a"), timeout=0.05)
        assert isinstance(result, Err)
        assert result.code == "NO_HANDLER"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"intak": 3}, "unknown option 'intak'"),
        ({"intake": 0}, "intake must be 1 to 1,000,000, got 0"),
        ({"intake": "many"}, "wrong type"),
        ({"namespace": "a.b"}, "namespace"),
        ({"node_id": ""}, "node_id"),
        ({"inbox_prefix": "x" * 200}, "inbox_prefix"),
        ({"url": " , "}, "url must name a server"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Bus("shop", **options)


@pytest.mark.parametrize("name", ["", "x" * 5_120, "ü" * 101, "\ud800", None, 3])
def test_names_of_services_and_nodes_have_bounds(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="service must be 1 to 200 bytes"):
        Bus(name)
    if name is None:
        return
    with pytest.raises(ConfigurationError, match="node_id must be 1 to 200 bytes"):
        Bus("shop", node_id=name)


@pytest.mark.parametrize("timeout", [0, -1, 1e30, math.inf, math.nan])
async def test_a_timeout_is_a_number_of_seconds_above_zero(client: Bus, timeout: float) -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        await client.send(Quote("a"), timeout=timeout)


@pytest.mark.parametrize("inbox", [None, "", "$JS.API.INFO", "catga.rpc.Quote", "elsewhere.a", "_INBOX.", "_INBOX.*"])
async def test_a_batch_that_may_not_be_answered_where_it_asks_is_not_run(
    url: str, client: Bus, inbox: str | None
) -> None:
    bus = service(url)
    async with bus:
        frame = msgspec.msgpack.encode(("id-1", "Quote", None, 1_000, 1, None, Quote("a")))
        payload = join_batch(Kind.MESSAGES, ("stranger", inbox, 1), [frame])
        assert client._node is not None
        client._node.transport.publish("catga.rpc.Quote", payload)
        await eventually(lambda: bus.statistics().requests.rejected == 1)
        assert await client.send(Quote("a")) == Ok(Price(1))
        assert bus.statistics().handlers.handlers[0].ok == 1


async def test_a_frame_of_another_type_than_its_subject_is_not_run(url: str, client: Bus) -> None:
    bus, seen = service(url), []

    @bus.handler
    async def stored(event: Stored) -> None:
        seen.append(event)

    @bus.handler
    async def tick(event: Tick) -> None:
        seen.append(event)

    async with bus:
        assert client._node is not None
        transport, answers = client._node.transport, []
        await transport.subscribe("_INBOX.stranger", lambda _, payload, *__: answers.append(payload))
        body = msgspec.msgpack.encode(("id-1", "Measure", None, 1_000, 1, None, Measure("a")))
        payload = join_batch(Kind.MESSAGES, ("stranger", "_INBOX.stranger", 1), [body])
        transport.publish("catga.rpc.Quote", payload)
        await eventually(lambda: len(answers) == 1)
        (frame,) = Gate().answers(answers[0]).frames
        assert frame.status == Status.INVALID
        for name, event in (("Stored", Stored(1)), ("Tick", Tick(1))):
            body = msgspec.msgpack.encode(("id-2", name, None, None, 1, None, event))
            transport.publish("catga.tick.Tick", join_batch(Kind.MESSAGES, ("stranger", None, 1), [body]))
        await eventually(lambda: len(seen) == 1)
        assert seen == [Tick(1)]
        assert all(one.ok == 0 for one in bus.statistics().handlers.handlers if one.type_name in ("Measure", "Stored"))


async def test_one_slow_message_does_not_keep_the_bytes_of_its_batch_mates(url: str, client: Bus) -> None:
    bus, gate = Bus("shop", url=url), asyncio.Event()

    @bus.handler
    async def quote(request: Quote) -> Price:
        if request.sku == "slow":
            await gate.wait()
        return Price(1)

    async with bus:
        calls = [asyncio.create_task(client.send(Quote(sku))) for sku in ("slow", *["x" * 10_000] * 20)]
        await eventually(lambda: bus.statistics().handlers.intake == 1)
        assert bus.statistics().handlers.intake_bytes < 100
        gate.set()
        await asyncio.gather(*calls)


# -- connection --------------------------------------------------------------------------------------------


async def test_a_call_made_without_a_connection_is_answered_once_it_is_back(url: str, client: Bus) -> None:
    async with service(url):
        broker_of(url).cut()
        call = asyncio.create_task(client.send(Quote("abc")))
        await eventually(lambda: client.statistics().calls.in_flight == 1)
        broker_of(url).heal()
        assert await call == Ok(Price(3))


async def test_a_call_in_flight_when_the_connection_breaks_is_sent_again_and_joins_what_runs(
    url: str, client: Bus
) -> None:
    bus, gate, runs = Bus("shop", url=url), asyncio.Event(), 0

    @bus.handler
    async def wait(request: Wait, ctx: Context) -> str:
        nonlocal runs
        runs += 1
        await gate.wait()
        return f"attempt {ctx.attempt}"

    async with bus:
        call = asyncio.create_task(client.send(Wait(0)))
        await eventually(lambda: runs == 1)
        broker_of(url).cut()
        broker_of(url).heal()
        await eventually(lambda: bus.statistics().requests.joined == 1)
        gate.set()
        assert await call == Ok("attempt 1")
        assert runs == 1


async def test_a_call_made_while_the_connection_comes_back_runs_once(url: str, client: Bus) -> None:
    bus, runs = Bus("shop", url=url), []

    @bus.handler
    async def wait(request: Wait, ctx: Context) -> str:
        runs.append(ctx.attempt)
        await asyncio.sleep(0.01)
        return "done"

    async with bus:
        broker_of(url).cut()
        await eventually(lambda: not client._connection.up.is_set())
        broker_of(url).heal()  # the transport is connected now, and the bus has not been told yet
        assert await asyncio.gather(*(client.send(Wait(0)) for _ in range(20))) == [Ok("done")] * 20
        await eventually(lambda: bus.statistics().handlers.intake == 0)
    assert runs == [1] * 20


async def test_a_caller_that_is_closed_takes_no_call(url: str) -> None:
    async with Bus("client", url=url) as bus:
        assert bus._node is not None
        caller = bus._node.caller
    with pytest.raises(DisconnectedError, match="was closed before it was sent") as caught:
        caller.call(Quote("a"), "id-1", 1.0)
    assert caught.value.outcome == "not_run"


async def test_what_must_not_run_twice_is_not_sent_again(url: str, client: Bus) -> None:
    bus, gate, runs = Bus("shop", url=url), asyncio.Event(), 0

    @bus.handler
    async def pay(request: Pay) -> None:
        nonlocal runs
        runs += 1
        await gate.wait()

    async with bus:
        call = asyncio.create_task(client.send(Pay(1)))
        await eventually(lambda: runs == 1)
        broker_of(url).cut()
        broker_of(url).heal()
        gate.set()
        assert await call == Ok(None)
        assert runs == 1


async def test_a_named_node_is_looked_for_once_there_is_a_connection(url: str, client: Bus) -> None:
    async with service(url, node_id="shop-1"):
        broker_of(url).cut()
        call = asyncio.create_task(client.send(Quote("abc"), node="shop-1"))
        await asyncio.sleep(0)
        broker_of(url).heal()
        assert await call == Ok(Price(3))
        broker_of(url).cut()
        late = await client.send(Quote("a"), node="shop-2", timeout=0.05)
        assert isinstance(late, Err)
        assert (late.code, late.outcome) == ("DISCONNECTED", "not_run")
        broker_of(url).heal()


async def test_the_grain_of_a_type_is_not_that_of_a_slower_one(url: str, client: Bus) -> None:
    bus = service(url)

    @bus.handler
    async def wait(request: Wait) -> str:
        await asyncio.sleep(request.seconds)
        return "done"

    async with bus:
        for _ in range(5):
            await asyncio.gather(
                *(client.send(Wait(0.01)) for _ in range(10)),
                *(client.send(Quote("a"), node=bus.node_id) for _ in range(10)),
                *(client.send(Quote("a")) for _ in range(10)),
            )
        assert client._node is not None
        routes = {route.type_name: route for route in client._node.caller._routes.values()}
        assert routes["Wait"].lane.limit == 1
        assert routes["Quote"].lane.limit > 1


async def test_without_a_connection_the_deadline_says_so(url: str, client: Bus) -> None:
    broker_of(url).cut()
    result = await client.send(Quote("a"), timeout=0.05)
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == ("DISCONNECTED", "not_run")
    with pytest.raises(ConnectionError, match="no connection"):
        await client.publish(Tick(1))
    broker_of(url).heal()


# -- forks and threads ---------------------------------------------------------------------------------------


def _use_in_fork(bus: Bus, told: Any) -> None:
    try:
        asyncio.run(bus.send(Quote("a")))
    except BusStateError as error:
        told.put(str(error))
    else:
        told.put("no error")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
async def test_a_bus_used_after_a_fork_says_so(client: Bus) -> None:
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=_use_in_fork, args=(client, told))
    child.start()
    text = await asyncio.to_thread(told.get)
    await asyncio.to_thread(child.join)
    told.close()
    assert f"was started in process {os.getpid()}" in text


def test_a_blocking_bus_serves_and_calls_without_a_loop(url: str) -> None:
    with BlockingBus("client", url=url) as caller:
        server = BlockingBus("shop", url=url)

        @server.bus.handler
        async def quote(request: Quote) -> Price:
            return Price(len(request.sku))

        seen = threading.Event()

        @server.bus.handler
        def flushed(event: Flushed) -> None:
            seen.set()

        with server:
            assert caller.send(Quote("abc")) == Ok(Price(3))
            caller.broadcast(Flushed(1))
            assert seen.wait(5)
            assert caller.statistics().calls.ok == 1
    with pytest.raises(BusStateError, match="not started"):
        caller.send(Quote("abc"))
    caller.drain()


def test_a_blocking_bus_that_cannot_start_says_why_and_leaves_no_thread() -> None:
    bus = BlockingBus("client", url="nats://127.0.0.1:1", connect_timeout=0.2)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1"):
        bus.start()
    assert not any(thread.name == "catga-loop" for thread in threading.enumerate())


async def test_errors_of_calls_that_failed_are_freed(url: str) -> None:
    """What a call consists of is not tracked by the collector: no cycle of it may hold an error, nor an error it."""

    class Pay(Command[int], partition_by="account"):
        account: str

    async def failed(call: Callable[[], Awaitable[object]]) -> Any:
        try:
            await call()
        except CallError as error:
            return weakref.ref(error)
        raise AssertionError("it did not fail")

    bus = Bus("till", url=url, partitions=1)

    @bus.handler
    async def pay(command: Pay) -> int:
        return 1

    async with bus:
        assert await bus.send(Pay("a"), timeout=5.0) == Ok(1)
        node = bus._node
        assert node is not None
        await node.durable._jetstream.delete_stream("catga-cmd-till")
        errors = [await failed(lambda: bus.enqueue(Pay("a"), timeout=1.0)) for _ in range(3)]
        errors += [await failed(lambda: node.durable.sender.enqueue(Pay("a"), "m", timeout=1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        gc.collect()
        alive = [error() for error in errors if error() is not None]
        assert len(alive) <= 1, "the last one may lie in its line until the next is written"
