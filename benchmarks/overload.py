"""Overload: ten times what a slow handler can do, in large payloads.

The node must stay small and every caller must get an answer. The load is open: requests are sent at
a fixed rate whether or not earlier ones were answered, as the users of a service do. A closed load
(so many in flight) would slow down with the node and never overload it.
"""

import argparse
import asyncio
import time
from collections import Counter
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from benchmarks.options import positive_number
from benchmarks.processes import RoleProcess
from benchmarks.reporting import Progress, Report, figure, markdown_table, mebibytes
from benchmarks.server import Server
from benchmarks.statistics import Target, percentile
from catga_bus import Bus, Ok, Request

HELP = "64 KiB payloads at ten times the capacity of a slow handler"

PAYLOAD_BYTES = 65_536
OVERLOAD = 10
CONCURRENCY = 8
HANDLER_SECONDS = 0.05
CAPACITY = CONCURRENCY / HANDLER_SECONDS
"""Requests per second that the handler can do at most: 160.

Ten times that is 100 MiB/s of payload, which one caller can send.
"""

SEND_TIMEOUT = 2.0
GRACE_SECONDS = 5.0
"""A caller without an answer this long after its timeout counts as hanging."""

WANTED_EXTRA_BYTES = Target(64 * 2**20, higher_is_better=False)

_SAMPLE_SECONDS = 0.05
_STEP_SECONDS = 5.0
_TICK_SECONDS = 0.005


class Upload(Request[int]):
    """Ask for the size of a payload."""

    payload: bytes


class SlowNode:
    """A node whose handler takes its time.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._bus = Bus("bench-slow", url=url, namespace=namespace)

        @self._bus.handler(concurrency=CONCURRENCY)
        async def upload(request: Upload) -> int:
            await asyncio.sleep(HANDLER_SECONDS)
            return len(request.payload)

    async def __aenter__(self) -> Self:
        """Start the node."""
        await self._bus.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the node."""
        await self._bus.__aexit__(kind, error, traceback)


@dataclass(frozen=True, slots=True)
class Flood:
    """What became of the requests of a flood."""

    sent: int
    seconds: float
    """How long requests were sent, without the wait for the last answers."""

    outcomes: dict[str, int]
    """How many ended in which way: `ok`, or the outcome and the code."""

    hanging: int
    """How many had no answer long after their timeout."""

    p50_seconds: float
    p99_seconds: float
    slowest_seconds: float


class Flooder:
    """A caller that does not wait for answers before it sends the next request.

    Args:
        url: Where the server is.
        namespace: The node's.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._bus = Bus("bench-flood", url=url, namespace=namespace)
        self._outcomes: Counter[str] = Counter()
        self._waited: list[float] = []
        self._payload = bytes(PAYLOAD_BYTES)

    async def __aenter__(self) -> Self:
        """Start the bus."""
        await self._bus.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the bus."""
        await self._bus.__aexit__(kind, error, traceback)

    async def flood(self, rate: float, seconds: float) -> Flood:
        """Send `rate` requests per second for `seconds`, then wait for the last answers."""
        waiting: set[asyncio.Task[None]] = set()
        sent = 0
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            while sent < elapsed * rate:
                task = asyncio.create_task(self._ask())
                waiting.add(task)
                task.add_done_callback(waiting.discard)
                sent += 1
            await asyncio.sleep(_TICK_SECONDS)
        hanging: set[asyncio.Task[None]] = set()
        if waiting:
            _, hanging = await asyncio.wait(waiting, timeout=SEND_TIMEOUT + GRACE_SECONDS)
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        waited = self._waited or [0.0]
        return Flood(
            sent,
            elapsed,
            dict(self._outcomes.most_common()),
            len(hanging),
            percentile(waited, 0.5),
            percentile(waited, 0.99),
            max(waited),
        )

    async def _ask(self) -> None:
        started = time.perf_counter()
        try:
            result = await self._bus.send(Upload(self._payload), timeout=SEND_TIMEOUT)
        except Exception as error:
            # Every way to end is counted, those that should not exist too.
            self._outcomes[f"raised {type(error).__name__}"] += 1
        else:
            self._outcomes["ok" if isinstance(result, Ok) else f"{result.outcome} {result.code}"] += 1
        self._waited.append(time.perf_counter() - started)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--seconds",
        type=positive_number,
        help="how long to overload (default: 60; quick: 3)",
        metavar="S",
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Flood a slow node and watch its memory meanwhile."""
    seconds = options.seconds if options.seconds is not None else 3.0 if options.quick else 60.0
    progress.expect(int(seconds // _STEP_SECONDS) + 1)
    where = {"url": server.url, "namespace": server.namespace}
    with (
        RoleProcess("benchmarks.overload:SlowNode", **where) as node,
        RoleProcess("benchmarks.overload:Flooder", **where) as flooder,
    ):
        base = node.rss_bytes()
        flooder.begin("flood", rate=CAPACITY * OVERLOAD, seconds=seconds)
        samples = _watch(node, flooder, seconds, progress)
        flood: Flood = flooder.result(timeout=SEND_TIMEOUT + GRACE_SECONDS + seconds)
        peak = max(node.peak_rss_bytes(), *samples)
    raw = {
        "settings": {"seconds": seconds, "payload_bytes": PAYLOAD_BYTES, "capacity": CAPACITY},
        "base_rss_bytes": base,
        "peak_rss_bytes": peak,
        "node_rss_bytes_over_time": samples,
        "flood": asdict(flood),
    }
    answered = sum(flood.outcomes.values())
    sound = flood.hanging == 0 and answered == flood.sent
    return Report(_markdown(base, peak, flood), raw, sound=sound)


def _watch(node: RoleProcess, flooder: RoleProcess, seconds: float, progress: Progress) -> list[int]:
    """Return the node's memory, sampled until the flood is over, at least once."""
    samples = [node.rss_bytes()]
    started = time.monotonic()
    told = -_STEP_SECONDS
    while not flooder.is_done(_SAMPLE_SECONDS):
        samples.append(node.rss_bytes())
        elapsed = time.monotonic() - started
        if told + _STEP_SECONDS <= elapsed <= seconds:
            told += _STEP_SECONDS
            progress.step(f"{elapsed:.0f} s, node at {mebibytes(samples[-1])} MiB")
    return samples


def _markdown(base: int, peak: int, flood: Flood) -> str:
    outcomes = [[name, f"{count:,}"] for name, count in flood.outcomes.items()]
    outcomes.append(["hanging", f"{flood.hanging:,}"])
    extra = peak - base
    return (
        f"{flood.sent:,} requests of {PAYLOAD_BYTES:,} bytes in {figure(flood.seconds)} s: "
        f"{figure(flood.sent / flood.seconds / CAPACITY)} times the capacity "
        f"of {CAPACITY:g} requests/s.\n\n"
        f"{markdown_table(['how it ended', 'requests'], outcomes)}\n\n"
        f"Time to an answer: p50 {figure(flood.p50_seconds)} s, p99 {figure(flood.p99_seconds)} s, "
        f"slowest {figure(flood.slowest_seconds)} s, with a timeout of {SEND_TIMEOUT:g} s.\n\n"
        f"Node: base {mebibytes(base)} MiB, peak {mebibytes(peak)} MiB, "
        f"{mebibytes(extra)} MiB above its base. "
        f"Target: at most {mebibytes(WANTED_EXTRA_BYTES.required)} MiB: "
        f"{WANTED_EXTRA_BYTES.verdict(extra)}."
    )
