"""What a caller knows of a request type, of one call, and of what it has done: records."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from catga_bus.requests.attempts import Progress
from catga_bus.result import Err, Ok
from catga_bus.transport.coalescer import Lane


class Route(msgspec.Struct, eq=False):
    """What the caller knows of one request type."""

    type_name: str
    subject: str
    key_field: str | None
    idempotent: bool
    decode: Callable[[Any], Any]
    lane: Lane
    handler_seconds: float = 0.0
    in_flight: int = 0


class Call(msgspec.Struct, eq=False, gc=False):
    """One request that waits for its answer.

    Not tracked by the garbage collector, which would look at every call in flight again and again: its future knows
    the waiting task, and neither knows the call, so that it is in no cycle.
    """

    id: str
    route: Route
    lane: Lane
    future: asyncio.Future[Ok[Any] | Err]
    frame: bytes
    """As first written; a later attempt is made from it, so a call is encoded once."""

    progress: Progress
    batch: int = 0


class CallerStatistics(msgspec.Struct, frozen=True):
    """What the caller has done; counts since start."""

    calls: int
    in_flight: int
    ok: int
    failed: int
    """Calls that ended as `Err`, whatever the outcome."""

    retries: int
    """Attempts after the first."""

    late_answers: int
    """Answers to calls that had ended."""

    rejected: int
    """Messages on the inbox that were not answers."""
