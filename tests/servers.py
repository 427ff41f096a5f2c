"""Real nats-servers under a test's control: started, killed, frozen, and started again on the same port."""

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from catga_bus.embedded import find_server_binary
from catga_bus.errors import ConfigurationError

START_TIMEOUT = 20.0
# Seconds; a start takes 20 ms, but a busy machine may take a hundred times as long.

FIRST_PORT, LAST_PORT = 10_000, 32_000
# Below the ports that the kernel gives to outgoing connections (from 32,768 on Linux): nobody takes a port of ours
# while its server is down, not even a client that tries to connect there and meets itself.

PORT_TRIES = 50
PR_SET_PDEATHSIG = 1


def server_binary() -> Path:
    """Return the nats-server to test with; without one the test is skipped, or fails where `CI` is set."""
    try:
        return find_server_binary()
    except ConfigurationError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that will not be given to anybody who connects."""
    for _ in range(PORT_TRIES):
        port = random.randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                return port
    raise AssertionError(f"no free port among {PORT_TRIES} between {FIRST_PORT} and {LAST_PORT}")


def dies_with_us() -> Callable[[], None] | None:
    """Return what a child has to call before its program starts (`preexec_fn`) so that it ends when we do."""
    # A test run that is killed leaves no server behind. The kernel ties the child to the thread that starts it, so
    # only the main thread may ask for this.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class NatsServer:
    """One nats-server on a port of 127.0.0.1 that it keeps for good. Calls block for milliseconds.

    Args:
        directory: For its configuration, log and store; made if need be.
        config: Text of the configuration file.
        jetstream: Whether it stores streams, in `directory`.
        port: The port to listen on; a free one by default.
        scheme: Of `url`; `tls` where the configuration asks for TLS.
    """

    def __init__(
        self,
        directory: Path,
        config: str = "",
        *,
        jetstream: bool = False,
        port: int | None = None,
        scheme: str = "nats",
    ) -> None:
        self.config = config
        """Taken up by the next start or `reload`."""

        self.directory = directory
        self.port = port if port is not None else free_port()
        self._keeps_port = port is not None
        self._jetstream = jetstream
        self._scheme = scheme
        self._process: subprocess.Popen[bytes] | None = None
        self._is_frozen = False

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Without credentials."""
        return f"{self._scheme}://{self.address}"

    @property
    def log(self) -> str:
        """All that it has written so far, over all starts."""
        file = self.directory / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def pid(self) -> int:
        """Of the running server."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether there is a process, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, and return when it takes connections."""
        assert not self.is_running, f"the server at {self.address} runs already"
        for _ in range(PORT_TRIES):
            if self._try_start():
                return
            assert not self._keeps_port, f"the server at {self.address} did not start:\n{self.log}"
            self.port = free_port()
        raise AssertionError(f"no server started:\n{self.log}")

    def stop(self) -> None:
        """Ask it to end (SIGTERM) and wait until it has."""
        self.thaw()
        process = self._running()
        process.terminate()
        process.wait(START_TIMEOUT)
        self._process = None

    def kill(self) -> None:
        """End it with SIGKILL, frozen or not: a frozen one does nothing more before it ends. Killing twice is fine."""
        if self._process is None:
            return
        self._is_frozen = False
        self._process.kill()
        self._process.wait()
        self._process = None

    def freeze(self) -> None:
        """Let it do nothing more while its sockets stay open (SIGSTOP), as behind a cut cable."""
        self.send(signal.SIGSTOP)
        self._is_frozen = True
        # The signal reaches one thread after the other; until the last has stopped the server goes on reading.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """End `freeze`; without one this does nothing."""
        if self._is_frozen and self.is_running:
            self.send(signal.SIGCONT)
        self._is_frozen = False

    def restart(self, config: str | None = None) -> None:
        """Kill it and start it again on its port, with another configuration if one is given."""
        self.kill()
        if config is not None:
            self.config = config
        self.start()

    def reload(self, config: str) -> None:
        """Let the running server take up another configuration (SIGHUP), and wait until it has."""
        self.config = config
        done = "Reloaded server configuration"
        before = self.log.count(done)
        self._write_config()
        self.send(signal.SIGHUP)
        _wait_for(lambda: self.log.count(done) > before, lambda: f"the configuration was not reloaded:\n{self.log}")

    def lame_duck(self) -> None:
        """Let it send its clients away and end (SIGUSR2)."""
        self.send(signal.SIGUSR2)

    def send(self, number: signal.Signals) -> None:
        """Send it any other signal."""
        os.kill(self.pid, number)

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"the server at {self.address} does not run"
        return self._process

    def _write_config(self) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / "server.conf"
        file.write_text(self.config)
        return file

    def _try_start(self) -> bool:
        """Return False if the port was taken by somebody in between."""
        arguments = [
            *(str(server_binary()), "-a", "127.0.0.1", "-p", str(self.port)),
            *("-c", str(self._write_config()), "--ports_file_dir", str(self.directory)),
        ]
        if self._jetstream:
            arguments += ["-js", "-sd", str(self.directory / "jetstream")]
        before = len(self.log)
        with (self.directory / "log").open("ab") as log:
            self._process = process = subprocess.Popen(arguments, stdout=log, stderr=log, preexec_fn=dies_with_us())
        self._is_frozen = False
        ports = self.directory / f"nats-server_{process.pid}.ports"

        def is_up_or_over() -> bool:
            if process.poll() is not None:
                return True
            try:
                return bool(json.loads(ports.read_text())["nats"])
            except (FileNotFoundError, ValueError):
                return False

        try:
            _wait_for(is_up_or_over, lambda: f"the server did not come up:\n{self.log}")
        except BaseException:
            self.kill()
            raise
        if process.poll() is None:
            self._keeps_port = True
            return True
        self._process = None
        said = self.log[before:]
        assert "address already in use" in said, f"the server ended at once:\n{said}"
        return False


def _wait_for(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.003)


def start_cluster(
    start_server: Callable[..., NatsServer], size: int, config: str = "", *, jetstream: bool = False
) -> list[NatsServer]:
    """Start servers that name each other to their clients.

    Args:
        start_server: The fixture of that name.
        size: How many.
        config: More configuration, the same for each.
        jetstream: Whether they store streams; they take seconds to elect who leads.
    """
    ports = [free_port() for _ in range(size)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    return [
        start_server(
            f'server_name: "s{place}"\n'
            f'cluster {{ name: "c", listen: "127.0.0.1:{port}", routes: [{routes}], pool_size: -1 }}\n{config}',
            jetstream=jetstream,
        )
        for place, port in enumerate(ports)
    ]


@dataclass(frozen=True)
class Certificates:
    """A certificate authority, a server's certificate and a client's, as paths of PEM files."""

    ca: str
    server_cert: str
    server_key: str
    client_cert: str
    client_key: str

    def config(self, *, verify: bool = False) -> str:
        """Return the `tls` block of a server; with `verify` it asks clients for a certificate."""
        return (
            f'tls {{ cert_file: "{self.server_cert}", key_file: "{self.server_key}", '
            f'ca_file: "{self.ca}", verify: {str(verify).lower()}, timeout: 5 }}\n'
        )


def make_certificates(directory: Path, *names: str) -> Certificates:
    """Make an authority of its own and write it down.

    Args:
        directory: For the files; made if need be.
        names: What the server's certificate is for; `localhost` and `127.0.0.1` by default.
    """
    directory.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    server = authority.issue_cert(*(names or ("localhost", "127.0.0.1")))
    client = authority.issue_cert("client@example.org")

    def path(name: str) -> str:
        return str(directory / f"{name}.pem")

    authority.cert_pem.write_to_path(path("ca"))
    for name, leaf in (("server", server), ("client", client)):
        leaf.private_key_pem.write_to_path(path(f"{name}-key"))
        for place, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(path(f"{name}-cert"), append=place > 0)
    return Certificates(
        ca=path("ca"),
        server_cert=path("server-cert"),
        server_key=path("server-key"),
        client_cert=path("client-cert"),
        client_key=path("client-key"),
    )
