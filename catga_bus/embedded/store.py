"""The directory of a private server: one server at a time, and where the next user finds it.

Two servers on one store lose acknowledged messages, so the store holds a lock file. The lock is an
open file description (`flock`) that is handed down to the server process itself: it is free exactly
when no server lives, however its owner ended. There is nothing to clean up after a crash.
"""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from catga_bus.errors import ConfigurationError

_LOCK = "catga.lock"
_RECORD = "server.json"
_SETTINGS = "nats-server.conf"
_LOG = "nats-server.log"
_OUTPUT = "supervisor.log"
_PORTS = "ports"

_PROBE_TIMEOUT = 1.0
# Bound of one look at a server on this machine, which answers in well under a millisecond.

_MAX_INFO_BYTES = 65_536


class ServerRecord(msgspec.Struct, frozen=True):
    """What a server's supervisor writes down beside the lock once the server answers."""

    url: str
    """Where clients on this machine connect."""

    name: str
    """Drawn for this run of the server, which greets with it: its port may be another's by now."""

    pid: int
    """The process id of the server."""

    owner: int
    """The process id of its owner."""


class Store:
    """One store directory.

    Args:
        path: The directory; made where it is missing.

    Raises:
        ConfigurationError: There can be no directory at `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigurationError(
                f"the store {str(path)!r} cannot be made: {reason}; name a directory that can be written"
            ) from error

    @property
    def record_file(self) -> Path:
        """Where the server that was started last is written down."""
        return self.path / _RECORD

    @property
    def settings_file(self) -> Path:
        """The server's configuration, written anew at every start."""
        return self.path / _SETTINGS

    @property
    def log_file(self) -> Path:
        """The server's log."""
        return self.path / _LOG

    @property
    def output_file(self) -> Path:
        """What server and supervisor say outside the log: a refused configuration, a crash."""
        return self.path / _OUTPUT

    @property
    def ports_directory(self) -> Path:
        """Where the server writes which port it was given."""
        return self.path / _PORTS

    def begin_log(self) -> None:
        """Put the log of the last run aside: the last words in it are not those of this run."""
        with contextlib.suppress(FileNotFoundError):
            self.log_file.replace(self.log_file.with_suffix(".previous.log"))

    def last_output(self) -> str:
        """Return the last lines of what server and supervisor said outside the log."""
        with contextlib.suppress(OSError):
            lines = self.output_file.read_text(errors="replace").strip().splitlines()
            if lines:
                return " | ".join(lines[-3:])
        return "it left no message"

    def try_lock(self) -> int | None:
        """Take the lock and return the open file that holds it; None while somebody else holds it.

        It is held by a server, or by a process that is starting one.

        Raises:
            ConfigurationError: The store cannot be written.
        """
        file = self.path / _LOCK
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"the store {str(self.path)!r} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise ConfigurationError(
                f"the store {str(self.path)!r} cannot be locked: {error.strerror}; use a local file system"
            ) from error
        return descriptor

    def record(self) -> ServerRecord | None:
        """Return what is written down, None if nothing is; the server may be gone."""
        try:
            return msgspec.json.decode(self.record_file.read_bytes(), type=ServerRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def live_record(self) -> ServerRecord | None:
        """Return what is written down if exactly that server answers now; takes up to a second."""
        record = self.record()
        return record if record and server_name(record.url) == record.name else None


def server_name(url: str) -> str | None:
    """Return the name that the server at `url` gives itself; None if none answers in a second."""
    address = urlsplit(url)
    where = (address.hostname or "127.0.0.1", address.port or 4222)
    with contextlib.suppress(OSError, ValueError):
        with socket.create_connection(where, timeout=_PROBE_TIMEOUT) as connection:
            greeting = b""
            while b"\r\n" not in greeting and len(greeting) < _MAX_INFO_BYTES:
                received = connection.recv(4_096)
                if not received:
                    return None
                greeting += received
        verb, _, info = greeting.partition(b" ")
        name = json.loads(info.partition(b"\r\n")[0]).get("server_name")
        return name if verb == b"INFO" and isinstance(name, str) else None
    return None
