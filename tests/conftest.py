"""What all tests share: real servers, killed at the end whatever happens."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from catga_bus.testing import RecordedEvents
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_core import NatsTransport
from tests.servers import Certificates, NatsServer, make_certificates


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., NatsServer]]:
    """Start as many servers as a test needs: `start_server(config, jetstream=..., port=..., scheme=...)`."""
    count = itertools.count(1)
    with ExitStack() as servers:

        def start(config: str = "", **options: Any) -> NatsServer:
            server = NatsServer(tmp_path / f"nats-{next(count)}", config, **options)
            servers.callback(server.kill)
            server.start()
            return server

        yield start


@pytest.fixture
def nats_server(start_server: Callable[..., NatsServer]) -> NatsServer:
    """A running server of the test's own, to be killed, frozen and started again at will."""
    return start_server()


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one server for the whole session; keep to a namespace of your own."""
    server = NatsServer(tmp_path_factory.mktemp("nats"), jetstream=True)
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority and what it has signed, for `localhost` and `127.0.0.1`."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def make_transport() -> AsyncIterator[Callable[..., tuple[NatsTransport, RecordedEvents]]]:
    """Make transports that are closed at the end: `make_transport(*urls, name=..., ...)`, not yet connected.

    First back after 20 ms by default, so that a test of the way back is short.
    """
    made: list[NatsTransport] = []

    def make(*urls: str, **options: Any) -> tuple[NatsTransport, RecordedEvents]:
        events = RecordedEvents()
        transport = NatsTransport(ConnectionOptions(urls=urls, **{"reconnect_delay": 0.02, **options}), events)
        made.append(transport)
        return transport, events

    yield make
    await asyncio.gather(*(transport.close() for transport in made))
