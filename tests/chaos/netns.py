"""A network of its own for one process, whose cable can be pulled: kernel-level faults, where root allows.

A namespace without a name, held by one process that dies with this one, and a veth pair into it. When the last process
in it has ended the kernel removes the namespace, and the pair with it: nothing is left behind, whatever happens.
Addresses are of 198.18.0.0/15, which is set aside for tests of networks (RFC 2544).
"""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers import dies_with_us

COMMAND_TIMEOUT = 10.0
MAX_SPACES = 8
# At a time, in one process: each has a /30 of its own.

_TOOLS = ("ip", "unshare", "nsenter")


def why_not() -> str | None:
    """Return why there can be no namespaces here, or None if there can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Namespace(MAX_SPACES - 1):
            return None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"the kernel does not allow network namespaces: {said.strip()}"


class Namespace:
    """A network with one cable to this machine. Use it in a `with` statement; calls block for milliseconds.

    Args:
        place: Which of the networks of this process it is, 0 to 7: no two at a time have the same.
    """

    def __init__(self, place: int = 0) -> None:
        assert 0 <= place < MAX_SPACES, place
        self._place = place

    def __enter__(self) -> Self:
        """Make the namespace and the cable.

        Raises:
            subprocess.SubprocessError: The kernel refuses; `stderr` says why.
        """
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], preexec_fn=dies_with_us(), stderr=subprocess.DEVNULL
        )
        try:
            self._build()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the cable and let go of the namespace."""
        self._end()

    @property
    def host(self) -> str:
        """The address of this machine, seen from inside."""
        return f"198.18.{self._base}.1"

    @property
    def prefix(self) -> list[str]:
        """What to put before a command so that it runs inside; it keeps its process id."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--"]

    def unplug(self) -> None:
        """Pull the cable: packets of both directions are lost, nobody is told."""
        _run("ip", "link", "set", self._outer, "down")

    @property
    def is_unplugged(self) -> bool:
        """Whether the kernel says that the cable carries nothing."""
        return Path(f"/sys/class/net/{self._outer}/operstate").read_text().strip() == "down"

    def plug(self) -> None:
        """Put the cable back."""
        _run("ip", "link", "set", self._outer, "up")

    @contextmanager
    def deaf_server(self) -> Iterator[None]:
        """Lose what is sent from inside, and nothing else: one-way loss."""
        route = ("blackhole", f"{self.host}/32")
        _run(*self.prefix, "ip", "route", "add", *route)
        try:
            yield
        finally:
            _run(*self.prefix, "ip", "route", "del", *route)

    @property
    def _base(self) -> int:
        return os.getpid() % 25 * 10 + self._place  # runs side by side mostly differ

    @property
    def _outer(self) -> str:
        return f"catga{os.getpid()}-{self._place}"[-15:]

    def _build(self) -> None:
        _wait_unshared(self._holder.pid)
        inner = f"{self._outer}i"[-15:]
        _run("ip", "link", "add", self._outer, "type", "veth", "peer", inner, "netns", str(self._holder.pid))
        _run("ip", "address", "add", f"{self.host}/30", "dev", self._outer)
        _run("ip", "link", "set", self._outer, "up")
        _run(*self.prefix, "ip", "link", "set", "lo", "up")
        _run(*self.prefix, "ip", "address", "add", f"198.18.{self._base}.2/30", "dev", inner)
        _run(*self.prefix, "ip", "link", "set", inner, "up")

    def _end(self) -> None:
        subprocess.run(["ip", "link", "delete", self._outer], stderr=subprocess.DEVNULL, check=False)
        self._holder.kill()
        self._holder.wait()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT)


def _wait_unshared(pid: int) -> None:
    """Wait until a process has a network of its own, or has failed to get one."""
    own = os.readlink("/proc/self/ns/net")
    for _ in itertools.repeat(None, 1000):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise OSError("unshare was refused")
        if os.readlink(f"/proc/{pid}/ns/net") != own:
            return
        time.sleep(0.005)
    raise OSError("unshare did not come to an end")
