"""What a dispatcher works on: deliveries, the stations that take them, and their counts. Records."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from catga_bus.wire import Status


class Delivery(msgspec.Struct, eq=False):
    """One attempt to handle one message."""

    station: "Station"
    id: str
    key: str | None
    attempt: int
    trace: str | None
    sender: str
    body: Any
    """The encoded message; decoded when its turn comes."""

    size: int
    """Bytes that it counts for in the intake."""

    deadline: float
    settle: "Settle"
    target: Any = None
    """Where the answer goes; known to `settle`."""

    lane: str | None = None
    """Deliveries of one station with the same lane run one after the other."""

    json: bool = False
    """Whether the body is JSON."""

    task: asyncio.Task[None] | None = None
    cut: bool = False
    """Whether its deadline passed while it ran."""


class Settle(Protocol):
    """Ends a delivery: sends its answer, if it wants one."""

    def __call__(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        """Settle a delivery.

        Args:
            delivery: Which one.
            status: How it ended.
            value: The handler's value if OK, else a `Fault`.
            seconds: How long the handler took.
        """


class Station:
    """A handler at work in one node: its bounds, its queues and its counts.

    Args:
        name: The handler's name, for logs.
        type_name: The message type on the wire.
        decode: From MessagePack to the message.
        decode_json: From JSON to the message.
        entry: Takes message and context, returns the handler's value or a result.
        takes_context: Whether `entry` wants the context.
        concurrency: The most executions at once.
        timeout: The most seconds of one execution, or None for the message's deadline alone.
        fits: Whether a value is what the message promises; None when anything goes.
    """

    __slots__ = (
        "concurrency", "decode", "decode_json", "entry", "failed", "fits", "lanes", "name", "ok", "refused", "running",
        "seconds", "stuck", "takes_context", "timeout", "type_name", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        *,
        name: str,
        type_name: str,
        decode: Callable[[Any], Any],
        decode_json: Callable[[Any], Any],
        entry: Callable[..., Awaitable[Any]],
        takes_context: bool,
        concurrency: int,
        timeout: float | None,
        fits: Callable[[Any], str | None] | None,
    ) -> None:
        self.name = name
        self.type_name = type_name
        self.decode = decode
        self.decode_json = decode_json
        self.entry = entry
        self.takes_context = takes_context
        self.concurrency = concurrency
        self.timeout = timeout
        self.fits = fits
        self.running = 0
        self.waiting: deque[Delivery] = deque()
        self.lanes: dict[str, deque[Delivery]] = {}  # lanes with a delivery that is ready or running: its successors
        self.ok = self.refused = self.failed = 0
        self.seconds = 0.0  # in the handler, all executions together
        self.stuck = 0  # threads that run on past their deadline: each keeps its slot


class StationStatistics(msgspec.Struct, frozen=True):
    """What one handler has done; counts since start."""

    handler: str
    type_name: str
    running: int
    waiting: int
    ok: int
    refused: int
    failed: int
    stuck: int
    """Threads that run on past their deadline."""

    seconds: float
    """Time in the handler, all executions together."""


class DispatcherStatistics(msgspec.Struct, frozen=True):
    """What is in the node, and what it has turned away; counts since start."""

    intake: int
    """Deliveries that are admitted and not settled."""

    intake_bytes: int
    running: int
    busy: int
    """Deliveries refused because the intake was full."""

    expired: int
    """Deliveries whose deadline had passed before they could start."""

    invalid: int
    """Deliveries whose body did not fit their type."""

    handlers: tuple[StationStatistics, ...]
