"""The service under fault: handlers that write down every execution. `python -m tests.chaos.service PLAN`."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec

from catga_bus import Bus, Context, Request
from tests.chaos.history import End, Fault, Recorder, Start


class Answer(msgspec.Struct):
    """Which call was executed, and by whom."""

    op: str
    node: str


class Quick(Request[Answer]):
    """Work of a few milliseconds."""

    op: str
    seconds: float = 0.0


class Slow(Request[Answer]):
    """Work of half a second: some of it is under way whenever a node dies."""

    op: str
    seconds: float = 0.0


class Pinned(Request[Answer]):
    """Quick work for one node and no other."""

    op: str
    seconds: float = 0.0


class Heavy(Request[Answer]):
    """Work that few executions at a time may do: an overload is easily made of it."""

    op: str
    seconds: float = 0.0


class Poison(Request[Answer]):
    """Kills the process that handles it."""

    op: str
    seconds: float = 0.0


class Ping(Request[str]):
    """Are you there?"""


class NodePlan(msgspec.Struct, frozen=True):
    """What a node process is told."""

    url: str
    namespace: str
    node_id: str
    history: str
    """Directory."""

    heavy_concurrency: int = 2
    intake: int = 4_096


def service(plan: NodePlan, recorder: Recorder) -> Bus:
    """Build the node."""
    bus = Bus("chaos", url=plan.url, namespace=plan.namespace, node_id=plan.node_id, intake=plan.intake)

    async def work(op: str, seconds: float, ctx: Context) -> Answer:
        clock, pid = recorder.clock, os.getpid()
        recorder.write(Start(clock(), op, ctx.message_id, ctx.node, pid, ctx.attempt, ctx.remaining))
        await asyncio.sleep(seconds)
        recorder.write(End(clock(), op, ctx.node, pid))
        return Answer(op, ctx.node)

    @bus.handler
    async def quick(request: Quick, ctx: Context) -> Answer:
        return await work(request.op, request.seconds, ctx)

    @bus.handler(concurrency=256)
    async def slow(request: Slow, ctx: Context) -> Answer:
        return await work(request.op, request.seconds, ctx)

    @bus.handler
    async def pinned(request: Pinned, ctx: Context) -> Answer:
        return await work(request.op, request.seconds, ctx)

    @bus.handler(concurrency=plan.heavy_concurrency)
    async def heavy(request: Heavy, ctx: Context) -> Answer:
        return await work(request.op, request.seconds, ctx)

    @bus.handler
    async def poison(request: Poison, ctx: Context) -> Answer:
        clock, pid = recorder.clock, os.getpid()
        recorder.write(Start(clock(), request.op, ctx.message_id, ctx.node, pid, ctx.attempt, ctx.remaining))
        await asyncio.sleep(request.seconds)  # time enough to be known as accepted
        name = f"poison-{ctx.node}-{request.op}"
        for edge in ("begin", "end"):
            recorder.write(Fault(clock(), name, "poison", ctx.node, edge, pid))
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("alive after SIGKILL")

    @bus.handler
    async def ping(request: Ping, ctx: Context) -> str:
        return ctx.node

    return bus


async def main() -> None:
    """Run the node of a plan until SIGTERM."""
    plan = msgspec.json.decode(sys.argv[1], type=NodePlan)
    await service(plan, Recorder(Path(plan.history), plan.node_id)).run()


if __name__ == "__main__":
    asyncio.run(main())
