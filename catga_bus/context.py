"""What a handler sees beside its message: `Context`, its twin for threads, and what outbound middleware sees."""

import asyncio
import math
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import datetime
from enum import Enum
from hashlib import blake2b
from typing import Any, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID

import msgspec

from catga_bus.clock import Clock
from catga_bus.effects import Effects, Fence, Stake, Transaction
from catga_bus.errors import BusStateError
from catga_bus.messages import Command, Event, Request
from catga_bus.result import Err, Ok, Stored
from catga_bus.wire import MAX_ID

R = TypeVar("R")
T = TypeVar("T")


Where: TypeAlias = Callable[[Any], bool]
"""Which nodes may take a request: given a `NodeInfo`, whether that one may."""

Key: TypeAlias = str | int | UUID | Enum
"""What a message is about: messages of one key are handled in order, one at a time."""


class Calls(Protocol):
    """What a context needs from its bus: calls that continue a trace and a deadline."""

    async def send_from(
        self,
        parent: "Context",
        request: Request[R] | Command[R],
        timeout: float | None,
        node: str | None,
        where: Where | None,
        key: Key | None,
    ) -> Ok[R] | Err:
        """Send a request or a command on behalf of a handler."""
        ...

    async def enqueue_from(
        self,
        parent: "Context",
        command: Command[Any],
        key: Key | None,
        timeout: float | None,
        delay: float | None,
        at: datetime | None,
    ) -> Stored:
        """Have a command stored on behalf of a handler."""
        ...

    async def publish_from(
        self, parent: "Context", event: Event, key: Key | None, timeout: float | None
    ) -> Stored | None:
        """Publish an event on behalf of a handler; return where it is stored, or None if its class is not durable."""

    async def broadcast_from(self, parent: "Context", event: Event) -> None:
        """Broadcast an event on behalf of a handler."""


class Context:
    """One execution of a handler: who asks, how long is left, and calls that belong to it.

    Attributes:
        message_id: The id of the message; the same in every attempt.
        message_type: The type's name on the wire.
        key: The key of the message, or None.
        attempt: Which attempt this is; the first is 1.
        node: The id of the node that runs the handler.
        sender: The id of the node or client that sent the message.
        trace: The W3C `traceparent` that came with the message, or None.
        handler_started: Whether the handler itself was called: false while only middleware has seen the message.
            Kept where there is middleware.
    """

    __slots__ = (
        "_calls", "_clock", "_deadline", "_sends", "_stake", "attempt", "handler_started", "key", "message_id",
        "message_type", "node", "sender", "trace",
    )  # fmt: skip

    def __init__(
        self,
        calls: Calls,
        clock: Clock,
        *,
        message_id: str,
        message_type: str,
        key: str | None,
        attempt: int,
        node: str,
        sender: str,
        trace: str | None,
        deadline: float,
        stake: Stake | None = None,
    ) -> None:
        self._calls = calls
        self._clock = clock
        self._deadline = deadline
        self._stake = stake
        self._sends = 0
        self.message_id = message_id
        self.message_type = message_type
        self.key = key
        self.attempt = attempt
        self.node = node
        self.sender = sender
        self.trace = trace
        self.handler_started = False

    def __repr__(self) -> str:
        return f"<Context {self.message_type} {self.message_id} attempt {self.attempt}, {self.remaining:.3f} s left>"

    @property
    def remaining(self) -> float:
        """Seconds until the handler is cut off, never below 0: the caller's deadline, or the handler's own time-out."""
        if self._deadline == math.inf:
            return math.inf
        return max(0.0, self._deadline - self._clock())

    @property
    def fence(self) -> Fence | None:
        """Partition and epoch of a command or durable event, for receivers of effects that refuse a lower epoch.

        None for all that is not stored.
        """
        return None if self._stake is None else self._stake.fence

    @property
    def effects(self) -> Effects | None:
        """What is committed together with the mark that this message is done; None without an inbox."""
        return None if self._stake is None else self._stake.effects

    async def transaction(self) -> Transaction:
        """Begin the transaction of this execution, or return the one that has begun.

        What is written through it is committed when the handler has returned, together with the mark that the message
        is done: exactly once, however often the handler runs. It is rolled back if the handler fails.

        Raises:
            BusStateError: The message is not stored, or the bus has no inbox.
        """
        if self._stake is None:
            raise BusStateError(
                f"{self!r} has no transaction, because its message is not stored; make {self.message_type} a Command "
                f"or a durable Event"
            )
        if self._stake.effects is None:
            raise BusStateError(f"{self!r} has no transaction, because the bus has no inbox; give it one: Bus(inbox=)")
        return await self._stake.effects.transaction()

    def take_id(self) -> str | None:
        """Return the id of the next message that is sent by this execution; None if any will do.

        For the bus: a command or durable event gives `<its id>.<n>`, counted from 1, so that a second execution sends
        the same ids. An id that would be too long begins with a hash of its parent's instead.
        """
        if self._stake is None:
            return None
        self._sends += 1
        own = f"{self.message_id}.{self._sends}"
        if len(own) <= MAX_ID:
            return own
        return f"{blake2b(self.message_id.encode(), digest_size=16).hexdigest()}.{self._sends}"

    async def send(
        self,
        request: Request[R] | Command[R],
        *,
        timeout: float | None = None,
        node: str | None = None,
        where: Where | None = None,
        key: Key | None = None,
    ) -> Ok[R] | Err:
        """Send as `Bus.send` does, continuing the trace; the timeout is cut to what is left of this deadline."""
        return await self._calls.send_from(self, request, timeout, node, where, key)

    async def enqueue(
        self,
        command: Command[Any],
        *,
        key: Key | None = None,
        timeout: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> Stored:
        """Have a command stored as `Bus.enqueue` does, continuing the trace.

        In a service with an inbox it is stored with the commit of this execution, and not at all if the handler fails:
        what is returned then has the sequence 0. There it cannot be delayed.

        Raises:
            ConfigurationError: As `Bus.enqueue`; also for `delay` or `at` in a service with an inbox.
            CallError: As `Bus.enqueue`.
        """
        return await self._calls.enqueue_from(self, command, key, timeout, delay, at)

    async def publish(self, event: Event, *, key: Key | None = None, timeout: float | None = None) -> Stored | None:
        """Publish as `Bus.publish` does, continuing the trace; in a service with an inbox as `enqueue`."""
        return await self._calls.publish_from(self, event, key, timeout)

    async def broadcast(self, event: Event) -> None:
        """Broadcast as `Bus.broadcast` does, continuing the trace."""
        await self._calls.broadcast_from(self, event)


# A thread that waits for the loop would wait for ever if the loop had gone; requests end by their deadline, so this
# only bounds the hand-over of events.
_HAND_OVER_SECONDS = 30.0


class BlockingContext:
    """The `Context` of a `def` handler, which runs in a thread: the same facts, and calls that block.

    Its calls may be made only from the handler's own thread (or others), never from the event loop.
    """

    __slots__ = ("_context", "_loop", "_pid")

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<Blocking{repr(self._context)[1:]}"

    @property
    def message_id(self) -> str:
        """The id of the message; the same in every attempt."""
        return self._context.message_id

    @property
    def message_type(self) -> str:
        """The type's name on the wire."""
        return self._context.message_type

    @property
    def key(self) -> str | None:
        """The key of the message, or None."""
        return self._context.key

    @property
    def attempt(self) -> int:
        """Which attempt this is; the first is 1."""
        return self._context.attempt

    @property
    def node(self) -> str:
        """The id of the node that runs the handler."""
        return self._context.node

    @property
    def sender(self) -> str:
        """The id of the node or client that sent the message."""
        return self._context.sender

    @property
    def trace(self) -> str | None:
        """The W3C `traceparent` that came with the message, or None."""
        return self._context.trace

    @property
    def remaining(self) -> float:
        """Seconds until the handler is cut off, never below 0: the caller's deadline, or the handler's own time-out."""
        return self._context.remaining

    @property
    def fence(self) -> Fence | None:
        """Partition and epoch of a command or durable event, for receivers of effects that refuse a lower epoch."""
        return self._context.fence

    def transaction(self) -> "BlockingTransaction":
        """Begin the transaction as `Context.transaction` does."""
        return BlockingTransaction(self._wait(self._context.transaction(), None), self)

    def send(
        self,
        request: Request[R] | Command[R],
        *,
        timeout: float | None = None,
        node: str | None = None,
        where: Where | None = None,
        key: Key | None = None,
    ) -> Ok[R] | Err:
        """Send as `Context.send` does, and wait for the result."""
        return self._wait(self._context.send(request, timeout=timeout, node=node, where=where, key=key), None)

    def enqueue(
        self,
        command: Command[Any],
        *,
        key: Key | None = None,
        timeout: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> Stored:
        """Have a command stored as `Context.enqueue` does, and wait until it is."""
        return self._wait(self._context.enqueue(command, key=key, timeout=timeout, delay=delay, at=at), None)

    def publish(self, event: Event, *, key: Key | None = None, timeout: float | None = None) -> Stored | None:
        """Publish as `Context.publish` does."""
        return self._wait(self._context.publish(event, key=key, timeout=timeout), None)

    def broadcast(self, event: Event) -> None:
        """Broadcast as `Context.broadcast` does."""
        self._wait(self._context.broadcast(event), _HAND_OVER_SECONDS)

    def _wait(self, call: Coroutine[Any, Any, T], timeout: float | None) -> T:
        if self._pid != os.getpid():
            call.close()
            raise BusStateError(
                f"{self!r} belongs to process {self._pid} and is used in its fork {os.getpid()}, where its event loop "
                f"does not run; call from the handler, or make and start a bus in the fork"
            )
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            raise


class BlockingTransaction:
    """The `Transaction` of a `def` handler: the same statements, each of which blocks until it has run."""

    __slots__ = ("_context", "_transaction")

    def __init__(self, transaction: Transaction, context: BlockingContext) -> None:
        self._transaction = transaction
        self._context = context

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> int:
        """Run a statement that writes; return the number of rows it changed."""
        return self._context._wait(self._transaction.execute(sql, parameters), None)  # noqa: SLF001 - its other half

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement once for each row; return the number of rows changed."""
        return self._context._wait(self._transaction.execute_many(sql, rows), None)  # noqa: SLF001 - its other half

    def fetch(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query, which sees what this transaction has written, and return its rows."""
        return self._context._wait(self._transaction.fetch(sql, parameters), None)  # noqa: SLF001 - its other half


class Outgoing(msgspec.Struct, frozen=True):
    """What outbound middleware is told about a call, beside the message."""

    operation: Literal["send", "enqueue", "publish", "broadcast"]
    """Which call it is."""

    timeout: float | None
    """Seconds until the deadline; None for events that are not stored."""

    node: str | None
    """The one node that a request is for, or None."""

    parent: Context | None
    """The execution that the call belongs to, or None when it was made on the bus itself."""

    where: Where | None = None
    """Which nodes may take a request, or None for all."""

    key: Key | None = None
    """The key given at the call, which goes over that in the message."""

    due_utc: float | None = None
    """When a command is to be handled, in seconds since 1970; None for at once, or after `delay`."""

    delay: float | None = None
    """Seconds after which a command is to be handled, by the server's clock; None for at once, or at `due_utc`."""

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, never below 0; infinite for events that are not stored."""
        return math.inf if self.timeout is None else self.timeout
