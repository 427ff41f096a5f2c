"""The health server over real sockets: strangers, slow ones, many of them, and a bus that stands still."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from catga_bus import BusState, ConfigurationError, Health
from catga_bus.health import Facts, HealthLimits, assess
from catga_bus.http import HealthServer
from catga_bus.http import server as module
from catga_bus.testing import eventually

GOOD = assess(Facts(state=BusState.STARTED, is_connected=True, is_subscribed=True), HealthLimits())
DEADLINE = 20.0


@pytest.fixture
def serve() -> Iterator[Callable[..., HealthServer]]:
    servers: list[HealthServer] = []

    def start(read: Callable[[], Health] = lambda: GOOD, address: str = "127.0.0.1:0") -> HealthServer:
        servers.append(HealthServer(address, read).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def connect(server: HealthServer) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), DEADLINE)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65_536):
        data += chunk
    return data


def say(server: HealthServer, data: bytes) -> bytes:
    with closing(connect(server)) as connection:
        connection.sendall(data)
        return read_all(connection)


def get(server: HealthServer, path: str, method: str = "GET") -> tuple[int, bytes]:
    answer = say(server, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_every_page_is_served(serve: Callable[..., HealthServer]) -> None:
    server = serve()
    assert get(server, "/livez") == (200, b"live\n")
    assert get(server, "/readyz") == (200, b"ready\n")
    status, body = get(server, "/health")
    assert (status, json.loads(body)["ready"]) == (200, True)
    assert get(server, "/livez", "HEAD") == (200, b"")
    assert get(server, "/nothing")[0] == 404
    assert get(server, "/livez", "POST")[0] == 405


def test_it_serves_ipv6(serve: Callable[..., HealthServer]) -> None:
    try:
        server = serve(address="[::1]:0")
    except ConfigurationError:
        pytest.skip("this machine has no IPv6")
    assert server.url.startswith("http://[::1]:")
    assert get(server, "/health")[0] == 200


def test_a_port_in_use_is_refused_before_anything_begins(serve: Callable[..., HealthServer]) -> None:
    address = serve().url.removeprefix("http://")
    with pytest.raises(ConfigurationError, match=f"cannot listen on {address}: address already in use"):
        serve(address=address)


@pytest.mark.parametrize("address", ["no.such.host.invalid:0", "203.0.113.7:0", "a..b:0"])
def test_an_address_that_is_not_here_is_refused(serve: Callable[..., HealthServer], address: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen on"):
        serve(address=address)


def test_the_port_is_free_again_at_once() -> None:
    with HealthServer("127.0.0.1:0", lambda: GOOD) as server:
        assert get(server, "/livez")[0] == 200
        address = server.url.removeprefix("http://")
    with HealthServer(address, lambda: GOOD) as server:
        assert get(server, "/livez")[0] == 200
    assert not [thread for thread in threading.enumerate() if thread.name == "catga-health"]


def test_a_server_that_is_left_at_once_ends() -> None:
    for _ in range(20):
        with HealthServer("127.0.0.1:0", lambda: GOOD):
            pass
    assert not [thread for thread in threading.enumerate() if thread.name == "catga-health"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00" + b"\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\n" + b"x" * 50_000, 413),
    ],
)
def test_what_is_no_request_is_answered_as_such(serve: Callable[..., HealthServer], data: bytes, status: int) -> None:
    server = serve()
    assert say(server, data).startswith(f"HTTP/1.1 {status} ".encode())
    assert get(server, "/livez") == (200, b"live\n")


def test_a_health_that_cannot_be_read_is_a_500(
    serve: Callable[..., HealthServer], caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Health:
        raise RuntimeError("boom")

    server = serve(broken)
    assert get(server, "/livez") == (500, b"internal server error\n")
    assert "/livez could not be answered" in caplog.text


def test_who_says_nothing_is_sent_away(serve: Callable[..., HealthServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    server = serve()
    with closing(connect(server)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        with suppress(ConnectionResetError):
            assert read_all(connection) == b""


def test_a_prober_gets_through_a_crowd_that_says_nothing(serve: Callable[..., HealthServer]) -> None:
    server = serve()
    crowd = [connect(server) for _ in range(module.MAX_CONNECTIONS + 20)]
    try:
        assert get(server, "/livez") == (200, b"live\n")
        assert len(server._connections) <= module.MAX_CONNECTIONS
        crowd[0].settimeout(DEADLINE)
        with suppress(ConnectionResetError):
            assert crowd[0].recv(1) == b""  # the first to come is the first to go
    finally:
        for connection in crowd:
            connection.close()


async def test_it_answers_while_the_loop_that_it_watches_is_blocked(serve: Callable[..., HealthServer]) -> None:
    server = serve()
    assert get(server, "/livez") == (200, b"live\n")  # called on the loop, which it blocks
    await eventually(lambda: not server._connections)
    assert await asyncio.to_thread(get, server, "/readyz") == (200, b"ready\n")
