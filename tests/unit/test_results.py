"""A node that is asked once more for what commands have come to."""

from typing import Any

import msgspec

from catga_bus.durability.inbox.base import Recorded
from catga_bus.durability.working.results import Results
from catga_bus.requests.kept import KeptBatches
from catga_bus.testing import eventually
from catga_bus.wire import Kind, Status, join_batch, join_ids
from tests.unit.work_rig import INBOX, Debit, Desk, FakeInbox, Rig, Start

SUBJECT = "catga.to.shop.node.results"
_encode = msgspec.msgpack.Encoder().encode


async def asking(rig: Rig) -> Results:
    results = rig.workshop.results(rig.transport, SUBJECT)
    await results.start()
    return results


def ask(rig: Rig, *ids: str, inbox: Any = INBOX) -> None:
    rig.transport.publish(SUBJECT, join_ids(Kind.STATUS, ("sender", inbox), ids))


async def kept(start: Start, desk: Desk, **options: Any) -> Rig:
    return await start(desk.router, kept=KeptBatches(1_000_000, lambda: 0.0), **options)


async def test_what_was_answered_lately_is_answered_again(start: Start) -> None:
    rig = await kept(start, Desk())
    results = await asking(rig)
    rig.take(Debit("a", 5), Debit("b", 6), waits=True)
    await rig.acked(1)
    assert rig.answers == [("1", Status.OK, 5), ("2", Status.OK, 6)]
    ask(rig, "2", "unheard")
    await eventually(lambda: len(rig.answers) == 4)
    assert rig.answers[2:] == rig.answers[:2], "with its batch mates, whom nobody awaits"
    assert rig.workshop.statistics().repeated == 1
    await results.close()


async def test_what_is_under_way_gets_no_word_and_is_answered_once(start: Start) -> None:
    desk = Desk()
    rig = await kept(start, desk, inbox=FakeInbox())
    results = await asking(rig)
    inbox = rig.inbox
    assert inbox is not None
    rig.worker.pause()
    rig.take(Debit("a", 5), waits=True)
    ask(rig, "1")
    await eventually(lambda: inbox.looks == 1)
    rig.worker.resume()
    await rig.acked(1)
    assert rig.answers == [("1", Status.OK, 5)]
    assert rig.workshop.statistics().repeated == 0
    await results.close()


async def test_what_is_not_kept_any_more_is_in_the_inbox(start: Start) -> None:
    inbox = FakeInbox()
    rig = await start(Desk().router, inbox=inbox)
    results = await asking(rig)
    inbox.done |= {"1": Recorded(Status.OK, _encode(42)), "2": Recorded(Status.REFUSED, _encode(["NO", "no"]))}
    inbox.find_errors = 1
    ask(rig, "1", "2", "3")
    await eventually(lambda: inbox.looks == 1 and not results._is_looking)
    assert rig.answers == [], "the store was locked: it will be asked again"
    ask(rig, "1", "2", "3")
    await eventually(lambda: len(rig.answers) == 2)
    assert [(name, status) for name, status, _ in rig.answers] == [("1", Status.OK), ("2", Status.REFUSED)]
    assert rig.answers[0][2] == 42
    assert rig.workshop.statistics().repeated == 2
    await results.close()


async def test_strange_questions_are_not_let_in(start: Start) -> None:
    rig = await kept(start, Desk())
    results = await asking(rig)
    rig.take(Debit("a", 5), waits=True)
    await rig.acked(1)
    rig.transport.publish(SUBJECT, b"hello")
    rig.transport.publish(SUBJECT, b"\xc1\x01\x93")
    rig.transport.publish(SUBJECT, join_batch(Kind.MESSAGES, ("sender", INBOX, 0), []))
    ask(rig, "1", inbox=None)
    ask(rig, "1", inbox="catga.cmd.shop.1")
    ask(rig, "1", inbox="_INBOX.another")
    ask(rig, "unheard")
    ask(rig, "1")
    await eventually(lambda: len(rig.answers) == 2)
    assert rig.workshop.statistics().repeated == 1
    await results.close()
