"""A node that is asked twice, asked after, told to forget, stood still, and about to leave."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import Bus, Context, Ok
from catga_bus.codec import Gate
from catga_bus.requests import attempts
from catga_bus.requests.kept import KEEP_SECONDS, KeptAnswers, KeptBatches
from catga_bus.testing import eventually
from catga_bus.wire import Kind, Names, Status, join_batch, join_ids
from tests.unit.lane import Ask, transport

NODE = "shop-1"
_encode = msgspec.msgpack.Encoder().encode


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


class Asker:
    """A caller played by hand."""

    def __init__(self, url: str) -> None:
        self.transport = transport(url)
        self.accepted: list[str] = []
        self.answers: list[tuple[str, int]] = []
        self.bodies: list[Any] = []
        self._gate = Gate()

    async def start(self) -> "Asker":
        await self.transport.connect()
        self.inbox = self.transport.new_inbox()
        await self.transport.subscribe(self.inbox, self._on_inbox)
        return self

    def _on_inbox(self, subject: str, payload: bytes, reply: str, headers: Any) -> None:
        if self._gate.kind(payload) == Kind.ACCEPTED:
            self.accepted.extend(self._gate.ids(payload).frames)
            return
        for frame in self._gate.answers(payload).frames:
            self.answers.append((frame.id, frame.status))
            self.bodies.append(msgspec.msgpack.decode(frame.body))

    def ask(self, *ids: str, what: str = "", attempt: int = 1, remaining_ms: int = 5_000) -> None:
        frames = [_encode((one, "Ask", None, remaining_ms, attempt, None, {"what": what})) for one in ids]
        payload = join_batch(Kind.MESSAGES, ("asker", self.inbox, 1), frames)
        self.transport.publish(Names().node_request("shop", NODE, "Ask"), payload)

    def status(self, *ids: str) -> None:
        self.transport.publish(Names().node_status("shop", NODE), join_ids(Kind.STATUS, ("asker", self.inbox), ids))

    def cancel(self, *ids: str) -> None:
        self.transport.publish(Names().node_cancel("shop", NODE), join_ids(Kind.CANCEL, ("asker", self.inbox), ids))


class Shop:
    """A node whose handler waits for a gate, one at a time."""

    def __init__(self, url: str) -> None:
        self.bus = Bus("shop", url=url, node_id=NODE)
        self.gate = asyncio.Event()
        self.ran: list[str] = []

        @self.bus.handler(concurrency=1)
        async def ask(request: Ask, ctx: Context) -> str:
            self.ran.append(ctx.message_id)
            await self.gate.wait()
            return f"{request.what} {ctx.attempt}"

    @property
    def requests(self) -> Any:
        return self.bus.statistics().requests


@pytest.fixture
async def shop(url: str) -> AsyncIterator[Shop]:
    shop = Shop(url)
    async with shop.bus:
        yield shop
        shop.gate.set()


@pytest.fixture
async def asker(url: str) -> AsyncIterator[Asker]:
    asker = await Asker(url).start()
    yield asker
    await asker.transport.close()


async def test_who_waits_longer_than_an_instant_is_told_once_that_the_request_is_here(shop: Shop, asker: Asker) -> None:
    asker.ask("1", "2")
    await eventually(lambda: asker.accepted == ["1", "2"])
    shop.gate.set()
    await eventually(lambda: asker.answers == [("1", Status.OK), ("2", Status.OK)])
    assert asker.accepted == ["1", "2"]


async def test_a_copy_of_what_runs_joins_it(shop: Shop, asker: Asker) -> None:
    asker.ask("1")
    await eventually(lambda: shop.ran == ["1"])
    asker.ask("1", attempt=2)
    await eventually(lambda: shop.requests.joined == 1)
    shop.gate.set()
    await eventually(lambda: asker.answers)
    assert (asker.answers, asker.bodies, shop.ran) == ([("1", Status.OK)], [" 1"], ["1"])


async def test_a_later_attempt_is_acknowledged_at_once_and_its_answer_given_again(shop: Shop, asker: Asker) -> None:
    asker.ask("1", attempt=2)
    await eventually(lambda: asker.accepted == ["1"])
    shop.gate.set()
    await eventually(lambda: len(asker.answers) == 1)
    asker.ask("1", attempt=3)
    await eventually(lambda: len(asker.answers) == 2)
    assert asker.bodies == [" 2", " 2"]
    assert shop.ran == ["1"]


async def test_the_id_of_another_callers_request_is_refused_while_that_runs(shop: Shop, asker: Asker, url: str) -> None:
    asker.ask("1")
    await eventually(lambda: shop.ran)
    other = await Asker(url).start()
    other.ask("1")
    await eventually(lambda: other.answers == [("1", Status.INVALID)])
    await other.transport.close()


async def test_a_status_query_tells_what_runs_what_is_done_and_what_is_lost(shop: Shop, asker: Asker) -> None:
    asker.ask("1")
    await eventually(lambda: asker.accepted == ["1"])
    asker.status("1", "unknown")
    await eventually(lambda: asker.accepted == ["1", "1"] and asker.answers == [("unknown", Status.LOST)])
    shop.gate.set()
    await eventually(lambda: len(asker.answers) == 2)
    asker.status("1")
    await eventually(lambda: asker.answers[1:] == [("1", Status.OK), ("1", Status.OK)])


async def test_answers_are_for_those_who_asked(shop: Shop, asker: Asker, url: str) -> None:
    asker.ask("1", attempt=2)
    await eventually(lambda: asker.accepted)
    other = await Asker(url).start()
    other.status("1")
    other.cancel("1")
    await eventually(lambda: other.answers == [("1", Status.LOST)])
    shop.gate.set()
    await eventually(lambda: asker.answers == [("1", Status.OK)])
    await other.transport.close()


async def test_what_is_cancelled_before_it_starts_never_runs(shop: Shop, asker: Asker) -> None:
    asker.ask("running", "waiting", "next")
    await eventually(lambda: shop.ran == ["running"])
    asker.cancel("running", "waiting", "unknown")
    await eventually(lambda: shop.requests.cancelled == 1)
    shop.gate.set()
    await eventually(lambda: len(asker.answers) == 2)
    assert shop.ran == ["running", "next"]
    assert asker.answers == [("running", Status.OK), ("next", Status.OK)]
    assert shop.bus.statistics().handlers.intake == 0


async def test_a_node_that_stood_still_starts_nothing_before_it_has_heard_the_server(
    shop: Shop, asker: Asker, url: str
) -> None:
    """What came during the gap may be old: it was cancelled, or its time is over."""
    here = shop.bus._node
    assert here is not None
    shop.gate.set()
    here.transport.flush = blocked = _Blocked()  # type: ignore[method-assign]
    here.pulse.last -= 3.0
    here.pulse.late_at -= 3.0
    asker.ask("old", remaining_ms=2_000)
    asker.ask("cancelled", "young", remaining_ms=30_000)
    asker.cancel("cancelled")
    await eventually(lambda: shop.requests.cancelled == 1)
    assert (shop.ran, shop.requests.gaps) == ([], 1)
    blocked.open.set()
    await eventually(lambda: len(asker.answers) == 2)
    assert sorted(asker.answers) == [("old", Status.EXPIRED), ("young", Status.OK)]
    assert shop.ran == ["young"]
    asker.ask("later", remaining_ms=2_000)
    await eventually(lambda: shop.ran == ["young", "later"])


async def test_what_a_link_held_back_waits_for_the_server_like_what_came_during_a_gap(shop: Shop, asker: Asker) -> None:
    """The loop ran all the time, but the node had not heard its own heartbeats: requests and cancels lay on the way."""
    here = shop.bus._node
    assert here is not None
    shop.gate.set()
    here.transport.flush = blocked = _Blocked()  # type: ignore[method-assign]
    here.responder.heard_itself(-5.0)
    here.responder._heard_at -= 3.0
    asker.ask("old", remaining_ms=2_000)
    asker.ask("cancelled", "young", remaining_ms=30_000)
    asker.cancel("cancelled")
    await eventually(lambda: shop.requests.cancelled == 1)
    assert shop.ran == []
    blocked.open.set()
    await eventually(lambda: len(asker.answers) == 2)
    assert sorted(asker.answers) == [("old", Status.EXPIRED), ("young", Status.OK)]


class _Blocked:
    """A flush that waits until it is let go."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, timeout: float = 5.0) -> None:
        await self.open.wait()


async def test_what_comes_to_a_node_that_is_about_to_leave_is_busy(shop: Shop, asker: Asker) -> None:
    asker.ask("1")
    await eventually(lambda: shop.ran == ["1"])
    leaving = asyncio.create_task(shop.bus.drain())
    await eventually(lambda: "DRAINING" in repr(shop.bus).upper())
    asker.ask("2")
    await eventually(lambda: asker.answers == [("2", Status.BUSY)])
    assert asker.bodies[0][1] == "the node is about to leave"
    asker.status("1")
    await eventually(lambda: asker.accepted.count("1") == 2)
    shop.gate.set()
    await leaving
    assert asker.answers == [("2", Status.BUSY), ("1", Status.OK)]


async def test_a_copy_of_what_runs_joins_it_while_the_node_leaves(shop: Shop, asker: Asker) -> None:
    asker.ask("1")
    await eventually(lambda: shop.ran == ["1"])
    leaving = asyncio.create_task(shop.bus.drain())
    await eventually(lambda: "DRAINING" in repr(shop.bus).upper())
    asker.ask("1", "2", attempt=2)
    await eventually(lambda: asker.answers == [("2", Status.BUSY)])
    await eventually(lambda: asker.accepted.count("1") >= 1)
    shop.gate.set()
    await leaving
    assert asker.answers == [("2", Status.BUSY), ("1", Status.OK)], "busy would have another node run it again"
    assert shop.ran == ["1"]


async def test_what_is_on_its_way_when_a_node_begins_to_leave_is_answered(shop: Shop, asker: Asker) -> None:
    node = shop.bus._node
    assert node is not None
    ids = [str(number) for number in range(500)]
    for one in ids:
        asker.transport.publish(
            Names().request("Ask"),
            join_batch(Kind.MESSAGES, ("asker", asker.inbox, 1), [_encode((one, "Ask", None, 5_000, 1, None, {}))]),
        )
    await node.drain()  # no turn of the loop in between: none has been read here
    await eventually(lambda: len(asker.answers) == 500)
    assert {status for _, status in asker.answers} == {Status.BUSY}
    assert shop.ran == []


async def test_a_call_that_takes_long_is_not_sent_again(shop: Shop, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "STATUS_INTERVAL", 0.1)
    async with Bus("web", url=url, attempt_timeout=0.05) as client:
        call = asyncio.create_task(client.send(Ask("x")))
        await eventually(lambda: shop.ran)
        await eventually(lambda: client.statistics().calls.asked >= 2)  # four times as long as silence may take
        shop.gate.set()
        assert await call == Ok("x 1")
        assert client.statistics().calls.failovers == 0


# -- kept answers --------------------------------------------------------------------------------------------


def test_kept_answers_end_by_age_and_by_bytes() -> None:
    now = 0.0
    kept = KeptAnswers(2_000, lambda: now)
    kept.keep("1", "inbox", b"x" * 300)
    assert kept.find("1", "inbox") == b"x" * 300
    assert kept.find("1", "other") is None
    kept.keep("2", "inbox", b"y" * 300)  # 556 bytes each with what keeping takes: one fits half the bound
    assert [kept.find(one, "inbox") is not None for one in "12"] == [True, True]
    kept.keep("3", "inbox", b"z" * 300)
    assert [kept.find(one, "inbox") is not None for one in "123"] == [False, True, True]
    now = KEEP_SECONDS - 0.1
    kept.keep("4", "inbox", b"!")
    assert kept.find("3", "inbox") is not None
    now = KEEP_SECONDS * 3
    kept.keep("5", "inbox", b"!")
    assert (len(kept), kept.find("4", "inbox")) == (1, None)


def test_an_answer_larger_than_half_the_bound_is_not_kept() -> None:
    kept = KeptAnswers(2_000, lambda: 0.0)
    kept.keep("1", "inbox", b"x" * 1_500)
    assert len(kept) == 0
    kept.keep("2", "inbox", b"y")
    assert kept.find("2", "inbox") == b"y"


def test_batches_are_kept_within_their_bounds_and_found_by_what_they_answer() -> None:
    now, opened = 0.0, []

    def ids_of(payload: bytes) -> list[str]:
        opened.append(payload)
        return payload.decode().split()

    kept = KeptBatches(1_000, lambda: now)
    kept.keep("inbox", b"1 2")
    kept.keep("other", b"1")
    kept.keep("inbox", b"3")
    assert kept.find("inbox", {"2", "4"}, ids_of) == [(b"1 2", {"1", "2"})]
    assert kept.find("inbox", {"3"}, ids_of) == [(b"3", {"3"})]
    assert opened == [b"1 2", b"3"], "each is taken apart once"
    kept.keep("inbox", b"4" + b" " * 200)  # the first has to go
    assert (len(kept), kept.find("inbox", {"1", "2"}, ids_of)) == (3, [])
    now = KEEP_SECONDS + 0.1
    kept.keep("inbox", b"5")
    assert len(kept) == 1
    kept.keep("inbox", b" " * 1_000)
    assert len(kept) == 0, "larger than the bound"


def test_no_batches_are_kept_if_none_may_be() -> None:
    kept = KeptBatches(0, lambda: 0.0)
    kept.keep("inbox", b"1")
    assert kept.find("inbox", {"1"}, lambda _: ["1"]) == []
