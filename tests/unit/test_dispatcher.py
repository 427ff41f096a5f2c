"""Every delivery is settled once, in turn and within its handler's slots, whatever the handler does."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import Bus, CallNext, Context, Err, Event, Ok, Outcome, Refused, Request, Result
from catga_bus.clock import monotonic
from catga_bus.dispatch.deliveries import Delivery, Slots, Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.dispatch.failures import describe, refused
from catga_bus.pulse import GAP, TICK, Pulse
from catga_bus.testing import eventually
from catga_bus.wire import Status

Settled = tuple[str, Status, Any]


class Unusual(BaseException):
    pass


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Rig:
    """A dispatcher whose message is the id of its delivery, and what was settled."""

    def __init__(self, *, intake: int = 1_000) -> None:
        self.settled: list[Settled] = []
        self.pulse = Pulse(monotonic, lambda gap: self.dispatcher.pause("gap"))
        self.dispatcher = Dispatcher(
            lambda _: None,  # type: ignore[arg-type,return-value]
            pulse=self.pulse,
            clock=monotonic,
            intake=intake,
            intake_bytes=1_000_000,
        )

    def station(
        self,
        entry: Callable[[Any], Awaitable[Any]],
        *,
        concurrency: int = 64,
        decode: Callable[[Any], Any] = lambda body: body,
        slots: Slots | None = None,
    ) -> Station:
        station = Station(
            name="handler",
            type_name="Type",
            decode=decode,
            decode_json=decode,
            entry=entry,
            takes_context=False,
            has_middleware=False,
            slots=slots or self.dispatcher.slots(object(), concurrency),
            timeout=None,
            fits=None,
        )
        self.dispatcher.add(station)
        return station

    def deliver(self, station: Station, *ids: str, seconds: float = math.inf, lane: str | None = None) -> list[bool]:
        taken = [
            self.dispatcher.admit(
                Delivery(
                    station=station,
                    id=one,
                    key=None,
                    attempt=1,
                    trace=None,
                    sender="sender",
                    body=one,
                    size=1,
                    deadline=monotonic() + seconds,
                    settle=self._settle,
                    lane=lane,
                )
            )
            for one in ids
        ]
        self.dispatcher.wake()
        return taken

    def _settle(self, delivery: Delivery, status: Status, value: Any, _: float) -> None:
        self.settled.append((delivery.id, status, value))

    @property
    def ids(self) -> list[str]:
        return [one for one, _, _ in self.settled]

    async def all_settled(self, count: int) -> None:
        await eventually(lambda: len(self.settled) >= count, what=f"{count} settled")
        assert len(self.settled) == count
        await eventually(lambda: self.dispatcher.statistics().intake == 0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    await made.dispatcher.close()


@pytest.fixture
async def buses() -> AsyncIterator[tuple[Bus, Bus]]:
    """A node, not started, and a client."""
    url = f"memory://{uuid4().hex}"
    node = Bus("node", url=url, drain_timeout=5.0)
    async with Bus("client", url=url) as client:
        yield node, client
        await node.close()


async def answer(message: Any) -> Any:
    return message


# -- what a handler raises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Unusual("x"), GeneratorExit("x"), UnspeakableError(), StopAsyncIteration("x")])
@pytest.mark.parametrize("suspends", [False, True])
async def test_whatever_a_handler_raises_its_delivery_is_settled(
    rig: Rig, error: BaseException, *, suspends: bool
) -> None:
    async def handle(_: Any) -> None:
        if suspends:
            await asyncio.sleep(0)
        raise error

    rig.deliver(rig.station(handle), "a", "b", lane="lane")
    await rig.all_settled(2)
    assert [status for _, status, _ in rig.settled] == [Status.FAILED] * 2
    assert all(fault.code == "HANDLER_ERROR" and type(error).__name__ in fault.message for _, _, fault in rig.settled)


async def test_a_refusal_that_cannot_be_read_is_a_failure(rig: Rig) -> None:
    class Broken(Refused):
        @property
        def details(self) -> Any:
            raise KeyError("gone")

        @details.setter
        def details(self, value: Any) -> None:
            pass

    async def handle(_: Any) -> None:
        raise Broken("MINE", "x")

    rig.deliver(rig.station(handle), "a")
    await rig.all_settled(1)
    assert rig.settled[0][1] is Status.FAILED


@pytest.mark.parametrize("error", [Unusual("x"), UnspeakableError(), SystemExit(3)])
async def test_whatever_decoding_raises_the_message_is_invalid(rig: Rig, error: BaseException) -> None:
    def decode(_: Any) -> None:
        raise error

    rig.deliver(rig.station(answer, decode=decode), "a")
    await rig.all_settled(1)
    assert rig.settled[0][1] is Status.INVALID


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_a_handler_ends_the_program_after_its_delivery_is_settled(
    error: type[BaseException], *, suspends: bool
) -> None:
    settled: list[str] = []

    async def handle(message: str) -> None:
        if message != "exit":
            return
        if suspends:
            await asyncio.sleep(0)
        raise error

    async def main() -> None:
        rig = Rig()
        try:
            rig.deliver(rig.station(handle), "exit", "next")
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(AssertionError):
                await rig.all_settled(2)
            settled.extend(rig.ids)
            await rig.dispatcher.close()

    with pytest.raises(error):
        asyncio.run(main())
    assert settled == (["next", "exit"] if suspends else ["exit", "next"])


async def test_a_flood_of_exceptions_writes_one_traceback(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(_: Any) -> None:
        raise ValueError("always")

    rig.deliver(rig.station(handle), "line\nbreak", *(str(number) for number in range(500)))
    await rig.all_settled(501)
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 1
    assert records[0].exc_info is not None
    assert records[0].getMessage() == r"handler raised for Type 'line\nbreak'"


async def test_a_flood_of_exceptions_behind_middleware_writes_one_traceback(
    buses: tuple[Bus, Bus], caplog: pytest.LogCaptureFixture
) -> None:
    node, client = buses

    @node.middleware
    async def around(message: Any, ctx: Context, call_next: CallNext) -> Result:
        return await call_next(message)

    @node.handler
    async def handle(request: Ask) -> int:
        raise Unusual("always")

    await node.start()
    results = await asyncio.gather(*(client.send(Ask()) for _ in range(50)))
    assert {(result.code, result.outcome) for result in results if isinstance(result, Err)} == {
        ("HANDLER_ERROR", Outcome.FAILED)
    }
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_an_exception_is_described_in_a_bounded_text_that_can_be_sent() -> None:
    assert describe(ValueError("text")) == "ValueError: text"
    assert describe(ValueError()) == "ValueError"
    assert describe(UnspeakableError()) == "UnspeakableError: (its text cannot be shown)"
    assert describe(ValueError("\ud800")) == "ValueError: ?"
    long = describe(ValueError("x" * 1_000_000))
    assert (len(long), long[-3:]) == (500, "...")


# -- what a handler returns ------------------------------------------------------------------------------------


class Ask(Request[int]):
    pass


class AskToo(Request[int]):
    pass


@pytest.mark.parametrize("with_middleware", [False, True])
async def test_a_returned_err_is_refused_whatever_outcome_it_claims(
    buses: tuple[Bus, Bus], *, with_middleware: bool
) -> None:
    node, client = buses
    seen: list[Any] = []

    if with_middleware:

        @node.middleware
        async def around(message: Any, ctx: Context, call_next: CallNext) -> Result:
            seen.append(await call_next(message))
            return seen[-1]

    @node.handler
    async def mine(request: Ask) -> int | Err:
        return Err("MINE", "x", outcome=Outcome.FAILED)

    @node.handler
    async def reserved(request: AskToo) -> int | Err:
        return Err("TIMEOUT", "x", outcome=Outcome.FAILED)

    await node.start()
    first, second = await client.send(Ask()), await client.send(AskToo())
    assert isinstance(first, Err)
    assert isinstance(second, Err)
    assert (first.code, first.outcome) == ("MINE", Outcome.REFUSED)
    assert (second.code, second.outcome) == ("HANDLER_ERROR", Outcome.FAILED)
    assert "reserved code TIMEOUT" in second.message
    if with_middleware:
        assert [(one.code, one.outcome) for one in seen] == [
            ("MINE", Outcome.REFUSED),
            ("HANDLER_ERROR", Outcome.FAILED),
        ]


@pytest.mark.parametrize(
    ("replaced", "code", "outcome"),
    [
        ({}, "HANDLER_ERROR", Outcome.FAILED),
        ({"code": "MINE"}, "MINE", Outcome.FAILED),
        ({"code": "TIMEOUT"}, "HANDLER_ERROR", Outcome.FAILED),
        ({"code": "MINE", "outcome": Outcome.REFUSED}, "MINE", Outcome.REFUSED),
    ],
)
async def test_middleware_hands_on_a_failure_and_may_name_it(
    buses: tuple[Bus, Bus], replaced: dict[str, Any], code: str, outcome: Outcome
) -> None:
    node, client = buses

    @node.middleware
    async def rename(message: Any, ctx: Context, call_next: CallNext) -> Result:
        result = await call_next(message)
        assert isinstance(result, Err)
        return msgspec.structs.replace(result, **replaced)

    @node.handler
    async def handle(request: Ask) -> int:
        raise ValueError("x")

    await node.start()
    result = await client.send(Ask())
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (code, outcome)


@pytest.mark.parametrize(("code", "message"), [(5, "x"), (["x"], "x"), ("MINE", None)])
def test_a_refusal_that_cannot_be_sent_is_a_failure_that_says_so(code: Any, message: Any) -> None:
    error = refused("handler", code, message, None, retryable=False)
    assert (error.code, error.outcome) == ("HANDLER_ERROR", Outcome.FAILED)
    assert "must be str" in error.message


# -- slots -----------------------------------------------------------------------------------------------------


async def test_those_that_wait_start_in_order_however_the_one_before_them_ends(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handle(message: str) -> None:
        if message == "slow":
            await gate.wait()

    station = rig.station(handle, concurrency=1)
    rig.deliver(station, "slow", "a", "b", "c")
    await eventually(lambda: station.slots.waiting)
    gate.set()
    await asyncio.sleep(0)
    rig.deliver(station, "late")
    await rig.all_settled(5)
    assert rig.ids == ["slow", "a", "b", "c", "late"]


async def test_no_more_run_at_once_than_there_are_slots(rig: Rig) -> None:
    now, peak = 0, 0

    async def handle(message: str) -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        for _ in range(int(message) % 4):
            await asyncio.sleep(0)
        now -= 1

    slots = rig.dispatcher.slots("both", 3)
    one, other = rig.station(handle, slots=slots), rig.station(handle, slots=slots)
    for start in range(0, 300, 10):
        rig.deliver(one if start % 20 else other, *(str(start + number) for number in range(10)))
        await asyncio.sleep(0)
    await rig.all_settled(300)
    assert peak == 3
    assert (slots.running, slots.is_open, len(slots.waiting)) == (0, True, 0)


async def test_a_handler_of_two_types_has_one_concurrency_and_one_pool_of_threads(buses: tuple[Bus, Bus]) -> None:
    node, client = buses
    lock, threads, overlaps = threading.Lock(), set(), 0

    @node.handler(concurrency=1)
    def handle(request: Ask | AskToo) -> int:
        nonlocal overlaps
        threads.add(threading.current_thread())
        if not lock.acquire(blocking=False):
            overlaps += 1
            return 0
        threading.Event().wait(0.001)
        lock.release()
        return 1

    await node.start()
    results = await asyncio.gather(*(client.send(message()) for message in (Ask, AskToo) * 10))
    assert results == [Ok(1)] * 20
    assert (overlaps, len(threads)) == (0, 1)
    assert [station.ok for station in node.statistics().handlers.handlers] == [10, 10]


async def test_what_waits_behind_a_stuck_thread_expires_while_nothing_runs(buses: tuple[Bus, Bus]) -> None:
    node, client = buses
    release = threading.Event()

    @node.handler(concurrency=1, timeout=0.02)
    def handle(request: Ask) -> int:
        release.wait(10)
        return 1

    await node.start()
    try:
        first = await client.send(Ask())
        assert isinstance(first, Err)
        results = await asyncio.gather(*(client.send(Ask(), timeout=0.05) for _ in range(20)))
        assert {result.code for result in results if isinstance(result, Err)} == {"TIMEOUT"}
        await eventually(lambda: node.statistics().handlers.intake == 0)
        statistics = node.statistics().handlers
        assert (statistics.running, statistics.handlers[0].stuck, statistics.handlers[0].waiting) == (0, 1, 0)
    finally:
        release.set()


async def test_what_waits_expires_by_its_own_deadline_and_not_by_that_of_who_is_before_it(rig: Rig) -> None:
    station = rig.station(answer, concurrency=1)
    station.slots.take()
    rig.deliver(station, "patient")
    rig.deliver(station, "hasty", seconds=0.02)
    await eventually(lambda: rig.ids == ["hasty"])
    assert rig.settled[0][1] is Status.EXPIRED
    station.slots.free()
    rig.dispatcher.wake()
    await rig.all_settled(2)


# -- lanes -----------------------------------------------------------------------------------------------------


class Told(Event):
    number: int


class ToldToo(Event):
    number: int


async def test_the_next_of_a_lane_begins_when_the_thread_before_it_has_ended(buses: tuple[Bus, Bus]) -> None:
    node, client = buses
    release, seen = threading.Event(), []

    @node.handler(timeout=0.02)
    def handle(event: Told | ToldToo) -> None:
        seen.append(("begins", event.number))
        if event.number == 0:
            release.wait(10)
        seen.append(("ends", event.number))

    await node.start()
    try:
        await client.broadcast(Told(0))
        await client.broadcast(ToldToo(1))
        await eventually(lambda: node.statistics().handlers.handlers[0].stuck == 1)
        await eventually(lambda: node.statistics().handlers.running == 0)
        assert seen == [("begins", 0)]
    finally:
        release.set()
    await eventually(lambda: len(seen) == 4)
    assert seen == [("begins", 0), ("ends", 0), ("begins", 1), ("ends", 1)]
    await eventually(lambda: node.statistics().handlers.intake == 0)


async def test_a_lane_is_held_although_middleware_gave_the_thread_up(buses: tuple[Bus, Bus]) -> None:
    node, client = buses
    release, seen = threading.Event(), []

    @node.middleware
    async def impatient(message: Any, ctx: Context, call_next: CallNext) -> Result:
        try:
            return await asyncio.wait_for(call_next(message), 0.02 if message.number == 0 else 5)
        except TimeoutError:
            return Err("GIVEN_UP")

    @node.handler
    def handle(event: Told) -> None:
        if event.number == 0:
            release.wait(10)
        seen.append(event.number)

    await node.start()
    try:
        await client.broadcast(Told(0))
        await client.broadcast(Told(1))
        await eventually(lambda: node.statistics().handlers.handlers[0].refused == 1)
        await eventually(lambda: node.statistics().handlers.running == 0)
        assert seen == []
    finally:
        release.set()
    await eventually(lambda: seen == [0, 1])


@pytest.mark.parametrize("senders", [1, 3])
async def test_a_thread_that_never_ends_does_not_fill_the_intake_with_events(senders: int) -> None:
    url = f"memory://{uuid4().hex}"
    release = threading.Event()
    node = Bus("node", url=url)

    @node.handler(concurrency=1, timeout=0.02)
    def handle(event: Told) -> None:
        release.wait(10)

    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(node)
        stack.callback(release.set)
        for _ in range(senders):
            client = await stack.enter_async_context(Bus("client", url=url))
            for number in range(100):
                await client.broadcast(Told(number))
        await eventually(lambda: node.statistics().handlers.handlers[0].stuck == 1)
        await eventually(lambda: node.statistics().handlers.busy > 0)
        release.set()
        await eventually(lambda: node.statistics().handlers.intake == 0)


class Slow(Request[int]):
    """Takes its time."""


async def test_a_slow_handler_leaves_half_of_the_intake_to_others() -> None:
    url, release = f"memory://{uuid4().hex}", asyncio.Event()
    node = Bus("node", url=url, intake=64)

    @node.handler(concurrency=1)
    async def slow(request: Slow) -> int:
        await release.wait()
        return 1

    @node.handler
    async def ask(request: Ask) -> int:
        return 2

    async with node, Bus("client", url=url) as client:
        flood = [asyncio.create_task(client.send(Slow(), timeout=30.0)) for _ in range(100)]
        await eventually(lambda: node.statistics().handlers.busy > 0)
        assert await client.send(Ask()) == Ok(2)
        assert node.statistics().handlers.intake == 33  # 32 that wait, and one that runs
        release.set()
        results = await asyncio.gather(*flood)
        assert sum(isinstance(result, Ok) for result in results) >= 33
        assert {result.code for result in results if isinstance(result, Err)} <= {"OVERLOADED"}


async def test_events_for_a_slow_handler_leave_half_of_the_intake_to_others() -> None:
    url, release = f"memory://{uuid4().hex}", asyncio.Event()
    node = Bus("node", url=url, intake=64)

    @node.handler
    async def told(event: Told) -> None:
        await release.wait()

    @node.handler
    async def ask(request: Ask) -> int:
        return 2

    async with node, Bus("client", url=url) as client:
        for number in range(100):
            await client.broadcast(Told(number))
        await eventually(lambda: node.statistics().handlers.busy > 0)
        assert await client.send(Ask()) == Ok(2)
        assert node.statistics().handlers.intake <= 34
        release.set()
        await eventually(lambda: node.statistics().handlers.intake == 0)


async def test_the_only_handler_may_fill_the_intake() -> None:
    url, release = f"memory://{uuid4().hex}", asyncio.Event()
    node = Bus("node", url=url, intake=64)

    @node.handler(concurrency=1)
    async def slow(request: Slow) -> int:
        await release.wait()
        return 1

    async with node, Bus("client", url=url) as client:
        flood = [asyncio.create_task(client.send(Slow(), timeout=30.0)) for _ in range(64)]
        await eventually(lambda: node.statistics().handlers.intake == 64)
        release.set()
        assert set(await asyncio.gather(*flood)) == {Ok(1)}


async def test_handlers_that_hold_the_loop_let_others_have_a_turn() -> None:
    url = f"memory://{uuid4().hex}"
    node = Bus("node", url=url)

    @node.handler
    async def slow(request: Slow) -> int:
        time.sleep(0.01)
        return 1

    async with node, Bus("client", url=url) as client:
        for task in (flood := [asyncio.create_task(client.send(Slow(), timeout=30.0)) for _ in range(64)]):
            await task
        assert {task.result() for task in flood} == {Ok(1)}
        assert node.statistics().calls.failovers == client.statistics().calls.failovers == 0
        assert node.statistics().requests.gaps == 0


# -- what is submitted -----------------------------------------------------------------------------------------


async def test_what_is_submitted_is_taken_in_however_full_the_node_is(rig: Rig) -> None:
    full = Rig(intake=1)
    station = full.station(answer)
    delivery = Delivery(station, "a", None, 1, None, "sender", "a", 1, math.inf, full._settle)
    assert full.deliver(station, "first", "second") == [True, False]
    full.dispatcher.submit(delivery)
    full.dispatcher.wake()
    await full.all_settled(2)
    assert full.ids == ["first", "a"]
    assert full.dispatcher.statistics().busy == 1
    await full.dispatcher.close()


async def test_it_is_said_when_the_last_thread_of_a_settled_delivery_has_ended(buses: tuple[Bus, Bus]) -> None:
    node, client = buses
    release, said = threading.Event(), []

    @node.handler(timeout=0.02)
    def handle(request: Ask) -> int:
        release.wait(10)
        return 1

    await node.start()
    settle = node._open().responder._settle

    def watch(delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        delivery.freed = lambda one: said.append((one.id, one.stuck))
        settle(delivery, status, value, seconds)

    node._open().responder._settle = watch  # type: ignore[method-assign]
    try:
        assert isinstance(await client.send(Ask()), Err)
        assert (said, node.statistics().handlers.handlers[0].stuck) == ([], 1)
    finally:
        release.set()
    await eventually(lambda: len(said) == 1)
    assert said[0][1] == 0
    assert node.statistics().handlers.handlers[0].stuck == 0


# -- closing ---------------------------------------------------------------------------------------------------


async def test_closing_refuses_what_has_not_started_so_that_callers_go_elsewhere() -> None:
    rig = Rig()

    async def handle(_: Any) -> None:
        await asyncio.Event().wait()

    narrow = rig.station(handle, concurrency=1)
    rig.deliver(narrow, "running", "waiting")
    rig.deliver(narrow, "waiting in its lane", "behind", "further behind", lane="lane")
    await eventually(lambda: len(narrow.slots.waiting) == 2)
    rig.deliver(narrow, "ready")
    await rig.dispatcher.close()
    await rig.all_settled(6)
    by_id = {one: (status, fault) for one, status, fault in rig.settled}
    assert by_id.pop("running")[0] is Status.FAILED
    assert {status for status, _ in by_id.values()} == {Status.BUSY}
    assert {(fault.code, fault.retryable) for _, fault in by_id.values()} == {("OVERLOADED", True)}
    assert narrow.slots.lanes == {}
    assert rig.deliver(narrow, "late") == [False]


async def test_a_handler_that_closes_is_not_cancelled_by_it() -> None:
    rig = Rig()

    async def handle(message: str) -> str:
        if message == "other":
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        await rig.dispatcher.close()
        return "closed"

    rig.deliver(rig.station(handle), "other", "closer")
    await rig.all_settled(2)
    assert {one: status for one, status, _ in rig.settled} == {"other": Status.FAILED, "closer": Status.OK}


async def test_what_is_ready_when_the_loop_goes_on_after_a_gap_waits_if_somebody_pauses(rig: Rig) -> None:
    async def entry(message: str) -> str:
        return message

    rig.pulse.last -= TICK + GAP + 1.0
    rig.pulse.late_at = rig.pulse.last
    rig.deliver(rig.station(entry), "1", "2")
    await eventually(lambda: monotonic() - rig.pulse.last < 1.0)
    assert rig.ids == []
    rig.dispatcher.resume("gap")
    await rig.all_settled(2)
    assert rig.ids == ["1", "2"]
