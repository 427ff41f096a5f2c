"""Threads of `def` handlers: what they raise reaches who waits, and never the event loop."""

import asyncio
import concurrent.futures
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from catga_bus.dispatch.threads import HandlerThreads


class Unusual(BaseException):
    pass


@pytest.fixture
async def threads() -> AsyncIterator[HandlerThreads]:
    made = HandlerThreads(1, "test")
    yield made
    made.close()


def nothing() -> None:
    pass


async def test_a_value_and_an_exception_come_as_they_are(threads: HandlerThreads) -> None:
    assert await threads.submit(lambda: 3, nothing) == 3
    with pytest.raises(ZeroDivisionError):
        await threads.submit(lambda: 1 // 0, nothing)


def raising(error: BaseException) -> Callable[[], Any]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        Unusual("x"),
        asyncio.CancelledError(),
        StopIteration(1),
    ],
)
async def test_what_a_coroutine_must_not_be_handed_comes_as_a_runtime_error(
    threads: HandlerThreads, error: BaseException
) -> None:
    with pytest.raises(RuntimeError, match=type(error).__name__) as raised:
        await threads.submit(raising(error), nothing)
    assert raised.value.__cause__ is error


async def test_a_thread_goes_on_after_an_exit(threads: HandlerThreads) -> None:
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        await threads.submit(lambda: sys.exit(3), nothing)
    first = await threads.submit(threading.current_thread, nothing)
    assert await threads.submit(threading.current_thread, nothing) is first


async def test_a_cancelled_call_of_another_future_comes_as_it_is(threads: HandlerThreads) -> None:
    with pytest.raises(concurrent.futures.CancelledError):
        await threads.submit(raising(concurrent.futures.CancelledError()), nothing)


async def test_a_thread_that_cannot_be_had_leaves_the_pool_as_it_was(
    threads: HandlerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threads.submit(nothing, nothing)
    assert await asyncio.wait_for(threads.submit(lambda: 3, nothing), 5) == 3
