"""The trace context of OpenTelemetry travels in the frame, and costs nothing where no SDK is configured."""

import subprocess
import sys
from uuid import uuid4

from catga_bus import Bus
from catga_bus.telemetry.propagation import trace_source

PROGRAM = """
import asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from catga_bus import Bus, Context, Request

trace.set_tracer_provider(TracerProvider())

class Inner(Request[str]): ...
class Outer(Request[str]): ...

async def main():
    bus = Bus("shop", url="memory://trace")
    @bus.handler
    async def inner(request: Inner, ctx: Context) -> str:
        return ctx.trace or ""
    @bus.handler
    async def outer(request: Outer, ctx: Context) -> str:
        return (await ctx.send(Inner())).unwrap()
    async with bus:
        assert (await bus.send(Inner())).unwrap() == ""
        with trace.get_tracer("test").start_as_current_span("span") as span:
            context = span.get_span_context()
            expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            assert (await bus.send(Inner())).unwrap() == expected
            assert (await bus.send(Outer())).unwrap() == expected

asyncio.run(main())
"""


def test_the_current_span_reaches_the_handler_and_the_handlers_own_calls() -> None:
    # In a process of its own: the tracer provider is a setting of the process.
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


def test_without_an_sdk_no_call_looks_for_a_span() -> None:
    assert trace_source() is None


async def test_without_an_sdk_a_bus_has_no_trace_source() -> None:
    async with Bus("shop", url=f"memory://{uuid4().hex}") as bus:
        assert bus._node is not None
        assert bus._node.trace is None
