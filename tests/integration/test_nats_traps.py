"""What ends the stock client, or makes it look alive while it is not; and that ours goes on.

Each trap is sprung on both clients at once, on the same server where it can be. A client that hangs is shown by what
it has not done a whole while after ours was back; where it never comes back the while could be any.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from nats.aio.client import Client

from catga_bus.errors import ConfigurationError, DisconnectedError, TooLargeError
from catga_bus.testing import Received, RecordedEvents, eventually
from catga_bus.transport.nats_core import NatsTransport
from tests.credentials import Operator
from tests.fake_nats import FakeNats
from tests.servers import Certificates, NatsServer, free_port

pytestmark = pytest.mark.nats

Make = Callable[..., tuple[NatsTransport, RecordedEvents]]
Start = Callable[..., NatsServer]
Stock = Callable[..., Awaitable[Client]]

PING_INTERVAL = 0.1
A_WHILE = 1.5
# Seconds; ours is back a fifth of it after the server is lost.


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "nats")


@pytest.fixture
async def stock() -> AsyncIterator[Stock]:
    """Connect stock clients, as eager to come back as ours; whatever state they end in, nothing of them is left."""
    clients: list[Client] = []
    before = asyncio.all_tasks()

    async def ignore(_: Exception) -> None:
        pass

    async def connect(*urls: str, **options: Any) -> Client:
        client = Client()
        clients.append(client)
        defaults = {
            "error_cb": ignore,
            "dont_randomize": True,
            "ping_interval": PING_INTERVAL,
            "max_outstanding_pings": 2,
            "reconnect_time_wait": 0.02,
            "connect_timeout": 0.5,
            "max_reconnect_attempts": -1,
        }
        await client.connect(list(urls), **{**defaults, **options})
        return client

    yield connect
    for client in clients:
        client.options["allow_reconnect"] = False
        if client._transport is not None and client._transport._io_writer is not None:
            client._transport._io_writer.transport.abort()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.close(), 1)
    await put_down(lambda: asyncio.all_tasks() - before - {asyncio.current_task()})


async def put_down(tasks: Callable[[], set[asyncio.Task[Any]]]) -> None:
    """End tasks of the stock client; asked more than once, since it loses a cancellation now and then."""
    for _ in range(100):
        left = {task for task in tasks() if not task.done()}
        if not left:
            return
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=0.1)
    raise AssertionError(f"cannot be cancelled: {tasks()}")


async def listens(client: Client, subject: str) -> list[bytes]:
    came: list[bytes] = []

    async def keep(message: Any) -> None:
        came.append(message.data)

    await client.subscribe(subject, cb=keep)
    await client.flush()
    return came


async def hears(transport: NatsTransport, subject: str) -> Received:
    received = Received()
    await transport.subscribe(subject, received)
    await transport.flush()
    return received


async def proves_itself(transport: NatsTransport) -> None:
    """See one message come back."""
    inbox = transport.new_inbox()
    received = await hears(transport, inbox)
    transport.publish(inbox, b"hello")
    await received.wait(1)


STOCK_PROCESS = """
import asyncio, ssl, sys
import nats

async def main(authority, *urls):
    async def ignore(_): pass
    async def lost(): print("lost", flush=True)
    async def back(): print("back", flush=True)
    client = await nats.connect(
        list(urls), dont_randomize=True, ping_interval=0.1, max_outstanding_pings=2, reconnect_time_wait=0.02,
        connect_timeout=0.5, max_reconnect_attempts=-1, error_cb=ignore, disconnected_cb=lost, reconnected_cb=back,
        tls=ssl.create_default_context(cafile=authority) if authority else None,
    )
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if not authority:
        client._transport.write(b"PUB z 10000000\\r\\n" + bytes(10_000_000))
    await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""
# A process of its own, since nothing in it can be relied on to end.


@contextlib.asynccontextmanager
async def stock_process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `STOCK_PROCESS` and wait until it is connected."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STOCK_PROCESS, *arguments, stdin=pipe, stdout=pipe
    )
    try:
        async with asyncio.timeout(20):
            assert (await process.stdout.readline()).strip() == b"connected"
        yield process
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.parametrize("kind", ["plain with unsent data", "TLS"])
async def test_a_frozen_server_is_waited_for_when_it_is_left(
    make_transport: Make, start_server: Start, certificates: Certificates, kind: str
) -> None:
    """Reconnecting waits for the old socket to close in order: 30 s with TLS, for ever with unsent data."""
    authority = certificates.ca if kind == "TLS" else ""
    config = certificates.config() if authority else ""
    frozen, other = start_server(config), start_server(config)
    # Both clients start on the server that will freeze: the other one is not there yet.
    other.stop()
    transport, events = make_transport(frozen.url, other.url, ping_interval=PING_INTERVAL, tls_ca=authority or None)
    await transport.connect()
    received = await hears(transport, "a.b")
    async with stock_process(authority, frozen.url, other.url) as process:
        other.start()
        frozen.freeze()
        process.stdin.write(b"go on\n")
        while not authority and not transport.is_behind:
            transport.publish("z", bytes(100_000))
            transport.push()
        lost_at = time.monotonic()
        await eventually(lambda: events.reconnected, 5)
        back_after = time.monotonic() - lost_at
        transport.publish("a.b", b"here")
        await received.wait(1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(A_WHILE, 3 * back_after)):
                async for line in process.stdout:
                    assert line.strip() == b"lost"
        assert process.returncode is None


async def test_a_pong_that_comes_late_ends_the_reading(
    stock: Stock, make_transport: Make, nats_server: NatsServer
) -> None:
    """A `flush` gave up; the answer it waited for then ends the read loop, and the client looks connected for ever."""
    client = await stock(nats_server.url, ping_interval=60)
    came = await listens(client, "a.b")
    transport, events = make_transport(nats_server.url, ping_interval=60)
    await transport.connect()
    received = await hears(transport, "a.b")
    nats_server.freeze()
    with pytest.raises(nats.errors.FlushTimeoutError):
        await client.flush(timeout=0.1)
    with pytest.raises(DisconnectedError):
        await transport.flush(0.1)
    nats_server.thaw()
    await transport.flush()
    transport.publish("a.b", b"1")
    await received.wait(1)
    await eventually(lambda: client._reading_task.done())
    assert client.is_connected
    assert came == []
    assert (transport.is_connected, events.disconnected) == (True, [])


async def test_a_message_that_cannot_be_read_ends_the_reading(
    stock: Stock, make_transport: Make, nats_server: NatsServer
) -> None:
    """Whoever may publish to a subject can make its stock subscribers look connected and hear nothing."""
    client = await stock(nats_server.url)
    came = await listens(client, "a.b")
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    received = await hears(transport, "a.b")
    block = b"NATS/1.0 \xff\xff\xff\r\n\r\n"
    with socket.create_connection(("127.0.0.1", nats_server.port), 5) as attacker:
        attacker.sendall(
            b'CONNECT {"verbose":false,"headers":true}\r\n' + b"HPUB a.b %d %d\r\n" % (len(block), len(block)) + block
        )
        attacker.sendall(b"\r\nPUB a.b 4\r\nnext\r\n")
        await received.wait(2)
    assert received.payloads == [b"", b"next"]
    await eventually(lambda: client._reading_task.done())
    assert client.is_connected
    assert came == []
    assert (transport.is_connected, events.disconnected) == (True, [])


@pytest.mark.parametrize(
    "nonsense",
    [b'INFO {"max_payload":\r\n', b"MSG a 1 -5\r\n", b"MSG a 1 x\r\n\r\n", b"HMSG a 1 9 5\r\n12345\r\n", b"HELO\r\n"],
)
async def test_nonsense_from_a_server_leads_to_a_new_connection(make_transport: Make, nonsense: bytes) -> None:
    async with FakeNats() as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        server.say(nonsense)
        await eventually(lambda: events.reconnected)
        assert len(events.disconnected) == 1
        assert "cannot be used" in events.disconnected[0]
        await transport.flush()


async def test_nonsense_from_a_server_ends_the_reading_of_the_stock_client(stock: Stock) -> None:
    async with FakeNats() as server:
        client = await stock(server.url)
        server.say(b'INFO {"max_payload":\r\n')
        await eventually(lambda: client._reading_task.done())
        assert client.is_connected
        assert len(server.connections) == 1


async def test_headers_count_towards_the_largest_payload(
    stock: Stock, make_transport: Make, start_server: Start
) -> None:
    """The client does not count them, the server does, and the client closes for good."""
    server = start_server("max_payload: 65536")
    client = await stock(server.url)
    transport, events = make_transport(server.url)
    await transport.connect()
    payload, headers = bytes(65_530), {"Key": "value" * 10}
    with pytest.raises(TooLargeError):
        transport.publish("a.b", payload, headers=headers)
    await client.publish("a.b", payload, headers=headers)
    await eventually(lambda: client.is_closed)
    await proves_itself(transport)
    assert events.disconnected == []


async def test_a_user_who_expires_is_let_in_again_with_a_new_file(
    stock: Stock, make_transport: Make, start_server: Start, tmp_path: Path
) -> None:
    """The client closes for good, although the file holds a fresh user by then."""
    operator, file = Operator.make(), tmp_path / "user.creds"
    server = start_server(operator.config)
    operator.write_credentials(file, expires_at=int(time.time()) + 3)  # whole seconds: in two to three
    client = await stock(server.url, user_credentials=str(file))
    transport, events = make_transport(server.url, credentials=str(file))
    await transport.connect()
    received = await hears(transport, "a.b")
    operator.write_credentials(file)
    await eventually(lambda: events.reconnected, 10)
    assert "authentication expired" in events.disconnected[0].lower()
    transport.publish("a.b", b"still")
    await received.wait(1)
    await eventually(lambda: client.is_closed)


async def test_any_error_of_the_server_is_survived(stock: Stock, make_transport: Make) -> None:
    """The stock client closes for good whatever the server objects to, and whether it hangs up or not."""
    async with FakeNats() as server:
        client = await stock(server.url)
        transport, events = make_transport(server.url)
        await transport.connect()
        for connection in server.connections:
            connection.write(b"-ERR 'Invalid Subject'\r\n")
        await eventually(lambda: client.is_closed)
        await eventually(lambda: events.errors)
        assert "Invalid Subject" in events.errors[0]
        await transport.flush()
        assert events.disconnected == []


async def test_a_subject_that_is_too_long_closes_the_client_for_good(
    stock: Stock, make_transport: Make, nats_server: NatsServer
) -> None:
    client = await stock(nats_server.url)
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    subject = "a." + "b" * 5_000
    with pytest.raises(ConfigurationError, match="longer"):
        transport.publish(subject, b"")
    await client.publish(subject, b"")
    await eventually(lambda: client.is_closed)
    await proves_itself(transport)
    assert events.disconnected == []


@pytest.mark.parametrize("subject", ["a..b", "a.", "a.*", "a.>"])
async def test_a_subject_that_nobody_can_receive_vanishes_without_a_word(
    stock: Stock, make_transport: Make, nats_server: NatsServer, subject: str
) -> None:
    errors: list[Exception] = []

    async def note(error: Exception) -> None:
        errors.append(error)

    client = await stock(nats_server.url, error_cb=note)
    came = await listens(client, "a.b")
    transport, _ = make_transport(nats_server.url)
    await transport.connect()
    with pytest.raises(ConfigurationError, match="subject"):
        transport.publish(subject, b"gone")
    await client.publish(subject, b"gone")
    await client.publish("a.b", b"next")
    await eventually(lambda: came == [b"next"])
    assert errors == []


async def test_a_first_connect_to_nobody_goes_on_for_ever(stock: Stock, make_transport: Make) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    transport, _ = make_transport(url, connect_timeout=0.3)
    connecting = asyncio.ensure_future(stock(url))
    with pytest.raises(DisconnectedError, match=url):
        await transport.connect()
    assert not connecting.done()
    await asyncio.wait([connecting], timeout=A_WHILE / 2)
    assert not connecting.done()
    await put_down(lambda: {connecting})


async def test_a_first_connect_with_the_wrong_authority_goes_on_for_ever(
    stock: Stock, make_transport: Make, start_server: Start, certificates: Certificates
) -> None:
    server = start_server(certificates.config())
    transport, _ = make_transport(server.url, connect_timeout=0.3)
    connecting = asyncio.ensure_future(stock(server.url, tls=ssl.create_default_context()))
    with pytest.raises(DisconnectedError, match=r"(?i)certificate.verify.failed"):
        await transport.connect()
    assert not connecting.done()
    await asyncio.wait([connecting], timeout=A_WHILE / 2)
    assert not connecting.done()
    await put_down(lambda: {connecting})


async def test_a_flush_overtakes_what_was_published_before_it(stock: Stock, make_transport: Make) -> None:
    async with FakeNats() as server:
        client = await stock(server.url, ping_interval=60)
        server.lines.clear()
        await client.publish("a.b", b"first")
        await client.flush()
        await eventually(lambda: b"PUB a.b  5" in server.lines or b"PUB a.b 5" in server.lines)
        assert server.lines[0] == b"PING"
        transport, _ = make_transport(server.url)
        await transport.connect()
        server.lines.clear()
        transport.publish("a.b", b"first")
        await transport.flush()
        assert server.lines == [b"PUB a.b 5", b"first", b"PING"]


async def test_a_server_without_tls_is_talked_to_in_the_clear_although_tls_is_asked_for(
    stock: Stock, make_transport: Make, certificates: Certificates
) -> None:
    async with FakeNats() as server:
        secure = server.url.replace("nats://", "tls://")
        await stock(secure, tls=ssl.create_default_context(cafile=certificates.ca), token="canary")
        assert any(b"canary" in line for line in server.lines)
        server.lines.clear()
        transport, _ = make_transport(secure, tls_ca=certificates.ca, token="canary", connect_timeout=0.3)
        with pytest.raises(DisconnectedError, match="does not offer TLS"):
            await transport.connect()
        assert not any(line.startswith(b"CONNECT") for line in server.lines)


async def test_credentials_of_a_seed_are_not_used_for_the_servers_that_it_names(
    stock: Stock, make_transport: Make
) -> None:
    async with FakeNats() as other, FakeNats({"connect_urls": [other.url.partition("://")[2]]}) as seed:
        secret = seed.url.replace("nats://", "nats://ada:canary@")
        await stock(secret)
        transport, events = make_transport(secret)
        await transport.connect()
        seed._server.close()
        for connection in seed.connections:
            connection.transport.abort()
        await eventually(lambda: len(other.connections) == 2 and events.reconnected)
        await eventually(lambda: len(other.lines) >= 4)
        greetings = [line for line in other.lines if line.startswith(b"CONNECT")]
        assert sorted(b"canary" in line for line in greetings) == [False, True]
