"""How short of memory the process is: what the kernel writes about its control group and the machine."""

import contextlib
import os
from pathlib import Path

import msgspec

_READ_BYTES = 16_384  # memory.stat of cgroup v2 has 1,500 to 3,000 bytes
_UNLIMITED = 1 << 62  # cgroup v1 writes the largest multiple of a page below 2**63 for "none"


class MemoryUse(msgspec.Struct, frozen=True):
    """How much of its memory the process's group, or the machine, has used."""

    used_bytes: int
    """Without pages of files that the kernel drops when it needs them."""

    limit_bytes: int
    """Where the kernel begins to kill."""

    is_group: bool
    """Whether a limit of a control group counts, as in a container; else the memory of the machine."""

    @property
    def share(self) -> float:
        """Part of the limit that is used, 0.0 to 1.0 and rarely a little above."""
        return self.used_bytes / self.limit_bytes


class MemoryFiles:
    """The files that tell of memory: of the tightest control group that this process is in, and of the machine.

    Args:
        root: Where the file systems of the kernel are mounted.
    """

    def __init__(self, root: Path) -> None:
        self._meminfo = str(root / "proc/meminfo")
        machine = machine_memory(read_text(self._meminfo))
        total = machine.limit_bytes if machine is not None else None
        groups = group_directories(read_text(str(root / "proc/self/cgroup")), root / "sys/fs/cgroup")
        limits = [(limit, group) for group in groups if (limit := group.limit(total)) is not None]
        self._group = min(limits, key=lambda entry: entry[0])[1] if limits else None
        pressures = [*(group.pressure for group in groups[:1]), str(root / "proc/pressure/memory")]
        self._pressure = next((path for path in pressures if memory_stall(read_text(path)) is not None), None)

    def read(self) -> tuple[MemoryUse | None, float | None]:
        """Return how much is used, and how much of the time something waits for memory."""
        use = self._group.use() if self._group is not None else None
        if use is None:
            use = machine_memory(read_text(self._meminfo))
        return use, memory_stall(read_text(self._pressure)) if self._pressure is not None else None


class GroupDirectory(msgspec.Struct, frozen=True):
    """One control group in the file system, of version 1 or 2."""

    path: str
    is_v2: bool

    @property
    def pressure(self) -> str:
        """The file of its pressure; version 1 has none."""
        return f"{self.path}/memory.pressure"

    def limit(self, machine_bytes: int | None) -> int | None:
        """Return its limit in bytes; None if it has none below the memory of the machine."""
        limit = group_number(read_text(f"{self.path}/{'memory.max' if self.is_v2 else 'memory.limit_in_bytes'}"))
        if limit is None or limit <= 0 or limit >= (machine_bytes if machine_bytes is not None else _UNLIMITED):
            return None
        return limit

    def use(self) -> MemoryUse | None:
        """Return how much of its limit is used; None if its files have gone."""
        limit = self.limit(None)  # read again: it may be raised and lowered while the process runs
        used = group_number(read_text(f"{self.path}/{'memory.current' if self.is_v2 else 'memory.usage_in_bytes'}"))
        if limit is None or used is None:
            return None
        return MemoryUse(max(0, used - droppable_bytes(read_text(f"{self.path}/memory.stat"))), limit, is_group=True)


# What the kernel writes, as values. Everything below takes text and returns None for what it cannot read.


def resident_bytes(statm: str | None, page_bytes: int) -> int | None:
    """Return the memory in RAM out of `/proc/<pid>/statm`.

    Source:
        proc_pid_statm(5): the second number is the resident set size, in pages.
    """
    fields = (statm or "").split()
    return int(fields[1]) * page_bytes if len(fields) > 1 and fields[1].isdecimal() else None


def machine_memory(meminfo: str | None) -> MemoryUse | None:
    """Return the use of the machine's memory out of `/proc/meminfo`.

    Source:
        proc_meminfo(5): `MemAvailable` is what new programs may have without swapping, in KiB.
    """
    sizes = _keyed(meminfo, ("MemTotal:", "MemAvailable:"))
    total, available = sizes.get("MemTotal:"), sizes.get("MemAvailable:")
    if not total or available is None:
        return None
    return MemoryUse(max(0, total - available) * 1_024, total * 1_024, is_group=False)


def memory_stall(pressure: str | None) -> float | None:
    """Return the share of the last 10 s in which at least one task waited for memory, 0.0 to 1.0.

    Source:
        Documentation/accounting/psi.rst of Linux: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, in per cent.
    """
    for line in (pressure or "").splitlines():
        kind, *fields = line.split()[:2] or [""]
        if kind == "some" and fields and fields[0].startswith("avg10="):
            with contextlib.suppress(ValueError):
                return float(fields[0].removeprefix("avg10=")) / 100.0
    return None


def group_number(text: str | None) -> int | None:
    """Return the number in a file of a control group; None for `max`."""
    value = (text or "").strip()
    return int(value) if value.isdecimal() else None


def droppable_bytes(stat: str | None) -> int:
    """Return the pages of files that were not used lately, out of a group's `memory.stat`; 0 where it does not say.

    They are counted as used by the group, but the kernel drops them rather than kill. A kubelet takes them off as well.
    """
    sizes = _keyed(stat, ("inactive_file", "total_inactive_file"))
    # Version 1 has both, with and without the groups below; its `usage` is with them.
    return sizes.get("total_inactive_file", sizes.get("inactive_file", 0))


def group_directories(cgroup: str | None, mount: Path) -> list[GroupDirectory]:
    """Return the control groups of a process that govern memory, from its own up to the root.

    A container without a namespace for groups sees the host's path, which is not there: its own group is mounted as the
    root, the last of the list.

    Args:
        cgroup: Text of `/proc/<pid>/cgroup`.
        mount: Where control groups are mounted.

    Source:
        cgroups(7): `hierarchy:controllers:path`; version 2 is hierarchy 0 without controllers.
    """
    v1: str | None = None
    v2: str | None = None
    for line in (cgroup or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            v1 = path
        elif number == "0" and not controllers:
            v2 = path
    if v1 is not None:
        base, path = mount / "memory", v1
    elif v2 is not None:
        base, path = mount, v2
    else:
        return []
    parts = [part for part in path.split("/") if part]
    if ".." in parts:  # a group outside of the namespace: only the root of the mount is ours to see
        parts = []
    return [GroupDirectory(str(base.joinpath(*parts[:depth])), v1 is None) for depth in range(len(parts), -1, -1)]


def _keyed(text: str | None, names: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in (text or "").splitlines():
        if line.startswith(names):
            name, _, rest = line.partition(" ")
            value = rest.split()[:1]
            if name in names and value and value[0].isdecimal():
                found[name] = int(value[0])
    return found


def read_text(path: str) -> str | None:
    """Return the beginning of a file of the kernel; None if it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
    try:
        return os.read(file, _READ_BYTES).decode("ascii", "replace")
    except OSError:  # pressure is switched off: it opens and cannot be read
        return None
    finally:
        os.close(file)
