"""A service that tests run in processes of its own: `python -m tests.integration.shop URL NAMESPACE [NODE_ID]`."""

import asyncio
import os
import sys
import time

from catga_bus import BlockingContext, Bus, Context, Event, Request


class Where(Request[str]):
    """Which node?"""


class Sleep(Request[str]):
    """Sleep, then say which node slept."""

    seconds: float


class Echo(Request[bytes]):
    data: bytes


class Spin(Request[str]):
    """Block the event loop."""

    seconds: float


class Stuck(Request[None]):
    """Never end, in a thread."""


class Flush(Event, durable=False):
    number: int


def service(url: str, namespace: str, node_id: str | None = None, **options: object) -> Bus:
    bus = Bus("shop", url=url, namespace=namespace, node_id=node_id, **options)

    @bus.handler
    async def where(request: Where, ctx: Context) -> str:
        return ctx.node

    @bus.handler(concurrency=64)
    async def sleep(request: Sleep, ctx: Context) -> str:
        await asyncio.sleep(request.seconds)
        return ctx.node

    @bus.handler
    async def echo(request: Echo) -> bytes:
        return request.data

    @bus.handler
    async def spin(request: Spin, ctx: Context) -> str:
        time.sleep(request.seconds)
        return ctx.node

    @bus.handler
    def stuck(request: Stuck, ctx: BlockingContext) -> None:
        while True:
            time.sleep(3600)

    @bus.handler
    async def flush(event: Flush) -> None:
        return None

    return bus


async def main() -> None:
    url, namespace, *rest = sys.argv[1:]
    drain = float(os.environ.get("SHOP_DRAIN", "25"))
    bus = service(url, namespace, rest[0] if rest else None, drain_timeout=drain)
    await bus.run()


if __name__ == "__main__":
    asyncio.run(main())
