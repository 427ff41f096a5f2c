"""The links that are made bad, over real sockets: what passes, what does not, and what happens when they heal."""

import asyncio
import errno
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import eventually
from tests.chaos import netns
from tests.chaos.netns import Namespace
from tests.chaos.proxy import Direction, Proxy

QUIET = 0.1
# Seconds after which what has not arrived over loopback is taken not to come.

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[Proxy], Awaitable[Pair]]


class Echo:
    """A server that sends back what it gets, and counts it."""

    def __init__(self) -> None:
        self.got = b""
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while data := await reader.read(4096):
                self.got += data
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, tuple[str, int]]]:
    one = Echo()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    yield one, server.sockets[0].getsockname()
    server.close()
    for writer in one.writers:
        writer.transport.abort()


@pytest.fixture
async def proxy(echo: tuple[Echo, tuple[str, int]]) -> AsyncIterator[Proxy]:
    one = Proxy(echo[1])
    await one.start()
    yield one
    await one.close()
    assert one.connections == 0


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    pairs: list[Pair] = []

    async def one(proxy: Proxy) -> Pair:
        host, _, port = proxy.address.rpartition(":")
        pairs.append(await asyncio.open_connection(host, int(port)))
        return pairs[-1]

    yield one
    for _, writer in pairs:
        writer.transport.abort()
    await asyncio.gather(*(writer.wait_closed() for _, writer in pairs), return_exceptions=True)


async def ask(pair: Pair, data: bytes) -> bytes:
    reader, writer = pair
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 5)


async def is_silent(pair: Pair) -> bool:
    try:
        await asyncio.wait_for(pair[0].read(1), QUIET)
    except TimeoutError:
        return True
    return False


async def is_reset(pair: Pair) -> bool:
    try:
        return await asyncio.wait_for(pair[0].read(1), 5) == b""
    except ConnectionError:
        return True


async def test_a_good_link_passes_everything_both_ways(proxy: Proxy, connect: Connect) -> None:
    pair = await connect(proxy)
    data = bytes(range(256)) * 4_000
    assert await ask(pair, data) == data
    pair[1].close()
    await eventually(lambda: proxy.connections == 0)


async def test_the_end_of_the_server_reaches_the_client(
    proxy: Proxy, echo: tuple[Echo, tuple[str, int]], connect: Connect
) -> None:
    pair = await connect(proxy)
    await ask(pair, b"a")
    echo[0].writers[0].close()
    assert await is_reset(pair)


async def test_a_delay_comes_on_top_in_each_direction_and_does_not_add_up(proxy: Proxy, connect: Connect) -> None:
    pair = await connect(proxy)
    proxy.delay = 0.1
    began = monotonic()
    for data in (b"a", b"b", b"c"):
        pair[1].write(data)
        await asyncio.sleep(0.01)
    assert await asyncio.wait_for(pair[0].readexactly(3), 5) == b"abc"
    assert 0.2 <= monotonic() - began < 2.0
    proxy.heal()
    assert await ask(pair, b"d") == b"d"


async def test_a_bandwidth_bounds_the_rate(proxy: Proxy, connect: Connect) -> None:
    pair = await connect(proxy)
    proxy.bandwidth = 100_000.0
    began = monotonic()
    await ask(pair, bytes(20_000))
    assert monotonic() - began >= 0.2


async def test_a_cut_link_resets_connections_and_new_ones_until_it_heals(proxy: Proxy, connect: Connect) -> None:
    pair = await connect(proxy)
    await ask(pair, b"a")
    proxy.cut()
    assert await is_reset(pair)
    assert await is_reset(await connect(proxy))
    proxy.heal()
    assert await ask(await connect(proxy), b"b") == b"b"


async def test_a_half_open_link_loses_everything_and_stays_open_and_is_reset_when_it_heals(
    proxy: Proxy, echo: tuple[Echo, tuple[str, int]], connect: Connect
) -> None:
    pair = await connect(proxy)
    await ask(pair, b"a")
    proxy.half_open()
    pair[1].write(b"lost")
    assert await is_silent(pair)
    echo[0].writers[0].close()  # not even the end is told
    assert await is_silent(pair)
    assert echo[0].got == b"a"
    proxy.heal()
    assert await is_reset(pair)
    assert await ask(await connect(proxy), b"b") == b"b"


async def test_upwards_one_way_loss_holds_what_is_sent_and_then_goes_on(
    proxy: Proxy, echo: tuple[Echo, tuple[str, int]], connect: Connect
) -> None:
    pair = await connect(proxy)
    await ask(pair, b"a")
    proxy.hold(Direction.UP)
    pair[1].write(b"b")
    assert await is_silent(pair)
    assert echo[0].got == b"a"
    echo[0].writers[0].write(b"!")
    assert await asyncio.wait_for(pair[0].readexactly(1), 5) == b"!"
    proxy.heal()
    assert await asyncio.wait_for(pair[0].readexactly(1), 5) == b"b"


async def test_downwards_one_way_loss_holds_answers_and_then_goes_on(
    proxy: Proxy, echo: tuple[Echo, tuple[str, int]], connect: Connect
) -> None:
    pair = await connect(proxy)
    proxy.hold(Direction.DOWN)
    pair[1].write(b"b")
    await eventually(lambda: echo[0].got == b"b")
    assert await is_silent(pair)
    proxy.heal()
    assert await asyncio.wait_for(pair[0].readexactly(1), 5) == b"b"


async def test_a_held_direction_holds_its_sender_back(proxy: Proxy, connect: Connect) -> None:
    pair = await connect(proxy)
    proxy.hold(Direction.UP)
    pair[1].write(bytes(64_000_000))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pair[1].drain(), 0.3)


async def test_a_server_that_is_down_resets_the_client(echo: tuple[Echo, tuple[str, int]], connect: Connect) -> None:
    proxy = Proxy(("127.0.0.1", 1))
    await proxy.start()
    assert await is_reset(await connect(proxy))
    await proxy.close()


async def test_what_becomes_of_the_bytes_is_counted(
    proxy: Proxy, echo: tuple[Echo, tuple[str, int]], connect: Connect
) -> None:
    def hits() -> dict[str, int]:
        return {fate: count for fate, count in proxy.hits.items() if count}

    async def becomes(expected: dict[str, int]) -> None:
        await eventually(lambda: hits() == expected, what=f"{hits()} becomes {expected}")
        proxy.hits.clear()

    pair = await connect(proxy)
    await ask(pair, b"abc")
    await becomes({"passed up": 3, "passed down": 3})
    proxy.delay = 0.01
    await ask(pair, b"abc")
    await becomes({"delayed up": 3, "passed up": 3, "delayed down": 3, "passed down": 3})
    proxy.heal()
    proxy.hold(Direction.UP)
    pair[1].write(b"up")
    echo[0].writers[0].write(b"down")
    await becomes({"held up": 2, "passed down": 4})
    proxy.heal()
    await becomes({"passed up": 2, "passed down": 2})
    proxy.half_open()
    pair[1].write(b"lost")
    await becomes({"lost up": 4})
    proxy.heal()
    await eventually(lambda: proxy.connections == 0)
    other = await connect(proxy)
    await ask(other, b"x")
    proxy.hits.clear()
    proxy.cut()
    assert await is_reset(other)
    assert await is_reset(await connect(proxy))
    await becomes({"reset": 1, "refused": 1})


# -- networks of their own ---------------------------------------------------------------------------------


def reaches(space: Namespace, within: float = 20.0) -> bool:
    """Whether the inside gets anything to this machine and back: a refusal is an answer."""
    program = f"import socket; s = socket.socket(); s.settimeout({within}); print(s.connect_ex(('{space.host}', 1)))"
    command = [*space.prefix, sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == errno.ECONNREFUSED


@pytest.fixture
def space() -> Namespace:
    if reason := netns.why_not():
        pytest.skip(reason)
    return Namespace()


def test_an_unplugged_network_reaches_nobody_until_it_is_plugged_in(space: Namespace) -> None:
    with space:
        assert reaches(space)
        assert not space.is_unplugged
        space.unplug()
        assert space.is_unplugged
        assert not reaches(space, within=0.3)
        space.plug()
        assert reaches(space)


def test_a_deaf_server_is_not_reached(space: Namespace) -> None:
    with space:
        with space.deaf_server():
            assert not reaches(space, within=0.3)
        assert reaches(space)


def test_nothing_is_left_of_a_network(space: Namespace) -> None:
    def interfaces() -> set[str]:
        return set(subprocess.run(["ls", "/sys/class/net"], capture_output=True, text=True, check=True).stdout.split())

    before = interfaces()
    with space:
        assert len(interfaces() - before) == 1
    assert interfaces() == before
