"""A caller whose nodes fall silent, die, forget, refuse and come back."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from catga_bus import Bus, Err, Ok
from catga_bus.clock import monotonic
from catga_bus.errors import CircuitOpenError, Code, Outcome, PermissionDeniedError
from catga_bus.requests import attempts
from catga_bus.requests.attempts import Phase
from catga_bus.resilience.circuit_breaker import BreakerOptions
from catga_bus.testing import eventually
from catga_bus.wire import Names, Status
from tests.unit.lane import PATIENCE, Ask, AskOnce, Lane, StartNode


@pytest.fixture
async def lane(url: str) -> AsyncIterator[Lane]:
    lane = await Lane(url, None).start()
    yield lane
    await lane.stop()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have callers ask after what was accepted twenty times a second."""
    monkeypatch.setattr(attempts, "STATUS_INTERVAL", PATIENCE)


async def test_what_a_silent_node_got_goes_to_a_live_one_and_the_silent_one_is_told_to_forget_it(
    lane: Lane, start_node: StartNode
) -> None:
    silent, live = await start_node("silent", in_group=True), await start_node("live")
    lane.view.live, lane.view.doubted = ["live"], ["silent", "live"]
    call = lane.send()
    await eventually(lambda: live.got)
    assert (silent.got[0].attempt, live.got[0].attempt) == (1, 2)
    live.answer("1")
    assert await call.future == Ok("done")
    await eventually(lambda: silent.cancelled == ["1"])
    assert live.cancelled == []  # it holds the second attempt
    statistics = lane.caller.statistics()
    assert (statistics.failovers, statistics.cancels) == (1, 1)


async def test_a_late_second_answer_is_dropped_and_counted(lane: Lane, start_node: StartNode) -> None:
    silent, live = await start_node("silent", in_group=True), await start_node("live")
    lane.view.live = ["live"]
    call = lane.send()
    await eventually(lambda: live.got)
    live.answer("1", "from live")
    assert await call.future == Ok("from live")
    silent.answer("1", "from silent")
    await eventually(lambda: lane.caller.statistics().late_answers == 1)


async def test_a_node_that_says_it_has_the_call_is_waited_for(lane: Lane, start_node: StartNode) -> None:
    slow, live = await start_node("slow", in_group=True), await start_node("live")
    lane.view.live = ["live"]
    call, other = lane.send(), lane.send()
    await eventually(lambda: len(slow.got) == 2)
    slow.accept("1")
    await eventually(lambda: live.ids == ["2"])  # of which nobody said anything
    live.answer("2")
    await other.future
    slow.answer("1")
    assert await call.future == Ok("done")
    assert slow.ids == ["1", "2"]
    assert live.ids == ["2"]


@pytest.mark.usefixtures("impatient")
async def test_a_node_that_has_a_call_is_asked_and_when_it_lost_it_the_next_one_gets_it(
    lane: Lane, start_node: StartNode
) -> None:
    forgetful, live = await start_node("forgetful", in_group=True), await start_node("live")
    lane.view.live = ["live"]
    call = lane.send()
    await eventually(lambda: forgetful.got)
    forgetful.accept("1")
    await eventually(lambda: forgetful.asked)
    forgetful.accept("1")
    await eventually(lambda: len(forgetful.asked) > 1)
    assert live.got == []
    forgetful.answer("1", status=Status.LOST)
    await eventually(lambda: live.ids == ["1"])
    live.answer("1")
    assert await call.future == Ok("done")


async def test_what_a_dying_node_has_goes_elsewhere_at_once_and_costs_two_nodes_at_most(
    lane: Lane, start_node: StartNode
) -> None:
    first = await start_node("a", in_group=True)
    second, third = await start_node("b"), await start_node("c")
    lane.view.live = ["b", "c"]
    call = lane.send()
    await eventually(lambda: first.got)
    first.accept("1")
    await eventually(lambda: call.node == "a")
    lane.caller.node_died("a", ["Ask"])
    await eventually(lambda: second.got)
    assert first.cancelled == ["1"]  # it may only be frozen
    second.accept("1")
    await eventually(lambda: call.progress.phase is attempts.Phase.ACCEPTED)
    lane.caller.node_died("b", ["Ask"])
    result = await call.future
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (Code.HANDLER_ERROR, Outcome.UNKNOWN)
    assert "2 nodes died" in result.message
    assert third.got == []


async def test_the_death_of_another_node_moves_nothing(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    lane.view.live = ["b"]
    call = lane.send()
    await eventually(lambda: node.got)
    node.accept("1")
    await eventually(lambda: call.node == "a")
    lane.caller.node_died("b", ["Ask"])
    node.answer("1")
    assert await call.future == Ok("done")
    assert call.attempts == 1


async def test_while_a_member_is_in_doubt_calls_are_addressed_to_live_nodes(lane: Lane, start_node: StartNode) -> None:
    frozen, live = await start_node("frozen", in_group=True), await start_node("live")
    lane.view.live, lane.view.troubled = ["live"], frozenset({"Ask"})
    calls = [lane.send() for _ in range(10)]
    await eventually(lambda: len(live.got) == 10)
    assert frozen.got == []
    assert {frame.attempt for frame in live.got} == {1}
    for call in calls:
        live.answer(call.id)
    assert [await call.future for call in calls] == [Ok("done")] * 10


async def test_what_a_thawed_node_says_of_a_call_that_was_taken_from_it_is_old(
    lane: Lane, start_node: StartNode
) -> None:
    frozen, live = await start_node("frozen", in_group=True), await start_node("live")
    lane.view.live = ["live"]
    call = lane.send()
    await eventually(lambda: live.got)
    frozen.accept("1")
    for status in (Status.EXPIRED, Status.BUSY, Status.LOST):
        frozen.answer("1", status=status)
    await eventually(lambda: lane.caller.statistics().late_answers == 3)
    assert call.node == "live"
    live.answer("1")
    assert await call.future == Ok("done")


async def test_a_call_that_must_not_run_twice_is_written_once(lane: Lane, start_node: StartNode) -> None:
    silent, live = await start_node("silent", in_group=True), await start_node("live")
    lane.view.live = ["live"]
    result = await lane.send(AskOnce(), timeout=PATIENCE * 6).future
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert (len(silent.got), len(live.got)) == (1, 0)


async def test_a_call_that_must_not_run_twice_goes_on_where_it_provably_did_not_run(
    lane: Lane, start_node: StartNode
) -> None:
    busy, live = await start_node("busy", in_group=True), await start_node("live")
    lane.view.live = ["live"]
    call = lane.send(AskOnce())
    await eventually(lambda: busy.got)
    busy.answer("1", status=Status.BUSY)
    await eventually(lambda: live.got)
    live.answer("1")
    assert await call.future == Ok("done")


async def test_a_call_to_one_node_ends_when_that_node_dies(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a")
    lane.view.live = ["b"]
    call = lane.send(target=("shop", "a"))
    await eventually(lambda: node.got)
    lane.caller.node_died("a", ["Ask"])
    result = await call.future
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (Code.NO_HANDLER, Outcome.UNKNOWN)
    assert "node a" in result.message


async def test_a_later_attempt_keeps_to_the_choice_of_nodes(lane: Lane, start_node: StartNode) -> None:
    first, second, other = await start_node("eu-1"), await start_node("eu-2"), await start_node("us-1")
    lane.view.live = ["us-1", "eu-2"]
    call = lane.send(target=("shop", "eu-1"), choice=lambda node: node.id.startswith("eu"))
    await eventually(lambda: second.got)
    assert (len(first.got), other.got) == (1, [])
    lane.view.live = ["us-1"]
    second.answer("1", status=Status.BUSY)
    result = await call.future
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)  # eu-1 might still have answered
    assert other.got == []


async def test_a_choice_that_nobody_fits_any_more_is_given_up_after_a_while(lane: Lane, start_node: StartNode) -> None:
    only, other = await start_node("eu"), await start_node("us")
    lane.view.live = ["us"]
    call = lane.send(timeout=30.0, target=("shop", "eu"), choice=lambda node: node.id == "eu")
    await eventually(lambda: only.got)
    only.answer("1", status=Status.BUSY)
    result = await call.future
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (Code.NO_HANDLER, Outcome.NOT_RUN)
    assert "where" in result.message
    assert other.got == []


async def test_the_only_node_of_a_choice_is_waited_for_when_it_is_late(lane: Lane, start_node: StartNode) -> None:
    only, other = await start_node("eu"), await start_node("us")
    lane.view.live = ["eu", "us"]
    call = lane.send(timeout=30.0, target=("shop", "eu"), choice=lambda node: node.id == "eu")
    await eventually(lambda: len(only.got) == 2)  # it was silent, and no other fits
    assert only.cancelled == []
    only.answer("1")
    assert await call.future == Ok("done")
    assert other.got == []


async def test_the_only_node_of_a_choice_is_tried_again_when_it_is_busy(lane: Lane, start_node: StartNode) -> None:
    only = await start_node("eu")
    lane.view.live = ["eu"]
    call = lane.send(timeout=30.0, target=("shop", "eu"), choice=lambda node: node.id == "eu")
    for times in (1, 2, 3):
        await eventually(lambda times=times: len(only.got) == times)
        only.answer("1", status=Status.BUSY)
    result = await call.future
    assert isinstance(result, Err)
    assert (result.code, result.outcome) == (Code.OVERLOADED, Outcome.NOT_RUN)


async def test_a_choice_is_refused_and_never_ignored_where_nodes_may_not_be_addressed(
    lane: Lane, start_node: StartNode
) -> None:
    await start_node("eu")
    group = await start_node("us", in_group=True)
    lane.view.live = ["eu", "us"]
    call = lane.send(target=("shop", "eu"), choice=lambda node: node.id == "eu")
    lane.caller.denied(call.lane.subject)
    with pytest.raises(PermissionDeniedError, match=r"to\.shop\.eu"):
        await call.future
    with pytest.raises(PermissionDeniedError, match=r"to\.shop\.eu"):
        lane.send(target=("shop", "eu"), choice=lambda node: node.id == "eu")
    assert group.got == []
    lane.caller.reconnected()  # maybe with other permissions
    lane.send(target=("shop", "eu"), choice=lambda node: node.id == "eu").future.cancel()


async def test_what_a_node_has_is_not_written_again_when_its_subject_is_refused(
    lane: Lane, start_node: StartNode
) -> None:
    node, group = await start_node("a"), await start_node("g", in_group=True)
    lane.view.live, lane.view.troubled = ["a"], {"AskOnce"}
    call = lane.send(AskOnce(), timeout=30.0)
    await eventually(lambda: node.got)
    node.accept("1")
    await eventually(lambda: call.attempts and call.progress is not None and call.progress.phase is Phase.ACCEPTED)
    lane.caller.denied(call.lane.subject)
    node.answer("1")
    assert await call.future == Ok("done")
    assert group.got == []


async def test_only_nodes_that_handle_a_type_die_of_it_and_each_once(lane: Lane, start_node: StartNode) -> None:
    await start_node("a", in_group=True)
    second, third = await start_node("b"), await start_node("c")
    lane.view.live = ["b", "c"]
    call = lane.send(timeout=30.0)
    await eventually(lambda: second.got)  # the first was silent
    second.accept("1")
    await eventually(lambda: call.progress is not None and call.progress.phase is Phase.ACCEPTED)
    lane.view.live = ["c"]
    lane.caller.node_died("billing", ["Pay"])
    lane.caller.node_died("client", [])
    lane.caller.node_died("b", ["Ask"])
    lane.caller.node_died("b", ["Ask"])  # as when a new start takes its place
    await eventually(lambda: third.got)
    third.answer("1")
    assert await call.future == Ok("done")


async def test_a_silent_call_without_budget_is_tried_again_when_there_is_some(
    lane: Lane, start_node: StartNode
) -> None:
    await start_node("silent", in_group=True)
    live = await start_node("live")
    lane.view.live = ["live"]
    now = monotonic()
    while lane.caller._budget.take(now):
        pass
    call = lane.send(timeout=30.0)
    await eventually(lambda: live.got)
    live.answer("1")
    assert await call.future == Ok("done")


async def test_a_deadline_holds_while_the_loop_is_late_again_and_again(lane: Lane, start_node: StartNode) -> None:
    await start_node("silent", in_group=True)
    call = lane.send(timeout=0.05)
    for _ in range(4):
        time.sleep(0.3)  # a handler that blocks, and another one, and so on
        await asyncio.sleep(0)
    assert call.future.done()


async def test_a_caller_that_may_not_address_nodes_uses_the_queue_group(lane: Lane, start_node: StartNode) -> None:
    node = await start_node("a", in_group=True)
    lane.view.live = ["b"]
    call = lane.send()
    await eventually(lambda: call.node == "b")
    lane.caller.denied(Names().node_request("shop", "b", "Ask"))
    await eventually(lambda: len(node.got) == 2)
    node.answer("1")
    assert await call.future == Ok("done")


# -- breakers ------------------------------------------------------------------------------------------------


@pytest.fixture
async def guarded(url: str) -> AsyncIterator[Lane]:
    lane = await Lane(url, BreakerOptions(min_calls=5, open_seconds=0.05, successes=1)).start()
    yield lane
    await lane.stop()


async def test_calls_that_nobody_answers_open_the_breaker_of_their_type_until_one_is_answered(
    guarded: Lane, start_node: StartNode
) -> None:
    node = await start_node("a", in_group=True)
    lost = [guarded.send(timeout=PATIENCE / 2) for _ in range(5)]
    for call in lost:
        assert (await call.future).code == Code.TIMEOUT
    with pytest.raises(CircuitOpenError) as caught:
        guarded.send()
    assert caught.value.outcome is Outcome.NOT_RUN
    assert guarded.caller.statistics().trips == 1
    assert guarded.caller.guard.held_names() == ("Ask",)

    def probe() -> bool:
        try:
            guarded.send()
        except CircuitOpenError:
            return False
        return True

    await eventually(probe)
    await eventually(lambda: len(node.got) == 6)
    node.answer(node.ids[-1])
    await eventually(lambda: not guarded.caller.guard.held)


async def test_a_node_that_never_answers_is_kept_out_of_the_way_and_tried_again(
    guarded: Lane, start_node: StartNode
) -> None:
    deaf, live = await start_node("deaf"), await start_node("live", in_group=True)
    guarded.view.live, guarded.view.troubled = ["deaf", "live"], frozenset({"Ask"})
    calls = [guarded.send() for _ in range(5)]
    await eventually(lambda: len(live.got) == 5)
    guarded.view.troubled = ()
    for call in calls:
        live.answer(call.id)
        await call.future
    assert guarded.caller.guard.held_nodes() == ("deaf",)
    call = guarded.send()
    await eventually(lambda: call.id in live.ids or call.id in deaf.ids)
    if call.id in deaf.ids:  # the breaker was half-open already
        await eventually(lambda: call.id in live.ids)
    live.answer(call.id)
    await call.future

    seen = len(deaf.got)

    async def answered() -> None:
        one = guarded.send()
        await eventually(lambda: one.id in [*live.ids, *deaf.ids])
        (deaf if one.id in deaf.ids else live).answer(one.id)
        assert await one.future == Ok("done")

    async with asyncio.timeout(5.0):
        while len(deaf.got) == seen:
            await answered()
    await eventually(lambda: not guarded.caller.guard.held)


async def test_a_loop_of_refused_calls_leaves_the_event_loop_to_others(url: str) -> None:
    async with Bus("client", url=url) as client:
        client._open().caller.guard._breakers.failed(("Ask", None), monotonic(), 25)
        ticker, done = asyncio.create_task(asyncio.sleep(0.05)), 0
        while not ticker.done():
            result = await client.send(Ask(), timeout=1.0)
            assert isinstance(result, Err)
            assert result.code == Code.CIRCUIT_OPEN
            done += 1
        assert done > 1
