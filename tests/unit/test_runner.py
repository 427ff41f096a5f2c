"""Only what suspends pays for a task, and inside an item everything is as in a task of its own."""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from catga_bus.dispatch.runner import Runner
from catga_bus.testing import eventually


class Rig:
    """A runner over strings whose coroutines the test supplies."""

    def __init__(self, run: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self.ready: deque[str] = deque()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.finished: list[str] = []
        self.runner: Runner[str] = Runner(
            self.ready,
            admit=lambda _: True,
            run=run,
            suspended=self.tasks.__setitem__,
            finished=self.finished.append,
        )

    def start(self, *items: str) -> None:
        self.ready.extend(items)
        self.runner.wake()


async def test_items_that_do_not_suspend_run_in_order_and_leave_no_task() -> None:
    seen: list[str] = []

    async def run(item: str) -> None:
        seen.append(item)

    rig = Rig(run)
    rig.start("a", "b", "c")
    await eventually(lambda: len(seen) == 3 and not rig.runner.tasks)
    assert seen == ["a", "b", "c"]
    assert rig.tasks == {}
    assert rig.finished == []


async def test_an_item_that_waits_does_not_hold_up_the_next() -> None:
    gate, seen = asyncio.Event(), []

    async def run(item: str) -> None:
        if item == "slow":
            await gate.wait()
        seen.append(item)

    rig = Rig(run)
    rig.start("slow", "b", "c")
    await eventually(lambda: seen == ["b", "c"])
    assert list(rig.tasks) == ["slow"]
    gate.set()
    await eventually(lambda: rig.finished == ["slow"])
    assert seen == ["b", "c", "slow"]


async def test_the_current_task_is_the_same_before_and_after_a_suspension() -> None:
    tasks: dict[str, list[asyncio.Task[Any] | None]] = {}

    async def run(item: str) -> None:
        before = asyncio.current_task()
        await asyncio.sleep(0)
        tasks[item] = [before, asyncio.current_task()]

    rig = Rig(run)
    rig.start("a", "b")
    await eventually(lambda: len(tasks) == 2)
    assert tasks["a"][0] is tasks["a"][1]
    assert tasks["a"][0] is not tasks["b"][0]
    assert rig.tasks["a"] is tasks["a"][0]


async def test_a_timeout_inside_an_item_ends_only_that_item() -> None:
    ended: list[str] = []

    async def run(item: str) -> None:
        if item == "late":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.Event().wait()
        ended.append(item)

    rig = Rig(run)
    rig.start("a", "late", "b")
    await eventually(lambda: sorted(ended) == ["a", "b", "late"])


async def test_context_variables_are_the_items_own() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: dict[str, tuple[str, str]] = {}

    async def run(item: str) -> None:
        before = variable.get()
        variable.set(item)
        if item != "quick":
            await asyncio.sleep(0)
        seen[item] = (before, variable.get())

    variable.set("outside")
    rig = Rig(run)
    rig.start("quick", "b", "c")
    await eventually(lambda: len(seen) == 3)
    assert seen == {name: ("outside", name) for name in ("quick", "b", "c")}
    assert variable.get() == "outside"


async def test_an_item_that_cancels_its_own_task_does_not_touch_the_next() -> None:
    ended: list[str] = []

    async def run(item: str) -> None:
        if item == "suicide":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            ended.append(item)
            return
        await asyncio.sleep(0)
        ended.append(item)

    rig = Rig(run)
    rig.start("suicide", "next", "last")
    await eventually(lambda: len(ended) == 3)
    assert ended == ["suicide", "next", "last"]


async def test_cancelling_the_task_of_an_item_reaches_the_item() -> None:
    caught: list[str] = []

    async def run(item: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            caught.append(item)

    rig = Rig(run)
    rig.start("a", "b")
    await eventually(lambda: len(rig.tasks) == 2)
    rig.tasks["a"].cancel()
    await eventually(lambda: rig.finished == ["a"])
    assert caught == ["a"]
    rig.tasks["b"].cancel()
    await eventually(lambda: not rig.runner.tasks)


async def test_nothing_starts_during_a_pause() -> None:
    seen: list[str] = []

    async def run(item: str) -> None:
        seen.append(item)

    rig = Rig(run)
    rig.runner.pause()
    rig.start("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert seen == []
    rig.runner.resume()
    await eventually(lambda: seen == ["a"])


async def test_a_long_queue_lets_others_have_a_turn() -> None:
    seen: list[str] = []
    seen_by_other: list[int] = []

    async def run(item: str) -> None:
        seen.append(item)

    rig = Rig(run)
    rig.start(*(str(number) for number in range(1_000)))
    while len(seen) < 1_000:
        seen_by_other.append(len(seen))
        await asyncio.sleep(0)
    assert len(seen_by_other) > 5


async def test_a_long_item_is_the_last_of_its_turn() -> None:
    seen: list[str] = []

    async def run(item: str) -> None:
        seen.append(item)
        rig.runner.end_turn()

    rig = Rig(run)
    rig.start("a", "b", "c")
    most_at_once = 0
    while len(seen) < 3:
        before = len(seen)
        await asyncio.sleep(0)
        most_at_once = max(most_at_once, len(seen) - before)
    assert most_at_once == 1


async def test_an_item_that_starts_others_sees_them_run() -> None:
    seen: list[str] = []
    rig: Rig

    async def run(item: str) -> None:
        if item == "parent":
            rig.start("child")
            await eventually(lambda: "child" in seen)
        seen.append(item)

    rig = Rig(run)
    rig.start("parent")
    await eventually(lambda: seen == ["child", "parent"])


async def test_a_worker_that_is_cancelled_before_it_began_is_replaced() -> None:
    seen: list[str] = []

    async def run(item: str) -> None:
        seen.append(item)

    rig = Rig(run)
    rig.start("a")
    for task in rig.runner.tasks:
        task.cancel()
    await eventually(lambda: seen == ["a"])
