"""Threads for `def` handlers: at most as many as the handler's concurrency, made when first needed.

`concurrent.futures` joins its threads when the interpreter ends, so one handler that never returns would keep the
process for ever; these are daemons, and a drain that runs out of time lets them go.
"""

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

from catga_bus.dispatch.failures import describe

_Job = tuple[Callable[[], Any], asyncio.Future[Any], Callable[[], None], contextvars.Context]


class HandlerThreads:
    """A pool of daemon threads for one event loop.

    Args:
        size: The most threads; the caller runs no more functions than that at a time.
        name: Prefix of their names.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._started = 0
        self._busy = 0

    def submit(self, function: Callable[[], Any], ended: Callable[[], None]) -> asyncio.Future[Any]:
        """Run a function in a thread, in a copy of the present context, and return the future of its value.

        Cancelling the future does not stop the thread. What a coroutine must not be handed from elsewhere comes as
        a `RuntimeError` with the original as its cause: `SystemExit`, `KeyboardInterrupt` and all else that is no
        `Exception`, which would end the event loop or pass for a cancellation, and `StopIteration`.

        Args:
            function: What to run.
            ended: Called on the event loop when the function has really ended, before the future is resolved.

        Raises:
            RuntimeError: The system gives no thread.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._busy >= self._started and self._started < self._size:
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{self._started + 1}", daemon=True)
            thread.start()
            self._started += 1
        self._busy += 1
        self._jobs.put((function, future, ended, contextvars.copy_context()))
        return future

    def close(self) -> None:
        """Let idle threads end now, and busy ones when they are done."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future, ended, context = job
            value: Any = None
            error: BaseException | None = None
            try:
                value = context.run(function)
            except BaseException as raised:
                error = raised
            try:
                future.get_loop().call_soon_threadsafe(self._resolve, future, ended, value, error)
            except RuntimeError:
                return  # the loop has gone, and with it everybody who could want the value
            del job, function, future, ended, context, value, error

    def _resolve(
        self, future: asyncio.Future[Any], ended: Callable[[], None], value: Any, error: BaseException | None
    ) -> None:
        self._busy -= 1
        ended()
        if future.done():
            return
        if error is not None:
            future.set_exception(error if _may_pass(error) else _wrapped(error))
        else:
            future.set_result(value)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, StopIteration)


def _wrapped(error: BaseException) -> RuntimeError:
    wrapped = RuntimeError(f"the thread ended with {describe(error)}")
    wrapped.__cause__ = error
    return wrapped
