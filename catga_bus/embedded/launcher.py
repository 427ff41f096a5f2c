"""Starts a server or finds the live one of a store: all of it blocks, and is run in a thread."""

import contextlib
import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec

from catga_bus.clock import monotonic
from catga_bus.embedded.binary import ENVIRONMENT_VARIABLE
from catga_bus.embedded.settings import DEFAULT_MAX_PAYLOAD_BYTES, server_settings
from catga_bus.embedded.store import ServerRecord, Store
from catga_bus.embedded.supervisor import ENDED, NOT_EXECUTABLE, READY
from catga_bus.errors import CatgaError, ConfigurationError, DisconnectedError, Outcome

POLL = 0.02
"""How often what cannot be waited for is looked at, in seconds; a start takes about 50 ms."""

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_STOP_TIMEOUT = 15.0
# Three times what the supervisor gives the server to end by itself.
_ANY_PORT = -1
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


class Wanted(msgspec.Struct, frozen=True):
    """What server to start."""

    binary: Path
    host: str = "127.0.0.1"
    port: int | None = None
    """None for any free one."""

    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    temporary: bool = False
    """Whether the store is removed once the server has ended."""

    start_timeout: float = 10.0
    """In seconds."""


class Launcher:
    """One start, and the end of what it started.

    Args:
        store: Where the server keeps its data.
        wanted: What to start.
    """

    def __init__(self, store: Store, wanted: Wanted) -> None:
        self._store = store
        self._wanted = wanted
        self._deadline = monotonic() + wanted.start_timeout
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._home = os.getpid()
        self._given_up = threading.Event()

    @property
    def is_owner(self) -> bool:
        """Whether there is a server here that this object started."""
        return self._supervisor is not None

    @property
    def has_ended(self) -> bool:
        """Whether the server that this object started is gone."""
        return self._supervisor is None or self._supervisor.poll() is not None

    def give_up(self) -> None:
        """End a launch that runs in another thread; what it has started is stopped."""
        self._given_up.set()

    def launch(self) -> ServerRecord | None:
        """Become the owner or find the owner's server, which may be starting or ending just now.

        Returns:
            The server, or None if `give_up` was called.

        Raises:
            ConfigurationError: The binary, the store or the port cannot be used.
            DisconnectedError: No server came up in time.
        """
        record = None
        while record is None and not self._given_up.is_set():
            lock = self._store.try_lock()
            if lock is not None:
                try:
                    record = self._start_own(lock)
                finally:
                    os.close(lock)  # the server holds its own copy, and with it the lock
            else:
                record = self._other()
        if self._given_up.is_set():
            self.stop()
            return None
        return record

    def stop(self) -> None:
        """End the server if this object started it. Stopping twice is fine."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None or os.getpid() != self._home:
            return
        if supervisor.stdin is not None:
            # Said, not only hung up: a forked child may hold a copy of the pipe.
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(b"stop\n")
                supervisor.stdin.flush()
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.close()
        if supervisor.stdout is not None:
            supervisor.stdout.close()
        try:
            supervisor.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()

    def _other(self) -> ServerRecord | None:
        """Return the live server of another owner; None, after a moment, if it is not up yet."""
        record = self._store.live_record()
        port = self._wanted.port
        if record is None:
            if monotonic() > self._deadline:
                raise DisconnectedError(
                    f"the store {self._shown} is locked, but no server answers there after "
                    f"{self._wanted.start_timeout:g} s; last known: {self._store.record()}",
                    outcome=Outcome.NOT_RUN,
                )
            self._given_up.wait(POLL)
        elif port is not None and urlsplit(record.url).port != port:
            raise ConfigurationError(
                f"the store {self._shown} is already served at {record.url} "
                f"by process {record.owner}; "
                f"connect there, or end that process to have it at port {port}"
            )
        return record

    def _start_own(self, lock: int) -> ServerRecord | None:
        self._prepare()
        answer: dict[str, Any] = {}
        for port in self._ports():
            answer = self._spawn(lock, port)
            if answer.get("state") == READY:
                return ServerRecord(answer["url"], answer["name"], answer["pid"], os.getpid())
            self.stop()
            if not _port_is_taken(answer):
                break
        if self._given_up.is_set():
            return None
        raise self._failure(answer)

    def _prepare(self) -> None:
        store, wanted = self._store, self._wanted
        with self._writing():
            store.settings_file.write_text(
                server_settings(max_payload_bytes=wanted.max_payload_bytes, durable=not wanted.temporary)
            )
            shutil.rmtree(store.ports_directory, ignore_errors=True)
            store.ports_directory.mkdir()
            store.begin_log()

    def _ports(self) -> list[int]:
        """Return the ports to try: the one asked for, or this store's last one and then any."""
        if self._wanted.port is not None:
            return [self._wanted.port]
        record = self._store.record()
        last = urlsplit(record.url).port if record else None
        return [last, _ANY_PORT] if last else [_ANY_PORT]

    def _spawn(self, lock: int, port: int) -> dict[str, Any]:
        store, wanted = self._store, self._wanted
        name = f"catga-{secrets.token_hex(8)}"
        spec = {
            "command": [
                *(str(wanted.binary), "--name", name, "--config", str(store.settings_file)),
                *("--addr", wanted.host, "--port", str(port)),
                *("--store_dir", str(store.path), "--log", str(store.log_file)),
                *("--ports_file_dir", str(store.ports_directory)),
            ],
            "owner": os.getpid(),
            "lock": lock,
            "store": str(store.path),
            "remove": wanted.temporary,
            "name": name,
            "host": _EVERY_ADDRESS.get(wanted.host, wanted.host),
            "record": str(store.record_file),
            "ports": str(store.ports_directory),
            "log": str(store.log_file),
            "start_ms": int(max(self._deadline - monotonic(), 0.1) * 1000),
        }
        with self._writing(), store.output_file.open("wb") as output:
            self._supervisor = subprocess.Popen(
                # -I -S: nothing of the user's environment or site-packages gets in or costs time.
                [sys.executable, "-I", "-S", str(_SUPERVISOR), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                pass_fds=(lock,),
                start_new_session=True,  # a Ctrl-C at the terminal is for us: we drain first
            )
        return self._answer(self._supervisor.stdout)

    def _answer(self, output: IO[bytes] | None) -> dict[str, Any]:
        """Return what the supervisor says: ready, or failed and why; empty if it says nothing."""
        if output is None:
            return {}
        deadline = self._deadline + 1.0  # the supervisor keeps the deadline itself and says so
        with selectors.DefaultSelector() as selector, output:
            selector.register(output, selectors.EVENT_READ)
            while not self._given_up.is_set() and monotonic() < deadline:
                if selector.select(POLL):
                    line = output.readline()
                    answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
                    return answer
        return {}

    def _failure(self, answer: dict[str, Any]) -> CatgaError:
        """Return the error for what the supervisor said, or did not live to say."""
        text = answer.get("text") or f"did not start: {self._store.last_output()}"
        binary = str(self._wanted.binary)
        if _port_is_taken(answer):
            return ConfigurationError(
                f"port {self._wanted.port} of {self._wanted.host} is already in use; "
                f"end what listens there, or take another port"
            )
        if answer.get("why") == NOT_EXECUTABLE:
            return ConfigurationError(f"the nats-server {binary!r} {text}; name another in {ENVIRONMENT_VARIABLE}")
        return DisconnectedError(
            f"the nats-server {binary!r} with the store {self._shown} {text}",
            outcome=Outcome.NOT_RUN,
        )

    @property
    def _shown(self) -> str:
        return repr(str(self._store.path))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigurationError(f"the store {self._shown} cannot be written: {error.strerror or error}") from error


def _port_is_taken(answer: dict[str, Any]) -> bool:
    return answer.get("why") == ENDED and "address already in use" in answer["text"]
