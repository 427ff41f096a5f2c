"""What makes the faults happen: carries out the plan on real processes while the replay runs."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from catga_bus.demo.faults import Act, Chronicle, FaultPlan, FaultRecord, What, first

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

    def terminate(self) -> None:
        """Ask it to finish and end (SIGTERM)."""


class FaultInjector:
    """Kills, freezes and rolls as a plan says, starts others in their place, and writes down what it did.

    Args:
        plan: What happens to whom.
        processes: The processes of the plan's nodes, by id.
        chronicle: Where the moments are written.
        wait_ready: Returns when a node answers; raises if it does not.
    """

    def __init__(
        self,
        plan: FaultPlan,
        processes: Mapping[str, Victim],
        chronicle: Chronicle,
        wait_ready: Callable[[str], Awaitable[None]],
    ) -> None:
        self._plan = plan
        self._processes = processes
        self._chronicle = chronicle
        self._wait_ready = wait_ready
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
                self._look_at_rolled()
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
            rolled_exit_code=self._processes[self._plan.rolled].exit_code,
        )

    def _look_at_rolled(self) -> None:
        node, moments = self._plan.rolled, self._chronicle.moments
        if first(moments, node, What.ROLLED) is None or first(moments, node, What.ENDED) is not None:
            return
        if self._processes[node].exit_code is not None:
            self._chronicle.add(node, What.ENDED)

    def _do(self, act: Act) -> None:
        # The instant is taken before the signal: no answer to it can seem to come too early.
        at = self._chronicle.now()
        plan = self._plan
        match act:
            case Act.KILL:
                self._processes[plan.killed].kill()
                self._chronicle.add(plan.killed, What.KILLED, at)
            case Act.FREEZE:
                self._processes[plan.frozen].freeze()
                self._chronicle.add(plan.frozen, What.FROZEN, at)
            case Act.THAW:
                self._was_stopped = self._processes[plan.frozen].is_stopped
                self._processes[plan.frozen].thaw()
                self._chronicle.add(plan.frozen, What.THAWED, at)
            case Act.ROLL:
                self._processes[plan.rolled].terminate()
                self._chronicle.add(plan.rolled, What.ROLLED, at)
            case Act.REPLACE:
                self._begin(plan.replacement, at)
            case Act.SUCCEED:
                self._begin(plan.successor, at)

    def _begin(self, node: str, at: float) -> None:
        self._chronicle.add(node, What.STARTED, at)
        self._waiting.append(asyncio.create_task(self._start(node)))

    async def _start(self, node: str) -> None:
        # In a thread: to start a process takes milliseconds, which would be counted as the bus's.
        await asyncio.to_thread(self._processes[node].start)
        await self._wait_ready(node)
        self._chronicle.add(node, What.READY)
