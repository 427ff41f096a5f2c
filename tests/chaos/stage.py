"""A stage for faults: a nats-server, child processes, links between them, and the faults that hit them.

Each fault writes its beginning into the history before the deed and its end after it was undone. Whatever happens,
no process, proxy or network is left at the end.
"""

import asyncio
import errno
import itertools
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import msgspec

from tests.chaos.history import Fault, Recorder, Witness
from tests.chaos.netns import Namespace
from tests.chaos.processes import Child, stance
from tests.chaos.proxy import Direction, Proxy
from tests.servers import NatsServer


class Stage:
    """One run of the rig. Use it in an `async with` statement.

    Args:
        directory: For the history, the logs and the server; made if need be, and without a history.
        seed: Of everything random in the processes that make calls.

    Attributes:
        nodes: The node processes that were started and neither killed nor rolled, by id.
        callers: The processes that make calls, by name.
    """

    def __init__(self, directory: Path, seed: str = "0") -> None:
        self.directory = directory
        self.seed = seed
        self.nodes: dict[str, Child] = {}
        self.callers: dict[str, Child] = {}
        self._namespace = f"c{uuid4().hex[:12]}"
        self._history = directory / "history"
        self._links: dict[str, Proxy] = {}
        self._spaces: dict[str, Namespace] = {}
        self._numbers = itertools.count(1)
        self._faults = itertools.count(1)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start the server and the rig's own connection."""
        self._history.mkdir(parents=True)  # nothing of another run is in it
        try:
            self._recorder = Recorder(self._history, "rig")
            self._stack.callback(self._recorder.close)
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything."""
        await self._stack.aclose()

    async def _start(self) -> None:
        """Start what all processes need."""
        self.server = self._start_server()

    def _start_server(self, **options: Any) -> NatsServer:
        server = NatsServer(self.directory / "nats", **options)
        self._stack.callback(server.kill)
        server.start()
        return server

    async def wait_busy(self, name: str) -> None:
        """Wait until a node is in the middle of something."""
        raise NotImplementedError

    # -- processes -----------------------------------------------------------------------------------------

    async def stop_callers(self, *names: str) -> None:
        """Let callers (all by default) make no more calls, and wait until every call has ended."""
        children = [self.callers.pop(name) for name in names or list(self.callers)]
        codes = await asyncio.gather(*(child.terminate() for child in children))
        assert not any(codes), f"callers ended with {codes}; see the logs in {self.directory}"

    async def _child(
        self,
        name: str,
        module: str,
        plan: msgspec.Struct,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Child:
        child = Child(name, module, plan, self.directory / f"{name}.log", prefix, env)
        self._stack.push_async_callback(child.kill)
        await child.start()
        return child

    async def _url(self, name: str, host: str) -> str:
        link = self._links[name] = Proxy(("127.0.0.1", self.server.port), host)
        await link.start()
        self._stack.push_async_callback(link.close)
        return f"nats://{link.address}"

    def _files(self, name: str) -> list[Path]:
        """Return the history files of the processes of a name."""
        return list(self._history.glob(f"{name}-*.jsonl"))

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
            see({end_of(child): 1})

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


def end_of(child: Child) -> str:
    """Return how a process has ended: `killed`, `left`, or else."""
    return {-signal.SIGKILL: "killed", 0: "left", None: "going"}.get(child.exit_code, f"ended {child.exit_code}")


def _answer_at(port: int) -> str:
    """Return what somebody is told who connects there: `refused`, or that there is still an answer."""
    with socket.socket() as probe:
        return "refused" if probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED else "answered"
