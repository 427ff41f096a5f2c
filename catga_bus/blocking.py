"""BlockingBus: the calls of a bus for programs without an event loop."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from catga_bus.bus import Bus
from catga_bus.cluster.records import NodeInfo, NodeStatus
from catga_bus.context import Key
from catga_bus.errors import BusStateError
from catga_bus.health import Health
from catga_bus.messages import Command, Event, Request
from catga_bus.node import BusStatistics
from catga_bus.result import Err, Ok, Stored

R = TypeVar("R")
T = TypeVar("T")

STACK_BYTES = 8_388_608
# The loop's thread decodes what arrives, and the decoder recurses: see the gate in `codec`. Threads get what the
# system gives otherwise, which may be 128 KiB.


class BlockingBus:
    """A bus on an event loop of its own, in a thread of its own; its calls block, and may come from any thread.

        with BlockingBus("shop", url="nats://127.0.0.1:4222") as bus:
            price = bus.send(Quote("sku-9")).unwrap()

    Register handlers on `bus.bus` before it starts.

    Args:
        service: As for `Bus`, like all other arguments.
        **options: As for `Bus`.

    Attributes:
        bus: The bus itself; its own calls belong to its loop.
    """

    def __init__(self, service: str, **options: Any) -> None:
        self.bus = Bus(service, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._life = threading.RLock()  # held while the bus starts or drains; a signal's handler may drain within start
        self._door = threading.Lock()  # held for a moment: no call is handed to a loop that has been told to end

    def start(self) -> None:
        """Start the loop and the bus; raises what `Bus.start` raises."""
        with self._life:
            self._start()

    def _start(self) -> None:
        if self._thread is not None:
            raise BusStateError(f"{self.bus!r} cannot be started: a bus starts once; make a new one")
        self._pid = os.getpid()
        ready = threading.Event()
        # The size of a stack is a setting of the process that counts when a thread is made; it is put back at once.
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=self._serve, args=(ready,), name="catga-loop", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
        self._thread = thread
        try:
            ready.wait()
            self._wait(self.bus.start())
        except BaseException:
            self._end()
            raise

    def drain(self) -> None:
        """Drain and close the bus, and end its thread. Draining twice is fine.

        Raises:
            BusStateError: The bus was started before a fork.
        """
        self._check_process()
        with self._life:
            if self._loop is not None:
                try:
                    self._wait(self.bus.drain())
                finally:
                    self._end()

    def __enter__(self) -> Self:
        """Start the bus."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drain the bus."""
        self.drain()

    def send(
        self,
        request: Request[R] | Command[R],
        *,
        timeout: float | None = None,
        node: str | None = None,
        where: Callable[[NodeInfo], bool] | None = None,
        key: Key | None = None,
    ) -> Ok[R] | Err:
        """Send as `Bus.send` does, and wait for the result."""
        return self._wait(self.bus.send(request, timeout=timeout, node=node, where=where, key=key))

    def enqueue(
        self,
        command: Command[Any],
        *,
        key: Key | None = None,
        timeout: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> Stored:
        """Have a command stored as `Bus.enqueue` does, and wait until it is."""
        return self._wait(self.bus.enqueue(command, key=key, timeout=timeout, delay=delay, at=at))

    def publish(self, event: Event, *, key: Key | None = None, timeout: float | None = None) -> Stored | None:
        """Publish as `Bus.publish` does."""
        return self._wait(self.bus.publish(event, key=key, timeout=timeout))

    def broadcast(self, event: Event) -> None:
        """Broadcast as `Bus.broadcast` does."""
        self._wait(self.bus.broadcast(event))

    def statistics(self) -> BusStatistics:
        """Return a snapshot of what the bus has done since its start."""

        async def snapshot() -> BusStatistics:
            return self.bus.statistics()

        return self._wait(snapshot())

    def health(self) -> Health:
        """Return whether the bus lives and takes work; see `Bus.health`."""
        return self.bus.health()

    @property
    def node(self) -> NodeInfo:
        """This node, as others see it."""

        async def own() -> NodeInfo:
            return self.bus.node

        return self._wait(own())

    def nodes(self, service: str | None = None, status: NodeStatus | str | None = None) -> list[NodeInfo]:
        """Return the nodes that are known, as `Bus.nodes` does."""

        async def known() -> list[NodeInfo]:
            return self.bus.nodes(service, status)

        return self._wait(known())

    def _serve(self, ready: threading.Event) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._stopped = asyncio.Event()
            ready.set()
            runner.run(self._live())

    async def _live(self) -> None:
        await self._stopped.wait()
        await self.bus.close()  # nothing to do after a drain, but a Ctrl-C may have cut that off

    def _check_process(self) -> None:
        if self._loop is not None and self._pid != os.getpid():
            raise BusStateError(
                f"{self.bus!r} was started in process {self._pid} and is used in its fork {os.getpid()}; "
                f"make and start a bus in each process"
            )

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            future = self._hand_over(call)
        except BaseException:
            call.close()
            raise
        try:
            return future.result()
        except CancelledError:
            raise BusStateError(f"{self.bus!r} was drained before the call ended") from None
        except BaseException:  # KeyboardInterrupt leaves nothing behind
            future.cancel()
            raise

    def _hand_over(self, call: Coroutine[Any, Any, T]) -> "Future[T]":
        self._check_process()  # before the lock, which a fork may have copied while it was held
        if threading.current_thread() is self._thread:
            raise BusStateError("a BlockingBus was called from its own event loop, which would wait for itself")
        with self._door:
            if self._loop is None:
                raise BusStateError(f"{self.bus!r} is not started; `with bus:` or `bus.start()` first")
            return asyncio.run_coroutine_threadsafe(call, self._loop)

    def _end(self) -> None:
        with self._door:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.call_soon_threadsafe(self._stopped.set)
        if self._thread is not None:
            self._thread.join()
