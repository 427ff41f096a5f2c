"""Health as a value: what makes a node not ready, what makes it dead, and what is only worth a look."""

import asyncio
import gc
import threading
import time
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from catga_bus import BlockingBus, Bus, BusState, Check, CheckStatus, Health, Request
from catga_bus.health import Facts, HealthLimits, assess
from catga_bus.testing import eventually
from catga_bus.vitals import MemoryUse, VitalSigns

LIMITS = HealthLimits(stall=0.5, intake=100, intake_bytes=1_000)
SIGNS = VitalSigns(0.5, 1_000, MemoryUse(10, 100, is_group=True), 0.0, 0.0, 0)
GOOD = Facts(state=BusState.STARTED, is_connected=True, is_subscribed=True, signs=SIGNS)


def check(health: Health, name: str) -> Check:
    (found,) = [one for one in health.checks if one.name == name]
    return found


def failed(health: Health) -> list[str]:
    return [one.name for one in health.checks if one.status is CheckStatus.FAIL]


def warned(health: Health) -> list[str]:
    return [one.name for one in health.checks if one.status is CheckStatus.WARN]


def test_a_node_without_trouble_lives_and_is_ready() -> None:
    health = assess(GOOD, LIMITS)
    assert (health.live, health.ready) == (True, True)
    assert {one.status for one in health.checks} == {CheckStatus.OK}
    assert [one.name for one in health.checks] == [
        *("state", "connection", "subscriptions", "node id", "stall", "memory", "memory stall", "gc"),
        *("in flight", "intake", "intake bytes"),
    ]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"state": BusState.NEW}, "state"),
        ({"state": BusState.STARTING}, "state"),
        ({"state": BusState.DRAINING}, "state"),
        ({"is_connected": False}, "connection"),
        ({"is_subscribed": False}, "subscriptions"),
        ({"is_replaced": True}, "node id"),
        ({"stall": 0.51}, "stall"),
        ({"stall": 29.0}, "stall"),
        ({"signs": replace(SIGNS, memory=MemoryUse(95, 100, is_group=True))}, "memory"),
    ],
)
def test_what_makes_a_node_not_ready_does_not_kill_it(changes: dict[str, object], name: str) -> None:
    health = assess(replace(GOOD, **changes), LIMITS)
    assert (health.live, health.ready) == (True, False)
    assert failed(health) == [name]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"signs": replace(SIGNS, memory=MemoryUse(94, 100, is_group=True))}, "memory"),
        ({"signs": replace(SIGNS, memory=MemoryUse(99, 100, is_group=False))}, "memory"),
        ({"signs": replace(SIGNS, memory_stall=0.9)}, "memory stall"),
        ({"signs": replace(SIGNS, gc=0.9)}, "gc"),
        ({"intake": 100}, "intake"),
        ({"intake": 80}, "intake"),
        ({"intake_bytes": 5_000}, "intake bytes"),
    ],
)
def test_what_is_worth_a_look_takes_no_node_out(changes: dict[str, object], name: str) -> None:
    health = assess(replace(GOOD, **changes), LIMITS)
    assert (health.live, health.ready) == (True, True)
    assert warned(health) == [name]


def test_only_the_end_and_a_loop_that_stood_still_for_long_are_no_life() -> None:
    assert not assess(replace(GOOD, state=BusState.CLOSED), LIMITS).live
    assert assess(replace(GOOD, stall=30.0), LIMITS).live
    stalled = assess(replace(GOOD, stall=30.1), LIMITS)
    assert not stalled.live
    assert check(stalled, "stall").text == "the event loop has been blocked for 30.1 s; after 30 s it counts as dead"


def test_what_the_system_does_not_tell_is_no_trouble() -> None:
    health = assess(replace(GOOD, signs=VitalSigns(0.0, None, None, None, 0.0, 0)), LIMITS)
    assert health.ready
    assert check(health, "memory").value is None
    assert check(health, "memory stall").text == "not told by the system, or not read yet"


def test_a_check_says_its_value_and_limit() -> None:
    health = assess(replace(GOOD, intake=81, in_flight=7), LIMITS)
    assert check(health, "intake") == Check(
        "intake", CheckStatus.WARN, 81, 100, "81 of 100 messages taken in and not settled"
    )
    assert check(health, "in flight") == Check("in flight", CheckStatus.OK, 7, None, "7 messages in handlers")


shares = st.floats(0.0, 1.5)
facts = st.builds(
    Facts,
    state=st.sampled_from(BusState),
    is_connected=st.booleans(),
    is_subscribed=st.booleans(),
    is_replaced=st.booleans(),
    stall=st.floats(0.0, 100.0),
    in_flight=st.integers(0, 10_000),
    intake=st.integers(0, 200),
    intake_bytes=st.integers(0, 2_000),
    signs=st.none()
    | st.builds(
        VitalSigns,
        shares,
        st.none(),
        st.none() | st.builds(MemoryUse, st.integers(0, 200), st.just(100), is_group=st.booleans()),
        st.none() | shares,
        shares,
        st.integers(0, 9),
    ),
)


@given(facts)
def test_whatever_the_facts_the_laws_hold(given_facts: Facts) -> None:
    health = assess(given_facts, LIMITS)
    assert health.ready == (not failed(health))
    assert not health.ready or health.live
    assert health.live == (given_facts.state is not BusState.CLOSED and given_facts.stall <= LIMITS.dead_stall)
    assert len({one.name for one in health.checks}) == len(health.checks)
    assert all(one.text for one in health.checks)


@given(facts)
def test_no_connection_ever_ends_a_life(given_facts: Facts) -> None:
    lost = replace(given_facts, is_connected=False, is_subscribed=False)
    assert assess(lost, LIMITS).live == assess(given_facts, LIMITS).live


# -- of a bus ----------------------------------------------------------------------------------------------


class Hold(Request[str]):
    pass


async def test_a_bus_says_how_it_is_all_its_life() -> None:
    bus = Bus("shop", url=f"memory://{uuid4().hex}")
    go = asyncio.Event()

    @bus.handler
    async def hold(request: Hold) -> str:
        await go.wait()
        return "held"

    assert (bus.health().live, bus.health().ready) == (True, False)
    assert check(bus.health(), "state").text == "the bus is new"
    starting = asyncio.create_task(bus.start())
    await asyncio.sleep(0)
    assert (bus.health().live, bus.health().ready) == (True, False)
    assert check(bus.health(), "state").text == "the bus is starting"
    await starting
    assert failed(bus.health()) == []
    call = asyncio.create_task(bus.send(Hold()))
    await eventually(lambda: check(bus.health(), "in flight").value == 1)
    assert check(bus.health(), "intake").value == 1
    draining = asyncio.create_task(bus.drain())
    await eventually(lambda: not bus.health().ready)
    assert bus.health().live
    assert check(bus.health(), "state").text == "the bus is draining"
    go.set()
    await draining
    assert (await call).unwrap() == "held"
    assert (bus.health().live, bus.health().ready) == (False, False)
    assert check(bus.health(), "state").text == "the bus is closed"


async def test_a_blocked_loop_is_seen_from_a_thread() -> None:
    async with Bus("shop", url=f"memory://{uuid4().hex}", stall_timeout=0.1) as bus:

        def watch() -> Health:
            deadline = time.monotonic() + 10.0
            while (health := bus.health()).ready and time.monotonic() < deadline:
                time.sleep(0.005)
            seen.set()
            return health

        seen = threading.Event()
        watching = asyncio.get_running_loop().run_in_executor(None, watch)
        seen.wait(10.0)  # the loop does nothing until the thread has seen that it does nothing
        health = await watching
        assert failed(health) == ["stall"]
        assert health.live
        await eventually(lambda: bus.health().ready)


def test_a_blocking_bus_has_the_health_of_its_bus() -> None:
    with BlockingBus("shop", url=f"memory://{uuid4().hex}") as bus:
        assert bus.health().ready
    assert not bus.health().live


async def test_the_collector_is_left_as_it_was() -> None:
    before = list(gc.callbacks)
    async with Bus("shop", url=f"memory://{uuid4().hex}"):
        assert len(gc.callbacks) == len(before) + 1
    assert gc.callbacks == before
