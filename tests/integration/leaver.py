"""A service whose handlers make leaving hard, for `catga run tests.integration.leaver:bus`.

It works in the present directory: `began` appears when a handler has begun, `go` lets `Hold` end, `ran` has a line for
each `Count` that was executed. While `no-names` is there, looking up a host takes for ever.
"""

import asyncio
import atexit
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from catga_bus import BlockingContext, Bus, Command, Request


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


class PooledElsewhere(Request[str]):
    """Never end, in a pool of the service's own."""


class Threaded(Request[str]):
    """Never end, and wait for a thread of one's own."""


class LeaveBehind(Request[str]):
    """End, but for a thread of one's own."""


class Order(Command[str]):
    """No bus starts with a handler of it."""


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


pool = ThreadPoolExecutor()
unfit = Bus("leaver")


def _look_up(*args: Any, look_up: Callable[..., Any] = socket.getaddrinfo, **options: Any) -> Any:
    while Path("no-names").exists():
        time.sleep(0.01)
    return look_up(*args, **options)


socket.getaddrinfo = _look_up


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
async def pooled_elsewhere(request: PooledElsewhere) -> str:
    Path("began").touch()
    await asyncio.get_running_loop().run_in_executor(pool, time.sleep, 3600)
    return ""


@bus.handler
async def threaded(request: Threaded) -> str:
    leave_behind()
    Path("began").touch()
    await asyncio.sleep(3600)
    return ""


@bus.handler
async def left_behind(request: LeaveBehind) -> str:
    leave_behind()
    return "left"


@unfit.handler
async def order(command: Order) -> str:
    return ""


def leave_behind() -> None:
    threading.Thread(target=time.sleep, args=(3600,)).start()


if "LEAVER_THREAD" in os.environ:
    leave_behind()
if "LEAVER_AT_EXIT" in os.environ:
    # What a program has to do in the end: quickly, or never.
    atexit.register(lambda: (Path("at-exit").touch(), time.sleep(float(os.environ["LEAVER_AT_EXIT"]))))


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
