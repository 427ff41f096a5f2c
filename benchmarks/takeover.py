"""Takeover: how long ordered partitions stand still when nodes are killed, frozen and rolled, and what that breaks.

Three nodes share 16 partitions, with one inbox in SQLite; a producer hands in numbered commands of a thousand accounts
at a steady rate. From the effects, in the order of their commits, follows for each partition how long it stood still,
and that nothing was lost, doubled or out of order. The part `leader` kills the server that leads the work queue, of
three, while nodes and producer go on. One command of ten is sent and its result waited for, the others are enqueued.
"""

import argparse
import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nats
import nats.errors

from benchmarks.errors import BenchmarkError
from benchmarks.fleet import freeze
from benchmarks.options import positive_integer, positive_number
from benchmarks.processes import RoleFailedError, RoleProcess
from benchmarks.reporting import Progress, Report, figure, markdown_table
from benchmarks.server import Server, open_cluster
from benchmarks.sides.ledger import PARTITIONS, SERVICE, Handed, create_ledger, read_ledger
from benchmarks.sides.stores import wait_empty
from benchmarks.statistics import Target, percentile
from benchmarks.takeovers import Count, Effect, Hit, Move, count, moves

HELP = "how long ordered partitions stand still when nodes and servers fail"

PARTS = ("kills", "freezes", "rolls", "leader")
ACCOUNTS = 1_000
FREEZE_SECONDS = 3.0
TIMEOUT = 15.0
"""Seconds after which the producer gives a command up."""

TARGETS = {
    "kill": Target(1.5, aim=0.7, higher_is_better=False),
    "hand-over": Target(0.15, higher_is_better=False),
}
"""Seconds, p99 of a partition."""

SEND_EVERY = 10
"""The producer waits for the result of each tenth command, and until the others are stored."""

_NODES = 3
_CALL_SECONDS = 30.0
_WHOLE_SECONDS = 30.0
_SETTLE_SECONDS = 0.5
_DOWN_SECONDS = 3.0
_POLL_SECONDS = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--only", type=_parts, default=PARTS, metavar="PART,PART,...", help=f"which parts (default: {','.join(PARTS)})"
    )
    for name, default, what in (
        ("kills", 50, "nodes killed"),
        ("freezes", 20, "nodes frozen for 3 s"),
        ("rolls", 20, "rolling restarts of all nodes"),
        ("leader-kills", 5, "times that the leading server is killed"),
    ):
        parser.add_argument(
            f"--{name}", type=positive_integer, metavar="N", help=f"{what} (default: {default}; quick: 1)"
        )
    parser.add_argument(
        "--rate", type=positive_number, default=1_000.0, metavar="R", help="commands per second (default: 1000)"
    )


def run(options: argparse.Namespace, server: Server, progress: Progress) -> Report:
    """Do one part after the other, each with processes of its own."""

    def number(value: int | None, usual: int) -> int:
        return value if value is not None else 1 if options.quick else usual

    times = {
        "kills": number(options.kills, 50),
        "freezes": number(options.freezes, 20),
        "rolls": number(options.rolls, 20),
        "leader": number(options.leader_kills, 5),
    }
    progress.expect(sum(times[part] for part in options.only))
    parts: dict[str, Part] = {}
    for part in options.only:
        if part == "leader":
            with open_cluster(3) as cluster:
                parts[part] = _run_part(part, times[part], cluster, options.rate, progress)
        else:
            parts[part] = _run_part(part, times[part], server, options.rate, progress)
    settings = {
        "times": times,
        "rate": options.rate,
        "accounts": ACCOUNTS,
        "partitions": PARTITIONS,
        "timeout": TIMEOUT,
    }
    raw = {"settings": settings, "parts": {name: part.as_json() for name, part in parts.items()}}
    return Report(_markdown(parts), raw, sound=all(part.is_sound for part in parts.values()))


class Part:
    """What one part came to."""

    def __init__(
        self, effects: Sequence[Effect], hits: Sequence[Hit], handed: Handed, slowest: Sequence[float]
    ) -> None:
        self.moves: list[Move] = moves(effects, hits)
        self.count: Count = count(effects, handed.accepted, handed.unknown)
        self.failures: list[str] = handed.failures
        self.hits = hits
        self.slowest = slowest
        """Of the calls around each leader kill, in seconds."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing happened that must not."""
        return not self.count.violations and not self.failures

    def seconds(self, kind: str) -> list[float]:
        """Return how long the partitions stood still that moved in this way."""
        return [move.seconds for move in self.moves if move.kind == kind]

    def as_json(self) -> dict[str, Any]:
        """Return all of it for the raw data."""
        return {
            "count": self.count.as_json(),
            "failures": self.failures,
            "hits": [hit._asdict() for hit in self.hits],
            "moves": [move._asdict() for move in self.moves],
            "slowest_call_seconds": list(self.slowest),
        }


def _run_part(part: str, times: int, server: Server, rate: float, progress: Progress) -> Part:
    replicas = max(1, len(server.members))
    slowest: list[float] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="bench-")))
        nodes = stack.enter_context(_Nodes(server, f"{server.namespace}-{part}", directory / "ledger.db", replicas))
        at = {"url": server.url, "namespace": nodes.namespace}
        producer = stack.enter_context(
            RoleProcess(
                "benchmarks.sides.ledger:Producer", **at, accounts=ACCOUNTS, timeout=TIMEOUT, send_every=SEND_EVERY
            )
        )
        producer.call("begin", timeout=_CALL_SECONDS, rate=rate)
        time.sleep(_SETTLE_SECONDS)
        act: dict[str, Callable[[], None]] = {"kills": nodes.kill, "freezes": nodes.freeze, "rolls": nodes.roll}
        for turn in range(1, times + 1):
            progress.step(f"{part}, {turn} of {times}")
            if part == "leader":
                _kill_leader(server, nodes.stream)
                slowest.append(producer.call("slowest", timeout=_CALL_SECONDS))
            else:
                act[part]()
        handed: Handed = producer.call("end", timeout=_CALL_SECONDS + TIMEOUT)
        asyncio.run(wait_empty(server.url, nodes.stream))
        return Part(read_ledger(directory / "ledger.db"), nodes.hits, handed, slowest)


def _kill_leader(server: Server, stream: str) -> None:
    """Kill the server that leads a stream, leave it down for a while, and start it again."""
    name = asyncio.run(_leader_of(server.url, stream))
    leader = server.members[int(name.removeprefix("s"))]
    leader.kill()
    time.sleep(2 * TIMEOUT / 3)
    leader.start()
    time.sleep(_DOWN_SECONDS)


async def _leader_of(url: str, stream: str) -> str:
    connection = await nats.connect(url.split(","))
    try:
        until = time.monotonic() + _WHOLE_SECONDS
        while time.monotonic() < until:
            with suppress(nats.errors.Error, TimeoutError):
                info = await connection.jetstream(timeout=2.0).stream_info(stream)
                if info.cluster is not None and info.cluster.leader:
                    return info.cluster.leader
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await connection.close()
    raise BenchmarkError(f"{stream} has no leader after {_WHOLE_SECONDS:g} s")


class _Nodes:
    """Three node processes that faults befall in turn, and one that is ready to take a place.

    Args:
        server: Where they work.
        namespace: Keeps this run apart.
        path: The file of the effects.
        replicas: Servers that hold each stream.
    """

    def __init__(self, server: Server, namespace: str, path: Path, replicas: int) -> None:
        self.namespace = namespace
        self.stream = f"{namespace}-cmd-{SERVICE}"
        self.hits: list[Hit] = []
        self._arguments = {"url": server.url, "namespace": namespace, "path": str(path), "replicas": replicas}
        create_ledger(path)
        self._live: list[tuple[RoleProcess, str]] = []
        self._spare: RoleProcess | None = None
        self._all: list[RoleProcess] = []

    def __enter__(self) -> "_Nodes":
        """Start them; each owns its share when this returns."""
        try:
            while len(self._live) < _NODES:
                self._join()
            self._wait_whole()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._end()

    def kill(self) -> None:
        """Kill the oldest node, and have another one join when its partitions have been taken over."""
        process, name = self._live.pop(0)
        self.hits.append(Hit("kill", name, time.monotonic()))
        process.send_signal(signal.SIGKILL)
        process.join(_CALL_SECONDS)
        self._replace()

    def freeze(self) -> None:
        """Freeze the oldest node for three seconds, and wait until it has its share again."""
        process, name = self._live.pop(0)
        self._live.append((process, name))
        self.hits.append(Hit("freeze", name, time.monotonic()))
        freeze(process, FREEZE_SECONDS)
        self._wait_whole()

    def roll(self) -> None:
        """Restart all nodes, one after the other: SIGTERM, wait, and another one joins."""
        for _ in range(_NODES):
            process, name = self._live.pop(0)
            self.hits.append(Hit("roll", name, time.monotonic()))
            process.send_signal(signal.SIGTERM)
            process.join(_CALL_SECONDS)
            self._join()
            self._wait_whole()

    def _replace(self) -> None:
        self._wait_whole()
        self._join()
        self._wait_whole()

    def _join(self) -> None:
        if self._spare is None:
            self._spare = self._launch()
        process = self._spare
        process.result(timeout=_CALL_SECONDS)
        self._live.append((process, process.call("join", timeout=_CALL_SECONDS)))
        self._spare = self._launch()

    def _launch(self) -> RoleProcess:
        process = RoleProcess("benchmarks.sides.ledger:Node", **self._arguments)
        self._all.append(process)
        process.launch()
        return process

    def _wait_whole(self) -> None:
        """Wait until the nodes share all partitions evenly."""
        until = time.monotonic() + _WHOLE_SECONDS
        least = PARTITIONS // len(self._live)
        while True:
            shares = [process.call("owned", timeout=_CALL_SECONDS) for process, _ in self._live]
            if sum(shares) == PARTITIONS and min(shares) >= least:
                break
            if time.monotonic() > until:
                raise BenchmarkError(f"the nodes own {shares} of {PARTITIONS} partitions after {_WHOLE_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        time.sleep(_SETTLE_SECONDS)

    def _end(self) -> None:
        """End all at once, not one drain after the other."""
        for process in self._all:
            for number in (signal.SIGCONT, signal.SIGTERM):
                with suppress(RoleFailedError, ProcessLookupError):
                    process.send_signal(number)
        for process in self._all:
            process.__exit__(None, None, None)


def _markdown(parts: dict[str, Part]) -> str:
    rows = []
    for name, kind, title in (
        ("kills", "kill", "killed (SIGKILL), from the signal"),
        ("freezes", "freeze", "frozen for 3 s (SIGSTOP), from the signal"),
        ("kills", "hand-over", "handed over to a node that joins, after a kill"),
        ("freezes", "hand-over", "handed back to a node that goes on"),
        ("rolls", "hand-over", "handed over in a rolling restart"),
    ):
        seconds = parts[name].seconds(kind) if name in parts else []
        if seconds:
            target = TARGETS.get(kind)
            p99 = percentile(seconds, 0.99)
            verdict = "" if target is None else f"at most {figure(target.required)} s: {target.verdict(p99)}"
            cells = [figure(percentile(seconds, 0.5)), figure(p99), figure(max(seconds)), verdict]
            rows.append([title, f"{len(seconds):,}", *cells])
    tables = []
    if rows:
        tables.append(
            markdown_table(["a partition's owner was", "partitions", "p50, s", "p99, s", "worst, s", "p99"], rows)
        )
    heads = ["part", "effects", "accounts", "lost", "doubled", "out of order", "epochs that fell", "calls that failed"]
    counts = [
        [
            name,
            f"{part.count.effects:,}",
            f"{part.count.accounts:,}",
            str(part.count.lost),
            str(part.count.doubled),
            str(part.count.out_of_order),
            str(part.count.falls),
            str(len(part.failures)),
        ]
        for name, part in parts.items()
    ]
    tables.append(markdown_table(heads, counts))
    if "leader" in parts:
        slowest = parts["leader"].slowest
        tables.append(
            f"Kills of the server that leads the work queue, of three: {len(slowest)}; the slowest call around each "
            f"took {', '.join(figure(seconds) for seconds in slowest)} s, of {TIMEOUT:g} s that it may take. "
            f"Calls that failed: {_failures(parts['leader'].failures)}."
        )
    return "\n\n".join(tables)


def _failures(failures: Sequence[str]) -> str:
    counts = Counter(failures)
    return ", ".join(f"{times} ({what})" for what, times in counts.most_common()) or "none"


def _parts(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in names)
