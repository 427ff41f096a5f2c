"""With an inbox effects happen once: found, committed before the answer, refused when the partition is lost."""

import asyncio
from typing import Any

import msgspec

from catga_bus import Context, Fence, RetryOptions, Router
from catga_bus.durability.inbox.base import InboxError, Recorded
from catga_bus.durability.letters.letters import Reason
from catga_bus.errors import CatgaError, Code
from catga_bus.testing import eventually
from catga_bus.wire import Status
from tests.unit.work_rig import QUICK, Debit, FakeInbox, Start

_encode = msgspec.msgpack.Encoder().encode


class Till:
    """A handler that writes through its transaction."""

    def __init__(self, **options: Any) -> None:
        self.runs: list[str] = []
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.router = Router()
        self.router.handler(**{"retry": QUICK, **options})(self.debit)

    async def debit(self, command: Debit, ctx: Context) -> int:
        """Write a line."""
        self.runs.append(ctx.message_id)
        transaction = await ctx.transaction()
        await transaction.execute(f"{command.account} {command.cents} attempt {ctx.attempt}")
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise ValueError("no money")
        return command.cents


async def test_effects_are_committed_then_answered_then_acknowledged(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    rig.take(Debit("a", 5), waits=True)
    await rig.acked(1)
    assert inbox.order == ["commit 1", "answer 1", "done 1"]
    assert inbox.effects == ["a 5 attempt 1"]
    assert inbox.done == {"1": Recorded(Status.OK, _encode(5))}
    assert rig.answers == [("1", Status.OK, 5)]


async def test_what_is_done_is_answered_again_and_not_run(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.done["7"] = Recorded(Status.OK, _encode(42))
    rig.take(rig.frame(Debit("a", 1), message_id="7", waits=True), rig.frame(Debit("a", 2), waits=True))
    await rig.acked(1)
    assert rig.answers == [("7", Status.OK, 42), ("2", Status.OK, 2)]
    assert till.runs == ["2"]
    assert rig.workshop.statistics().duplicates == 1
    assert rig.workshop.statistics().handled == 1


async def test_a_record_is_looked_up_at_once_and_not_frame_by_frame(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    rig.take(*(Debit(f"k{number}") for number in range(50)))
    await rig.acked(1)
    assert inbox.looks == 1


async def test_a_message_done_meanwhile_is_recognised_by_the_commit(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.gate.clear()
    rig.take(Debit("a", 1), waits=True)
    await eventually(lambda: till.runs)
    inbox.done["1"] = Recorded(Status.OK, _encode(99))
    till.gate.set()
    await rig.acked(1)
    assert rig.answers == [("1", Status.OK, 99)]
    assert (inbox.effects, rig.workshop.statistics().duplicates) == ([], 1)


async def test_a_failed_attempt_is_rolled_back_before_the_next_begins(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.failures = 2
    rig.take(Debit("a", 5))
    await rig.acked(1)
    assert inbox.rolled_back == ["1", "1"]
    assert inbox.effects == ["a 5 attempt 3"]


async def test_a_commit_that_fails_is_a_failed_attempt(start: Start) -> None:
    till, inbox = Till(max_attempts=2), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.commit_errors = [CatgaError("disk full"), CatgaError("disk full")]
    rig.take(Debit("a", 1), Debit("a", 2))
    await rig.acked(1)
    assert [(letter.id, letter.reason, letter.attempts) for letter in rig.letters.buried] == [("1", Reason.ATTEMPTS, 2)]
    assert "disk full" in rig.letters.buried[0].error
    assert inbox.effects == ["a 2 attempt 1"]


async def test_an_inbox_that_cannot_be_read_puts_off_and_costs_no_attempt(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.find_errors = 4
    rig.take(Debit("a", 1))
    await rig.acked(1)
    assert inbox.effects == ["a 1 attempt 1"]
    assert rig.workshop.statistics().delayed == 4
    assert rig.workshop.statistics().dead_letters == {}


async def test_an_inbox_that_cannot_begin_puts_off_and_takes_nothing_for_invalid(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.unit_errors = [CatgaError("the inbox is not open")] * 2
    rig.take(Debit("a", 1))
    await rig.acked(1)
    assert (rig.letters.tries, inbox.effects) == (0, ["a 1 attempt 1"])
    assert rig.workshop.statistics().delayed == 2


async def test_a_fenced_effect_is_dropped_without_acknowledgement_and_counted(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    rig.keeper.on_lost = rig.worker.drop
    inbox.highest = 8
    rig.take(Debit("a", 1), Debit("b", 1), waits=True)
    await eventually(lambda: rig.keeper.losses)
    await eventually(lambda: rig.dispatcher.statistics().intake == 0)
    assert (rig.keeper.acked, rig.answers, inbox.effects) == ([], [], [])
    assert set(rig.keeper.losses) == {8}, "the next claim has to be above what the store has seen"
    assert rig.workshop.statistics().fenced >= 1
    assert rig.worker.records == 0


async def test_a_refusal_by_an_epoch_of_ones_own_runs_the_message_again_under_it(start: Start) -> None:
    """The partition was claimed anew while it ran, and another message has been committed under the new epoch."""
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.gate.clear()
    rig.take(Debit("a", 1))
    await eventually(lambda: till.runs)
    rig.keeper.fence = Fence(3, 9)
    inbox.highest = 9
    till.gate.set()
    await rig.acked(1)
    assert (rig.keeper.losses, rig.workshop.statistics().fenced) == ([], 0)
    assert inbox.effects == ["a 1 attempt 1"]
    assert till.runs == ["1", "1"]


async def test_a_partition_that_turns_out_to_be_its_own_goes_on_after_a_fence(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.highest = 8

    def claim_anew() -> None:
        rig.worker.pause()
        rig.keeper.fence = Fence(3, 11)
        asyncio.get_running_loop().call_soon(rig.worker.resume)

    rig.keeper.on_lost = claim_anew
    rig.take(Debit("a", 1))
    await rig.acked(1)
    assert (len(rig.keeper.losses), inbox.effects) == (1, ["a 1 attempt 1"])


async def test_handlers_without_a_context_are_marked_as_done_as_well(start: Start) -> None:
    router, inbox, runs = Router(), FakeInbox(), []

    @router.handler
    async def debit(command: Debit) -> int:
        runs.append(command.cents)
        return 1

    rig = await start(router, inbox=inbox)
    record = rig.record(rig.frame(Debit("a", 1)))
    rig.worker.take(record)
    await rig.acked(1)
    keeper, worker = rig.partition()
    worker.take(record)
    await eventually(lambda: keeper.acked == [1])
    assert runs == [1]


async def test_nothing_is_committed_after_the_drop(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.gate.clear()
    rig.take(Debit("a", 1), waits=True)
    await eventually(lambda: till.runs)
    rig.worker.drop()
    till.gate.set()
    await eventually(lambda: inbox.rolled_back == ["1"])
    assert (inbox.effects, rig.answers, rig.keeper.acked) == ([], [], [])


async def test_a_commit_that_is_under_way_when_the_partition_is_lost_is_neither_answered_nor_acknowledged(
    start: Start,
) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.gate.clear()
    rig.take(Debit("a", 1), waits=True)
    await eventually(lambda: till.runs and rig.dispatcher.statistics().intake == 0)
    rig.worker.drop()
    inbox.gate.set()
    await eventually(lambda: inbox.order == ["commit 1"])
    await eventually(lambda: not rig.worker._lanes._ghosts)
    for _ in range(10):  # answers leave at the end of their turn
        await asyncio.sleep(0)
    assert (rig.answers, rig.keeper.acked) == ([], [])


async def test_what_is_older_than_the_inbox_remembers_is_not_run(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    record = rig.record(rig.frame(Debit("a", 1)))
    rig.utc += inbox.retention + 1.0
    rig.worker.take(record)
    rig.take(Debit("a", 2))
    await rig.acked(1, 2)
    assert [letter.reason for letter in rig.letters.buried] == [Reason.EXPIRED]
    assert inbox.effects == ["a 2 attempt 1"]


async def test_a_pause_while_the_inbox_is_asked_starts_nothing(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    rig.take(Debit("a", 1))
    rig.worker.pause()
    await eventually(lambda: inbox.looks == 1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert till.runs == []
    rig.worker.resume()
    await rig.acked(1)
    assert till.runs == ["1"]


async def test_order_per_key_holds_with_an_inbox_that_fails_now_and_then(start: Start) -> None:
    till, inbox = Till(max_attempts=100, retry=RetryOptions(first=0.0)), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.find_errors = 3
    inbox.commit_errors = [CatgaError("x") for _ in range(20)]
    till.failures = 20
    for number in range(20):
        rig.take(*(Debit(f"k{index % 3}", number * 10 + index) for index in range(10)))
    await rig.acked(*range(1, 21))
    for key in ("k0", "k1", "k2"):
        numbers = [int(line.split()[1]) for line in inbox.effects if line.startswith(key)]
        assert numbers == sorted(set(numbers))
    assert len(inbox.effects) == 200


# -- dead letters ----------------------------------------------------------------------------------------------


async def test_a_dead_letter_is_noted_before_its_key_goes_on_and_is_not_run_again_by_the_next_owner(
    start: Start,
) -> None:
    """Its record is not acknowledged when its node dies: another message of it still runs."""
    till, inbox = Till(max_attempts=2), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.failures = 2
    record = rig.record(rig.frame(Debit("a", 1), waits=True), rig.frame(Debit("a", 2)))
    rig.worker.take(record)
    await rig.acked(1)
    assert inbox.order[:3] == ["commit 1", "answer 1", "commit 2"]

    keeper, worker = rig.partition()
    worker.take(record)
    await eventually(lambda: keeper.acked == [1])
    assert till.runs == ["1", "1", "2"]
    assert [letter.id for letter in rig.letters.buried] == ["1"]
    assert [(name, status, fault.code) for name, status, fault in rig.answers] == [
        ("1", Status.FAILED, Code.DEAD_LETTERED)
    ] * 2
    assert rig.answers[0] == rig.answers[1]


async def test_a_dead_letter_that_is_retried_is_run_in_its_new_record(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.failures = 1
    frame = rig.frame(Debit("a", 1))
    rig.worker.take(rig.record(frame))
    await rig.acked(1)
    retried = rig.record(frame)
    rig.worker.take(retried)
    await rig.acked(1, 2)
    assert (till.runs, inbox.effects) == (["1", "1"], ["a 1 attempt 1"])
    assert inbox.done["1"].status == Status.OK


async def test_a_killer_whose_effects_are_committed_is_no_dead_letter(start: Start) -> None:
    """Its process died between the commit and the end of its mark."""
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    inbox.done["1"] = Recorded(Status.OK, _encode(1))
    inbox.find_errors = 2
    rig.take(Debit("a", 1), Debit("a", 2), waits=True, killer=0)
    await rig.acked(1)
    assert (rig.letters.tries, till.runs) == (0, ["2"])
    assert rig.answers == [("1", Status.OK, 1), ("2", Status.OK, 2)]


async def test_what_is_expired_and_known_as_done_is_no_dead_letter(start: Start) -> None:
    till, inbox = Till(), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    record = rig.record(rig.frame(Debit("a", 1)))
    inbox.done["1"] = Recorded(Status.OK, _encode(1))
    rig.utc += inbox.retention + 1.0
    rig.worker.take(record)
    await rig.acked(1)
    assert (rig.letters.tries, till.runs) == (0, [])


async def test_an_inbox_that_cannot_note_a_dead_letter_holds_back_its_key(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.failures = 1
    inbox.commit_errors = [InboxError("disk full"), InboxError("disk full")]
    rig.take(Debit("a", 1), Debit("a", 2))
    await rig.acked(1)
    assert inbox.order[:2] == ["commit 1", "commit 2"]
    assert (rig.letters.tries, inbox.done["1"].status) == (1, Status.FAILED)


async def test_a_dead_letter_that_the_fence_refuses_is_neither_answered_nor_acknowledged(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    rig.keeper.on_lost = rig.worker.drop
    till.failures = 1
    inbox.highest = 8
    rig.take(Debit("a", 1), waits=True)
    await eventually(lambda: rig.keeper.losses == [8] and rig.worker.records == 0)
    assert (rig.keeper.acked, rig.answers, inbox.done) == ([], [], {})


async def test_a_dead_letter_is_noted_under_the_epoch_that_was_claimed_meanwhile(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    till.failures = 1
    inbox.highest = 8

    def claim_anew() -> None:
        rig.keeper.fence = Fence(3, 11)

    rig.keeper.on_lost = claim_anew
    rig.take(Debit("a", 1))
    await rig.acked(1)
    assert (rig.keeper.losses, inbox.highest) == ([8], 11)


async def test_what_was_done_meanwhile_is_answered_as_it_was_though_its_letter_is_stored(start: Start) -> None:
    till, inbox = Till(max_attempts=1), FakeInbox()
    rig = await start(till.router, inbox=inbox)
    rig.letters.gate.clear()
    till.failures = 1
    rig.take(Debit("a", 1), waits=True)
    await eventually(lambda: rig.letters.tries)
    inbox.done["1"] = Recorded(Status.OK, _encode(99))
    rig.letters.gate.set()
    await rig.acked(1)
    assert rig.answers == [("1", Status.OK, 99)]
    assert rig.workshop.statistics().dead_letters == {}
