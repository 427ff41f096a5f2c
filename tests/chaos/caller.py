"""A caller under fault: calls at a steady rate, each written down. `python -m tests.chaos.caller PLAN`, until SIGTERM.

The load is open: calls are made when they are due, whether or not those before have been answered, so that a fault
cannot hide in calls that were not made. SIGTERM ends the making; the process ends when every call has ended.
"""

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from catga_bus import Bus, Err
from tests.chaos.history import Done, Invoke, Recorder, View
from tests.chaos.service import Answer, Heavy, Pinned, Poison, Quick, Slow

TICK = 0.005
MAX_IN_FLIGHT = 20_000
# Calls that would be more are not made, and so are not part of the history.

# A slow request that its node takes with it into a freeze is run again when the node is declared dead, a second later:
# with 0.3 s of work both executions and the second between them fit a deadline of 2 s.

WORK: dict[str, tuple[type[Quick | Slow | Pinned | Heavy | Poison], Callable[[random.Random], float]]] = {
    "Quick": (Quick, lambda rng: rng.uniform(0.0, 0.005)),
    "Slow": (Slow, lambda rng: 0.3),
    "Pinned": (Pinned, lambda rng: 0.0),
    "Heavy": (Heavy, lambda rng: 0.02),
    "Poison": (Poison, lambda rng: 0.05),
}
"""Class and seconds of work of each kind of call."""


class CallerPlan(msgspec.Struct, frozen=True):
    """What a caller process is told."""

    url: str
    namespace: str
    name: str
    history: str
    """Directory."""

    seed: str
    rate: float
    """Calls per second."""

    timeout: float
    """Seconds until the deadline of each call."""

    mix: dict[str, float]
    """Shares of the kinds of `WORK`."""

    node: str | None = None
    """The one node to ask, or None for any."""

    limit: int | None = None
    """Calls to make before it makes no more; None without a bound."""


class Caller:
    """Makes the calls of a plan.

    Args:
        plan: Which calls.
        bus: Started.
        recorder: Of this process.
    """

    def __init__(self, plan: CallerPlan, bus: Bus, recorder: Recorder) -> None:
        self._plan = plan
        self._bus = bus
        self._recorder = recorder
        self._clock = recorder.clock
        self._rng = random.Random(plan.seed)
        self._made = 0
        self._calls: set[asyncio.Task[None]] = set()

    async def watch(self) -> None:
        """Write down what this caller believes of the nodes, until the bus is closed."""
        async for change in self._bus.watch_nodes():
            if change.node is not None and change.kind != "updated":
                self._recorder.write(View(self._clock(), self._plan.name, change.node.id, str(change.kind)))

    async def run(self, over: asyncio.Event) -> None:
        """Make calls until it is over, and wait for the end of each."""
        began = self._clock()
        while not over.is_set():
            due = int((self._clock() - began) * self._plan.rate) - self._made
            for _ in range(min(due, MAX_IN_FLIGHT - len(self._calls))):
                self._make()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), TICK)
        await asyncio.gather(*self._calls)

    def _make(self) -> None:
        if self._plan.limit is not None and self._made >= self._plan.limit:
            return
        self._made += 1
        kind = self._rng.choices(list(self._plan.mix), list(self._plan.mix.values()))[0]
        task = asyncio.create_task(self._call(kind, f"{self._plan.name}-{self._made}"))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, kind: str, op: str) -> None:
        cls, seconds = WORK[kind]
        plan, clock = self._plan, self._clock
        work = seconds(self._rng)
        request = cls(op, work)
        began = clock()
        self._recorder.write(Invoke(began, op, plan.name, kind, plan.timeout, plan.node, work))
        try:
            result = await self._bus.send(request, timeout=plan.timeout, node=plan.node)
        except Exception as error:
            code, outcome, node, attempts = f"raised {error!r}", "raised", None, 0
        else:
            code, outcome, node, attempts = _read(result.value if result.is_ok is True else result, op)
        now = clock()
        self._recorder.write(Done(now, op, code, outcome, now - began, node, attempts))


def _read(result: Answer | Err, op: str) -> tuple[str, str, str | None, int]:
    """Return code, outcome, node and attempts; an answer that is somebody else's is not ok."""
    if isinstance(result, Err):
        return result.code, result.outcome, result.node, result.attempts
    if result.op != op:
        return f"answer of {result.op}", "failed", result.node, 1
    return "ok", "ok", result.node, 1


async def main() -> None:
    """Run the caller of a plan until SIGTERM."""
    plan = msgspec.json.decode(sys.argv[1], type=CallerPlan)
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    async with Bus(plan.name, url=plan.url, namespace=plan.namespace, node_id=plan.name) as bus:
        caller = Caller(plan, bus, Recorder(Path(plan.history), plan.name))
        watch = asyncio.create_task(caller.watch())
        await caller.run(over)
    await watch


if __name__ == "__main__":
    asyncio.run(main())
