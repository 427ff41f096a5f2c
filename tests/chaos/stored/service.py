"""A service of the rig whose effects lie in a store: `python -m tests.chaos.stored.service PLAN`, until SIGTERM.

Every effect is a row: its place in the table is the order of commits. With `CHAOS_BUG` set the process has the bug of
that name, see `tests.chaos.stored.bugs`.
"""

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from catga_bus import Bus, Context
from catga_bus.resilience.retry import RetryOptions
from tests.chaos.history import Recorder
from tests.chaos.stored import bugs
from tests.chaos.stored.history import Begun, Counts, Ended, Hit
from tests.chaos.stored.messages import MAX_ATTEMPTS, Amend, NodePlan, Post, Told
from tests.chaos.stored.points import Points, TellingInbox, install

EFFECTS = """CREATE TABLE IF NOT EXISTS effects (
    place INTEGER PRIMARY KEY AUTOINCREMENT, t REAL NOT NULL, op TEXT NOT NULL, execution TEXT NOT NULL,
    key TEXT NOT NULL, value INTEGER NOT NULL, domain TEXT NOT NULL, partition INTEGER NOT NULL,
    epoch INTEGER NOT NULL, node TEXT NOT NULL, pid INTEGER NOT NULL)"""

COUNT_SECONDS = 0.25
# Between two looks at the statistics: a process that is killed has told those up to then.


class FlakyError(Exception):
    """An attempt that is meant to fail."""


def service(plan: NodePlan, points: Points, inbox: TellingInbox) -> Bus:
    """Build the node."""
    bus = Bus(
        plan.service,
        url=plan.url,
        namespace=plan.namespace,
        node_id=plan.node_id,
        inbox=inbox,
        partitions=plan.partitions,
        stream_replicas=plan.replicas,
        command_max_bytes=67_108_864,
        event_max_bytes=67_108_864,
        dead_letter_max_bytes=16_777_216,
        reconnect_delay=0.05,
    )
    recorder, clock, pid = points.recorder, points.recorder.clock, os.getpid()
    numbers = itertools.count(1)

    async def work(message: Post | Amend | Told, ctx: Context) -> str:
        fence = ctx.fence
        assert fence is not None
        execution = f"{plan.node_id}-{pid}-{next(numbers)}"
        points.ops[ctx.message_id] = message.op
        recorder.write(
            Begun(
                clock(), message.op, ctx.message_id, plan.service, message.key, message.value,
                plan.node_id, pid, ctx.attempt, fence.domain, fence.partition, fence.epoch,
            )
        )  # fmt: skip
        how: Any = "cancelled"
        try:
            await _do(message, ctx)
            how = "ok"
            transaction = await ctx.transaction()
            await transaction.execute(
                "INSERT INTO effects (t, op, execution, key, value, domain, partition, epoch, node, pid)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    clock(), message.op, execution, message.key, message.value,
                    fence.domain, fence.partition, fence.epoch, plan.node_id, pid,
                ),
            )  # fmt: skip
        except FlakyError:
            how = "raised"
            raise
        finally:
            recorder.write(Ended(clock(), message.op, plan.service, plan.node_id, pid, how))
        return execution

    async def _do(message: Post | Amend | Told, ctx: Context) -> None:
        if message.work.seconds:
            await asyncio.sleep(message.work.seconds)
        if message.work.kills:
            recorder.write(Hit(clock(), plan.node_id, pid, "die", "kill", message.op))
            os.kill(pid, signal.SIGKILL)
        await points.reach("run", f"{'long' if message.work.seconds >= 1.0 else 'short'} {message.op}")
        if ctx.attempt <= message.work.fails:
            raise FlakyError(f"attempt {ctx.attempt} of {message.op}")

    options = {
        "max_attempts": MAX_ATTEMPTS,
        "retry": RetryOptions(first=0.05, longest=0.1),
        "concurrency": plan.concurrency,
    }
    if plan.takes_commands:

        @bus.handler(**options)
        async def post(command: Post | Amend, ctx: Context) -> str:
            return await work(command, ctx)

    if plan.takes_events:

        @bus.handler(**options, start="all")
        async def told(event: Told, ctx: Context) -> None:
            await work(event, ctx)

    return bus


async def _count(bus: Bus, points: Points) -> None:
    """Write the statistics down every now and then."""
    plan, clock = points.plan, points.recorder.clock
    while True:
        await asyncio.sleep(COUNT_SECONDS)
        points.recorder.write(Counts(clock(), plan.node_id, os.getpid(), _counts(bus)))


def _counts(bus: Bus) -> dict[str, int]:
    node = bus._node
    if node is None or node.durable is None:
        return {}
    statistics = node.durable.statistics()
    counts = {"retries": statistics.sent.written.retries}
    for one in statistics.partitions.values():
        kept = one.keepers
        for name in ("takeovers", "claims", "reclaims", "hand_overs", "stale", "repeated", "killers"):
            counts[name] = counts.get(name, 0) + getattr(kept, name)
        for reason, count in kept.doubts.items():
            counts[f"doubt: {reason}"] = counts.get(f"doubt: {reason}", 0) + count
    return counts


async def main() -> None:
    """Run the node of a plan until SIGTERM."""
    plan = msgspec.json.decode(sys.argv[1], type=NodePlan)
    points = Points(plan, Recorder(Path(plan.history), plan.node_id))
    install(points)
    bugs.plant(os.environ.get("CHAOS_BUG", ""))
    inbox = TellingInbox(plan.inbox, points)
    await inbox.open()
    await inbox.script([EFFECTS])
    bus = service(plan, points, inbox)
    counting = asyncio.create_task(_count(bus, points))
    await bus.run()
    counting.cancel()
    await inbox.close()


if __name__ == "__main__":
    asyncio.run(main())
