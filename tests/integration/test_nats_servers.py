"""The servers that the other tests rely on do what they are told."""

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from catga_bus.errors import ConfigurationError
from tests import servers
from tests.servers import NatsServer

pytestmark = pytest.mark.nats


def hello(server: NatsServer, timeout: float = 5.0) -> bytes:
    host, port = "127.0.0.1", server.port
    with socket.create_connection((host, port), timeout) as connection:
        return connection.recv(5)


def test_a_server_keeps_its_port_over_every_end_and_start(nats_server: NatsServer) -> None:
    port = nats_server.port
    assert hello(nats_server) == b"INFO "
    nats_server.restart()
    assert hello(nats_server) == b"INFO "
    nats_server.stop()
    with pytest.raises(ConnectionRefusedError):
        hello(nats_server)
    nats_server.start()
    assert hello(nats_server) == b"INFO "
    assert nats_server.port == port


def test_a_frozen_server_takes_connections_and_says_nothing_until_it_is_thawed(nats_server: NatsServer) -> None:
    nats_server.freeze()
    with pytest.raises(TimeoutError):
        hello(nats_server, 0.1)
    nats_server.thaw()
    assert hello(nats_server) == b"INFO "


def test_a_frozen_server_can_be_killed(nats_server: NatsServer) -> None:
    pid = nats_server.pid
    nats_server.freeze()
    nats_server.kill()
    assert not Path(f"/proc/{pid}").exists()


def test_a_bad_configuration_fails_with_the_words_of_the_server(start_server: Callable[..., NatsServer]) -> None:
    with pytest.raises(AssertionError, match="no_such_option"):
        start_server("no_such_option: 1")


def test_a_port_that_somebody_took_is_left_to_them(tmp_path: Path, nats_server: NatsServer) -> None:
    other = NatsServer(tmp_path / "other")
    other.port = nats_server.port
    try:
        other.start()
        assert other.port != nats_server.port
        other.send(signal.SIGCONT)
    finally:
        other.kill()


@pytest.mark.parametrize(("ci", "ends_with"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_binary_a_test_is_skipped_but_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, ends_with: type[BaseException]
) -> None:
    def none() -> Path:
        raise ConfigurationError("no nats-server found")

    monkeypatch.setattr(servers, "find_server_binary", none)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(ends_with, match="no nats-server found"):
        servers.server_binary()
