"""A producer under fault: numbered values per key at a steady rate. `python -m tests.chaos.stored.producer PLAN`.

Until SIGTERM, or its limit; it ends when the outcome of every message is known. The load is open, see
`tests.chaos.caller`. The keys of a producer are its own, so that their order is that in which it sends them.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import msgspec

from catga_bus import Bus
from catga_bus.errors import CallError
from tests.chaos.history import Recorder
from tests.chaos.stored import bugs
from tests.chaos.stored.history import Sent, Settled
from tests.chaos.stored.messages import SERVICE, WORK, Amend, Post, ProducerPlan, Told

TICK = 0.005
MAX_IN_FLIGHT = 20_000


class Producer:
    """Sends the messages of a plan.

    Args:
        plan: Which.
        bus: Started.
        recorder: Of this process.
    """

    def __init__(self, plan: ProducerPlan, bus: Bus, recorder: Recorder) -> None:
        self._plan = plan
        self._bus = bus
        self._recorder = recorder
        self._rng = random.Random(plan.seed)
        self._values: Counter[str] = Counter()
        self._made = 0
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self, over: asyncio.Event) -> None:
        """Send until it is over, and wait for the outcome of each message."""
        clock = self._recorder.clock
        began = clock()
        while not over.is_set():
            due = int((clock() - began) * self._plan.rate) - self._made
            for _ in range(min(due, MAX_IN_FLIGHT - len(self._calls))):
                self._make()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), TICK)
        await asyncio.gather(*self._calls)

    def _make(self) -> None:
        plan, rng = self._plan, self._rng
        if plan.limit is not None and self._made >= plan.limit:
            return
        kind = rng.choices(list(plan.mix), list(plan.mix.values()))[0]
        work = WORK[plan.opening[self._made] if self._made < len(plan.opening) else kind]
        self._made += 1
        # Events have keys of their own: they are another order.
        is_event = rng.random() < plan.events
        key = f"{plan.name}-{'e' if is_event else 'c'}{rng.randrange(plan.keys)}"
        self._values[key] += 1
        cls = Told if is_event else rng.choice((Post, Amend))
        message = cls(f"{plan.name}-{self._made}", key, self._values[key], work)
        waits = not is_event and rng.random() < plan.waits
        # Tasks start in the order in which they were made, and nothing is awaited before a message has its place.
        task = asyncio.create_task(self._call(message, waits=waits))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, message: Post | Amend | Told, *, waits: bool) -> None:
        plan, clock = self._plan, self._recorder.clock
        service = "" if isinstance(message, Told) else SERVICE
        self._recorder.write(
            Sent(clock(), message.op, plan.name, service, message.key, message.value, message.work, waits, plan.timeout)
        )
        outcome, code, answer, sequence = await self._outcome(message, waits=waits)
        self._recorder.write(Settled(clock(), message.op, outcome, code, answer, sequence))

    async def _outcome(self, message: Post | Amend | Told, *, waits: bool) -> tuple[str, str, str, int]:
        timeout = self._plan.timeout
        try:
            if isinstance(message, Told):
                stored = await self._bus.publish(message, timeout=timeout)
                return "ok", "ok", "", stored.sequence if stored is not None else 0
            if not waits:
                return "ok", "ok", "", (await self._bus.enqueue(message, timeout=timeout)).sequence
            result = await self._bus.send(message, timeout=timeout)
        except CallError as error:
            return str(error.outcome), str(error.code), "", 0
        if result.is_ok is True:
            return "ok", "ok", result.value, 0
        return str(result.outcome), str(result.code), "", 0


async def main() -> None:
    """Run the producer of a plan until SIGTERM."""
    plan = msgspec.json.decode(sys.argv[1], type=ProducerPlan)
    bugs.plant(os.environ.get("CHAOS_BUG", ""))
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    options = {"node_id": plan.name, "stream_replicas": plan.replicas, "event_max_bytes": 67_108_864}
    async with Bus(
        plan.name, url=plan.url, namespace=plan.namespace, partitions=plan.partitions, reconnect_delay=0.05, **options
    ) as bus:
        await Producer(plan, bus, Recorder(Path(plan.history), plan.name)).run(over)


if __name__ == "__main__":
    asyncio.run(main())
