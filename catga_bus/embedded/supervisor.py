"""Keeps one nats-server exactly as long as its owner lives.

Run as a program, with the standard library alone.

A parent's death reaches a child in no portable way: `PR_SET_PDEATHSIG` is Linux only and is bound
to the thread that started the child. So this process stands between the two. It holds the reading
end of a pipe whose other end the owner holds; the kernel closes that end however the owner ends. It
also looks at its parent's id twice a second, because a forked child of the owner would keep a copy
of the pipe open.

Should the supervisor itself be killed, the server follows at once on Linux (it is started from this
process's only thread). Elsewhere it is left running, and so is the lock on its store, which it has
inherited: the next user connects to it.

It is started by path and without site-packages, so it takes 30 milliseconds and none of the owner's
environment.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

READY = "ready"
FAILED = "failed"

NOT_EXECUTABLE = "not_executable"
ENDED = "ended"
LATE = "late"

_STARTING_POLL_MS = 5
# The server is up 11 ms after it is spawned.
_RUNNING_POLL_MS = 500
# How long a server may outlive an owner that left a forked child; in all other cases the pipe tells
# at once.
_STOP_TIMEOUT = 5.0
# A server with an idle store ends within 10 ms of SIGTERM; one that writes out a large one may take
# longer.


class Spec:
    """What to run, taken from the only argument (JSON).

    Attributes:
        command: The server and its arguments.
        owner: Process id of the owner, which is the parent as long as it lives.
        lock: The descriptor of the locked file, handed on to the server.
        store: The directory.
        remove: Whether the store is removed in the end.
        name: The server's name.
        host: The address that clients of this machine use.
        record: Where to write down the running server.
        ports: The directory where the server writes its ports.
        log: The server's log.
        start_ms: How long the server may take to start.
    """

    def __init__(self, text: str) -> None:
        fields: dict[str, Any] = json.loads(text)
        self.command: list[str] = fields["command"]
        self.owner: int = fields["owner"]
        self.lock: int = fields["lock"]
        self.store = Path(fields["store"])
        self.remove: bool = fields["remove"]
        self.name: str = fields["name"]
        self.host: str = fields["host"]
        self.record = Path(fields["record"])
        self.ports = Path(fields["ports"])
        self.log = Path(fields["log"])
        self.start_ms: int = fields["start_ms"]


class Supervisor:
    """One server and the watch over its owner."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        wake_reader, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        os.set_blocking(wake_reader, False)
        self._wake = wake_reader
        self._ending = False
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the poll
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._poll = select.poll()
        self._poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
        self._poll.register(wake_reader, select.POLLIN)

    def run(self) -> None:
        """Start the server, say so on stdout, stay until owner or server ends, and tidy up."""
        try:
            server = subprocess.Popen(
                self._spec.command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                pass_fds=(self._spec.lock,),
                preexec_fn=_end_with_parent(),
            )
        except OSError as error:
            _say(FAILED, why=NOT_EXECUTABLE, text=f"cannot be executed: {error.strerror or error}")
            self._tidy()
            return
        try:
            if self._wait_until_ready(server):
                while server.poll() is None and self._owner_lives(_RUNNING_POLL_MS):
                    pass
        finally:
            _stop(server)
            self._tidy()

    def _wait_until_ready(self, server: subprocess.Popen[bytes]) -> bool:
        ports_file = self._spec.ports / f"nats-server_{server.pid}.ports"
        for _ in range(self._spec.start_ms // _STARTING_POLL_MS):
            port = _port_in(ports_file)
            if port:
                self._announce(server.pid, port)
                return True
            if server.poll() is not None:
                text = f"ended with exit code {server.returncode}: {self._last_words()}"
                _say(FAILED, why=ENDED, text=text)
                return False
            if not self._owner_lives(_STARTING_POLL_MS):
                return False
        text = f"was not ready after {self._spec.start_ms / 1000:g} s: {self._last_words()}"
        _say(FAILED, why=LATE, text=text)
        return False

    def _announce(self, pid: int, port: int) -> None:
        facts = {
            "url": f"nats://{self._spec.host}:{port}",
            "name": self._spec.name,
            "pid": pid,
            "owner": self._spec.owner,
        }
        draft = self._spec.record.with_suffix(".new")
        draft.write_text(json.dumps(facts))
        draft.replace(self._spec.record)  # so that nobody ever reads half of it
        _say(READY, **facts)

    def _owner_lives(self, wait_ms: int) -> bool:
        for descriptor, _ in self._poll.poll(wait_ms):
            if descriptor != self._wake:
                return False  # the owner said stop, or its end of the pipe is closed
            try:
                os.read(self._wake, 512)
            except BlockingIOError:
                continue
        return not self._ending and os.getppid() == self._spec.owner

    def _on_signal(self, *_: object) -> None:
        self._ending = True

    def _last_words(self) -> str:
        """Return the lines in which the server says why it ended."""
        try:
            lines = self._spec.log.read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        telling = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
        return " | ".join(line.partition("] ")[2] for line in telling[-3:]) or "it left no message in its log"

    def _tidy(self) -> None:
        if self._spec.remove:
            shutil.rmtree(self._spec.store, ignore_errors=True)


def _end_with_parent() -> Any:
    if sys.platform != "linux":
        return None
    import ctypes  # here: only Linux has it to call, and nothing may be imported after the fork

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    supervisor = os.getpid()

    def end_with_parent() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != supervisor:
            os._exit(1)

    return end_with_parent


def _port_in(ports_file: Path) -> int | None:
    try:
        url: str = json.loads(ports_file.read_text())["nats"][0]
        return int(url.rpartition(":")[2])
    except (OSError, ValueError, KeyError, IndexError):
        return None  # not there yet, or half written


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _say(what: str, **facts: object) -> None:
    try:
        sys.stdout.write(json.dumps({"state": what, **facts}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The owner is gone already. Without this the interpreter would try to write again on its
        # way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    Supervisor(Spec(sys.argv[1])).run()
