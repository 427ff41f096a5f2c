"""What cannot be read, what nobody here handles, what kills its process: isolated, and never in the way of others."""

import asyncio
import gc

import msgspec
import pytest

from catga_bus import Context, Router
from catga_bus.durability.letters.letters import Reason
from catga_bus.durability.working import careful, strangers
from catga_bus.durability.working.jobs import Job
from catga_bus.durability.working.worker import Worker
from catga_bus.errors import CatgaError
from catga_bus.partition.lanes import Record
from catga_bus.testing import eventually
from catga_bus.wire import PREFIX, Kind, join_batch
from tests.unit.work_rig import STREAM, Debit, Debited, Desk, FakeInbox, Keeper, Start


async def turns(count: int = 20) -> None:
    """Let whatever is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "LOOK_SECONDS", 0.01)


# -- records that cannot be read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"\xc1\x01", b"\xc1\x01\x93\x00\xc0\xc0", join_batch(Kind.ANSWERS, ("x",), ()), PREFIX + b"\xff" * 99],
)
async def test_a_record_that_cannot_be_read_is_a_dead_letter_as_a_whole(start: Start, payload: bytes) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.letters.gate.clear()
    rig.worker.take(rig.raw_record(payload))
    rig.take(Debit("a", 1))
    await rig.acked(2)
    rig.letters.gate.set()
    await rig.acked(2, 1)
    letter = rig.letters.buried[0]
    assert (letter.reason, letter.id, letter.body, letter.type) == (Reason.UNDECODABLE, f"{STREAM}.1", payload, "")
    assert rig.workshop.statistics().dead_letters == {"undecodable": 1}


async def test_an_empty_record_is_done_at_once(start: Start) -> None:
    rig = await start(Desk().router)
    rig.take()
    assert rig.keeper.acked == [1]


async def test_a_paused_partition_buries_nothing(start: Start) -> None:
    rig = await start(Desk().router)
    rig.worker.pause()
    rig.worker.take(rig.raw_record(b"{}"))
    await turns()
    assert rig.letters.tries == 0
    rig.worker.resume()
    await rig.acked(1)


async def test_an_event_on_the_subject_of_another_type_is_a_dead_letter(start: Start) -> None:
    router, seen = Router(), []

    @router.handler
    async def debited(event: Debited) -> None:
        seen.append(event.account)

    rig = await start(router)
    keeper, worker = rig.partition(by_type=True)
    worker.take(rig.record(rig.frame(Debited("a")), worker=worker, subject="catga.evt.Other.3"))
    worker.take(rig.record(rig.frame(Debited("b")), worker=worker, subject="catga.evt.Debited.3"))
    await eventually(lambda: sorted(keeper.acked) == [1, 2])
    assert (seen, [letter.reason for letter in rig.letters.buried]) == (["b"], [Reason.INVALID])


# -- types that nobody here handles ----------------------------------------------------------------------------


async def test_a_stranger_that_no_node_takes_holds_back_its_key_alone_and_is_given_up(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router, unroutable_after=0.05)
    stranger = rig.frame("Stranger", body=msgspec.msgpack.encode([1]))
    keyed = msgspec.msgpack.encode(("s", "Stranger", "a", None, 1, None, 1))
    rig.take(keyed, Debit("a", 1), Debit("b", 2))
    rig.take(stranger, Debit("c", 3))
    await eventually(lambda: desk.of("b") == [2] and desk.of("c") == [3])
    assert desk.of("a") == []
    assert rig.workshop.statistics().waiting_keys == 2
    await rig.acked(1, 2)
    assert desk.of("a") == [1]
    assert {(letter.reason, letter.type) for letter in rig.letters.buried} == {(Reason.UNROUTABLE, "Stranger")}
    assert "no node of shop handles Stranger" in rig.letters.buried[0].error


async def test_nothing_of_a_record_that_another_node_takes_is_begun_nor_of_what_is_behind_it(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router, unroutable_after=0.02)
    rig.hands_over = True
    rig.take(Debit("b", 1))
    rig.take("Stranger", Debit("b", 2))
    rig.take(Debit("c", 3), Debit("b", 3))
    assert (rig.worker.wanted, rig.worker.holds(2), rig.worker.holds(3)) == (0, True, True)
    await eventually(lambda: len(rig.asked) > 5)
    await asyncio.wait_for(rig.worker.finish(below=True), 5.0)
    assert (desk.seen, rig.keeper.acked, rig.letters.tries) == ([("b", 1)], [1], 0)
    assert not rig.worker.holds(2)
    assert not rig.worker.holds(3)


async def test_a_stranger_alone_goes_to_another_node_undone(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router, unroutable_after=0.02)
    rig.hands_over = True
    rig.take("Stranger", Debit("b", 2))
    await eventually(lambda: len(rig.asked) > 5)
    await asyncio.wait_for(rig.worker.finish(below=False), 5.0)
    assert (desk.seen, rig.letters.buried, rig.keeper.acked) == ([], [], [])
    assert set(rig.asked) == {"Stranger"}


async def test_a_held_record_goes_on_when_the_other_node_does_not_take_it_after_all(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.hands_over = True
    rig.take("Stranger", Debit("b", 2))
    rig.take(Debit("b", 3))
    await eventually(lambda: len(rig.asked) > 3)
    assert desk.seen == []
    rig.hands_over = False
    await eventually(lambda: desk.of("b") == [2, 3])
    await rig.acked(2)


async def test_a_record_is_held_for_a_while_only_and_none_again_soon(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "HOLD_SECONDS", 0.05)
    desk = Desk()
    rig = await start(desk.router, unroutable_after=0.01)
    rig.hands_over = True
    rig.take("Stranger", Debit("b", 2))
    assert desk.seen == []
    await eventually(lambda: desk.of("b") == [2])
    rig.take("Stranger", Debit("b", 3))
    assert rig.worker.wanted > 0  # nothing is held
    await eventually(lambda: desk.of("b") == [2, 3])
    await turns()
    assert rig.letters.tries == 0  # another node knows it
    finish = asyncio.create_task(rig.worker.finish(below=False))
    await asyncio.wait_for(finish, 5.0)  # but cannot have it without what has begun
    assert [letter.reason for letter in rig.letters.buried] == [Reason.UNROUTABLE] * 2


async def test_a_stranger_waits_on_for_a_node_that_will_take_it(start: Start) -> None:
    rig = await start(Desk().router, unroutable_after=0.02)
    rig.take("Stranger")
    await eventually(lambda: rig.asked)
    rig.hands_over = True
    await eventually(lambda: len(rig.asked) > 20)
    assert rig.letters.tries == 0


async def test_nobody_is_asked_while_the_partition_is_paused(start: Start) -> None:
    rig = await start(Desk().router)
    rig.worker.pause()
    rig.take("Stranger")
    await turns()
    assert rig.asked == []
    rig.worker.resume()
    assert rig.asked[0] == "Stranger"


async def test_a_record_of_a_newer_wire_version_holds_back_what_is_behind_it(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router, unroutable_after=0.05)
    newer = b"\xc1\x02whatever comes"
    rig.worker.take(rig.raw_record(newer))
    rig.take(Debit("a", 1))
    await turns()
    assert (desk.seen, rig.worker.wanted, rig.worker.holds(2)) == ([], 0, True)
    await rig.acked(1, 2)
    assert [(letter.reason, letter.body) for letter in rig.letters.buried] == [(Reason.UNROUTABLE, newer)]
    assert rig.asked[0] == ""


async def test_a_record_of_a_newer_wire_version_goes_to_another_node_with_all_behind_it(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.hands_over = True
    rig.worker.take(rig.raw_record(b"\xc1\x02whatever comes"))
    rig.take(Debit("a", 1))
    await asyncio.wait_for(rig.worker.finish(below=False), 5.0)
    assert (desk.seen, rig.keeper.acked, rig.worker.records, rig.worker.holds(2)) == ([], [], 0, False)
    rig.worker.resume()
    rig.take(Debit("a", 2))
    await rig.acked(3)


# -- killers and careful mode ----------------------------------------------------------------------------------


async def test_a_killer_is_a_dead_letter_unrun_and_its_mates_are_run(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.take(Debit("a", 1), Debit("a", 2), Debit("a", 3), killer=1)
    await rig.acked(1)
    assert desk.of("a") == [1, 3]
    assert [(letter.id, letter.reason) for letter in rig.letters.buried] == [("2", Reason.KILLER)]


async def test_a_killer_that_is_not_in_the_record_is_nobody(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.take(Debit("a", 1), killer=7)
    await rig.acked(1)
    assert desk.of("a") == [1]


@pytest.mark.parametrize("with_inbox", [False, True])
async def test_careful_work_marks_each_frame_and_runs_one_at_a_time(start: Start, *, with_inbox: bool) -> None:
    router, now, peak, order = Router(), 0, 0, []

    @router.handler
    async def debit(command: Debit, ctx: Context) -> int:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        order.append(command.cents)
        assert rig.keeper.marks[-1] == ((ctx.message_id in ("1", "2", "3") and 1) or 2, (int(ctx.message_id) - 1) % 3)
        await asyncio.sleep(0)
        now -= 1
        return 1

    rig = await start(router, inbox=FakeInbox() if with_inbox else None)
    rig.worker.pause()
    rig.keeper.is_careful = True
    rig.worker.resume()
    rig.take(*(Debit(f"k{number}", number) for number in (1, 2, 3)))
    rig.take(*(Debit(f"k{number}", number) for number in (4, 5, 6)))
    await rig.acked(1, 2)
    await eventually(lambda: len(rig.keeper.marks) == 12)
    assert (peak, order) == (1, [1, 2, 3, 4, 5, 6])
    assert rig.keeper.marks == [mark for r in (1, 2) for i in range(3) for mark in ((r, i), None)]


def make_careful(keeper: Keeper, worker: Worker) -> None:
    worker.pause()
    keeper.is_careful = True
    worker.resume()


async def test_careful_partitions_of_a_node_mark_one_frame_between_them(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    keeper, other = rig.partition()
    make_careful(rig.keeper, rig.worker)
    make_careful(keeper, other)
    desk.gates = {"a": asyncio.Event(), "b": asyncio.Event()}
    rig.take(Debit("a"), Debit("c"))
    rig.take(Debit("b"), worker=other)
    await eventually(lambda: len(desk.seen) == 1)
    await turns()

    assert (rig.keeper.marks, keeper.marks) == ([(1, 0)], [])  # a death now would be that of "a" alone
    desk.gates["a"].set()
    await eventually(lambda: keeper.marks == [(1, 0)])
    assert rig.keeper.marks == [(1, 0), None]
    desk.gates["b"].set()
    await rig.acked(1)
    await eventually(lambda: keeper.acked == [1])


async def test_a_careful_frame_that_hangs_holds_up_the_other_partitions_for_a_while_only(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(careful, "_TURN_SECONDS", 0.05)
    desk = Desk()
    rig = await start(desk.router)
    keeper, other = rig.partition()
    make_careful(rig.keeper, rig.worker)
    make_careful(keeper, other)
    desk.gates = {"a": asyncio.Event()}
    rig.take(Debit("a"))
    rig.take(Debit("b"), Debit("c"), worker=other)
    await eventually(lambda: keeper.acked == [1])
    assert rig.keeper.acked == []
    desk.gates["a"].set()
    await rig.acked(1)


async def test_the_turn_of_a_frame_that_outlives_its_tenure_ends_with_it(start: Start) -> None:
    """The partition was lost and came back while its handler ran on."""
    desk = Desk()
    rig = await start(desk.router)
    keeper, other = rig.partition()
    make_careful(rig.keeper, rig.worker)
    make_careful(keeper, other)
    desk.gates = {"a": asyncio.Event()}
    rig.take(Debit("a"))
    await eventually(lambda: desk.seen)
    _, again = rig.partition(1)
    assert again is not rig.worker
    rig.take(Debit("b"), Debit("c"), worker=other)
    await turns()
    assert desk.seen == [("a", 0)]
    desk.gates["a"].set()
    await eventually(lambda: keeper.acked == [1])


async def test_a_frame_that_could_not_be_marked_gives_the_turn_to_others(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    keeper, other = rig.partition()
    make_careful(rig.keeper, rig.worker)
    make_careful(keeper, other)
    rig.keeper.mark_error = CatgaError("the partition is another's")
    rig.take(Debit("a"))
    rig.take(Debit("b"), worker=other)
    await eventually(lambda: keeper.acked == [1])


async def test_work_goes_on_side_by_side_when_there_is_no_need_for_care_any_more(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.worker.pause()
    rig.keeper.is_careful = True
    rig.keeper.on_done = lambda _: setattr(rig.keeper, "is_careful", False)
    rig.worker.resume()
    desk.gates = {f"k{number}": asyncio.Event() for number in range(5)}
    rig.take(Debit("first"))
    rig.take(*(Debit(key) for key in desk.gates))
    await eventually(lambda: len(desk.seen) == 6)
    assert rig.keeper.marks == [(1, 0), None]
    for gate in desk.gates.values():
        gate.set()
    await rig.acked(1, 2)


async def test_a_frame_that_cannot_be_marked_is_not_started(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.worker.pause()
    rig.keeper.is_careful = True
    rig.keeper.mark_error = CatgaError("the partition is another's")
    rig.worker.resume()
    rig.take(Debit("a"))
    await eventually(lambda: rig.workshop.statistics().delayed >= 2)
    assert desk.seen == []
    rig.keeper.mark_error = None
    await rig.acked(1)


async def test_a_pause_between_mark_and_start_takes_the_mark_back(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.worker.pause()
    rig.keeper.is_careful = True
    rig.worker.resume()
    rig.take(Debit("a"))
    await asyncio.sleep(0)
    rig.worker.pause()
    await eventually(lambda: rig.keeper.marks == [(1, 0), None])
    await turns()
    assert desk.seen == []
    rig.worker.resume()
    await rig.acked(1)


async def test_a_careful_failure_lets_others_go_first_and_comes_again(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.worker.pause()
    rig.keeper.is_careful = True
    rig.worker.resume()
    desk.failing["a"] = 1
    rig.take(Debit("a", 1), Debit("a", 2), Debit("b", 3))
    await rig.acked(1)
    assert [cents for _, cents in desk.seen] == [1, 3, 1, 2]


# -- memory ----------------------------------------------------------------------------------------------------


async def test_records_that_are_done_leave_nothing_for_the_garbage_collector(start: Start) -> None:
    desk = Desk()
    rig = await start(desk.router)
    rig.take(Debit("warm"))
    await rig.acked(1)
    gc.collect()
    gc.disable()
    try:
        for number in range(50):
            rig.take(*(Debit(f"k{index}", number) for index in range(20)))
        await eventually(lambda: len(rig.keeper.acked) == 51)
        found = [one for one in gc.get_objects() if isinstance(one, Job | Record)]
    finally:
        gc.enable()
    assert len(found) <= 1
