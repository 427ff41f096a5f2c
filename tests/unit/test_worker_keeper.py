"""What the keeper says is done: nothing starts in a pause, a finish leaves nothing half done, a drop no trace."""

import asyncio
import contextlib
import threading

import pytest

from catga_bus import Context, Router
from catga_bus.testing import eventually
from tests.unit.work_rig import Close, Debit, Desk, FakeInbox, Start


async def turns(count: int = 20) -> None:
    """Let whatever is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


# -- pause and resume ------------------------------------------------------------------------------------------


async def test_it_begins_paused(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    keeper, worker = rig.partition(open=False)
    sequence = rig.take(Debit("a"), worker=worker)
    await turns()
    assert (desk.seen, worker.highest, worker.holds(sequence)) == ([], 0, True)
    worker.resume()
    await eventually(lambda: keeper.acked == [1])
    assert (worker.highest, worker.holds(sequence)) == (1, False)


async def test_a_pause_recalls_what_waits_at_the_dispatcher_and_lets_what_runs_go_on(start: Start) -> None:
    desk = Desk(concurrency=1)
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a"), Debit("b"), Debit("c"), Debit("d"))
    await eventually(lambda: desk.of("a") == [0])
    assert rig.dispatcher.statistics().intake == 2  # a runs, b waits there
    rig.worker.pause()
    desk.gates["a"].set()
    await eventually(lambda: rig.dispatcher.statistics().intake == 0)
    await turns()
    assert (desk.seen, rig.worker.frames) == ([("a", 0)], 3)
    rig.worker.resume()
    await rig.acked(1)
    assert sorted(desk.seen) == [(key, 0) for key in "abcd"]
    assert rig.workshop.statistics().retries == rig.workshop.statistics().delayed == 0


async def test_a_pause_that_ends_before_the_recalled_came_back_takes_the_recall_back(start: Start) -> None:
    desk = Desk(concurrency=1)
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a"), Debit("b"))
    await eventually(lambda: desk.of("a") == [0])
    rig.worker.pause()
    rig.worker.resume()
    desk.gates["a"].set()
    await rig.acked(1)
    assert desk.seen == [("a", 0), ("b", 0)]
    assert rig.dispatcher.statistics().expired == 0


async def test_a_pause_from_within_the_turn_in_which_a_frame_would_start_keeps_it_back(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.take(Debit("a"))
    rig.dispatcher._pulse.late_at = 0.0  # the loop stood still: the beat tells, and whoever hears it pauses
    rig.dispatcher._pulse.last = 0.0
    rig.dispatcher._pulse._on_gap = lambda _: rig.worker.pause()
    await turns()
    assert desk.seen == []
    rig.worker.resume()
    await rig.acked(1)


async def test_what_is_due_in_a_pause_waits_for_its_end(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    desk.failing["a"] = 1
    rig.take(Debit("a"))
    await eventually(lambda: desk.attempts == [1])
    rig.worker.pause()
    await eventually(lambda: not rig.worker._troubles.is_waiting)
    await turns()
    assert desk.attempts == [1]
    rig.worker.resume()
    await rig.acked(1)
    assert desk.attempts == [1, 2]


async def test_a_pause_stops_one_partition_and_not_its_neighbours(start: Start) -> None:
    desk = Desk(concurrency=1)
    rig = await start(desk.router)
    keeper, other = rig.partition()
    rig.worker.pause()
    rig.take(*(Debit(f"a{number}") for number in range(10)))
    rig.take(*(Debit(f"b{number}") for number in range(10)), worker=other)
    await eventually(lambda: keeper.acked == [1])
    assert {account[0] for account, _ in desk.seen} == {"b"}
    rig.worker.resume()
    await rig.acked(1)


# -- finish ----------------------------------------------------------------------------------------------------


async def test_finishing_completes_what_has_begun_and_what_it_waits_for_and_forgets_the_rest(start: Start) -> None:
    desk = Desk(concurrency=1)
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a", 1), Debit("x", 1))  # begun
    rig.take(Debit("b", 2), Debit("c", 2))  # not begun, and nobody waits for it
    rig.take(Debit("c", 3), Debit("d", 3))  # the same
    await eventually(lambda: desk.of("a") == [1])
    finish = asyncio.create_task(rig.worker.finish(below=False))
    await turns()
    assert (rig.worker.wanted, rig.worker.records, finish.done()) == (0, 1, False)
    rig.take(Debit("late"))
    desk.gates["a"].set()
    await asyncio.wait_for(finish, 5.0)
    await rig.acked(1)
    await turns()
    assert desk.seen == [("a", 1), ("x", 1)]
    assert not any(rig.worker.holds(sequence) for sequence in (1, 2, 3, 4))
    assert rig.dispatcher.statistics().intake == 0


async def test_finishing_runs_what_a_begun_record_waits_for_through_other_records(start: Start) -> None:
    desk = Desk(concurrency=1)
    rig = await start(desk.router)
    _, other = rig.partition()
    desk.gates["x"] = asyncio.Event()
    rig.take(Debit("x"), Debit("y"), worker=other)  # all that may be at the handler of Debit
    await eventually(lambda: desk.of("x") == [0])
    rig.take(Debit("b", 1), Debit("c", 1))
    rig.take(Debit("c", 2), Debit("d", 2))
    rig.take(Debit("d", 3), Close("a"))  # begun, through another handler
    rig.take(Debit("e", 4), Debit("d", 4))
    await eventually(lambda: desk.of("a") == [-1])
    assert rig.worker.highest == 3
    finish = asyncio.create_task(rig.worker.finish(below=False))
    await turns()
    assert rig.worker.records == 3
    desk.gates["x"].set()
    await asyncio.wait_for(finish, 5.0)
    await rig.acked(1, 2, 3)
    assert (desk.of("b"), desk.of("c"), desk.of("d"), desk.of("e")) == ([1], [1, 2], [2, 3], [])


@pytest.mark.parametrize("below", [False, True])
async def test_finishing_the_event_log_completes_everything_below_the_highest_begun(
    start: Start, *, below: bool
) -> None:
    desk = Desk(concurrency=1)
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a", 1))
    await eventually(lambda: desk.of("a") == [1])
    rig.take(Debit("a", 2))
    rig.worker._lanes.highest = 3  # as if a third one had been done already
    finish = asyncio.create_task(rig.worker.finish(below=below))
    await turns()
    desk.gates["a"].set()
    await asyncio.wait_for(finish, 5.0)
    await rig.acked(*([1, 2] if below else [1]))


async def test_finishing_waits_for_answers_and_dead_letters(start: Start) -> None:
    desk = Desk(max_attempts=1)
    rig = await start(desk.router)
    desk.failing["a"] = 1
    rig.letters.gate.clear()
    rig.take(Debit("a"), waits=True)
    await eventually(lambda: rig.letters.tries == 1)
    finish = asyncio.create_task(rig.worker.finish(below=False))
    await turns()
    assert not finish.done()
    rig.letters.gate.set()
    await asyncio.wait_for(finish, 5.0)
    assert rig.order == ["answer 1", "done 1"]


async def test_finishing_nothing_is_over_at_once_and_the_work_can_begin_anew(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    await asyncio.wait_for(rig.worker.finish(below=True), 5.0)
    rig.take(Debit("a"))
    await turns()
    assert desk.seen == []
    rig.worker.resume()
    await rig.acked(1)


async def test_a_drop_ends_a_finish(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a"))
    await eventually(lambda: desk.seen)
    finish = asyncio.create_task(rig.worker.finish(below=False))
    await turns()
    rig.worker.drop()
    await asyncio.wait_for(finish, 5.0)
    desk.gates["a"].set()
    await eventually(lambda: rig.dispatcher.statistics().intake == 0)
    assert rig.keeper.acked == []


async def test_a_finish_that_is_cancelled_takes_nothing_more_until_the_drop(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    desk.gates["a"] = asyncio.Event()
    rig.take(Debit("a"))
    await eventually(lambda: desk.seen)
    finish = asyncio.create_task(rig.worker.finish(below=False))
    await turns()
    finish.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await finish
    assert rig.worker.wanted == 0
    rig.take(Debit("b"))
    assert not rig.worker.holds(2)
    rig.worker.drop()
    assert rig.worker.wanted > 0


# -- drop ------------------------------------------------------------------------------------------------------


async def test_what_runs_when_the_partition_is_lost_ends_without_a_trace(start: Start) -> None:
    inbox = FakeInbox()
    router, gate, began = Router(), asyncio.Event(), asyncio.Event()

    @router.handler
    async def debit(command: Debit, ctx: Context) -> int:
        transaction = await ctx.transaction()
        await transaction.execute(command.account)
        began.set()
        await gate.wait()
        return 1

    rig = await start(router, inbox=inbox)
    rig.take(Debit("a"), waits=True)
    await began.wait()
    rig.worker.drop()
    gate.set()
    await eventually(lambda: inbox.rolled_back == ["1"])
    await turns()
    assert (rig.keeper.acked, rig.answers, inbox.effects, inbox.done) == ([], [], [], {})
    assert rig.workshop.statistics().handled == 0


async def test_a_lost_partition_starts_nothing_more_and_stores_no_dead_letter(start: Start) -> None:
    desk = Desk(concurrency=1, max_attempts=1)
    rig = await start(desk.router)
    desk.gates["a"], desk.failing["a"] = asyncio.Event(), 1
    rig.take(*(Debit("a", number) for number in range(3)), *(Debit(f"b{number}") for number in range(5)))
    await eventually(lambda: desk.seen)
    rig.worker.drop()
    desk.gates["a"].set()
    await eventually(lambda: rig.dispatcher.statistics().intake == 0)
    await turns()
    assert (desk.seen, rig.letters.tries, rig.keeper.acked) == ([("a", 0)], 0, [])
    assert (rig.worker.records, rig.worker.frames, rig.worker.waiting_keys) == (0, 0, 0)


async def test_a_retry_that_is_due_after_the_drop_does_not_happen(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    desk.failing["a"] = 1
    rig.take(Debit("a"))
    await eventually(lambda: rig.worker.waiting_keys)
    timers = list(rig.worker._troubles._timers.values())
    rig.worker.drop()
    assert all(timer.cancelled() for timer in timers)
    assert not rig.worker._troubles.is_waiting


@pytest.mark.parametrize("anew", [False, True])
async def test_a_record_that_comes_back_waits_for_its_own_zombie(start: Start, *, anew: bool) -> None:
    router, release = Router(), threading.Event()
    seen: list[str] = []

    @router.handler
    def debit(command: Debit) -> int:
        seen.append(f"begins {command.account}")
        if len(seen) == 1:
            release.wait(10)
        seen.append(f"ends {command.account}")
        return 1

    rig = await start(router)
    record = rig.record(rig.frame(Debit("a")), rig.frame(Debit("b")))
    rig.worker.take(record)
    try:
        await eventually(lambda: "ends b" in seen)
        if anew:  # another tenure has another keeper
            rig.keeper, rig.worker = rig.partition(1)
        else:
            rig.worker.drop()
            rig.worker.resume()
        rig.worker.take(record)
        await eventually(lambda: seen.count("ends b") == 2)
        assert seen.count("begins a") == 1
    finally:
        release.set()
    await rig.acked(1)
    assert [one for one in seen if one.endswith("a")] == ["begins a", "ends a"] * 2


async def test_what_was_answered_and_not_reported_is_not_acknowledged_after_the_drop(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.on_answer = rig.worker.drop
    rig.take(Debit("a"), waits=True)
    await eventually(lambda: rig.answers)
    await turns()
    assert rig.keeper.acked == []


async def test_an_acknowledgement_that_fails_holds_back_nobody(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)

    def fail(sequence: int) -> None:
        if sequence == 1:
            raise RuntimeError("no connection")

    rig.keeper.on_done = fail
    rig.take(Debit("a", 1))
    rig.take(Debit("a", 2))
    await rig.acked(1, 2)
    assert desk.of("a") == [1, 2]


async def test_closing_the_workshop_leaves_no_task_and_no_timer(start: Start) -> None:
    desk = Desk(max_attempts=2)
    rig = await start(desk.router)
    desk.failing = {"a": 9, "b": 9}
    rig.letters.gate.clear()
    rig.take(Debit("a"), Debit("b"), Debit("c"))
    await eventually(lambda: rig.letters.tries == 2)
    before = asyncio.all_tasks()
    await rig.workshop.close()
    assert not (asyncio.all_tasks() & before) - {asyncio.current_task()}
    assert rig.worker.records == 0


async def test_a_settled_delivery_frees_its_bench(start: Start) -> None:
    desk = Desk(concurrency=2)
    rig = await start(desk.router)
    rig.take(*(Debit(f"k{number}") for number in range(100)))
    rig.worker.pause()
    await eventually(lambda: rig.dispatcher.statistics().intake == 0)
    rig.worker.drop()
    bench = rig.workshop._shop.places["Debit"].bench
    await eventually(lambda: bench.out == 0)
