"""What may happen at any moment of a connection's life: cancelled, closed, lost, lied to."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Self

import psutil
import pytest

from catga_bus.errors import BusStateError, DisconnectedError
from catga_bus.testing import Received, RecordedEvents, eventually
from catga_bus.transport.nats_core import NatsTransport
from tests.servers import Certificates, NatsServer, start_cluster

pytestmark = pytest.mark.nats

Make = Callable[..., tuple[NatsTransport, RecordedEvents]]
Start = Callable[..., NatsServer]
Script = Callable[["Peer"], Awaitable[None]]

INFO = b'INFO {"headers":true,"max_payload":1048576}\r\n'
MESSAGE = b"MSG a.b 1 6\r\nforged\r\n"


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, text: bytes) -> None:
        self._writer.write(text)

    async def wait_for(self, word: bytes) -> None:
        while not (await self._reader.readline()).startswith(word):
            if self._reader.at_eof():
                raise ConnectionResetError

    async def welcome(self) -> None:
        """Do what a server does until a client is let in."""
        self.say(INFO)
        await self.wait_for(b"PING")
        self.say(b"PONG\r\n")

    async def serve(self) -> None:
        """Answer pings until the client leaves."""
        while True:
            await self.wait_for(b"PING")
            self.say(b"PONG\r\n")

    async def hear_out(self) -> None:
        await self._reader.read()

    async def leave(self) -> None:
        """Hang up; what was said still arrives."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def well(peer: Peer) -> None:
    await peer.welcome()
    await peer.serve()


class Scripted:
    """A server that follows one script per connection, the last one for all further ones."""

    def __init__(self, *scripts: Script) -> None:
        self.peers: list[Peer] = []
        self._scripts = scripts
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self._scripts[min(len(self.peers), len(self._scripts) - 1)]
        peer = Peer(reader, writer)
        self.peers.append(peer)
        task = asyncio.get_running_loop().create_task(self._follow(script, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, script: Script, peer: Peer) -> None:
        try:
            with contextlib.suppress(OSError):
                await script(peer)
        finally:
            await peer.leave()


async def hears(transport: NatsTransport, subject: str = "a.b") -> Received:
    received = Received()
    await transport.subscribe(subject, received)
    await transport.flush()
    return received


def sockets() -> set[int]:
    gc.collect()
    return {connection.fd for connection in psutil.Process().net_connections("tcp")}


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Check that no task and no socket is there that was not there before."""
    before, tasks = sockets(), asyncio.all_tasks()
    yield
    await eventually(lambda: asyncio.all_tasks() <= tasks, what="no task is left")
    await eventually(lambda: sockets() <= before, what="no socket is left")


def moments() -> Iterator[float]:
    """Yield pauses, in seconds, that grow from nothing to longer than a hand-shake, and go on."""
    yield from (0.0,) * 3
    pause = 0.0001
    while True:
        yield pause
        pause *= 1.15


@pytest.fixture(params=["plain", "tls"])
def any_server(
    request: pytest.FixtureRequest, start_server: Start, certificates: Certificates
) -> tuple[str, dict[str, str]]:
    """A server's address, and what it takes to trust it."""
    if request.param == "plain":
        return start_server().url, {}
    return start_server(certificates.config()).url, {"tls_ca": certificates.ca}


# Opening, at any moment.


async def test_a_connect_may_be_cancelled_at_any_moment(
    make_transport: Make, any_server: tuple[str, dict[str, str]]
) -> None:
    url, trust = any_server
    async with nothing_left():
        for pause in moments():
            transport, events = make_transport(url, connect_timeout=60, **trust)
            connecting = asyncio.ensure_future(transport.connect())
            await asyncio.sleep(pause)
            if connecting.done():
                await transport.close()
                break
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            assert not transport.is_connected
            assert events.disconnected == []
            await transport.close()


async def test_a_connect_may_be_closed_at_any_moment(
    make_transport: Make, any_server: tuple[str, dict[str, str]]
) -> None:
    url, trust = any_server
    async with nothing_left():
        for pause in moments():
            transport, events = make_transport(url, connect_timeout=60, **trust)
            connecting = asyncio.ensure_future(transport.connect())
            await asyncio.sleep(pause)
            is_over = connecting.done()
            await asyncio.wait_for(transport.close(), 4)
            if is_over:
                await connecting
                break
            with pytest.raises(BusStateError, match="closed"):
                await asyncio.wait_for(connecting, 4)
            assert not transport.is_connected
            assert events.disconnected == []


async def test_a_cancelled_connect_may_be_tried_again(make_transport: Make, nats_server: NatsServer) -> None:
    transport, _ = make_transport(nats_server.url)
    connecting = asyncio.ensure_future(transport.connect())
    await asyncio.sleep(0)
    connecting.cancel()
    await asyncio.gather(connecting, return_exceptions=True)
    await transport.connect()
    await transport.flush()
    with pytest.raises(BusStateError):
        await transport.connect()


async def test_what_was_closed_before_it_was_connected_stays_closed(make_transport: Make) -> None:
    transport, _ = make_transport("nats://127.0.0.1:1")
    await transport.close()
    with pytest.raises(BusStateError):
        await transport.connect()
    with pytest.raises(DisconnectedError):
        await transport.subscribe("a", Received())


# A server that goes away, at any moment of the hand-shake.


async def say_nothing(peer: Peer) -> None:
    del peer


async def go_after_info(peer: Peer) -> None:
    peer.say(INFO)


async def go_after_half_an_info(peer: Peer) -> None:
    peer.say(INFO[:10])


async def go_after_connect(peer: Peer) -> None:
    peer.say(INFO)
    await peer.wait_for(b"CONNECT")


async def go_after_the_pong(peer: Peer) -> None:
    await peer.welcome()


async def go_with_an_error_after_the_pong(peer: Peer) -> None:
    await peer.welcome()
    peer.say(b"-ERR 'Maximum Connections Exceeded'\r\n")


GOING = (
    say_nothing,
    go_after_info,
    go_after_half_an_info,
    go_after_connect,
    go_after_the_pong,
    go_with_an_error_after_the_pong,
)


@pytest.mark.parametrize("script", GOING)
async def test_a_server_may_go_away_at_any_moment_of_the_first_hand_shake(make_transport: Make, script: Script) -> None:
    async with Scripted(script, script, well) as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        # Where it went right after it had let us in, that may have counted as a connection that was lost.
        await eventually(lambda: transport.is_connected and len(server.peers) == 3)
        await transport.flush()
        assert len(events.disconnected) == len(events.reconnected) <= 2


async def test_a_server_may_go_away_at_any_moment_of_a_later_hand_shake(make_transport: Make) -> None:
    async def welcome_and_hang_up(peer: Peer) -> None:
        await peer.welcome()
        await peer.wait_for(b"UNSUB")

    async with Scripted(welcome_and_hang_up, *GOING, well) as server:
        transport, events = make_transport(server.url, reconnect_delay=0.01)
        await transport.connect()
        received = Received()
        await transport.subscribe("a.b", received)
        await (await transport.subscribe("c", Received())).close()  # the sign to hang up
        await eventually(lambda: len(events.reconnected) == 1, 30)
        assert (len(events.disconnected), len(server.peers)) == (1, 2 + len(GOING))
        server.peers[-1].say(b"MSG a.b 1 5\r\nhello\r\n")
        await received.wait(1)


async def test_a_reconnect_is_told_when_the_interests_are_in_force(make_transport: Make) -> None:
    has_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.wait_for(b"PING")
        peer.say(b"PONG\r\n")

    async def takes_no_interest(peer: Peer) -> None:
        await peer.welcome()
        await peer.wait_for(b"SUB a.b")
        await peer.wait_for(b"PING")

    async def hesitates(peer: Peer) -> None:
        await peer.welcome()
        await peer.wait_for(b"SUB a.b")
        await peer.wait_for(b"PING")
        has_asked.set()
        await may_answer.wait()
        peer.say(b"PONG\r\n")
        await peer.serve()

    async with Scripted(first, takes_no_interest, hesitates) as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        await hears(transport)
        await asyncio.wait_for(has_asked.wait(), 5)
        assert transport.is_connected
        assert (len(events.disconnected), events.reconnected) == (1, []), "a loss before it was told is not told"
        may_answer.set()
        await eventually(lambda: events.reconnected == [server.url])
        assert len(events.disconnected) == 1


# A server, or somebody in between, that says too much too early.


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda peer: early(peer, INFO + MESSAGE, b""), id="with INFO"),
        pytest.param(lambda peer: early(peer, INFO, MESSAGE), id="before the PONG"),
        pytest.param(lambda peer: early(peer, INFO, b"PONG\r\n" + MESSAGE), id="with the PONG"),
        pytest.param(lambda peer: early(peer, INFO + b"PONG\r\n" + MESSAGE, b""), id="with a PONG for no PING"),
        pytest.param(lambda peer: early(peer, MESSAGE, b""), id="instead of INFO"),
    ],
)
async def test_a_message_reaches_no_sink_before_the_hand_shake_is_over(make_transport: Make, script: Script) -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.wait_for(b"PING")
        peer.say(b"PONG\r\n")

    async with Scripted(first, script, well) as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        received = await hears(transport)
        await eventually(lambda: events.reconnected)
        assert len(server.peers) == 3
        assert received.messages == []


async def early(peer: Peer, at_once: bytes, after_connect: bytes) -> None:
    peer.say(at_once)
    await peer.wait_for(b"PING")
    peer.say(after_connect)
    await peer.hear_out()


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (b"MSG a.b 1 1000\r\nforged", "in the clear"),
        (b"INF", "in the clear"),
        (MESSAGE, "before the hand-shake"),
        (b"PONG\r\n", "PONG before"),
    ],
)
async def test_nothing_in_the_clear_is_taken_for_what_comes_encrypted(
    make_transport: Make, certificates: Certificates, extra: bytes, why: str
) -> None:
    async def script(peer: Peer) -> None:
        peer.say(b'INFO {"tls_required":true}\r\n' + extra)
        await peer.hear_out()

    async with Scripted(script) as server:
        transport, _ = make_transport(server.url, tls_ca=certificates.ca, connect_timeout=0.3)
        with pytest.raises(DisconnectedError, match=why):
            await transport.connect()


async def test_an_info_that_comes_with_the_pong_counts(make_transport: Make) -> None:
    async def script(peer: Peer) -> None:
        peer.say(INFO)
        await peer.wait_for(b"PING")
        peer.say(b'PONG\r\nINFO {"max_payload":1000}\r\n')
        await peer.serve()

    async with Scripted(script) as server:
        transport, _ = make_transport(server.url)
        await transport.connect()
        assert transport.max_payload == 1_000


async def test_a_server_that_stops_in_the_middle_of_a_message_is_left(make_transport: Make) -> None:
    async def stops(peer: Peer) -> None:
        await peer.welcome()
        await peer.wait_for(b"PING")
        peer.say(b"PONG\r\nMSG a.b 1 6\r\nfor")
        await peer.hear_out()

    async with Scripted(stops, well) as server:
        transport, events = make_transport(server.url, ping_interval=0.1)
        await transport.connect()
        received = await hears(transport)
        await eventually(lambda: events.reconnected)
        server.peers[-1].say(b"MSG a.b 1 5\r\nhello\r\n")
        await received.wait(1)
        assert received.payloads == [b"hello"]


# Real servers.


async def test_the_last_of_three_servers_is_found_from_the_address_of_the_first(
    make_transport: Make, start_server: Start
) -> None:
    servers = start_cluster(start_server, 3)
    transport, events = make_transport(servers[0].url, ping_interval=0.1)
    await transport.connect()
    pool = transport._connection._dialer.pool
    await eventually(lambda: {server.url for server in pool.round()} == {server.url for server in servers}, 20)
    received = await hears(transport)
    for rounds, end in ((1, NatsServer.kill), (2, NatsServer.freeze)):
        (current,) = (server for server in servers if server.url == transport.url)
        end(current)
        await eventually(lambda count=rounds: len(events.reconnected) == count, 20)
        assert transport.url != current.url
        transport.publish("a.b", b"%d" % rounds)
        await received.wait(rounds)
    assert received.payloads == [b"1", b"2"]


async def test_a_limit_that_shrinks_while_we_are_connected_is_survived(
    make_transport: Make, start_server: Start
) -> None:
    server = start_server("max_payload: 100000")
    transport, events = make_transport(server.url)
    await transport.connect()
    received = await hears(transport)
    server.reload("max_payload: 1000")  # the server does not tell its clients
    transport.publish("a.b", bytes(2_000))
    await eventually(lambda: events.reconnected)
    assert transport.max_payload == 1_000
    assert "Maximum Payload Violation" in events.disconnected[0]
    transport.publish("a.b", b"small")
    await received.wait(1)
    assert received.payloads == [b"small"]


async def test_a_frozen_server_with_tls_holds_back_who_waits_and_gets_everything_in_the_end(
    make_transport: Make, start_server: Start, certificates: Certificates
) -> None:
    server = start_server(certificates.config())
    sender, events = make_transport(server.url, tls_ca=certificates.ca, ping_interval=60, write_limit_bytes=65_536)
    receiver, _ = make_transport(server.url, tls_ca=certificates.ca, ping_interval=60)
    await sender.connect()
    await receiver.connect()
    received = await hears(receiver)
    server.freeze()
    sent = 0
    # As much again as it takes to be behind: the kernel takes some more when it has been given some.
    while not sender.is_behind or sent < 128:
        sender.publish("a.b", b"%08d" % sent + bytes(100_000))
        sender.push()
        sent += 1
        await asyncio.sleep(0)
    waiting = asyncio.ensure_future(sender.wait_writable())
    await asyncio.wait([waiting], timeout=0.1)
    assert not waiting.done()
    server.thaw()
    await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(received.wait(sent), 10)
    assert [int(payload[:8]) for payload in received.payloads] == list(range(sent))
    assert events.disconnected == []


# Closing.


async def test_a_close_that_is_cancelled_ends_everything_at_once(make_transport: Make, nats_server: NatsServer) -> None:
    async with nothing_left():
        transport, events = make_transport(nats_server.url, ping_interval=60)
        await transport.connect()
        nats_server.freeze()
        transport.publish("a.b", b"")
        closing = [asyncio.ensure_future(transport.close()) for _ in range(2)]
        await asyncio.sleep(0)
        closing[0].cancel()
        await asyncio.wait(closing, timeout=1)
        assert [task.cancelled() for task in closing] == [True, False]
        assert all(task.done() for task in closing)
        assert not transport.is_connected
        await transport.close()
    assert events.disconnected == []


async def test_what_was_published_before_a_close_arrives(make_transport: Make, nats_server: NatsServer) -> None:
    receiver, _ = make_transport(nats_server.url)
    await receiver.connect()
    received = await hears(receiver)
    sender, _ = make_transport(nats_server.url)
    await sender.connect()
    for number in range(1_000):
        sender.publish("a.b", b"%d" % number + bytes(2_000))
    await asyncio.gather(sender.close(), sender.close())
    await received.wait(1_000)


async def test_a_loop_that_ends_without_a_pause_after_the_close_leaves_nothing(nats_server: NatsServer) -> None:
    async def short_life() -> None:
        from catga_bus.transport.base import ConnectionOptions

        transport = NatsTransport(ConnectionOptions(urls=(nats_server.url,)), RecordedEvents())
        await transport.connect()
        await transport.close()

    before = sockets()
    await asyncio.to_thread(asyncio.run, short_life())
    assert sockets() <= before
