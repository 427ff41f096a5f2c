"""What a result was measured on: without it a number says nothing."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = ("nats-py", "msgspec", "uvloop", "faststream", "pydantic", "fast-depends")


def describe_machine(server_version: str) -> dict[str, Any]:
    """Return processor, memory, system, versions and the commit measured.

    Args:
        server_version: Of the nats-server in use.
    """
    return {
        "cpu": _cpu_model(),
        "cores": core_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_before": [round(load, 2) for load in psutil.getloadavg()],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "loop": "uvloop",
        "nats_server": server_version,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "commit": _commit(),
    }


def core_count() -> int:
    """Return how many cores the machine has."""
    return psutil.cpu_count() or 1


def busy_percent(seconds: float) -> float:
    """Watch the machine for `seconds`, and return how busy its cores were, 0 to 100."""
    return float(psutil.cpu_percent(interval=seconds))


def busy_seconds() -> float:
    """Return the processor time that all programs together have used, and the host has withheld, since the start.

    Interrupts are left out: the kernel's work on loopback would count as somebody else's.
    """
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "steal", 0.0))


def machine_line(machine: dict[str, Any]) -> str:
    """Return the description as one line for people."""
    libraries = machine["libraries"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"{machine['python']}, uvloop {libraries['uvloop']}, nats-server {machine['nats_server']}, "
        f"nats-py {libraries['nats-py']}, msgspec {libraries['msgspec']}, "
        f"FastStream {libraries['faststream']}; commit {machine['commit']}"
    )


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of this checkout, marked if files that it tracks have changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
