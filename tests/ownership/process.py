"""A simulated process: an event loop of its own, run one callback at a time, that can be frozen or killed in between.

A frozen process runs nothing; what reaches its sockets waits there, and its timers are late when it thaws. A killed one
runs nothing ever again.
"""

import asyncio
import contextlib
import heapq
import math
import random
from asyncio import events
from collections.abc import Callable, Coroutine
from typing import Any


class Killed(BaseException):
    """The process has died at this point; what is raised unwinds it, and nothing that it still says is heard."""


class ProcessLoop(asyncio.BaseEventLoop):
    """An event loop without sockets that somebody else runs.

    Args:
        clock: Tells the virtual time.
        rng: Decides whether timers or messages come first when both are overdue.
    """

    def __init__(self, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__()
        self._clock = clock
        self._rng = rng

    def time(self) -> float:
        """The virtual instant."""
        return self._clock()

    def next_timer(self) -> float:
        """Return when the next timer is due; infinity if there is none."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:  # type: ignore[attr-defined]
            handle = heapq.heappop(timers)
            handle._scheduled = False  # type: ignore[attr-defined]
        return timers[0].when() if timers else math.inf

    @property
    def has_work(self) -> bool:
        """Whether a callback is to be run now."""
        return bool(self._ready) or self.next_timer() <= self.time()  # type: ignore[attr-defined]

    def step(self) -> None:
        """Run one callback that is due."""
        ready = self._ready  # type: ignore[attr-defined]
        now = self.time()
        due = []
        while self.next_timer() <= now:
            handle = heapq.heappop(self._scheduled)  # type: ignore[attr-defined]
            handle._scheduled = False
            due.append(handle)
        if due and ready and self._rng.random() < 0.5:
            ready.extendleft(reversed(due))
        else:
            ready.extend(due)
        while ready:
            handle = ready.popleft()
            if not handle._cancelled:
                self.enter(handle._run)
                return

    def enter(self, function: Callable[[], None]) -> None:
        """Run something as if this loop did."""
        before = events._get_running_loop()  # type: ignore[attr-defined]
        events._set_running_loop(self)
        try:
            function()
        finally:
            events._set_running_loop(before)

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""

    def _process_events(self, event_list: object) -> None:
        """There are none."""


class Process:
    """One process.

    Args:
        name: For messages.
        clock: Tells the virtual time.
        rng: Of the world.
        on_point: Told of each point that the process comes to; may freeze or kill it.
    """

    def __init__(
        self, name: str, clock: Callable[[], float], rng: random.Random, on_point: Callable[["Process", str], None]
    ) -> None:
        self.name = name
        self.loop = ProcessLoop(clock, rng)
        self.loop.set_exception_handler(self._failed)
        self.is_alive = True
        self.thaws_at = 0.0
        self.thawed_at = 0.0
        """When the last pause ended that was long enough to be noticed."""

        self.errors: list[str] = []
        self._clock = clock
        self._on_point = on_point
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_frozen(self) -> bool:
        """Whether it stands still."""
        return self._clock() < self.thaws_at

    @property
    def can_step(self) -> bool:
        """Whether it would do something now."""
        return self.is_alive and not self.is_frozen and self.loop.has_work

    def next_timer(self) -> float:
        """Return when it does something by itself."""
        return max(self.loop.next_timer(), self.thaws_at) if self.is_alive else math.inf

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Start a task."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def freeze(self, seconds: float) -> None:
        """Stop it for a while."""
        self.thaws_at = max(self.thaws_at, self._clock() + seconds)
        if seconds > 0.5:
            self.thawed_at = self.thaws_at

    def kill(self) -> None:
        """End it."""
        self.is_alive = False

    def reach(self, name: str) -> None:
        """Come to a point between two things that it does.

        Raises:
            Killed: That was the end.
        """
        if self.is_alive:
            self._on_point(self, name)
        if not self.is_alive:
            raise Killed(name)

    async def point(self, name: str) -> None:
        """Come to a point; return when it goes on."""
        self.reach(name)
        if self.is_frozen:
            await asyncio.sleep(0)

    def bury(self) -> None:
        """Take apart what is left of it."""
        self.is_alive = False
        for _ in range(100):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                self.loop.enter(task.cancel)
            while self.loop._ready:  # type: ignore[attr-defined]
                with contextlib.suppress(Killed):
                    self.loop.step()
        assert not asyncio.all_tasks(self.loop), asyncio.all_tasks(self.loop)
        self.loop.close()

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.is_alive and not isinstance(error, Killed):
            self.errors.append(f"{self.name}: {context['message']}: {error!r}")
