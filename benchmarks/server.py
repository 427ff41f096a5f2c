"""The NATS server that a benchmark runs against: a private one, or the one at `--url`."""

import asyncio
import json
import random
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import nats
import nats.errors
import psutil

from benchmarks.errors import BenchmarkError, ServerUnreachableError, UsageError
from catga_bus.embedded import EmbeddedServer, find_server_binary
from catga_bus.errors import CatgaError, ConfigurationError

_DEFAULT_PORT = 4222
# A server on the same continent answers within 0.2 s; three seconds is "not there".
_PROBE_SECONDS = 3.0
# A start takes 20 ms; a busy machine may take a hundred times as long.
_START_SECONDS = 10.0
_POLL_SECONDS = 0.005
# A cluster elects its first leader within some seconds.
_ELECTION_SECONDS = 30.0
_PORT_TRIES = 50


def _new_namespace() -> str:
    return f"bench-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that has answered."""

    url: str
    """What clients connect to; a comma-separated list is a cluster."""

    version: str
    """As the server itself says."""

    pids: tuple[int, ...] = ()
    """Its processes, where the benchmark started them; several of a cluster."""

    members: "tuple[PlainServer, ...]" = ()
    """The servers of a cluster that the benchmark started, `s0` first."""

    namespace: str = field(default_factory=_new_namespace)
    """First token of every subject of this run: nothing else on the server is touched."""

    def cpu_seconds(self) -> float | None:
        """Return the processor time used so far, user and system; None where it is not ours to look at."""
        if not self.pids:
            return None
        every = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(float(times.user + times.system) for times in every)


@contextmanager
def open_server(url: str | None) -> Iterator[Server]:
    """Hold a server: the one at `url` if there is one, else a private one that ends with the block.

    Args:
        url: nats:// or tls:// addresses, separated by commas; None for a private server.

    Raises:
        UsageError: `url` is of another kind, or no private server can be started.
        ServerUnreachableError: None of the addresses answers within 3 s each.
    """
    if url is not None:
        yield Server(url, _version_at(url))
        return
    embedded = EmbeddedServer()
    with asyncio.Runner() as runner:
        try:
            runner.run(embedded.start())
        except CatgaError as error:
            raise UsageError(f"no private server: {error}; give one with --url") from error
        try:
            yield Server(embedded.url, _version_at(embedded.url), () if embedded.pid is None else (embedded.pid,))
        finally:
            runner.run(embedded.stop())


class PlainServer:
    """A nats-server with nothing but its own defaults, and a port that it has again after it was killed.

    Its pings notice a client that freezes after minutes, where those of a private server of catga_bus take 1.5 s.

    Args:
        arguments: Of its command line, beside its address.

    Raises:
        UsageError: There is no nats-server to start.
    """

    def __init__(self, *arguments: str) -> None:
        try:
            binary = find_server_binary()
        except ConfigurationError as error:
            raise UsageError(f"no server of its own: {error}") from error
        self._port = _free_port()
        self._command = [str(binary), "-a", "127.0.0.1", "-p", str(self._port), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"nats://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill it if it runs."""
        self.kill()

    def start(self) -> float:
        """Start the server, and return the instant (`time.monotonic`) at which it greeted.

        Raises:
            BenchmarkError: It does not answer within 10 s.
        """
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(OSError, ValueError):
                _greeting("127.0.0.1", self._port)
                return time.monotonic()
            time.sleep(_POLL_SECONDS)
        self.kill()
        raise BenchmarkError(f"a nats-server at {self.url} did not come up; try again, the port may have been taken")

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def kill(self) -> None:
        """Kill it (SIGKILL) if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def open_cluster(size: int, *, is_synced: bool = False) -> Iterator[Server]:
    """Hold servers of its own that replicate streams to each other.

    Args:
        size: How many servers; one is a server alone.
        is_synced: Whether they write every message through to the disk before they confirm it.

    Raises:
        UsageError: There is no nats-server to start.
        BenchmarkError: They do not answer, or elect no leader, within 30 s.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="bench-servers-")))
        routes = [_free_port() for _ in range(size)]
        members: list[PlainServer] = []
        for place, port in enumerate(routes):
            config = directory / f"s{place}.conf"
            config.write_text(_member_config(directory, place, port, routes, is_synced=is_synced))
            members.append(stack.enter_context(PlainServer("-c", str(config))))
        url = ",".join(member.url for member in members)
        asyncio.run(_wait_for_streams(url, size))
        yield Server(url, _version_at(url), tuple(member.pid for member in members), tuple(members))


def _member_config(directory: Path, place: int, port: int, routes: Sequence[int], *, is_synced: bool) -> str:
    sync = ", sync_interval: always" if is_synced else ""
    lines = [f'server_name: "s{place}"', f'jetstream {{ store_dir: "{directory / f"s{place}"}"{sync} }}']
    if len(routes) > 1:
        others = ", ".join(f'"nats://127.0.0.1:{route}"' for route in routes)
        lines.append(f'cluster {{ name: "bench", listen: "127.0.0.1:{port}", routes: [{others}], pool_size: -1 }}')
    return "\n".join(lines) + "\n"


async def _wait_for_streams(url: str, replicas: int) -> None:
    """Wait until a stream with so many replicas can be made and written."""
    until = time.monotonic() + _ELECTION_SECONDS
    connection = await nats.connect(url.split(","))
    try:
        while time.monotonic() < until:
            with suppress(nats.errors.Error, TimeoutError):
                streams = connection.jetstream(timeout=2.0)
                await streams.add_stream(name="probe", subjects=["probe"], num_replicas=replicas)
                await streams.publish("probe", b"")
                await streams.delete_stream("probe")
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await connection.close()
    raise BenchmarkError(f"the servers at {url} store nothing after {_ELECTION_SECONDS:g} s")


def _free_port() -> int:
    """Return a port below those that the system gives to connections: nobody takes it while its server is down."""
    for _ in range(_PORT_TRIES):
        port = random.randint(10_000, 32_000)
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise BenchmarkError(f"none of {_PORT_TRIES} ports between 10,000 and 32,000 is free")


def _version_at(urls: str) -> str:
    failures = []
    for url in urls.split(","):
        host, port = _address(url.strip())
        try:
            return _greeting(host, port)
        except (OSError, ValueError) as error:
            failures.append(f"{host}:{port} ({error})")
    raise ServerUnreachableError(
        f"no NATS server answers at {', '.join(failures)}; "
        f"start one (docker compose up -d), or leave --url out for a private server"
    )


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    try:
        port = parts.port or _DEFAULT_PORT
    except ValueError as error:
        raise UsageError(f"--url: {url!r} has no usable port ({error})") from error
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        raise UsageError(f"--url: {url!r} is not an address like nats://127.0.0.1:4222")
    return parts.hostname, port


def _greeting(host: str, port: int) -> str:
    """Return the version in the INFO line, the first thing that a NATS server says, TLS or not."""
    with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as connection:
        line = connection.makefile("rb").readline(65_536)
    verb, _, text = line.partition(b" ")
    if verb != b"INFO":
        raise ValueError(f"what listens there is no NATS server: it said {line[:40]!r}")
    return str(json.loads(text).get("version", "unknown"))
