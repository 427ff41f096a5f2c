"""A service whose handlers make leaving hard, for `catga run tests.integration.leaver:bus`.

It works in the present directory: `began` appears when a handler has begun, `go` lets `Hold` end, `ran` has a line for
each `Count` that was executed.
"""

import asyncio
import os
import time
from pathlib import Path

from catga_bus import BlockingContext, Bus, Request


class Hold(Request[str]):
    """End when told to."""


class Forever(Request[str]):
    """End when cancelled."""


class Stubborn(Request[str]):
    """Never end, not even when cancelled."""


class Stuck(Request[str]):
    """Never end, in a thread of the bus."""


class Pooled(Request[str]):
    """Never end, in a thread of the event loop's pool."""


class Block(Request[str]):
    """Block the event loop."""

    seconds: float


class Count(Request[int]):
    """Say which one was executed."""

    number: int


class CountOnce(Request[int], idempotent=False):
    """The same, and nobody may try again where it may have been executed."""

    number: int


bus = Bus(
    "leaver",
    namespace=os.environ.get("LEAVER_NAMESPACE", "leaver"),
    drain_timeout=float(os.environ.get("LEAVER_DRAIN", "25")),
)


@bus.handler
async def hold(request: Hold) -> str:
    Path("began").touch()
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    return "held"


@bus.handler
async def forever(request: Forever) -> str:
    Path("began").touch()
    await asyncio.sleep(3600)
    return ""


@bus.handler
async def stubborn(request: Stubborn) -> str:
    Path("began").touch()
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


@bus.handler
def stuck(request: Stuck, ctx: BlockingContext) -> str:
    Path("began").touch()
    time.sleep(3600)
    return ""


@bus.handler
async def pooled(request: Pooled) -> str:
    Path("began").touch()
    await asyncio.to_thread(time.sleep, 3600)
    return ""


@bus.handler
async def block(request: Block) -> str:
    Path("began").touch()
    time.sleep(request.seconds)
    return "blocked"


@bus.handler(concurrency=64)
async def count(request: Count | CountOnce) -> int:
    with Path("ran").open("a") as ran:  # appended with one write
        ran.write(f"{request.number}\n")
    await asyncio.sleep(0.02)
    return request.number
