"""What the sides that store messages ask the server for, each over a connection of its own."""

import asyncio
import time

import nats

from benchmarks.errors import BenchmarkError

_POLL_SECONDS = 0.005
_PATIENCE_SECONDS = 120.0


async def wait_empty(url: str, stream: str) -> None:
    """Wait until a work queue is empty: everything in it is handled and acknowledged.

    Raises:
        BenchmarkError: It is not, two minutes later.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    connection = await nats.connect(url.split(","))
    try:
        streams = connection.jetstream()
        while (left := (await streams.stream_info(stream)).state.messages) > 0:
            if time.monotonic() > until:
                raise BenchmarkError(f"{left:,} messages are left in {stream} after {_PATIENCE_SECONDS:g} s")
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await connection.close()


async def wait_read(url: str, log: str) -> None:
    """Wait until every consumer of a log has acknowledged all of it.

    Raises:
        BenchmarkError: One has not, two minutes later.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    connection = await nats.connect(url.split(","))
    try:
        streams = connection.jetstream()
        while left := sum(one.num_pending + one.num_ack_pending for one in await streams.consumers_info(log)):
            if time.monotonic() > until:
                raise BenchmarkError(f"{left:,} messages of {log} are not read after {_PATIENCE_SECONDS:g} s")
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        await connection.close()


async def make_log(url: str, log: str, subject: str) -> None:
    """Make a log of a side's own."""
    connection = await nats.connect(url.split(","))
    try:
        await connection.jetstream(timeout=10.0).add_stream(name=log, subjects=[subject], max_bytes=1 << 28)
    finally:
        await connection.close()


async def make_work_queue(url: str, stream: str, subject: str, replicas: int) -> None:
    """Make a work queue of a side's own."""
    connection = await nats.connect(url.split(","))
    try:
        await connection.jetstream(timeout=10.0).add_stream(
            name=stream, subjects=[subject], retention="workqueue", num_replicas=replicas, max_bytes=1 << 30
        )
    finally:
        await connection.close()
