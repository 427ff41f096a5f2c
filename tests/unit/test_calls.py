"""Requests over a transport: each caller gets its own answer, or learns in time that there is none."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import eventually
from catga_bus.transport.calls import Calls
from catga_bus.transport.jetstream import JetStreamUnknownError
from tests.unit.played_server import PlayedServer


@pytest.fixture
def server() -> PlayedServer:
    return PlayedServer()


@pytest.fixture
async def calls(server: PlayedServer) -> AsyncIterator[Calls]:
    calls = Calls(server, monotonic)
    yield calls
    await calls.close()
    assert not server.subscriptions
    assert calls.in_flight == 0


async def asked(server: PlayedServer, count: int) -> None:
    await eventually(lambda: len(server.published) == count)


async def test_answers_in_any_order_reach_their_callers(server: PlayedServer, calls: Calls) -> None:
    tasks = [asyncio.ensure_future(calls.ask(f"s.{number}", b"", 5.0)) for number in range(3)]
    await asked(server, 3)
    assert calls.in_flight == 3
    assert len(server.subscriptions) == 1
    for place in (1, 2, 0):
        server.answer(b"answer to " + server.published[place].subject.encode(), place)
    assert await asyncio.gather(*tasks) == [b"answer to s.0", b"answer to s.1", b"answer to s.2"]


async def test_nobody_there_is_no_answer(server: PlayedServer, calls: Calls) -> None:
    task = asyncio.ensure_future(calls.ask("s", b"", 5.0))
    await asked(server, 1)
    server.say_nobody()
    assert await task is None


async def test_an_empty_answer_is_an_answer(server: PlayedServer, calls: Calls) -> None:
    task = asyncio.ensure_future(calls.ask("s", b"", 5.0))
    await asked(server, 1)
    server.answer(b"")
    assert await task == b""


async def test_second_and_late_answers_harm_nobody(server: PlayedServer, calls: Calls) -> None:
    task = asyncio.ensure_future(calls.ask("s", b"", 5.0))
    await asked(server, 1)
    server.answer(b"first")
    server.answer(b"second")
    assert await task == b"first"
    server.answer(b"third")
    server.say("_INBOX.1.no-such-call", b"")


async def test_each_waits_as_long_as_it_said(server: PlayedServer, calls: Calls) -> None:
    long = asyncio.ensure_future(calls.ask("long", b"", 60.0))
    middle = asyncio.ensure_future(calls.ask("middle", b"", 0.1))
    short = asyncio.ensure_future(calls.ask("short", b"", 0.02))
    with pytest.raises(JetStreamUnknownError, match="short: no answer in time"):
        await short
    assert not middle.done()
    with pytest.raises(JetStreamUnknownError, match="middle: no answer in time"):
        await middle
    assert not long.done()
    server.answer(b"", 0)
    assert await long == b""


async def test_one_timer_serves_all(server: PlayedServer, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    armed: list[float] = []
    call_later = loop.call_later

    def counted(delay: float, *args: object, **options: object) -> asyncio.TimerHandle:
        armed.append(delay)
        return call_later(delay, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", counted)
    tasks = [asyncio.ensure_future(calls.ask("s", b"", 60.0 + number)) for number in range(500)]
    await asyncio.sleep(0)
    for place in range(500):
        server.answer(b"", place)
    await asyncio.gather(*tasks)
    assert len(armed) == 1


async def test_without_a_connection_a_call_is_unknown_at_once(server: PlayedServer, calls: Calls) -> None:
    server.is_connected = False
    with pytest.raises(JetStreamUnknownError, match="s: not connected"):
        await calls.ask("s", b"", 60.0)
    assert calls.in_flight == 0


async def test_a_lost_connection_ends_all_that_waits_and_the_next_call_works(
    server: PlayedServer, calls: Calls
) -> None:
    tasks = [asyncio.ensure_future(calls.ask("s", b"", 60.0)) for _ in range(3)]
    await asked(server, 3)
    calls.fail_all("the connection was lost")
    assert [str(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [
        "s: the connection was lost"
    ] * 3
    again = asyncio.ensure_future(calls.ask("s", b"", 60.0))
    await asked(server, 4)
    server.answer(b"")
    assert await again == b""


async def test_a_cancelled_call_leaves_nothing_behind(server: PlayedServer, calls: Calls) -> None:
    task = asyncio.ensure_future(calls.ask("s", b"", 60.0))
    await asked(server, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls.in_flight == 0
    server.answer(b"late")


async def test_a_call_that_is_failed_and_cancelled_at_once_leaves_no_unread_error(
    server: PlayedServer, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    task = asyncio.ensure_future(calls.ask("s", b"", 60.0))
    await asked(server, 1)
    calls.fail_all("lost")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    assert caplog.records == []


async def test_closing_ends_what_waits_and_refuses_what_comes(server: PlayedServer, calls: Calls) -> None:
    task = asyncio.ensure_future(calls.ask("s", b"", 60.0))
    await asked(server, 1)
    await calls.close()
    await calls.close()
    with pytest.raises(JetStreamUnknownError, match="s: closed"):
        await task
    with pytest.raises(JetStreamUnknownError, match="closed"):
        await calls.ask("s", b"", 60.0)
    assert len(server.published) == 1
