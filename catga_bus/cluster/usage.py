"""What this process uses: CPU and memory, for the beats."""

import os

from catga_bus.clock import Clock


class Usage:
    """Reads the share of a core used since the last reading, and the resident memory.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._page_bytes = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4_096
        self._read_at = clock()
        self._used = _cpu_seconds()

    def read(self) -> tuple[float, int]:
        """Return the share of a core since the last call, and bytes of memory (0 where the system does not tell)."""
        now, used = self._clock(), _cpu_seconds()
        passed = now - self._read_at
        share = (used - self._used) / passed if passed > 0.0 else 0.0
        self._read_at, self._used = now, used
        return max(0.0, share), self._memory_bytes()

    def _memory_bytes(self) -> int:
        try:
            with open("/proc/self/statm", "rb") as file:
                return int(file.read().split()[1]) * self._page_bytes
        except (OSError, ValueError, IndexError):
            return 0


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system
