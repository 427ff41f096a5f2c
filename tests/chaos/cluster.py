"""A service under test: a nats-server, node and caller processes, links between them, and the faults that hit them.

Each fault writes its beginning into the history before the deed and its end after it was undone. Whatever happens,
no process, proxy or network is left at the end.
"""

import asyncio
import errno
import itertools
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from catga_bus import Bus, Ok
from catga_bus.testing import eventually
from tests.chaos.caller import CallerPlan
from tests.chaos.history import End, Fault, Invoke, Record, Recorder, Start, Witness, read_history, read_tail
from tests.chaos.netns import Namespace
from tests.chaos.processes import Child, stance
from tests.chaos.proxy import Direction, Proxy
from tests.chaos.service import NodePlan, Ping
from tests.servers import NatsServer

READY_TIMEOUT = 60.0
RUNNING_FOR = 0.05
# Seconds after which a run is known to its caller as accepted.

SLOWEST = 1.0
# Seconds that no handler of the rig exceeds: a run that has not ended after them was cut off.


class Cluster:
    """One run of the rig. Use it in an `async with` statement.

    Args:
        directory: For the history, the logs and the server; made if need be, and without a history.
        seed: Of everything random in the callers.

    Attributes:
        nodes: The node processes that were started and neither killed nor rolled, by id.
        callers: The caller processes, by name.
    """

    def __init__(self, directory: Path, seed: str = "0") -> None:
        self.directory = directory
        self.seed = seed
        self.nodes: dict[str, Child] = {}
        self.callers: dict[str, Child] = {}
        self._namespace = f"c{uuid4().hex[:12]}"
        self._history = directory / "history"
        self._options: dict[str, dict[str, int]] = {}
        self._links: dict[str, Proxy] = {}
        self._spaces: dict[str, Namespace] = {}
        self._numbers = itertools.count(1)
        self._faults = itertools.count(1)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start the server and the rig's own connection."""
        self._history.mkdir(parents=True)  # nothing of another run is in it
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        self._recorder = Recorder(self._history, "rig")
        self._stack.callback(self._recorder.close)
        self.server = NatsServer(self.directory / "nats")
        self._stack.callback(self.server.kill)
        self.server.start()
        self._bus = await self._stack.enter_async_context(
            Bus("rig", url=self.server.url, namespace=self._namespace, reconnect_delay=0.02)
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything."""
        await self._stack.aclose()

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

    async def stop_callers(self, *names: str) -> None:
        """Let callers (all by default) make no more calls, and wait until every call has ended."""
        children = [self.callers.pop(name) for name in names or list(self.callers)]
        codes = await asyncio.gather(*(child.terminate() for child in children))
        assert not any(codes), f"callers ended with {codes}; see the logs in {self.directory}"

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
                    self._see(record.name, {_end_of(child): 1})

    def sees_poison(self) -> None:
        """From now on nodes may end by themselves."""
        for child in self.nodes.values():
            child.may_end = True

    async def _child(self, name: str, module: str, plan: NodePlan | CallerPlan, prefix: Sequence[str] = ()) -> Child:
        child = Child(name, module, plan, self.directory / f"{name}.log", prefix)
        self._stack.push_async_callback(child.kill)
        await child.start()
        return child

    async def _url(self, name: str, host: str) -> str:
        link = self._links[name] = Proxy(("127.0.0.1", self.server.port), host)
        await link.start()
        self._stack.push_async_callback(link.close)
        return f"nats://{link.address}"

    def _said(self, name: str) -> list[Record]:
        return [record for path in self._history.glob(f"{name}-*.jsonl") for record in read_tail(path)]

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

    @asynccontextmanager
    async def fault(
        self, kind: str, target: str, pid: int | None = None, delay: float = 0.0
    ) -> AsyncIterator[Callable[[dict[str, int]], None]]:
        """Write the beginning and the end of a fault around the deed; yields what notes how it bit."""
        name = f"{kind}-{next(self._faults)}"

        def write(edge: str) -> None:
            self._recorder.write(Fault(self._recorder.clock(), name, kind, target, edge, pid, delay))

        write("begin")
        try:
            yield lambda saw: self._see(name, saw)
        finally:
            write("end")

    def _see(self, name: str, saw: dict[str, int]) -> None:
        self._recorder.write(Witness(self._recorder.clock(), name, saw))

    async def kill(self, name: str) -> None:
        """SIGKILL a node while it is in the middle of something."""
        await self.wait_busy(name)
        child = self.nodes.pop(name)
        async with self.fault("kill", name, child.pid) as see:
            await child.kill()
            see({_end_of(child): 1})

    async def freeze(self, name: str, seconds: float) -> None:
        """SIGSTOP a node in the middle of something, and SIGCONT it afterwards."""
        await self.wait_busy(name)
        child = self.nodes[name]
        async with self.fault("freeze", name, child.pid) as see:
            child.freeze()
            try:
                await asyncio.sleep(seconds)
                see({stance(child.pid): 1})
            finally:
                child.thaw()

    async def roll(self, name: str) -> str:
        """Start another node like it, then SIGTERM this one and wait for its end; return the id of the new one."""
        child = self.nodes[name]
        async with self.fault("roll", name, child.pid) as see:
            successor = await self.start_node(linked=name in self._links, **self._options[name])
            del self.nodes[name]
            code = await child.terminate()
            see({_end_of(child): 1})
        assert code == 0, f"{name} ended with {code} on SIGTERM; see its log in {self.directory}"
        return successor

    async def restart_server(self, down: float) -> None:
        """SIGKILL the server and start it again on its port after a while."""
        async with self.fault("restart_server", "server") as see:
            self.server.kill()
            await asyncio.sleep(down)
            see({_answer_at(self.server.port): 1})
            self.server.start()

    async def freeze_server(self, seconds: float) -> None:
        """SIGSTOP the server, and SIGCONT it afterwards."""
        async with self.fault("freeze_server", "server") as see:
            self.server.freeze()
            try:
                await asyncio.sleep(seconds)
                see({stance(self.server.pid): 1})
            finally:
                self.server.thaw()

    async def cut(self, name: str, seconds: float) -> None:
        """Reset the connection of a linked node or caller, and every new one."""
        await self._spoil("cut", name, seconds, lambda link: link.cut())

    async def half_open(self, name: str, seconds: float) -> None:
        """Let what a linked node or caller and the server send each other disappear."""
        await self._spoil("half_open", name, seconds, lambda link: link.half_open())

    async def one_way(self, name: str, direction: Direction, seconds: float) -> None:
        """Stop one direction of the link of a node or caller."""
        await self._spoil("one_way", name, seconds, lambda link: link.hold(direction))

    async def delay(self, name: str, delay: float, seconds: float) -> None:
        """Let everything on the link of a node or caller come later."""

        def spoil(link: Proxy) -> None:
            link.delay = delay

        await self._spoil("delay", name, seconds, spoil, delay)

    async def _spoil(
        self, kind: str, name: str, seconds: float, spoil: Callable[[Proxy], None], delay: float = 0.0
    ) -> None:
        link = self._links[name]
        async with self.fault(kind, name, delay=delay) as see:
            link.hits.clear()
            spoil(link)
            try:
                await asyncio.sleep(seconds)
                see(dict(link.hits))
            finally:
                link.heal()

    async def unplug(self, name: str, seconds: float) -> None:
        """Pull the cable of a node in a network of its own, and put it back."""
        space = self._spaces[name]
        async with self.fault("unplug", name) as see:
            space.unplug()
            try:
                await asyncio.sleep(seconds)
                see({"unplugged" if space.is_unplugged else "plugged": 1})
            finally:
                space.plug()

    async def overload(self, seconds: float, **load: object) -> None:
        """Put a second caller with its load on top."""
        async with self.fault("overload", "load"):
            name = await self.start_caller(f"flood{next(self._numbers)}", **load)  # type: ignore[arg-type]
            await asyncio.sleep(seconds)
            await self.stop_callers(name)


def _end_of(child: Child) -> str:
    return {-signal.SIGKILL: "killed", 0: "left", None: "going"}.get(child.exit_code, f"ended {child.exit_code}")


def _answer_at(port: int) -> str:
    """Return what somebody is told who connects there: `refused`, or that there is still an answer."""
    with socket.socket() as probe:
        return "refused" if probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED else "answered"
