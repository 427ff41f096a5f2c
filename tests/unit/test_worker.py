"""Stored messages are handled in order per key, tried again in place, and done only when all that follows is stored."""

import asyncio
import threading
from typing import Any

import msgspec
import pytest

from catga_bus import Bulkhead, Context, Err, Fence, Refused, RetryOptions, Router
from catga_bus.durability.letters.letters import Reason
from catga_bus.testing import eventually
from catga_bus.wire import Fault, Kind, Status, join_batch
from tests.unit.work_rig import QUICK, STREAM, Close, Debit, Debited, Desk, Start

# -- order -----------------------------------------------------------------------------------------------------


async def test_a_key_is_handled_in_order_across_types_and_records(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a", 1), Close("a"), Debit("a", 2))
    rig.take(Debit("b", 1), Debit("a", 3), Close("a"))
    await rig.acked()
    await eventually(lambda: desk.of("b") == [1])
    assert desk.of("a") == [1]
    desk.gates["a"].set()
    await rig.acked(1, 2)
    assert desk.of("a") == [1, -1, 2, 3, -1]


@pytest.mark.parametrize("concurrency", [1, 3, 64])
async def test_any_number_of_records_keep_the_order_of_their_keys_under_failures(
    start: Start, concurrency: int
) -> None:
    desk = Desk(concurrency=concurrency, max_attempts=50, retry=RetryOptions(first=0.0, longest=0.001))
    rig = await start(desk.router)
    for number in range(60):
        desk.failing[f"k{number % 7}"] = 5
        rig.take(*(Debit(f"k{(number * 5 + index) % 7}", number * 10 + index) for index in range(10)))
    await rig.acked(*range(1, 61))
    for key in (f"k{number}" for number in range(7)):
        numbers = desk.of(key)
        assert numbers == sorted(numbers)
        assert len(set(numbers)) * 7 >= 590
    assert rig.workshop.statistics().handled == 600


async def test_messages_without_a_key_run_side_by_side(start: Start) -> None:
    router, gate, running = Router(), asyncio.Event(), 0

    class Free(Debit):
        pass

    @router.handler
    async def free(command: Free) -> int:
        nonlocal running
        running += 1
        await gate.wait()
        return 1

    rig = await start(router)
    frames = [msgspec.msgpack.encode((f"id{n}", "Free", None, None, 1, None, Free("same"))) for n in range(5)]
    rig.worker.take(rig.record(*frames))
    await eventually(lambda: running == 5)
    gate.set()
    await rig.acked(1)


async def test_two_partitions_take_turns_at_a_handler(start: Start) -> None:
    order: list[str] = []
    router = Router()

    @router.handler(concurrency=1)
    async def debit(command: Debit) -> int:
        order.append(command.account[0])
        await asyncio.sleep(0)
        return 1

    rig = await start(router)
    keeper, other = rig.partition()
    rig.take(*(Debit(f"a{number}") for number in range(100)))
    rig.take(*(Debit(f"b{number}") for number in range(100)), worker=other)
    await rig.acked(1)
    await eventually(lambda: keeper.acked == [1])
    assert order[:2] == ["a", "a"]  # what its bench let out before the other came
    assert "".join(order[2:100]) in ("ab" * 49, "ba" * 49)


async def test_a_full_intake_refuses_requests_and_never_what_is_stored(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)  # its intake is 100
    for partition in range(5):
        _, worker = rig.partition()
        rig.take(*(Debit(f"k{partition}.{number}") for number in range(256)), worker=worker)
    await eventually(lambda: rig.workshop.statistics().handled == 5 * 256)
    assert rig.dispatcher.statistics().busy == 0


async def test_no_more_than_twice_its_concurrency_is_at_the_dispatcher(start: Start) -> None:
    desk = Desk(concurrency=5)
    rig = await start(desk.router)
    desk.gates = {f"k{number}": asyncio.Event() for number in range(50)}
    rig.take(*(Debit(key) for key in desk.gates))
    await eventually(lambda: len(desk.seen) == 5)
    assert rig.dispatcher.statistics().intake == 10
    for gate in desk.gates.values():
        gate.set()
    await rig.acked(1)


# -- failures --------------------------------------------------------------------------------------------------


async def test_a_failing_key_is_tried_again_in_place_while_others_flow(start: Start) -> None:
    desk = Desk(max_attempts=4)
    rig = await start(desk.router)
    desk.failing["a"] = 3
    rig.take(Debit("a", 1), Debit("a", 2), Debit("b", 1), waits=True)
    await rig.acked(1)
    assert desk.seen[0] == ("a", 1)
    assert desk.seen.index(("b", 1)) < desk.seen.index(("a", 2))
    assert desk.of("a") == [1, 1, 1, 1, 2]
    assert desk.attempts[:1] + desk.attempts[2:] == [1, 2, 3, 4, 1]
    await eventually(lambda: len(rig.answers) == 3)
    assert {(one, status) for one, status, _ in rig.answers} == {(one, Status.OK) for one in "123"}
    statistics = rig.workshop.statistics()
    assert (statistics.handled, statistics.retries, statistics.waiting_keys) == (3, 3, 0)


async def test_after_max_attempts_it_is_a_dead_letter_stored_before_its_record_is_done(start: Start) -> None:
    desk = Desk(max_attempts=3)
    rig = await start(desk.router)
    desk.failing["a"] = 99
    rig.letters.gate.clear()
    rig.take(Debit("b", 1), Debit("a", 2), waits=True)
    rig.take(Debit("a", 3))
    await eventually(lambda: rig.letters.tries == 1)
    assert (desk.of("a"), rig.keeper.acked) == ([2, 2, 2], [])
    desk.failing["a"] = 0
    rig.letters.gate.set()
    await rig.acked(1, 2)
    letter = rig.letters.buried[0]
    assert (letter.id, letter.type, letter.key, letter.reason) == ("2", "Debit", "a", Reason.ATTEMPTS)
    assert (letter.attempts, letter.stream, letter.sequence, letter.index) == (3, STREAM, 1, 1)
    assert (letter.service, letter.node, letter.sender) == ("shop", "node", "sender")
    assert "ValueError: no money" in letter.error
    assert msgspec.msgpack.decode(letter.body, type=Debit) == Debit("a", 2)
    assert desk.of("a") == [2, 2, 2, 3]
    await eventually(lambda: len(rig.answers) == 2)
    status, fault = next((status, body) for one, status, body in rig.answers if one == "2")
    assert (status, fault.code) == (Status.FAILED, "DEAD_LETTERED")
    assert "no money" in fault.message
    assert rig.workshop.statistics().dead_letters == {"attempts": 1}


async def test_a_dead_letter_that_cannot_be_stored_is_tried_until_it_is(start: Start) -> None:
    desk = Desk(max_attempts=1)
    rig = await start(desk.router)
    desk.failing["a"] = 1
    rig.letters.failures = 3
    rig.take(Debit("a", 1))
    await rig.acked(1)
    assert (rig.letters.tries, len(rig.letters.buried)) == (4, 1)


@pytest.mark.parametrize("raises", [False, True])
async def test_a_refusal_is_an_answer_and_never_tried_again(start: Start, *, raises: bool) -> None:
    router = Router()

    @router.handler
    async def debit(command: Debit) -> int | Err:
        if raises:
            raise Refused("POOR", "no money")
        return Err("POOR", "no money")

    rig = await start(router)
    rig.take(Debit("a"), waits=True)
    await rig.acked(1)
    assert rig.answers == [("1", Status.REFUSED, Fault("POOR", "no money"))]
    assert rig.workshop.statistics().refused == 1


async def test_what_does_not_fit_its_type_is_a_dead_letter_at_once(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.take(rig.frame(Debit("a"), body=b"\x93\x01\x02\x03", waits=True), Debit("a", 2))
    await rig.acked(1)
    assert [letter.reason for letter in rig.letters.buried] == [Reason.INVALID]
    assert rig.letters.buried[0].attempts == 0
    assert rig.letters.buried[0].body == b"\x93\x01\x02\x03"
    assert desk.seen == [("a", 2)]


async def test_an_answer_that_cannot_be_encoded_is_a_failure_of_the_handler(start: Start) -> None:
    router = Router()

    class Odd(Debit):
        pass

    @router.handler(max_attempts=2, retry=QUICK)
    async def odd(command: Odd) -> int:
        return 2**200

    rig = await start(router)
    rig.take(Odd("a"), waits=True)
    await rig.acked(1)
    assert "cannot be encoded" in rig.letters.buried[0].error
    assert rig.letters.buried[0].attempts == 2


async def test_an_answer_that_is_too_large_is_said_to_be_and_the_command_is_done(start: Start) -> None:
    router = Router()

    class Large(Debit):
        pass

    class Text(msgspec.Struct):
        text: str

    @router.handler
    async def large(command: Large) -> int:
        return 1

    @router.middleware
    async def swell(message: Any, ctx: Any, call_next: Any) -> Any:
        result = await call_next(message)
        return Err("LARGE", "x", "y" * 2_000_000) if result.is_ok else result

    rig = await start(router)
    rig.take(Large("a"), waits=True)
    await rig.acked(1)
    assert [(status, fault.code) for _, status, fault in rig.answers] == [(Status.FAILED, "TOO_LARGE")]


async def test_a_message_put_off_by_middleware_is_not_an_attempt(start: Start) -> None:
    router, gate = Router(), asyncio.Event()
    attempts: list[int] = []

    @router.handler(max_attempts=1, middleware=[Bulkhead(max_running=1)])
    async def debit(command: Debit, ctx: Context) -> int:
        attempts.append(ctx.attempt)
        await gate.wait()
        return 1

    rig = await start(router)
    rig.take(Debit("a"), Debit("b"))
    await eventually(lambda: rig.workshop.statistics().delayed >= 3)
    gate.set()
    await rig.acked(1)
    assert attempts == [1, 1]
    assert rig.letters.buried == []


# -- answers ---------------------------------------------------------------------------------------------------


async def test_answers_leave_before_the_record_is_done_and_only_where_somebody_waits(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.take(rig.frame(Debit("a", 7), waits=True), rig.frame(Debit("b", 8)))
    await rig.acked(1)
    assert rig.answers == [("1", Status.OK, 7)]
    assert rig.order == ["answer 1", "done 1"]


async def test_an_inbox_outside_the_roots_gets_no_answer(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    heard: list[str] = []
    await rig.transport.subscribe(">", lambda subject, *_: heard.append(subject))
    payload = join_batch(Kind.MESSAGES, ("sender", "$JS.API.STREAM.DELETE.x", 0), [rig.frame(Debit("a"), waits=True)])
    rig.worker.take(rig.raw_record(payload))
    await rig.acked(1)
    rig.take(Debit("a"), waits=True)
    await rig.acked(1, 2)
    await eventually(lambda: heard)
    assert heard == ["_INBOX.sender"]


async def test_events_have_no_answers(start: Start) -> None:
    router, seen = Router(), []

    @router.handler
    async def debited(event: Debited, ctx: Context) -> None:
        seen.append((event.account, ctx.fence))

    rig = await start(router)
    keeper, worker = rig.partition(by_type=True)
    worker.take(rig.record(rig.frame(Debited("a")), worker=worker, subject="catga.evt.Debited.3"))
    await eventually(lambda: keeper.acked == [1])
    assert seen == [("a", Fence(3, 7))]


# -- the window ------------------------------------------------------------------------------------------------


async def test_a_failing_key_fills_the_window_and_the_partition_says_which(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(max_attempts=1_000, retry=RetryOptions(first=5.0, longest=5.0))
    rig = await start(desk.router)
    desk.failing["a"] = 1
    sequences = [rig.take(Debit("a", 0), Debit("b", 0))]
    await eventually(lambda: rig.workshop.statistics().waiting_keys == 1)
    for _ in range(20):
        if not rig.worker.wanted:
            break
        sequences.append(rig.take(*(Debit("a", 0) for _ in range(250))))
    await eventually(lambda: desk.of("b") == [0])
    assert rig.worker.wanted == 0
    assert rig.worker.frames <= 1_024 + 250
    assert "waits for key 'a'" in caplog.text
    assert "no money" in caplog.text
    oldest = rig.workshop.statistics().oldest
    assert oldest is not None
    assert (oldest.key, oldest.type_name, oldest.message_id, oldest.failures) == ("a", "Debit", "1", 1)
    assert all(rig.worker.holds(sequence) for sequence in sequences)
    rig.worker.drop()
    assert rig.worker.wanted > 0


# -- threads ---------------------------------------------------------------------------------------------------


async def test_the_next_attempt_starts_only_when_the_thread_of_the_last_has_ended(start: Start) -> None:
    router, release = Router(), threading.Event()
    seen: list[str] = []

    @router.handler(timeout=0.02, max_attempts=2, retry=RetryOptions(first=0.0))
    def debit(command: Debit) -> int:
        seen.append(f"begins {command.cents}")
        if len(seen) == 1:
            release.wait(10)
        seen.append(f"ends {command.cents}")
        return 1

    rig = await start(router)
    rig.take(Debit("a", 1), Debit("a", 2))
    try:
        await eventually(lambda: rig.workshop.statistics().stuck == 1)
        assert (seen, rig.workshop.statistics().retries) == (["begins 1"], 0)
    finally:
        release.set()
    await rig.acked(1)
    assert seen == ["begins 1", "ends 1", "begins 1", "ends 1", "begins 2", "ends 2"]
    assert (rig.workshop.statistics().stuck, rig.workshop.statistics().retries) == (0, 1)


async def test_a_handler_of_stored_messages_is_cut_off_after_30_seconds_unless_it_says_otherwise(start: Start) -> None:
    router = Router()
    left: list[float] = []

    @router.handler
    async def debit(command: Debit, ctx: Context) -> int:
        left.append(ctx.remaining)
        return 1

    rig = await start(router)
    rig.take(Debit("a"))
    await rig.acked(1)
    assert 29.0 < left[0] <= 30.0


async def test_a_handler_that_is_cut_off_has_failed(start: Start) -> None:
    router = Router()

    @router.handler(timeout=0.01, max_attempts=2, retry=QUICK)
    async def debit(command: Debit) -> int:
        await asyncio.sleep(60)
        return 1

    rig = await start(router)
    rig.take(Debit("a"))
    await rig.acked(1)
    assert (rig.letters.buried[0].attempts, rig.letters.buried[0].error.split(":")[0]) == (2, "TIMEOUT")
