"""One real node of catga_bus that tells what knowing the others costs it, thread by thread."""

import asyncio
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from catga_bus import Bus


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a node stands at one instant. Counts and processor times since its start."""

    at: float
    known: int
    interval: float
    """Seconds between its own beats."""

    beats_sent: int
    beats_heard: int
    probes: int
    deaths: int
    loop_cpu_seconds: float
    beats_cpu_seconds: float
    """Of the thread that sends its beats."""


class Listener:
    """A node without work.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._bus = Bus("listener", url=url, namespace=namespace)

    async def __aenter__(self) -> Self:
        """Start the node."""
        await self._bus.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the node."""
        await self._bus.drain()

    async def see(self, nodes: int, within: float) -> bool:
        """Wait until exactly so many nodes are online, this one included; say whether they became so."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            if len(self._bus.nodes(status="online")) == nodes:
                return True
            await asyncio.sleep(0.05)
        return False

    async def read(self) -> Reading:
        """Return where the node stands."""
        counts = self._bus.statistics().nodes
        return Reading(
            at=time.monotonic(),
            known=counts.known,
            interval=self._bus.node.interval,
            beats_sent=counts.beats_sent,
            beats_heard=counts.beats_heard,
            probes=counts.probes,
            deaths=counts.deaths,
            loop_cpu_seconds=_cpu_seconds(threading.main_thread()),
            beats_cpu_seconds=sum(_cpu_seconds(one) for one in threading.enumerate() if one.name == "catga-beats"),
        )


def _cpu_seconds(thread: threading.Thread) -> float:
    return 0.0 if thread.ident is None else time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
