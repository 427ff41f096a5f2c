"""The contract of `catga_bus.durability.inbox.base.Inbox` as tests: every store inherits and passes them.

Inherit `InboxContract` and give it the fixture `make`: a function that returns an inbox, not yet open, on the store of
a name; the same name is the same store. Statements are such as SQLite and PostgreSQL both take.
"""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import ClassVar, TypeAlias

import pytest

from catga_bus.durability.inbox.base import (
    FencedError,
    Inbox,
    InboxError,
    Outbound,
    Recorded,
    SlowTransactionError,
    Unit,
)
from catga_bus.partition.work import Fence
from catga_bus.testing.waiting import eventually
from catga_bus.wire import Status

Make: TypeAlias = Callable[[str], Inbox]
"""Returns an inbox on the store of a name, not yet open."""

Open: TypeAlias = Callable[[str], Awaitable[Inbox]]

SERVICE = "billing"
FENCE = Fence(partition=3, epoch=100)
DONE = Recorded(0, b"\xa4done")
OTHER = Recorded(1, b"\xa5other")
DEAD = Recorded(int(Status.FAILED), b"\xa5first")
DEAD_AGAIN = Recorded(int(Status.FAILED), b"\xa6second")


def outbound(number: int) -> Outbound:
    """A message of the outbox."""
    return Outbound(f"catga.evt.Debited.{number}", f"m-1.{number}", b"frame %d" % number, "ledger")


async def pay(unit: Unit, name: str, cents: int = 1) -> None:
    """Write an effect."""
    transaction = await unit.transaction()
    await transaction.execute(
        "INSERT INTO payments (name, cents) VALUES (:name, :cents)", {"name": name, "cents": cents}
    )


async def payments(inbox: Inbox) -> list[tuple[str, int]]:
    """Return the effects that are committed."""
    unit = inbox.unit(SERVICE, "reads", FENCE)
    rows = await (await unit.transaction()).fetch("SELECT name, cents FROM payments ORDER BY name, cents")
    await unit.rollback()
    return [(str(name), int(cents)) for name, cents in rows]


async def do(inbox: Inbox, message_id: str, *, fence: Fence = FENCE, result: Recorded = DONE) -> Recorded:
    """Do a message: one effect, named after it."""
    unit = inbox.unit(SERVICE, message_id, fence)
    await pay(unit, message_id)
    return await unit.commit(result)


async def mark(inbox: Inbox, message_id: str, *, fence: Fence = FENCE, result: Recorded = DONE) -> Recorded:
    """Do a message that has no effect in the store."""
    return await inbox.unit(SERVICE, message_id, fence).commit(result)


class InboxContract:
    """The promises of `Inbox`, one test each. Inherit it and give it the fixture `make`."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    @pytest.fixture
    def make(self) -> Make:
        """How to make an inbox; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `make`")

    @pytest.fixture
    async def open_inbox(self, make: Make) -> AsyncIterator[Open]:
        """How to open an inbox; closed at the end."""
        opened: list[Inbox] = []

        async def open_inbox(name: str) -> Inbox:
            inbox = make(name)
            await inbox.open()
            opened.append(inbox)
            return inbox

        yield open_inbox
        for inbox in opened:
            await inbox.close()

    @pytest.fixture
    async def inbox(self, open_inbox: Open) -> Inbox:
        """An open inbox with a table for effects."""
        inbox = await open_inbox("first")
        unit = inbox.unit(SERVICE, "makes the table", Fence(0, 1))
        await (await unit.transaction()).execute("CREATE TABLE payments (name TEXT PRIMARY KEY, cents INTEGER)")
        await unit.commit(DONE)
        return inbox

    # What a commit is

    async def test_effect_mark_and_result_are_committed_together(self, inbox: Inbox) -> None:
        assert await inbox.find(SERVICE, "m-1") is None
        assert await do(inbox, "m-1") == DONE
        assert await inbox.find(SERVICE, "m-1") == DONE
        assert await payments(inbox) == [("m-1", 1)]

    async def test_a_unit_without_effects_leaves_its_mark(self, inbox: Inbox) -> None:
        assert await mark(inbox, "m-1", result=OTHER) == OTHER
        assert await inbox.find(SERVICE, "m-1") == OTHER

    async def test_a_transaction_without_statements_is_a_mark(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await unit.transaction()
        assert await unit.commit(DONE) == DONE
        assert await inbox.find(SERVICE, "m-1") == DONE

    async def test_a_rollback_leaves_nothing(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await pay(unit, "m-1")
        unit.send(outbound(1))
        assert list(unit.outbound) == [outbound(1)]
        await unit.rollback()
        assert unit.failure is None
        assert await inbox.find(SERVICE, "m-1") is None
        assert await payments(inbox) == []
        assert await inbox.unsent(SERVICE, FENCE, 10) == []
        assert await do(inbox, "m-1") == DONE  # the next attempt

    async def test_a_rollback_before_the_first_statement_is_nothing(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await unit.transaction()
        await unit.rollback()
        await unit.rollback()
        assert await inbox.find(SERVICE, "m-1") is None

    async def test_a_unit_ends_once(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await pay(unit, "m-1")
        await unit.commit(DONE)
        await unit.rollback()
        with pytest.raises(InboxError, match="m-1"):
            await unit.commit(DONE)
        assert await payments(inbox) == [("m-1", 1)]

    async def test_a_statement_after_the_end_is_refused(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        transaction = await unit.transaction()
        await unit.commit(DONE)
        with pytest.raises(InboxError, match="m-1"):
            await transaction.execute("INSERT INTO payments VALUES ('late', 1)")
        assert await payments(inbox) == []

    async def test_the_same_id_of_another_service_is_another_message(self, inbox: Inbox) -> None:
        await mark(inbox, "m-1")
        assert await inbox.find("shipping", "m-1") is None
        assert await inbox.unit("shipping", "m-1", FENCE).commit(OTHER) == OTHER
        assert await inbox.find(SERVICE, "m-1") == DONE

    async def test_many_are_found_at_once(self, inbox: Inbox) -> None:
        ids = [f"m-{number}" for number in range(600)]
        await asyncio.gather(*(mark(inbox, message_id) for message_id in ids[::3]))
        assert await inbox.find_many(SERVICE, ids) == dict.fromkeys(ids[::3], DONE)
        assert await inbox.find_many(SERVICE, []) == {}

    @pytest.mark.parametrize(
        "message_id", ["", "x" * 256, "naïve \N{SNOWMAN}", "a'b\"c;--", "line\nline", "\x00", "%_*>"]
    )
    async def test_any_text_is_an_id(self, inbox: Inbox, message_id: str) -> None:
        await mark(inbox, message_id)
        assert await inbox.find(SERVICE, message_id) == DONE
        assert await inbox.find(SERVICE, message_id + "x") is None

    async def test_a_large_result_comes_back_whole(self, inbox: Inbox) -> None:
        large = Recorded(0, bytes(range(256)) * 4_096)
        await mark(inbox, "m-1", result=large)
        assert await inbox.find(SERVICE, "m-1") == large

    # Duplicates

    async def test_a_duplicate_gets_the_recorded_result_and_its_effect_is_rolled_back(self, inbox: Inbox) -> None:
        await do(inbox, "m-1")
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await pay(unit, "again")
        unit.send(outbound(1))
        assert await unit.commit(OTHER) == DONE
        assert await payments(inbox) == [("m-1", 1)]
        assert await inbox.unsent(SERVICE, FENCE, 10) == []

    async def test_a_duplicate_without_effects_gets_the_recorded_result(self, inbox: Inbox) -> None:
        await do(inbox, "m-1")
        results = await asyncio.gather(
            mark(inbox, "m-0", result=OTHER), mark(inbox, "m-1", result=OTHER), mark(inbox, "m-2", result=OTHER)
        )
        assert list(results) == [OTHER, DONE, OTHER]
        assert await inbox.find(SERVICE, "m-2") == OTHER

    @pytest.mark.parametrize("has_effects", [False, True])
    async def test_a_dead_letter_is_replaced_by_the_result_of_its_retry(
        self,
        inbox: Inbox,
        has_effects: bool,  # noqa: FBT001
    ) -> None:
        assert await mark(inbox, "m-1", result=DEAD) == DEAD
        assert await inbox.find(SERVICE, "m-1") == DEAD
        assert await mark(inbox, "m-1", result=DEAD_AGAIN) == DEAD_AGAIN
        assert await (do if has_effects else mark)(inbox, "m-1") == DONE
        assert await inbox.find(SERVICE, "m-1") == DONE
        assert await payments(inbox) == ([("m-1", 1)] if has_effects else [])

    async def test_what_is_done_is_no_dead_letter_any_more(self, inbox: Inbox) -> None:
        await do(inbox, "m-1")
        assert await mark(inbox, "m-1", result=DEAD) == DONE
        assert await inbox.find(SERVICE, "m-1") == DONE

    async def test_of_units_that_race_for_one_message_one_has_the_effect(self, inbox: Inbox) -> None:
        async def race(number: int) -> Recorded:
            unit = inbox.unit(SERVICE, "m-1", FENCE)
            if number % 2:
                await pay(unit, f"racer {number}")
            return await unit.commit(Recorded(0, b"%d" % number))

        results = await asyncio.gather(*(race(number) for number in range(8)))
        assert len({result.body for result in results}) == 1
        assert await inbox.find(SERVICE, "m-1") == results[0]
        winner = int(results[0].body)
        assert await payments(inbox) == ([(f"racer {winner}", 1)] if winner % 2 else [])

    # The fence

    async def test_a_lower_epoch_is_refused_and_leaves_nothing(self, inbox: Inbox) -> None:
        await mark(inbox, "m-1")
        unit = inbox.unit(SERVICE, "m-2", Fence(FENCE.partition, FENCE.epoch - 1))
        await pay(unit, "m-2")
        unit.send(outbound(1))
        with pytest.raises(FencedError, match=f"m-2.*{FENCE.epoch - 1}.*{FENCE.epoch}") as caught:
            await unit.commit(DONE)
        assert caught.value.highest == FENCE.epoch
        with pytest.raises(FencedError):
            await mark(inbox, "m-3", fence=Fence(FENCE.partition, 1))
        assert await inbox.find_many(SERVICE, ["m-2", "m-3"]) == {}
        assert await payments(inbox) == []
        assert await inbox.unsent(SERVICE, FENCE, 10) == []

    async def test_a_lower_epoch_is_refused_even_for_what_is_done(self, inbox: Inbox) -> None:
        await mark(inbox, "m-1")
        with pytest.raises(FencedError):
            await mark(inbox, "m-1", fence=Fence(FENCE.partition, FENCE.epoch - 1))

    async def test_an_equal_and_a_higher_epoch_pass(self, inbox: Inbox) -> None:
        for epoch in (100, 100, 101, 2**53):
            assert await mark(inbox, f"m-{epoch}", fence=Fence(3, epoch)) == DONE
        with pytest.raises(FencedError):
            await mark(inbox, "m", fence=Fence(3, 2**53 - 1))

    @pytest.mark.parametrize("has_effects", [True, False])
    async def test_a_duplicate_raises_the_fence_all_the_same(self, inbox: Inbox, has_effects: bool) -> None:  # noqa: FBT001
        await mark(inbox, "m-1")
        await (do if has_effects else mark)(inbox, "m-1", fence=Fence(3, 200))
        with pytest.raises(FencedError):
            await mark(inbox, "m-2", fence=Fence(3, 199))

    async def test_what_comes_with_a_duplicate_raises_the_fence(self, inbox: Inbox) -> None:
        await mark(inbox, "m-1")
        results = await asyncio.gather(mark(inbox, "m-1", result=OTHER), mark(inbox, "m-2", fence=Fence(3, 200)))
        assert list(results) == [DONE, DONE]
        with pytest.raises(FencedError):
            await mark(inbox, "m-3", fence=Fence(3, 199))

    async def test_the_fence_is_the_stores_and_not_the_nodes(self, inbox: Inbox, open_inbox: Open) -> None:
        other = await open_inbox("first")
        await mark(inbox, "m-1", fence=Fence(3, 100))
        await mark(other, "m-2", fence=Fence(3, 200))
        with pytest.raises(FencedError):
            await mark(inbox, "m-3", fence=Fence(3, 100))
        assert await inbox.find(SERVICE, "m-2") == DONE

    async def test_a_rollback_does_not_raise_the_fence(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", Fence(3, 200))
        await pay(unit, "m-1")
        await unit.rollback()
        assert await mark(inbox, "m-1") == DONE

    async def test_fences_of_other_partitions_domains_and_services_are_apart(self, inbox: Inbox) -> None:
        await mark(inbox, "m-1", fence=Fence(3, 100))
        assert await mark(inbox, "m-2", fence=Fence(4, 1)) == DONE
        assert await mark(inbox, "m-3", fence=Fence(3, 1, "evt")) == DONE
        assert await inbox.unit("shipping", "m-4", Fence(3, 1)).commit(DONE) == DONE
        with pytest.raises(FencedError):
            await mark(inbox, "m-5", fence=Fence(3, 99))

    async def test_one_stale_unit_among_many_is_refused_alone(self, inbox: Inbox) -> None:
        await mark(inbox, "m-0", fence=Fence(3, 100))
        fences = [Fence(3, 99) if number == 5 else Fence(3, 100) for number in range(10)]
        results = await asyncio.gather(
            *(mark(inbox, f"n-{number}", fence=fence) for number, fence in enumerate(fences)), return_exceptions=True
        )
        assert [isinstance(result, FencedError) for result in results] == [number == 5 for number in range(10)]
        found = await inbox.find_many(SERVICE, [f"n-{number}" for number in range(10)])
        assert sorted(found) == [f"n-{number}" for number in range(10) if number != 5]

    # Transactions

    async def test_a_query_sees_what_its_transaction_has_written(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        transaction = await unit.transaction()
        assert await transaction.execute_many("INSERT INTO payments VALUES (?, ?)", [("a", 1), ("b", 2)]) == 2
        assert await transaction.execute("UPDATE payments SET cents = cents + 1") == 2
        assert await transaction.execute("UPDATE payments SET cents = 0 WHERE name = ?", ["nobody"]) == 0
        assert await transaction.fetch("SELECT cents FROM payments ORDER BY cents") == [(2,), (3,)]
        assert await unit.transaction() is transaction
        await unit.commit(DONE)
        assert await payments(inbox) == [("a", 2), ("b", 3)]

    async def test_nobody_sees_what_is_not_committed(self, inbox: Inbox) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await pay(unit, "m-1")
        looking = asyncio.ensure_future(payments(inbox))
        assert await inbox.find(SERVICE, "m-1") is None
        await unit.rollback()
        assert await looking == []

    async def test_concurrent_units_run_one_after_another(self, inbox: Inbox) -> None:
        async def count(number: int) -> None:
            unit = inbox.unit(SERVICE, f"n-{number}", FENCE)
            transaction = await unit.transaction()
            [(cents,)] = await transaction.fetch("SELECT cents FROM payments WHERE name = 'counter'")
            await asyncio.sleep(0)
            await transaction.execute("UPDATE payments SET cents = ? WHERE name = 'counter'", (cents + 1,))
            if number % 3 == 0:
                await unit.rollback()
            else:
                await unit.commit(DONE)

        setup = inbox.unit(SERVICE, "setup", FENCE)
        await pay(setup, "counter", 0)
        await setup.commit(DONE)
        await asyncio.gather(*(count(number) for number in range(60)))
        assert await payments(inbox) == [("counter", 40)]

    async def test_a_failed_statement_does_nothing_and_the_transaction_goes_on(self, inbox: Inbox) -> None:
        await do(inbox, "m-1")
        unit = inbox.unit(SERVICE, "m-2", FENCE)
        await pay(unit, "m-2")
        with pytest.raises(Exception, match=r"payments\.name"):
            await pay(unit, "m-1")
        with pytest.raises(Exception, match="nothing_there"):
            await (await unit.transaction()).fetch("SELECT * FROM nothing_there")
        await unit.commit(DONE)
        assert await payments(inbox) == [("m-1", 1), ("m-2", 1)]

    @pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "end", "BEGIN", "SAVEPOINT s", "RELEASE catga_unit"])
    async def test_a_handler_cannot_end_the_transaction_itself(self, inbox: Inbox, statement: str) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        await pay(unit, "m-1")
        with pytest.raises(Exception, match="does not begin or end its transaction"):
            await (await unit.transaction()).execute(statement)
        await unit.rollback()
        assert await payments(inbox) == []
        assert await inbox.find(SERVICE, "m-1") is None

    @pytest.mark.parametrize(
        "statement", ["DELETE FROM catga_inbox", "UPDATE catga_fence SET epoch = 0", "DROP TABLE catga_outbox"]
    )
    async def test_a_handler_cannot_change_what_the_inbox_knows(self, inbox: Inbox, statement: str) -> None:
        await mark(inbox, "m-1")
        unit = inbox.unit(SERVICE, "m-2", FENCE)
        with pytest.raises(Exception, match="belongs to the inbox"):
            await (await unit.transaction()).execute(statement)
        await unit.rollback()
        assert await inbox.find(SERVICE, "m-1") == DONE

    async def test_a_cancelled_handler_that_is_rolled_back_does_not_hold_the_others_up(self, inbox: Inbox) -> None:
        first, second = inbox.unit(SERVICE, "m-1", FENCE), inbox.unit(SERVICE, "m-2", FENCE)
        await pay(first, "m-1")
        waiting = asyncio.ensure_future(pay(second, "m-2"))
        third = asyncio.ensure_future(do(inbox, "m-3"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await second.rollback()
        assert not third.done()
        await first.commit(DONE)
        assert await third == DONE
        assert await payments(inbox) == [("m-1", 1), ("m-3", 1)]

    # The outbox

    async def test_what_is_sent_is_found_in_order_until_it_is_stored(self, inbox: Inbox) -> None:
        for number in range(1, 5):
            unit = inbox.unit(SERVICE, f"p-{number}", FENCE)
            if number % 2:
                await pay(unit, f"p-{number}")
            unit.send(outbound(2 * number))
            unit.send(outbound(2 * number + 1))
            await unit.commit(DONE)
        every = [outbound(number) for number in range(2, 10)]
        assert await inbox.unsent(SERVICE, FENCE, 100) == every
        assert await inbox.unsent(SERVICE, FENCE, 3) == every[:3]
        await inbox.sent(SERVICE, [out.message_id for out in every[1:4]])
        await inbox.sent(SERVICE, [out.message_id for out in every[1:4]])
        await inbox.sent(SERVICE, [])
        assert await inbox.unsent(SERVICE, FENCE, 100) == [every[0], *every[4:]]

    async def test_outboxes_of_partitions_domains_and_services_are_apart(self, inbox: Inbox) -> None:
        places = [(SERVICE, Fence(3, 1)), (SERVICE, Fence(4, 1)), (SERVICE, Fence(3, 1, "evt")), ("x", Fence(3, 1))]
        for number, (service, fence) in enumerate(places):
            unit = inbox.unit(service, f"p-{number}", fence)
            unit.send(outbound(number))
            await unit.commit(DONE)
        for number, (service, fence) in enumerate(places):
            assert await inbox.unsent(service, fence, 10) == [outbound(number)]

    async def test_looking_for_the_unsent_raises_the_fence(self, inbox: Inbox) -> None:
        assert await inbox.unsent(SERVICE, Fence(3, 200), 10) == []
        with pytest.raises(FencedError):
            await mark(inbox, "m-1", fence=Fence(3, 199))
        with pytest.raises(FencedError):
            await inbox.unsent(SERVICE, Fence(3, 199), 10)

    # The store

    async def test_a_store_keeps_its_id_and_what_it_holds(self, open_inbox: Open) -> None:
        inbox = await open_inbox("kept")
        await mark(inbox, "m-1")
        store_id = inbox.store_id
        await inbox.close()
        again = await open_inbox("kept")
        assert again.store_id == store_id
        assert await again.find(SERVICE, "m-1") == DONE
        with pytest.raises(FencedError):
            await mark(again, "m-2", fence=Fence(FENCE.partition, 1))

    async def test_different_stores_have_different_ids(self, open_inbox: Open) -> None:
        ids = {(await open_inbox(name)).store_id for name in ("one", "two", "three")}
        assert len(ids) == 3
        assert all(len(store_id) >= 16 for store_id in ids)

    async def test_opened_twice_it_is_closed_by_the_second_close(self, make: Make) -> None:
        inbox = make("twice")
        await asyncio.gather(inbox.open(), inbox.open())
        await inbox.close()
        assert await mark(inbox, "m-1") == DONE
        await inbox.close()
        await inbox.close()
        with pytest.raises(InboxError, match="not open"):
            await inbox.find(SERVICE, "m-1")
        with pytest.raises(InboxError, match="not open"):
            await mark(inbox, "m-2")

    async def test_what_was_handed_in_is_committed_before_the_close(self, open_inbox: Open) -> None:
        inbox = await open_inbox("kept")
        units = [asyncio.ensure_future(mark(inbox, f"m-{number}")) for number in range(300)]
        await asyncio.sleep(0)
        await inbox.close()
        assert await asyncio.gather(*units) == [DONE] * 300
        again = await open_inbox("kept")
        assert len(await again.find_many(SERVICE, [f"m-{number}" for number in range(300)])) == 300

    async def test_what_waits_for_a_transaction_is_committed_before_the_close(
        self, inbox: Inbox, open_inbox: Open
    ) -> None:
        await pay(inbox.unit(SERVICE, "m-1", FENCE), "m-1")
        units = [asyncio.ensure_future(mark(inbox, f"n-{number}")) for number in range(3)]
        await asyncio.sleep(0)
        await inbox.close()
        assert await asyncio.gather(*units) == [DONE] * 3
        again = await open_inbox("first")
        assert len(await again.find_many(SERVICE, ["m-1", "n-0", "n-1", "n-2"])) == 3

    async def test_what_has_not_finished_is_rolled_back_by_the_close(self, inbox: Inbox, open_inbox: Open) -> None:
        first, second = inbox.unit(SERVICE, "m-1", FENCE), inbox.unit(SERVICE, "m-2", FENCE)
        await pay(first, "m-1")
        waiting = asyncio.ensure_future(pay(second, "m-2"))
        await asyncio.sleep(0)
        await inbox.close()
        with pytest.raises(InboxError, match="closed"):
            await waiting
        with pytest.raises(InboxError, match="closed"):
            await first.commit(DONE)
        assert first.failure is not None
        assert second.failure is not None
        assert await payments(await open_inbox("first")) == []

    # Retention

    async def test_a_sweep_forgets_what_is_older_than_the_retention(self, inbox: Inbox, utc: list[float]) -> None:
        await asyncio.gather(*(mark(inbox, f"old-{number}") for number in range(2_500)))
        utc[0] += 3_600.0
        await mark(inbox, "young")
        assert await inbox.sweep(utc[0]) == 0
        oldest = utc[0] - 3_600.0
        assert await inbox.sweep(oldest + inbox.retention + 1.0) == 2_500 + 1  # one made the table
        assert await inbox.find(SERVICE, "old-0") is None
        assert await inbox.find(SERVICE, "young") == DONE
        assert await inbox.sweep(utc[0] + inbox.retention) == 0
        assert await inbox.sweep(utc[0] + inbox.retention + 1.0) == 1

    async def test_a_dead_letter_that_is_replaced_is_young_again_and_holds_up_no_sweep(
        self, inbox: Inbox, utc: list[float]
    ) -> None:
        await mark(inbox, "m-1", result=DEAD)
        await mark(inbox, "m-2")
        utc[0] += 3_600.0
        await mark(inbox, "m-1")
        oldest = utc[0] - 3_600.0
        assert await inbox.sweep(oldest + inbox.retention + 1.0) == 1 + 1  # one made the table
        assert await inbox.find(SERVICE, "m-1") == DONE
        assert await inbox.find(SERVICE, "m-2") is None

    async def test_a_sweep_leaves_fences_and_the_outbox(self, inbox: Inbox, utc: list[float]) -> None:
        unit = inbox.unit(SERVICE, "m-1", FENCE)
        unit.send(outbound(1))
        await unit.commit(DONE)
        await inbox.sweep(utc[0] + 10 * inbox.retention)
        assert await inbox.unsent(SERVICE, FENCE, 10) == [outbound(1)]
        with pytest.raises(FencedError):
            await mark(inbox, "m-2", fence=Fence(FENCE.partition, 1))

    @pytest.fixture
    def utc(self) -> list[float]:
        """The wall clock of the stores that `make` makes: seconds since 1970, to be moved."""
        return [1_800_000_000.0]

    # Time-outs

    async def test_a_transaction_that_is_open_for_too_long_is_rolled_back(self, inbox: Inbox) -> None:
        slow = inbox.unit(SERVICE, "slow", FENCE)
        await pay(slow, "slow")
        assert await do(inbox, "m-1") == DONE  # it had to wait for the time-out
        with pytest.raises(SlowTransactionError, match=r"slow was open for more than .* s and was rolled back"):
            await pay(slow, "slow again")
        assert slow.failure is None  # the handler is to blame, not the store
        with pytest.raises(InboxError, match="slow was open"):
            await slow.commit(DONE)
        await slow.rollback()
        assert await payments(inbox) == [("m-1", 1)]
        assert await inbox.find(SERVICE, "slow") is None

    async def test_a_statement_that_takes_too_long_is_broken_off(self, inbox: Inbox) -> None:
        slow = inbox.unit(SERVICE, "slow", FENCE)
        await pay(slow, "slow")
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        with pytest.raises(InboxError, match="slow was open for more than"):
            await (await slow.transaction()).fetch(endless)
        await slow.rollback()
        assert await do(inbox, "m-1") == DONE
        assert await payments(inbox) == [("m-1", 1)]

    async def test_a_waiting_unit_has_its_own_time(self, inbox: Inbox) -> None:
        slow = inbox.unit(SERVICE, "slow", FENCE)
        await pay(slow, "slow")
        marks = [asyncio.ensure_future(mark(inbox, f"m-{number}")) for number in range(10)]
        await eventually(lambda: all(task.done() for task in marks), what="the marks behind the slow transaction")
        assert [task.result() for task in marks] == [DONE] * 10
        await slow.rollback()
