"""What the process costs and how short of memory it is. Read from any thread, a few times a second."""

import contextlib
import gc
import os
import threading
from collections import deque
from pathlib import Path

import msgspec

from catga_bus.clock import Clock, cpu_seconds, monotonic
from catga_bus.vitals.memory import MemoryFiles, MemoryUse, read_text, resident_bytes

SAMPLE = 0.2
"""Seconds for which a reading is handed out again: whoever asks meanwhile shares it, and nobody shortens the interval
that another one's CPU share is measured over."""

GC_WINDOW = 10.0
"""Seconds over which the share of garbage collection is taken: a full collection is rare, and one of a second is a
tenth of a window rather than all of a quarter of a second."""

_MEMORY_INTERVAL = 1.0
# Seconds between two looks at the memory of the group: the kernel sums it up over all its CPUs for each.

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4_096
_FULL = 2  # the oldest generation


class VitalSigns(msgspec.Struct, frozen=True):
    """One reading. What the system does not tell is None."""

    cpu: float
    """Processor time over time since the reading before: 1.0 is one core, several threads may use more."""

    resident_bytes: int | None
    """Memory of the process that is in RAM."""

    memory: MemoryUse | None
    """At most 1 s old."""

    memory_stall: float | None
    """Share of the last 10 s in which something waited for memory (PSI, `some avg10`), 0.0 to 1.0: of the group where
    it has its own figure, else of the machine. At most 1 s old."""

    gc: float
    """Share of the last 10 s that went into garbage collection, 0.0 to 1.0."""

    gc_full: int
    """Full collections (generation 2) since the start."""


class Vitals:
    """Reads the signs of this process, and how much of its time goes into garbage collection.

    Measured on Linux with Python 3.11 on 2 cores: 8 microseconds a reading, 30 once a second. All of it may be called
    from any thread. What a system other than Linux does not tell is None.

    Args:
        clock: Monotonic seconds.
        cpu: Processor seconds of this process.
        root: Where the file systems of the kernel are mounted.
    """

    def __init__(self, clock: Clock = monotonic, cpu: Clock = cpu_seconds, root: Path = Path("/")) -> None:
        self._clock = clock
        self._cpu = cpu
        self._lock = threading.Lock()  # guards what a reading leaves for the next
        self._memory = MemoryFiles(root)
        self._statm = str(root / "proc/self/statm")
        self._last_at, self._last_cpu = clock(), cpu()
        self._memory_at = -_MEMORY_INTERVAL + self._last_at
        self._use: MemoryUse | None = None
        self._stall: float | None = None
        self._latest: VitalSigns | None = None
        # Written by the collector only, which never runs twice at a time.
        self._gc_began: float | None = None
        self._gc_seconds = 0.0
        self._gc_full = 0
        self._gc_readings = deque([(self._last_at, 0.0)])  # (instant, seconds so far), of the last GC_WINDOW

    def start(self) -> None:
        """Begin to measure garbage collection."""
        if self._on_gc not in gc.callbacks:
            gc.callbacks.append(self._on_gc)

    def stop(self) -> None:
        """Measure it no more, and leave nothing behind in the collector."""
        with contextlib.suppress(ValueError):
            gc.callbacks.remove(self._on_gc)

    def read(self) -> VitalSigns:
        """Return the present signs; those of a moment ago if they are younger than `SAMPLE`."""
        now = self._clock()
        with self._lock:
            latest = self._latest
            if latest is None or now - self._last_at >= SAMPLE:
                latest = self._latest = self._read(now)
            return latest

    def _read(self, now: float) -> VitalSigns:
        cpu = self._cpu()
        passed = now - self._last_at
        share = max(0.0, cpu - self._last_cpu) / passed if passed > 0.0 else 0.0
        self._last_at, self._last_cpu = now, cpu
        if now - self._memory_at >= _MEMORY_INTERVAL:
            self._memory_at = now
            self._use, self._stall = self._memory.read()
        resident = resident_bytes(read_text(self._statm), _PAGE_BYTES)
        return VitalSigns(share, resident, self._use, self._stall, self._gc_share(now), self._gc_full)

    def _gc_share(self, now: float) -> float:
        readings = self._gc_readings
        seconds = self._gc_seconds
        readings.append((now, seconds))
        while len(readings) > 2 and readings[1][0] <= now - GC_WINDOW:
            readings.popleft()
        since, before = readings[0]
        return min(1.0, (seconds - before) / (now - since)) if now > since else 0.0

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began = self._clock()
            return
        if self._gc_began is not None:  # else it was installed by the collection that ends here
            self._gc_seconds += self._clock() - self._gc_began
            self._gc_began = None
        if info["generation"] == _FULL:
            self._gc_full += 1
