"""The breakers of a caller: what counts for and against a request type and a node, and whose answer closes what."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from catga_bus import (
    BreakerOptions,
    BreakerState,
    Bus,
    BusStateError,
    ConfigurationError,
    Err,
    Ok,
    Request,
)
from catga_bus.clock import monotonic
from catga_bus.errors import CircuitOpenError, Code, Outcome
from catga_bus.requests import attempts
from catga_bus.requests.attempts import Phase
from catga_bus.requests.guard import Guard
from catga_bus.requests.peers import NoPeers
from catga_bus.testing import eventually
from catga_bus.wire import Fault, Status
from tests.unit.lane import PATIENCE, AskOnce, FakeNode, Lane, StartNode

ASK, ASK_ONCE = ("Ask", None), ("AskOnce", None)
TYPES = ("Ask", "AskOnce")
MIN_CALLS = 5


class Quote(Request[str]):
    """Answered at once."""


class Bill(Request[str]):
    """Handled by another service."""


def shop(url: str, node_id: str, zone: str | None = None) -> Bus:
    bus = Bus("shop", url=url, node_id=node_id, zone=zone)

    @bus.handler
    async def quote(request: Quote) -> str:
        return node_id

    return bus


def billing(url: str, node_id: str) -> Bus:
    bus = Bus("billing", url=url, node_id=node_id)

    @bus.handler
    async def bill(request: Bill) -> str:
        return node_id

    return bus


@pytest.fixture
async def client(url: str) -> AsyncIterator[Bus]:
    async with Bus("client", url=url, node_id="client") as client:
        yield client


def trip(client: Bus, node: str) -> None:
    """Open the breaker of a node, and let its time be over at once."""
    guard = client._open().caller.guard
    guard._breakers.failed((None, node), monotonic() - 100.0, 25)
    assert guard.held_nodes() == (node,)


# -- which calls probe a node ----------------------------------------------------------------------------------


async def test_a_held_node_is_tried_only_with_types_that_it_handles(url: str, client: Bus) -> None:
    async with shop(url, "s1"), billing(url, "b1"):
        await eventually(lambda: len(client.nodes()) == 3)
        trip(client, "b1")
        assert [await client.send(Quote(), timeout=2.0) for _ in range(10)] == [Ok("s1")] * 10
        assert client._open().caller.guard.held_nodes() == ("b1",)
        assert [await client.send(Bill(), timeout=2.0) for _ in range(3)] == [Ok("b1")] * 3
        assert client._open().caller.guard.held_nodes() == ()


async def test_a_held_node_is_tried_only_with_calls_that_it_fits(url: str, client: Bus) -> None:
    async with shop(url, "good", zone="eu"), shop(url, "bad", zone="us"):
        await eventually(lambda: len(client.nodes()) == 3)
        trip(client, "bad")
        for _ in range(5):
            assert await client.send(Quote(), timeout=2.0, where=lambda node: node.zone == "eu") == Ok("good")
        assert client._open().caller.guard.held_nodes() == ("bad",)
        for _ in range(3):
            assert await client.send(Quote(), timeout=2.0, where=lambda node: node.zone == "us") == Ok("bad")
        assert client._open().caller.guard.held_nodes() == ()


# -- what counts -----------------------------------------------------------------------------------------------


@pytest.fixture
async def lane(url: str) -> AsyncIterator[Lane]:
    lane = await Lane(
        url, BreakerOptions(min_calls=MIN_CALLS, open_seconds=60.0, max_open_seconds=60.0, probes=1, successes=1)
    ).start()
    yield lane
    await lane.stop()


def counts(lane: Lane, key: tuple[str | None, str | None]) -> tuple[int, int]:
    """Return the successes and failures that the breaker of a key has in its window; none if there is no breaker."""
    seen = [one for one in lane.caller.guard.statistics() if (one.type_name, one.node) == key]
    return (seen[0].successes, seen[0].failures) if seen else (0, 0)


def state(lane: Lane, key: tuple[str | None, str | None]) -> BreakerState:
    return next(one.state for one in lane.caller.guard.statistics() if (one.type_name, one.node) == key)


async def accepted(lane: Lane, node: FakeNode, message: Any = None, **options: Any) -> Any:
    """Make a call that the node has and says so."""
    call = lane.send(message, **options)
    await eventually(lambda: call.id in node.ids)
    node.accept(call.id)
    await eventually(lambda: call.trouble().phase is Phase.ACCEPTED)
    return call


async def test_the_deadline_of_calls_that_a_live_node_holds_counts_for_nothing(
    lane: Lane, start_node: StartNode
) -> None:
    node = await start_node("a", in_group=True)
    calls = [await accepted(lane, node, timeout=PATIENCE) for _ in range(2 * MIN_CALLS)]
    for call in calls:
        result = await call.future
        assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert lane.caller.guard.statistics() == ()
    assert isinstance(await (await accepted(lane, node, timeout=PATIENCE)).future, Err)  # it went to the node


async def test_what_handlers_answer_is_no_failure_whatever_it_is(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    lane.view.live, lane.view.troubled = ["a"], frozenset({"Ask"})
    faults = [
        (Status.FAILED, Fault(str(Code.TIMEOUT), "the handler was cut off")),
        (Status.FAILED, Fault(str(Code.HANDLER_ERROR), "the handler raised")),
        (Status.REFUSED, Fault("NO_SUCH_SKU", "refused")),
    ]
    for status, fault in faults * MIN_CALLS:
        call = lane.send()
        await eventually(lambda one=call: one.id in node.ids)  # type: ignore[misc]
        node.answer(call.id, fault, status)
        assert (await call.future).code == fault.code
    assert lane.caller.guard.statistics() == ()


async def test_answers_of_any_kind_outweigh_silence(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    await lane.send(timeout=PATIENCE / 2).future
    for _ in range(3):
        call = await accepted(lane, node)
        node.answer(call.id, Fault(str(Code.TIMEOUT), "the handler was cut off"), Status.FAILED)
        await call.future
    assert counts(lane, ASK) == (3, 1)


async def test_a_burst_of_silence_after_many_answers_opens_nothing(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    for _ in range(10):
        calls = [lane.send() for _ in range(20)]
        await eventually(lambda last=calls[-1]: last.id in node.ids)  # type: ignore[misc]
        node.answer_all(*[(call.id, Status.OK, "done") for call in calls])
        assert [await call.future for call in calls] == [Ok("done")] * 20
    assert lane.caller.guard.statistics() == ()  # nothing has failed
    lost = [lane.send(timeout=PATIENCE, target=("shop", "a")) for _ in range(4 * MIN_CALLS)]
    for call in lost:
        assert (await call.future).code == Code.TIMEOUT
    assert (counts(lane, ASK), counts(lane, (None, "a"))) == ((200, 20), (200, 20))
    assert lane.caller.guard.held_names() == ()


async def test_without_breakers_no_answer_is_counted(url: str, start_node: StartNode) -> None:
    lane = await Lane(url, None).start()
    node = await start_node("a", in_group=True)
    call = lane.send()
    await eventually(lambda: node.got)
    node.answer(call.id)
    assert await call.future == Ok("done")
    assert not lane.caller.guard._breakers._calm
    for _ in range(40):
        lost = lane.send(timeout=PATIENCE / 2, target=("shop", "a"))
    assert (await lost.future).code == Code.TIMEOUT
    assert lane.caller.guard.statistics() == ()
    await lane.stop()


async def test_each_answer_of_a_batch_counts_for_its_own_type(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    await lane.send(timeout=PATIENCE / 2).future
    await lane.send(AskOnce(), timeout=PATIENCE / 2).future
    calls = [lane.send(message) for message in (None, None, AskOnce(), None)]
    await eventually(lambda: len(node.got) == 6)
    node.answer_all(*[(call.id, Status.OK, "done") for call in calls])
    assert [await call.future for call in calls] == [Ok("done")] * 4
    assert (counts(lane, ASK), counts(lane, ASK_ONCE)) == ((3, 1), (1, 1))


async def test_a_silent_node_counts_once_for_its_type_and_once_for_itself(lane: Lane, start_node: StartNode) -> None:
    await start_node("a")
    result = await lane.send(timeout=PATIENCE * 3, target=("shop", "a")).future
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert (counts(lane, ASK), counts(lane, (None, "a"))) == ((0, 1), (0, 1))


async def test_a_silent_node_counts_although_another_one_answers(lane: Lane, start_node: StartNode) -> None:
    await start_node("a")
    live = await start_node("b")
    lane.view.live, lane.view.troubled = ["a", "b"], frozenset({"Ask"})
    call = lane.send()
    await eventually(lambda: live.got)
    live.answer(call.id)
    assert await call.future == Ok("done")
    assert (counts(lane, ASK), counts(lane, (None, "a"))) == ((0, 0), (0, 1))
    assert counts(lane, (None, "b")) == (0, 0)


async def test_a_call_that_one_node_was_silent_about_and_a_live_one_holds_counts_for_the_silent_one_only(
    lane: Lane, start_node: StartNode
) -> None:
    await start_node("a")
    live = await start_node("b")
    lane.view.live, lane.view.troubled = ["a", "b"], frozenset({"Ask"})
    call = await accepted(lane, live, timeout=PATIENCE * 4)
    assert isinstance(await call.future, Err)
    assert (counts(lane, ASK), counts(lane, (None, "a"))) == ((0, 0), (0, 1))
    assert counts(lane, (None, "b")) == (0, 0)


async def test_a_node_that_forgot_a_call_counts_once_for_its_type_and_once_for_itself(
    lane: Lane, start_node: StartNode
) -> None:
    node = await start_node("a", in_group=True)
    call = await accepted(lane, node, AskOnce())
    node.answer(call.id, status=Status.LOST)
    result = await call.future
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert (counts(lane, ASK_ONCE), counts(lane, (None, "a"))) == ((0, 1), (0, 1))


async def test_a_node_that_has_a_call_and_leaves_questions_about_it_unanswered_counts_once_for_each(
    lane: Lane, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "STATUS_INTERVAL", PATIENCE / 2)
    node = await start_node("a", in_group=True)
    call = await accepted(lane, node, AskOnce(), timeout=PATIENCE * 4)
    result = await call.future
    assert len(node.asked) >= attempts.MAX_ASKED
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert (counts(lane, ASK_ONCE), counts(lane, (None, "a"))) == ((0, 1), (0, 1))


@pytest.mark.parametrize(("asked", "failures"), [(attempts.MAX_ASKED - 1, 0), (attempts.MAX_ASKED, 1)])
async def test_a_question_may_be_lost(lane: Lane, start_node: StartNode, asked: int, failures: int) -> None:
    node = await start_node("a", in_group=True)
    call = await accepted(lane, node, AskOnce(), timeout=PATIENCE)
    call.trouble().asked = asked
    assert (await call.future).code == Code.TIMEOUT
    assert (counts(lane, ASK_ONCE), counts(lane, (None, "a"))) == ((0, failures), (0, failures))


async def test_two_nodes_that_died_with_a_call_count_once_each_and_so_does_its_type(
    lane: Lane, start_node: StartNode
) -> None:
    first, second = await start_node("a"), await start_node("b")
    lane.view.live, lane.view.troubled = ["a", "b"], frozenset({"Ask"})
    call = lane.send()
    await eventually(lambda: first.got)
    lane.caller.node_died("a", TYPES)
    await eventually(lambda: second.got)
    lane.caller.node_died("b", TYPES)
    assert (await call.future).code == Code.HANDLER_ERROR
    assert counts(lane, ASK) == (0, 1)
    assert (counts(lane, (None, "a")), counts(lane, (None, "b"))) == ((0, 1), (0, 1))


async def test_a_call_that_waits_for_another_attempt_after_a_silence_counts_for_its_type(
    lane: Lane, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "RETRY_DELAY", 60.0)
    await start_node("silent", in_group=True)
    busy = await start_node("b")
    lane.view.live = ["b"]
    call = lane.send(timeout=PATIENCE * 5)
    await eventually(lambda: busy.got)
    busy.answer(call.id, status=Status.BUSY)
    result = await call.future
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert counts(lane, ASK) == (1, 1)  # that a node is busy is a sign of life
    assert counts(lane, (None, "b")) == (0, 0)


async def test_a_call_that_nodes_were_too_busy_for_after_a_silence_counts_for_the_silent_node_only(
    lane: Lane, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "RETRY_DELAY", 0.01)
    await start_node("a")
    busy, other = await start_node("b"), await start_node("c")
    lane.view.live, lane.view.troubled = ["a", "b", "c"], frozenset({"Ask"})
    call = lane.send()
    for node in (busy, other):
        await eventually(lambda one=node: one.got)  # type: ignore[misc]
        node.answer(call.id, status=Status.BUSY)
    result = await call.future
    assert (result.code, result.outcome) == (Code.OVERLOADED, Outcome.UNKNOWN)
    assert counts(lane, ASK) == (0, 0)
    assert [one.node for one in lane.caller.guard.statistics()] == ["a"]


async def test_a_call_that_waits_for_another_attempt_after_a_lost_connection_is_no_failure(
    lane: Lane, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "RETRY_DELAY", 60.0)
    node = await start_node("a")
    call = lane.send(target=("shop", "a"), timeout=PATIENCE * 4)
    await eventually(lambda: node.got)
    attempts.after_disconnect(call.trouble())
    lane.caller.reconnected()
    await eventually(lambda: len(node.got) == 2)
    node.answer(call.id, status=Status.BUSY)
    result = await call.future
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert lane.caller.guard.statistics() == ()


async def test_a_node_that_died_with_a_call_counts_once_for_its_type_and_once_for_itself(
    lane: Lane, start_node: StartNode
) -> None:
    node = await start_node("a", in_group=True)
    call = await accepted(lane, node, AskOnce(), timeout=PATIENCE * 4)
    lane.caller.node_died("a", TYPES)
    assert counts(lane, (None, "a")) == (0, 1)
    result = await call.future
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert (counts(lane, ASK_ONCE), counts(lane, (None, "a"))) == ((0, 1), (0, 1))


async def test_the_death_of_the_one_node_that_was_asked_counts_once_for_each(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a")
    call = await accepted(lane, node, target=("shop", "a"))
    lane.caller.node_died("a", TYPES)
    assert (await call.future).code == Code.NO_HANDLER
    assert (counts(lane, ASK), counts(lane, (None, "a"))) == ((0, 1), (0, 1))


async def test_a_node_that_was_too_busy_is_no_failure_although_an_earlier_attempt_may_have_run(
    lane: Lane, start_node: StartNode
) -> None:
    node = await start_node("a")
    call = lane.send(target=("shop", "a"))
    await eventually(lambda: node.got)
    attempts.after_disconnect(call.trouble())  # the connection was lost, and is back
    lane.caller.reconnected()
    for seen in range(2, 5):
        await eventually(lambda count=seen: len(node.got) == count)  # type: ignore[misc]
        node.answer(call.id, status=Status.BUSY)
    result = await call.future
    assert (result.code, result.outcome) == (Code.OVERLOADED, Outcome.UNKNOWN)
    assert lane.caller.guard.statistics() == ()


async def test_a_lost_connection_is_no_failure(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    calls = [await accepted(lane, node, timeout=PATIENCE) for _ in range(MIN_CALLS)]
    lane.caller.disconnected()
    for call in calls:
        result = await call.future
        assert (result.code, result.outcome) == (Code.DISCONNECTED, Outcome.UNKNOWN)
    assert lane.caller.guard.statistics() == ()


# -- probes ----------------------------------------------------------------------------------------------------


def open_breaker(lane: Lane, key: tuple[str | None, str | None]) -> None:
    """Open a breaker whose time is over at once."""
    lane.caller.guard._breakers.failed(key, monotonic() - 100.0, MIN_CALLS)
    assert key in lane.caller.guard.held


async def probe(lane: Lane, node: FakeNode, **options: Any) -> Any:
    """Make a call that probes a node, and wait until the node has it."""
    open_breaker(lane, (None, node.id))
    call = lane.send(**options)
    assert [key for key, _ in call.probes] == [(None, node.id)]
    await eventually(lambda: node.got)
    return call


async def test_a_probe_that_another_node_answers_after_a_refusal_does_not_close_the_breaker(
    lane: Lane, start_node: StartNode
) -> None:
    tried, other = await start_node("a"), await start_node("b")
    lane.view.live = ["a", "b"]
    call = await probe(lane, tried)
    tried.answer(call.id, status=Status.BUSY)
    await eventually(lambda: other.got)
    other.answer(call.id)
    assert await call.future == Ok("done")
    assert state(lane, (None, "a")) is BreakerState.HALF_OPEN
    assert len(lane.send().probes) == 1  # its slot was given back


async def test_a_probe_that_another_node_answers_after_a_silence_opens_the_breaker_again(
    lane: Lane, start_node: StartNode
) -> None:
    tried, other = await start_node("a"), await start_node("b")
    lane.view.live = ["a", "b"]
    call = await probe(lane, tried)
    await eventually(lambda: other.got)
    other.answer(call.id)
    assert await call.future == Ok("done")
    assert state(lane, (None, "a")) is BreakerState.OPEN
    assert counts(lane, (None, "a")) == (0, 0)  # as a probe only


async def test_a_probe_that_its_node_answers_closes_the_breaker_whatever_the_answer_is(
    lane: Lane, start_node: StartNode
) -> None:
    tried = await start_node("a")
    lane.view.live = ["a"]
    call = await probe(lane, tried)
    tried.answer(call.id, Fault(str(Code.TIMEOUT), "the handler was cut off"), Status.FAILED)
    assert (await call.future).outcome is Outcome.UNKNOWN
    assert state(lane, (None, "a")) is BreakerState.CLOSED


async def test_a_probe_that_its_node_still_holds_at_the_deadline_says_nothing(
    lane: Lane, start_node: StartNode
) -> None:
    tried = await start_node("a")
    lane.view.live = ["a"]
    call = await probe(lane, tried, timeout=PATIENCE * 2)
    tried.accept(call.id)
    assert (await call.future).code == Code.TIMEOUT
    assert state(lane, (None, "a")) is BreakerState.HALF_OPEN
    assert len(lane.send().probes) == 1


async def test_a_probe_of_a_node_that_never_got_it_says_nothing_of_that_node(lane: Lane, start_node: StartNode) -> None:
    await start_node("group", in_group=True)
    lane.view.live = ["a"]
    lane.caller._routing.closed.add("shop")  # the server refuses to let this user address nodes
    open_breaker(lane, (None, "a"))
    call = lane.send(timeout=PATIENCE / 2)
    assert (await call.future).code == Code.TIMEOUT
    assert counts(lane, ASK) == (0, 1)
    assert state(lane, (None, "a")) is BreakerState.HALF_OPEN
    assert len(lane.send().probes) == 1


async def test_a_probe_of_a_type_succeeds_wherever_it_is_answered(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    open_breaker(lane, ASK)
    call = lane.send()
    await eventually(lambda: node.got)
    node.answer(call.id, Fault(str(Code.TIMEOUT), "the handler was cut off"), Status.FAILED)
    await call.future
    assert state(lane, ASK) is BreakerState.CLOSED


async def test_a_probe_of_a_type_that_ends_in_silence_opens_it_again(lane: Lane, start_node: StartNode) -> None:
    await start_node("a", in_group=True)
    open_breaker(lane, ASK)
    assert (await lane.send(timeout=PATIENCE / 2).future).code == Code.TIMEOUT
    assert state(lane, ASK) is BreakerState.OPEN


async def test_a_probe_that_nobody_waits_for_any_more_gives_its_slot_back(lane: Lane, start_node: StartNode) -> None:
    tried = await start_node("a")
    lane.view.live = ["a"]
    lane.caller.forget(await probe(lane, tried))
    assert state(lane, (None, "a")) is BreakerState.HALF_OPEN
    assert len(lane.send().probes) == 1


# -- what is held back -----------------------------------------------------------------------------------------


def hold(lane: Lane, key: tuple[str | None, str | None]) -> None:
    """Open a breaker that stays open."""
    lane.caller.guard._breakers.failed(key, monotonic(), MIN_CALLS)


async def test_a_call_that_only_a_held_node_fits_is_held_back(lane: Lane) -> None:
    hold(lane, (None, "a"))
    lane.view.live = ["a", "b"]
    fits = {"target": ("shop", "a"), "choice": lambda node: node.id == "a"}
    with pytest.raises(CircuitOpenError, match="calls to node a are held back"):
        lane.send(**fits)
    open_breaker(lane, ASK)
    with pytest.raises(CircuitOpenError, match="calls to node a are held back"):
        lane.send(**fits)
    assert lane.send().probes[0][0] == ASK  # the one before gave its slot back


async def test_a_call_to_a_held_node_by_its_name_is_held_back_and_may_be_made_again(
    lane: Lane, start_node: StartNode
) -> None:
    node = await start_node("a")
    hold(lane, (None, "a"))
    with pytest.raises(CircuitOpenError, match="calls to node a are held back") as caught:
        lane.send(target=("shop", "a"))
    assert (caught.value.outcome, caught.value.retryable) == (Outcome.NOT_RUN, True)
    assert node.got == []
    assert lane.send(target=("shop", "b")).node == "b"


async def test_a_call_that_others_fit_goes_to_one_of_them(lane: Lane, start_node: StartNode) -> None:
    other = await start_node("b")
    hold(lane, (None, "a"))
    lane.view.live = ["a", "b"]
    calls = [lane.send(), lane.send(target=("shop", "a"), choice=lambda node: True)]
    await eventually(lambda: len(other.got) == 2)
    assert [call.probes for call in calls] == [(), ()]


async def test_a_call_that_no_live_node_fits_is_not_held_back(lane: Lane) -> None:
    hold(lane, (None, "a"))
    lane.view.live = ["a"]
    call = lane.send(target=("shop", "b"), choice=lambda node: node.id == "b")
    assert (call.node, call.probes) == ("b", ())


async def test_the_queue_group_gets_what_no_other_node_can_take(lane: Lane, start_node: StartNode) -> None:
    group = await start_node("group", in_group=True)
    hold(lane, (None, "a"))
    lane.view.live = ["a"]
    lane.send()
    await eventually(lambda: group.got)


async def test_what_is_held_is_named_for_people(lane: Lane) -> None:
    hold(lane, (None, "n1"))
    hold(lane, ASK)
    assert lane.caller.guard.held_names() == ("Ask", "n1")
    assert lane.caller.guard.held_nodes() == ("n1",)


def test_what_has_nothing_left_to_remember_is_forgotten_every_few_seconds() -> None:
    now = [0.0]
    guard = Guard(BreakerOptions(window=1.0), NoPeers(), lambda: now[0])
    guard.answered("Quote", "n1", 1)
    guard._breakers.failed(ASK, 0.0)
    seen = []
    for now[0] in (1.0, 4.9, 5.0):
        guard.answered("Quote", "n1", 1)
        seen.append(len(guard.statistics()))
    assert seen == [1, 1, 0]


# -- who is told -----------------------------------------------------------------------------------------------


async def test_who_watches_is_told_of_each_change_until_the_bus_is_closed(url: str, client: Bus) -> None:
    told: list[tuple[str | None, str | None, str, str]] = []

    async def watch() -> None:
        async for change in client.watch_breakers():
            assert change.missed == 0
            told.append((change.type_name, change.node, str(change.before), str(change.after)))

    watching = asyncio.create_task(watch())
    async with shop(url, "s1"):
        await eventually(lambda: len(client.nodes()) == 2)
        trip(client, "s1")
        await eventually(lambda: told)
        assert told == [(None, "s1", "closed", "open")]
        assert [await client.send(Quote(), timeout=2.0) for _ in range(3)] == [Ok("s1")] * 3
    await client.close()
    await watching
    assert told[1:] == [(None, "s1", "open", "half_open"), (None, "s1", "half_open", "closed")]


async def test_watching_begins_with_the_breakers_that_are_not_closed(lane: Lane) -> None:
    open_breaker(lane, ASK)
    open_breaker(lane, (None, "a"))
    lane.send()
    lane.caller.guard._breakers.failed(ASK_ONCE, monotonic())  # closed
    watcher = lane.caller.guard.watch(10)
    seen = [await anext(watcher) for _ in range(2)]
    assert [(one.type_name, one.node, one.after) for one in seen] == [
        ("Ask", None, BreakerState.HALF_OPEN),
        (None, "a", BreakerState.OPEN),
    ]
    open_breaker(lane, ASK_ONCE)
    assert (await anext(watcher)).type_name == "AskOnce"


async def test_a_watcher_that_never_reads_is_bounded_and_told_what_it_missed(lane: Lane) -> None:
    watcher = lane.caller.guard.watch(3)
    for number in range(10):
        open_breaker(lane, (None, f"n{number}"))
        lane.caller.guard._breakers.allow((None, f"n{number}"), monotonic())
        if number:
            lane.caller.guard._breakers.end_probe((None, f"n{number}"), 1, monotonic(), succeeded=True)
    assert len(watcher._queue) <= 3
    missed = await anext(watcher)
    assert (missed.missed, missed.type_name, missed.node) == (29, None, None)
    present = await anext(watcher)
    assert (present.node, present.after, present.missed) == ("n0", BreakerState.HALF_OPEN, 0)
    await lane.caller.close()
    assert [change async for change in watcher] == []


async def test_changes_are_logged_and_a_trip_as_a_warning(lane: Lane, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "catga_bus.requests")
    open_breaker(lane, ASK)
    open_breaker(lane, (None, "a"))
    lane.send()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "breaker of calls of Ask: open, was closed"),
        ("WARNING", "breaker of calls to node a: open, was closed"),
        ("INFO", "breaker of calls of Ask: half_open, was open"),
    ]


async def test_a_watcher_that_is_dropped_is_forgotten(lane: Lane) -> None:
    watcher = lane.caller.guard.watch(3)
    assert len(lane.caller.guard._watchers) == 1
    del watcher
    assert len(lane.caller.guard._watchers) == 0


async def test_who_would_watch_needs_a_bus_that_is_started_and_room_for_a_change(client: Bus) -> None:
    with pytest.raises(BusStateError, match="not started"):
        Bus("shop", url="memory://none").watch_breakers()
    with pytest.raises(ConfigurationError, match="max_pending must be a number of changes, at least 1, got 0"):
        client.watch_breakers(max_pending=0)


async def test_calls_that_were_held_back_are_counted(lane: Lane) -> None:
    assert lane.caller.statistics().held_back == 0
    lane.caller.guard._breakers.failed(ASK, monotonic(), MIN_CALLS)
    for _ in range(3):
        with pytest.raises(CircuitOpenError):
            lane.send()
    assert lane.caller.statistics().held_back == 3
    assert lane.send(AskOnce())
    assert lane.caller.statistics().held_back == 3
    assert lane.caller.statistics().calls == 1
