"""The life of a bus: whoever starts, drains or closes it, in whatever order, as often as they like."""

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import BlockingBus, BlockingContext, Bus, BusStateError, CallNext, Err, Ok, Outgoing, Request, Result
from catga_bus.testing import broker_of, eventually
from catga_bus.transport.nats_connection import NatsConnection, State
from tests.servers import NatsServer


class Wait(Request[str]):
    pass


class Stop(Request[str]):
    pass


class Fork(Request[str]):
    pass


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


class Shop(Bus):
    """A bus whose one handler waits for `gate`."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__("shop", url=url, **options)
        self.gate = asyncio.Event()
        self.handler(self.wait)

    async def wait(self, request: Wait) -> str:
        await self.gate.wait()
        return "done"


def is_anybody_there(url: str) -> bool:
    try:
        return broker_of(url).has_links()
    except Exception:
        return False


# -- starting ----------------------------------------------------------------------------------------------


async def slow_start(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Task[None], asyncio.Event]:
    """Start a bus that waits, connected, for an event."""
    go = asyncio.Event()
    arrived = asyncio.Event()
    connect = bus._connect

    async def slowly() -> Any:
        transport = await connect()
        arrived.set()
        await go.wait()
        return transport

    monkeypatch.setattr(bus, "_connect", slowly)
    start = asyncio.create_task(bus.start())
    await arrived.wait()
    return start, go


async def test_closing_while_it_starts_ends_the_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Shop(url)
    start, _ = await slow_start(bus, monkeypatch)
    await bus.close()
    with pytest.raises(BusStateError, match="was closed while it started"):
        await start
    assert not is_anybody_there(url)
    assert "closed" in repr(bus)


async def test_draining_while_it_starts_waits_for_the_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Shop(url)
    start, go = await slow_start(bus, monkeypatch)
    drain = asyncio.create_task(bus.drain())
    await eventually(lambda: bus._draining)
    assert not drain.done()
    go.set()
    await drain
    await start
    assert not is_anybody_there(url)


async def test_draining_while_a_start_fails_ends_with_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Shop(url)
    monkeypatch.setattr("catga_bus.bus.Node", lambda *_, **__: 1 / 0)
    start, go = await slow_start(bus, monkeypatch)
    drain = asyncio.create_task(bus.drain())
    await eventually(lambda: bus._draining)
    go.set()
    await drain
    with pytest.raises(ZeroDivisionError):
        await start
    assert not is_anybody_there(url)


async def test_a_cancelled_start_leaves_nothing_behind(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Shop(url)
    start, _ = await slow_start(bus, monkeypatch)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not is_anybody_there(url)
    with pytest.raises(BusStateError, match="starts once"):
        await bus.start()


@pytest.mark.nats
async def test_closing_while_it_connects_to_a_server_leaves_no_connection(nats_server: NatsServer) -> None:
    for turns in range(12):  # each finds the start somewhere else
        bus = Shop(nats_server.url)
        start = asyncio.create_task(bus.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        if bus._starting is None:
            await start
        await bus.close()
        await asyncio.gather(start, return_exceptions=True)
        assert bus._node is None
        assert bus._transport is None or not bus._transport.is_connected


@pytest.mark.nats
@pytest.mark.parametrize("scheme", ["nats", "embedded"])
async def test_a_start_that_fails_late_closes_what_it_opened(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("catga_bus.bus.Node", lambda *_, **__: 1 / 0)
    bus = Shop(nats_server.url if scheme == "nats" else "embedded://")
    with pytest.raises(ZeroDivisionError):
        await bus.start()
    assert bus._transport is not None
    assert not bus._transport.is_connected
    if bus._server is not None:
        pid = bus._server.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    del bus
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, NatsConnection) and one.state is not State.ENDED]


# -- draining and closing ----------------------------------------------------------------------------------


async def test_a_second_drain_waits_for_the_first_and_cancels_nothing(url: str) -> None:
    async with Bus("client", url=url) as client:
        bus = Shop(url)
        await bus.start()
        call = asyncio.create_task(client.send(Wait()))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        drains = [asyncio.create_task(bus.drain()) for _ in range(3)]
        await eventually(lambda: "draining" in repr(bus))
        drains[0].cancel()
        await asyncio.wait(drains[:1])
        assert not any(drain.done() for drain in drains[1:])
        bus.gate.set()
        await asyncio.gather(*drains[1:])
        assert await call == Ok("done")


async def test_leaving_the_context_closes_even_when_the_drain_is_cancelled(url: str) -> None:
    bus, leave = Shop(url, drain_timeout=3_600), asyncio.Event()

    async def main() -> None:
        async with bus:
            await leave.wait()

    async with Bus("client", url=url) as client:
        task = asyncio.create_task(main())
        await eventually(lambda: "started" in repr(bus))
        call = asyncio.create_task(client.send(Wait()))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        leave.set()
        await eventually(lambda: "draining" in repr(bus))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bus._transport is not None
        assert not bus._transport.is_connected
        await call


async def test_a_start_that_ends_as_the_bus_is_closed_does_not_bring_it_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = Shop(url)
    start, go = await slow_start(bus, monkeypatch)
    close: list[asyncio.Task[None]] = []

    async def last_step() -> None:
        close.append(bus._begin_close())  # asked for before the start's last line, heard after it

    monkeypatch.setattr("catga_bus.node.Node.warn_of_capture", lambda _: last_step())
    go.set()
    with pytest.raises(BusStateError, match="was closed while it started"):
        await start
    await close[0]
    assert "closed" in repr(bus)
    await bus.drain()
    assert not is_anybody_there(url)


async def test_closing_ends_a_drain(url: str) -> None:
    async with Bus("client", url=url) as client:
        bus = Shop(url, drain_timeout=3_600)
        await bus.start()
        call = asyncio.create_task(client.send(Wait()))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        drain = asyncio.create_task(bus.drain())
        await eventually(lambda: "draining" in repr(bus))
        await bus.close()
        await drain
        assert isinstance(await call, Err)


async def test_a_second_close_waits_for_the_first(url: str) -> None:
    bus = Shop(url)
    await bus.start()
    first = asyncio.create_task(bus.close())
    await asyncio.sleep(0)
    await bus.close()
    assert not is_anybody_there(url)
    await first


async def test_a_cancelled_close_goes_on(url: str) -> None:
    released = asyncio.Event()
    bus = Bus("shop", url=url)

    @bus.handler
    async def wait(request: Wait) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await released.wait()
        return ""

    async with Bus("client", url=url) as client:
        await bus.start()
        assert bus._node is not None
        transport = bus._node.transport
        call = asyncio.create_task(client.send(Wait(), timeout=0.5))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        close = asyncio.create_task(bus.close())
        await eventually(lambda: "closed" in repr(bus))
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        assert transport.is_connected
        released.set()
        await bus.close()
        assert not transport.is_connected
        await call


async def test_a_handler_may_close_its_bus_and_is_cancelled_by_it(url: str) -> None:
    bus = Shop(url)
    cancelled = asyncio.Event()

    @bus.handler
    async def stop(request: Stop) -> str:
        try:
            await bus.close()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ""

    async with Bus("client", url=url) as client:
        await bus.start()
        result = await client.send(Stop(), timeout=5)
        assert isinstance(result, Err)
        await asyncio.wait_for(cancelled.wait(), 5)
        await bus.close()
        assert "closed" in repr(bus)
        late = await client.send(Wait(), timeout=0.05)
        assert isinstance(late, Err)
        assert late.code == "NO_HANDLER"


@pytest.mark.parametrize("suspends", [False, True])
async def test_a_handler_that_drains_its_bus_is_told_that_it_would_wait_for_itself(url: str, suspends: bool) -> None:
    bus = Shop(url)

    @bus.handler
    async def stop(request: Stop) -> str:
        if suspends:
            await asyncio.sleep(0)
        with pytest.raises(BusStateError, match=r"create_task\(bus\.drain\(\)\)"):
            await bus.drain()
        return "told"

    async with bus, Bus("client", url=url) as client:
        assert await client.send(Stop()) == Ok("told")


async def test_a_handler_may_leave_the_drain_to_a_task(url: str) -> None:
    bus, drains = Shop(url), []

    @bus.handler
    async def stop(request: Stop) -> str:
        drains.append(asyncio.create_task(bus.drain()))
        return "draining"

    async with Bus("client", url=url) as client:
        await bus.start()
        assert await client.send(Stop()) == Ok("draining")
        await drains[0]
        assert "closed" in repr(bus)


async def test_whoever_waits_for_a_connection_ends_with_the_bus(url: str) -> None:
    bus = Bus("client", url=url)
    async with Bus("other", url=url):
        await bus.start()
        broker_of(url).cut()
        await eventually(lambda: not bus._connection.up.is_set())
        call = asyncio.create_task(bus.send(Wait(), node="nobody", timeout=3_600))
        await asyncio.sleep(0)
        await bus.close()
        result = await call
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("DISCONNECTED", "not_run")
        broker_of(url).heal()


async def test_a_bus_that_was_never_started_can_be_closed_and_not_started_then(url: str) -> None:
    for end in ("close", "drain"):
        bus = Shop(url)
        await getattr(bus, end)()
        await getattr(bus, end)()
        with pytest.raises(BusStateError, match="starts once"):
            await bus.start()


# -- running -----------------------------------------------------------------------------------------------


@pytest.fixture
def own_handlers() -> Iterator[dict[int, Callable[..., None]]]:
    """Handlers of the program's own, which a bus puts back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    own: dict[int, Callable[..., None]] = {number: lambda *_: None for number in before}
    for number, handler in own.items():
        signal.signal(number, handler)
    yield own
    for number, previous in before.items():
        signal.signal(number, previous)


@pytest.mark.parametrize("end", ["close", "drain"])
async def test_run_ends_when_somebody_else_ends_the_bus(url: str, end: str) -> None:
    bus = Shop(url)
    run = asyncio.create_task(bus.run())
    await eventually(lambda: "started" in repr(bus))
    await getattr(bus, end)()
    assert await asyncio.wait_for(run, 5) is True


async def test_run_ends_when_the_bus_is_closed_while_it_starts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Shop(url)
    arrived = asyncio.Event()

    async def never() -> Any:
        arrived.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(bus, "_connect", never)
    run = asyncio.create_task(bus.run())
    await arrived.wait()
    await bus.close()
    assert await asyncio.wait_for(run, 5) is True
    with pytest.raises(BusStateError, match="starts once"):
        await bus.run()


async def test_run_says_that_a_close_cut_something_off(url: str) -> None:
    bus = Shop(url)
    async with Bus("client", url=url) as client:
        run = asyncio.create_task(bus.run())
        await eventually(lambda: "started" in repr(bus))
        call = asyncio.create_task(client.send(Wait(), timeout=5))
        await eventually(lambda: bus.statistics().handlers.running == 1)
        await bus.close()
        assert await asyncio.wait_for(run, 5) is False
        await call


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_run_puts_the_handlers_of_signals_back(
    url: str, own_handlers: dict[int, Callable[..., None]], loop: str
) -> None:
    async def main() -> bool:
        bus = Shop(url)
        run = asyncio.create_task(bus.run())
        await eventually(lambda: "started" in repr(bus))
        os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(run, 5)

    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(main()) is True
    for number, handler in own_handlers.items():
        assert signal.getsignal(number) is handler


async def test_buses_that_run_together_all_hear_a_signal_and_end_in_any_order(
    url: str, own_handlers: dict[int, Callable[..., None]]
) -> None:
    buses = [Shop(url), Shop(url), Shop(url)]
    runs = [asyncio.create_task(bus.run()) for bus in buses]
    await eventually(lambda: all("started" in repr(bus) for bus in buses))
    await buses[0].drain()
    assert await runs[0] is True
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(asyncio.gather(*runs[1:]), 5) == [True, True]
    for number, handler in own_handlers.items():
        assert signal.getsignal(number) is handler


async def test_run_works_without_signals_in_a_thread(url: str) -> None:
    bus = Shop(url)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> bool:
        loops.append(asyncio.get_running_loop())
        return await bus.run()

    run = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(main())))
    await eventually(lambda: "started" in repr(bus))
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(bus.drain(), loops[0]))
    assert await asyncio.wait_for(run, 5) is True


# -- forks and threads -------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def say(told: Any, call: Callable[[], Any]) -> None:
    """Tell the parent what a call in its fork came to; a call that hangs ends the fork."""
    signal.alarm(20)
    try:
        told.put(str(call()))
    except BaseException as error:
        told.put(f"{type(error).__name__}: {error}")


def in_a_fork(call: Callable[[], Any]) -> str:
    told = FORK.SimpleQueue()
    child = FORK.Process(target=say, args=(told, call))
    child.start()
    child.join()
    try:
        assert child.exitcode == 0
        return str(told.get())
    finally:
        told.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("use", ["send", "drain", "statistics"])
def test_a_blocking_bus_used_after_a_fork_says_so(url: str, use: str) -> None:
    with BlockingBus("client", url=url) as bus:
        call = getattr(bus, use)
        text = in_a_fork(lambda: call(Wait(), timeout=0.1) if use == "send" else call())
        assert text.startswith("BusStateError")
        assert f"was started in process {os.getpid()}" in text
        assert isinstance(bus.send(Wait(), timeout=0.05), Err)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_blocking_context_used_after_a_fork_says_so(url: str) -> None:
    bus = BlockingBus("shop", url=url)

    @bus.bus.handler
    def fork(request: Fork, ctx: BlockingContext) -> str:
        return in_a_fork(lambda: ctx.send(Wait(), timeout=0.1))

    with bus:
        text = bus.send(Fork(), timeout=30).unwrap()
    assert text.startswith("BusStateError")
    assert f"belongs to process {os.getpid()}" in text


@pytest.mark.nats
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
async def test_closing_in_a_fork_leaves_the_connection_to_the_parent(nats_server: NatsServer) -> None:
    async with Shop(nats_server.url) as bus, Bus("client", url=nats_server.url) as client:
        bus.gate.set()
        assert await client.send(Wait()) == Ok("done")
        assert bus._node is not None
        socket_before = bus._node.transport._connection._socket  # type: ignore[attr-defined]

        def close() -> str:
            asyncio.run(bus.close())
            asyncio.run(bus.drain())
            return repr(bus)

        text = in_a_fork(close)
        assert text.endswith("closed>")
        await bus._node.transport.flush()
        assert await client.send(Wait()) == Ok("done")
        assert bus._node.transport._connection._socket is socket_before  # type: ignore[attr-defined]
        assert bus.statistics().reconnects == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_bus_made_before_a_fork_draws_an_id_in_each_process(url: str) -> None:
    drawn, given = Shop(url), Shop(url, node_id="shop-1")

    def start(bus: Bus) -> str:
        async def main() -> str:
            async with bus:
                return bus.node_id

        return asyncio.run(main())

    before = drawn.node_id
    ids = {in_a_fork(lambda: start(drawn)) for _ in range(2)}
    assert len(ids | {before}) == 3
    assert in_a_fork(lambda: start(given)) == "shop-1"
    assert start(drawn) == before


def test_two_threads_that_start_a_blocking_bus_start_it_once(url: str) -> None:
    for _ in range(20):
        bus = BlockingBus("client", url=url)
        barrier, errors = threading.Barrier(2), []

        def start(bus: BlockingBus = bus, barrier: threading.Barrier = barrier, errors: list[str] = errors) -> None:
            barrier.wait()
            try:
                bus.start()
            except BusStateError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(errors) == 1
        assert "starts once" in errors[0]
        assert bus.statistics().reconnects == 0
        drains = [threading.Thread(target=bus.drain) for _ in range(2)]
        for thread in drains:
            thread.start()
        for thread in drains:
            thread.join(10)
        assert not any(thread.name == "catga-loop" for thread in threading.enumerate())


def test_calls_that_meet_the_end_of_a_blocking_bus_all_end(url: str) -> None:
    bus = BlockingBus("client", url=url)
    bus.start()
    ends: list[str] = []

    def call() -> None:
        while True:
            try:
                bus.send(Wait(), timeout=5)
            except BusStateError as error:
                ends.append(str(error))
                return

    threads = [threading.Thread(target=call, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    bus.drain()
    for thread in threads:
        thread.join(10)
    assert len(ends) == 8


# -- deadlines ---------------------------------------------------------------------------------------------


async def test_the_time_of_outbound_middleware_counts(url: str) -> None:
    client, left, now = Bus("client", url=url), [], 100.0
    client._clock = lambda: now

    @client.middleware(side="outbound")
    async def slow(message: Any, ctx: Outgoing, call_next: CallNext) -> Result:
        nonlocal now
        now += 2.0
        return await call_next(message)

    async with client:
        assert client._node is not None
        call = client._node.call

        def noting(*args: Any) -> Any:
            left.append(args[2])
            return call(*args)

        client._node.call = noting  # type: ignore[method-assign]
        late = await client.send(Wait(), timeout=1.5)
        assert isinstance(late, Err)
        assert (late.code, late.outcome, late.retryable, late.attempts) == ("TIMEOUT", "not_run", True, 0)
        assert left == []
        sent = asyncio.create_task(client.send(Wait(), timeout=5.0))
        await eventually(lambda: left)
        assert left == [pytest.approx(3.0)]
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)
