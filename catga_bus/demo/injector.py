"""What makes the faults happen: carries out the plan on real processes while the replay runs."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Protocol

from catga_bus.demo.faults import Act, Chronicle, FaultPlan, FaultRecord, What

_POLL = 0.005  # seconds between two looks at the plan: short beside any fault, and one look costs microseconds


class Victim(Protocol):
    """The process of one node, as `processes.NodeProcess` is one."""

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None if it has not."""

    @property
    def is_stopped(self) -> bool:
        """Whether the system says that it stands still."""

    def start(self) -> None:
        """Start it."""

    def kill(self) -> None:
        """End it at once (SIGKILL)."""

    def freeze(self) -> None:
        """Stop it where it stands (SIGSTOP)."""

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""


class FaultInjector:
    """Kills, replaces, freezes and thaws as a plan says, and writes down what it did.

    Args:
        plan: What happens to whom.
        processes: The processes of the plan's nodes, by id.
        chronicle: Where the moments are written.
        wait_ready: Returns when a node answers; raises if it does not.
        wait_gone: Returns when every node that lives sees a node as gone, and whether they did so in time.
    """

    def __init__(
        self,
        plan: FaultPlan,
        processes: Mapping[str, Victim],
        chronicle: Chronicle,
        wait_ready: Callable[[str], Awaitable[None]],
        wait_gone: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._plan = plan
        self._processes = processes
        self._chronicle = chronicle
        self._wait_ready = wait_ready
        self._wait_gone = wait_gone
        self._was_stopped = False
        self._waiting: list[asyncio.Task[None]] = []

    async def run(self, part: Callable[[], float]) -> FaultRecord:
        """Do what the plan says until the replay is over and every fault has been mended.

        Args:
            part: How much of the replay is done, 0 to 1; 1 when it is over.

        Raises:
            Exception: What `wait_ready` raised: the replacement did not begin to answer.
        """
        try:
            while part() < 1 or self._plan.is_open(self._chronicle.moments):
                for act in self._plan.due(part(), self._chronicle.now(), self._chronicle.moments):
                    self._do(act)
                await asyncio.sleep(_POLL)
            await asyncio.gather(*self._waiting)
        finally:
            for task in self._waiting:
                task.cancel()
            await asyncio.gather(*self._waiting, return_exceptions=True)
        return FaultRecord(
            plan=self._plan,
            moments=self._chronicle.moments,
            exit_code=self._processes[self._plan.killed].exit_code,
            was_stopped=self._was_stopped,
        )

    def _do(self, act: Act) -> None:
        # The instant is taken before the signal: no answer to it can seem to come too early.
        at = self._chronicle.now()
        match act:
            case Act.KILL:
                self._processes[self._plan.killed].kill()
                self._chronicle.add(self._plan.killed, What.KILLED, at)
                self._wait(self._spread(self._plan.killed))
            case Act.FREEZE:
                self._processes[self._plan.frozen].freeze()
                self._chronicle.add(self._plan.frozen, What.FROZEN, at)
                self._wait(self._spread(self._plan.frozen))
            case Act.THAW:
                self._was_stopped = self._processes[self._plan.frozen].is_stopped
                self._processes[self._plan.frozen].thaw()
                self._chronicle.add(self._plan.frozen, What.THAWED, at)
            case Act.REPLACE:
                self._chronicle.add(self._plan.replacement, What.STARTED, at)
                self._wait(self._replace(self._plan.replacement))

    def _wait(self, work: Coroutine[None, None, None]) -> None:
        self._waiting.append(asyncio.create_task(work))

    async def _replace(self, node: str) -> None:
        # In a thread: to start a process takes milliseconds, which would be counted as the bus's.
        await asyncio.to_thread(self._processes[node].start)
        await self._wait_ready(node)
        self._chronicle.add(node, What.READY)

    async def _spread(self, node: str) -> None:
        if await self._wait_gone(node):
            self._chronicle.add(node, What.UNANIMOUS)
