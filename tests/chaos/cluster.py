"""A service under test: node and caller processes on a stage, and the faults that only they know."""

import asyncio
from pathlib import Path

from catga_bus import Bus, Ok
from catga_bus.testing import eventually
from tests.chaos.caller import CallerPlan
from tests.chaos.history import End, Fault, Invoke, Record, Start, read_history, read_tail
from tests.chaos.netns import Namespace
from tests.chaos.service import NodePlan, Ping
from tests.chaos.stage import Stage, end_of

READY_TIMEOUT = 60.0
RUNNING_FOR = 0.05
# Seconds after which a run is known to its caller as accepted.

SLOWEST = 1.0
# Seconds that no handler of the rig exceeds: a run that has not ended after them was cut off.


class Cluster(Stage):
    """A service that answers requests, and those who ask it. See `Stage`."""

    def __init__(self, directory: Path, seed: str = "0") -> None:
        super().__init__(directory, seed)
        self._options: dict[str, dict[str, int]] = {}

    async def _start(self) -> None:
        await super()._start()
        self._bus = await self._stack.enter_async_context(
            Bus("rig", url=self.server.url, namespace=self._namespace, reconnect_delay=0.02)
        )

    # -- members -------------------------------------------------------------------------------------------

    async def start_nodes(self, count: int, **options: int) -> list[str]:
        """Start nodes side by side, and return their ids when all of them answer."""
        return list(await asyncio.gather(*(self.start_node(**options) for _ in range(count))))

    async def start_node(self, *, linked: bool = False, in_space: bool = False, **options: int) -> str:
        """Start a node, and return its id, which no node had before, when it answers.

        Args:
            linked: Connect it through a proxy of its own.
            in_space: Put it into a network of its own, behind a proxy on the cable.
            **options: Fields of `NodePlan`.
        """
        name = f"n{next(self._numbers)}"
        prefix: list[str] = []
        host = "127.0.0.1"
        if in_space:
            space = self._spaces[name] = self._stack.enter_context(Namespace(len(self._spaces)))
            prefix, host = space.prefix, space.host
        url = await self._url(name, host) if linked or in_space else self.server.url
        plan = NodePlan(url, self._namespace, name, str(self._history), **options)
        self._options[name] = options
        child = self.nodes[name] = await self._child(name, "tests.chaos.service", plan, prefix)

        async with asyncio.timeout(READY_TIMEOUT):
            while not isinstance(await self._bus.send(Ping(), node=name, timeout=1.0), Ok):
                child.check()
        return name

    async def start_caller(
        self,
        name: str = "c1",
        *,
        mix: dict[str, float],
        rate: float = 250.0,
        timeout: float = 2.0,
        linked: bool = False,
        node: str | None = None,
        limit: int | None = None,
    ) -> str:
        """Start a caller, and return its name when it has made its first call. See `CallerPlan`."""
        url = await self._url(name, "127.0.0.1") if linked else self.server.url
        plan = CallerPlan(
            url, self._namespace, name, str(self._history), f"{self.seed}-{name}", rate, timeout, mix, node, limit
        )
        child = self.callers[name] = await self._child(name, "tests.chaos.caller", plan)

        def has_called() -> bool:
            child.check()
            return any(isinstance(record, Invoke) for record in self._said(name))

        await eventually(has_called, READY_TIMEOUT)
        return name

    async def finish(self) -> list[Record]:
        """Stop the callers, see that all that should live does, and return the history."""
        await self.stop_callers()
        for child in self.nodes.values():
            child.check()
        self._see_poisoned()
        return read_history(self._history)

    def _see_poisoned(self) -> None:
        """Write down how the nodes ended that were poisoned, which the rig learns only now."""
        for child in self.nodes.values():
            for record in self._said(child.name):
                if isinstance(record, Fault) and record.edge == "end":
                    self._see(record.name, {end_of(child): 1})

    def sees_poison(self) -> None:
        """From now on nodes may end by themselves."""
        for child in self.nodes.values():
            child.may_end = True

    def _said(self, name: str) -> list[Record]:
        return [record for path in self._files(name) for record in read_tail(path)]

    def running(self, name: str) -> set[str]:
        """Return the calls that a node has been executing for a while, as its history says."""
        now = self._recorder.clock()
        runs: dict[str, float] = {}
        for record in self._said(name):
            match record:
                case Start() if now - SLOWEST < record.t < now - RUNNING_FOR:
                    runs[record.op] = record.t
                case End():
                    runs.pop(record.op, None)
        return set(runs)

    async def wait_busy(self, name: str) -> None:
        """Wait until a node is in the middle of something."""
        await eventually(lambda: self.running(name), READY_TIMEOUT, what=f"{name} runs something")

    async def wait_all_serve(self) -> None:
        """Wait until every node is given work: also one that was cut off, frozen or new has its share again."""

        def idle() -> list[str]:
            since = self._recorder.clock() - SLOWEST
            return [
                name
                for name in self.nodes
                if not any(isinstance(record, Start) and record.t > since for record in self._said(name))
            ]

        await eventually(lambda: not idle(), READY_TIMEOUT, what="every node is given work")

    # -- faults --------------------------------------------------------------------------------------------

    async def roll(self, name: str) -> str:
        """Start another node like it, then SIGTERM this one and wait for its end; return the id of the new one."""
        child = self.nodes[name]
        async with self.fault("roll", name, child.pid) as see:
            successor = await self.start_node(linked=name in self._links, **self._options[name])
            del self.nodes[name]
            code = await child.terminate()
            see({end_of(child): 1})
        assert code == 0, f"{name} ended with {code} on SIGTERM; see its log in {self.directory}"
        return successor

    async def overload(self, seconds: float, **load: object) -> None:
        """Put a second caller with its load on top."""
        async with self.fault("overload", "load"):
            name = await self.start_caller(f"flood{next(self._numbers)}", **load)  # type: ignore[arg-type]
            await asyncio.sleep(seconds)
            await self.stop_callers(name)
