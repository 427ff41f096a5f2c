"""The calling side of what is stored: from a command or event to its partition, its record and its result."""

import asyncio
import base64
import logging
import random
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Body, Gate
from catga_bus.codec.frames import encode_keyed, key_as_text
from catga_bus.durability.answers import Answers
from catga_bus.durability.postings import Line, Posting
from catga_bus.durability.room import Room
from catga_bus.durability.routes import EVENT_LOG, Route, Routes, schema_hash
from catga_bus.durability.writer import Writer, WriterStatistics
from catga_bus.effects import Outbound
from catga_bus.errors import (
    ConfigurationError,
    DeadlineExceededError,
    DisconnectedError,
    InvalidMessageError,
    NoHandlerError,
    Outcome,
)
from catga_bus.messages import Command, Event, options_of, reply_type
from catga_bus.partition.hashing import partition_of
from catga_bus.result import Err, Ok, Stored
from catga_bus.transport.base import Transport
from catga_bus.transport.jetstream import JetStream, JetStreamUnknownError
from catga_bus.wire import Names


def draw_record_id() -> str:
    """Return 96 random bits as text: nobody can store another record under it first."""
    return base64.urlsafe_b64encode(secrets.token_bytes(12)).decode()


log = logging.getLogger("catga_bus.durability")

_CHECK_SECONDS = 5.0  # between two looks at what the handlers of an event declare
_CHECK_PATIENCE = 0.5


class SenderStatistics(msgspec.Struct, frozen=True):
    """What was sent into streams; counts since start."""

    commands: int
    """Commands that were given to `send` or `enqueue`."""

    events: int
    """Durable events that were published."""

    pending: int
    """Commands that wait for their result, now."""

    late_answers: int
    rejected: int
    """What came to the inbox and was no answer."""

    written: WriterStatistics


class _Outlet(msgspec.Struct):
    """What is known of one message class on its way out."""

    type_name: str
    key_field: str | None
    schema: str
    decode: Callable[[Any], Any] | None
    """Of the reply; None for events."""

    checked: Route | None = None
    """The route that the class was last compared with."""

    is_warned: bool = False
    check_at: float = 0.0
    """Events: when the class is to be compared with its route, for which nobody waits."""


class Sender:
    """Sends commands and publishes durable events.

    Args:
        transport: The connection.
        jetstream: The streams.
        routes: Who handles what.
        gate: Lets answers in.
        names: Subjects and streams.
        sender: Id of this node, for the heads of records.
        clock: Monotonic seconds.
        rng: Jitter of the pauses between attempts.
        duplicate_window: Seconds for which the streams recognise duplicates.
        draw_id: Gives ids of records.
    """

    def __init__(
        self,
        transport: Transport,
        jetstream: JetStream,
        routes: Routes,
        gate: Gate,
        names: Names,
        *,
        sender: str,
        clock: Clock,
        rng: random.Random,
        duplicate_window: float = 120.0,
        draw_id: Callable[[], str] = draw_record_id,
    ) -> None:
        self._transport = transport
        self._jetstream = jetstream
        self._routes = routes
        self._names = names
        self._clock = clock
        self._create_future = asyncio.get_running_loop().create_future
        self._room = Room()
        self._answers = Answers(transport, gate, clock)
        self._writer = Writer(
            transport,
            jetstream,
            self._room,
            sender=sender,
            reply=self._answers.inbox,
            window=duplicate_window,
            draw_id=draw_id,
            clock=clock,
            rng=rng,
        )
        self._outlets: dict[type, _Outlet] = {}
        self._max_payload = transport.max_payload
        self._is_closed = False
        self._commands = self._events = 0

    async def start(self) -> None:
        """Listen for results."""
        await self._answers.start()

    async def wait_idle(self) -> None:
        """Wait until everything that was sent is stored or has failed."""
        await self._writer.wait_idle()

    async def close(self) -> None:
        """End what still waits; from then on nothing is taken."""
        self._is_closed = True
        await self._writer.close()
        await self._answers.close()

    def statistics(self) -> SenderStatistics:
        """Return the counts so far."""
        return SenderStatistics(
            commands=self._commands,
            events=self._events,
            pending=len(self._answers),
            late_answers=self._answers.late,
            rejected=self._answers.rejected,
            written=self._writer.statistics(),
        )

    def reconnected(self) -> None:
        """The connection is back."""
        self._max_payload = self._transport.max_payload
        self._writer.reconnected()

    def denied(self, subject: str) -> None:
        """The server refuses a subject."""
        self._writer.denied(subject)

    # -- calls ---------------------------------------------------------------------------------------------

    async def send(
        self,
        command: Command[Any],
        message_id: str,
        *,
        timeout: float,
        key: object = None,
        trace: str | None = None,
    ) -> Ok[Any] | Err:
        """Store a command and wait for its result.

        Args:
            command: The command.
            message_id: Its id.
            timeout: Seconds until the deadline, which is the caller's alone: what is stored will be handled.
            key: A str, int, UUID or Enum in place of what `partition_by` says.
            trace: W3C `traceparent`.

        Returns:
            The result. An `Err` of the bus has in `details` where the command lies, if that is known.

        Raises:
            CallError: It was not even written: nobody handles it, the key or a field cannot be sent, or too much waits.
            ConfigurationError: The class is no command, or differs from its route in `partition_by`.
            PermissionDeniedError: The server refuses the subject to this user.
        """
        line, posting = await self._command(command, message_id, timeout, key, trace, wants_result=True)
        self._answers.expect(posting)
        try:
            result: Ok[Any] | Err = await self._posted(line, posting)
            return result
        finally:
            self._answers.forget(posting)

    async def enqueue(
        self,
        command: Command[Any],
        message_id: str,
        *,
        timeout: float,
        key: object = None,
        trace: str | None = None,
    ) -> Stored:
        """Store a command and return when that is certain.

        Raises:
            CallError: It is not stored, or that is not known: see `outcome`. Otherwise as for `send`.
        """
        line, posting = await self._command(command, message_id, timeout, key, trace, wants_result=False)
        stored: Stored = await self._posted(line, posting)
        return stored

    async def publish(
        self,
        event: Event,
        message_id: str,
        *,
        timeout: float,
        key: object = None,
        trace: str | None = None,
    ) -> Stored:
        """Store a durable event in the log and return when that is certain; raises as `enqueue` does."""
        outlet = self._outlets.get(type(event)) or self._add(type(event), "Event")
        now = self._clock()
        deadline = now + timeout
        log = self._routes.known(EVENT_LOG, now) or await self._found(outlet, EVENT_LOG, timeout)
        if now >= outlet.check_at:
            await self._check_event(type(event), outlet, deadline)
        text = _key(event, outlet, key)
        partition = partition_of(message_id if text is None else text, log.partitions)
        line = self._writer.line(self._names.event_stream(), partition)
        subject = self._names.event(outlet.type_name, partition)
        posting = await self._posting(line, outlet, event, message_id, text, subject, deadline, trace)
        self._events += 1
        stored: Stored = await self._posted(line, posting)
        return stored

    async def store(self, outbound: Outbound, *, timeout: float) -> Stored:
        """Store what `prepare` has made; raises as `enqueue` does."""
        stream = self._names.command_stream(outbound.service) if outbound.service else self._names.event_stream()
        partition = int(outbound.subject.rpartition(".")[2])
        line = self._writer.line(stream, partition)
        deadline = self._clock() + timeout
        await self._wait_room(line, outbound.subject, deadline)
        posting = Posting(
            outbound.message_id, outbound.subject, outbound.subject, outbound.frame, deadline, self._create_future()
        )
        stored: Stored = await self._posted(line, posting)
        return stored

    async def prepare(
        self,
        message: Command[Any] | Event,
        message_id: str,
        *,
        timeout: float,
        key: object = None,
        trace: str | None = None,
    ) -> Outbound:
        """Return a command or event as it will be stored by `store`: for transactions. Raises as `enqueue` does."""
        is_event = isinstance(message, Event)
        outlet = self._outlets.get(type(message)) or self._add(type(message), "Event" if is_event else "Command")
        name = EVENT_LOG if is_event else outlet.type_name
        route = self._routes.known(name, self._clock()) or await self._found(outlet, name, timeout)
        if not is_event:
            self._compare(type(message), outlet, route)
        text = _key(message, outlet, key)
        partition = partition_of(message_id if text is None else text, route.partitions)
        frame = encode_keyed(message, outlet.type_name, message_id, text, None, trace, self._max_payload)
        if is_event:
            return Outbound(self._names.event(outlet.type_name, partition), message_id, frame)
        return Outbound(self._names.command(route.service, partition), message_id, frame, route.service)

    # -- to the lines --------------------------------------------------------------------------------------

    async def _command(
        self, command: Any, message_id: str, timeout: float, key: object, trace: str | None, *, wants_result: bool
    ) -> tuple[Line, Posting]:
        outlet = self._outlets.get(type(command)) or self._add(type(command), "Command")
        now = self._clock()
        deadline = now + timeout
        route = self._routes.known(outlet.type_name, now) or await self._found(outlet, outlet.type_name, timeout)
        if route is not outlet.checked:
            self._compare(type(command), outlet, route)
        text = _key(command, outlet, key)
        partition = partition_of(message_id if text is None else text, route.partitions)
        line = self._writer.line(self._names.command_stream(route.service), partition)
        subject = self._names.command(route.service, partition)
        posting = await self._posting(
            line, outlet, command, message_id, text, subject, deadline, trace, wants_result=wants_result
        )
        self._commands += 1
        return line, posting

    async def _posting(
        self,
        line: Line,
        outlet: _Outlet,
        message: Any,
        message_id: str,
        key: str | None,
        subject: str,
        deadline: float,
        trace: str | None,
        *,
        wants_result: bool = False,
    ) -> Posting:
        await self._wait_room(line, outlet.type_name, deadline)
        remaining_ms = max(0, int((deadline - self._clock()) * 1000.0)) if wants_result else None
        frame = encode_keyed(message, outlet.type_name, message_id, key, remaining_ms, trace, self._max_payload)
        decode = outlet.decode if wants_result else None
        return Posting(message_id, outlet.type_name, subject, frame, deadline, self._create_future(), decode)

    async def _wait_room(self, line: Line, what: str, deadline: float) -> None:
        """Wait for room; what was awaited before may have used up the time."""
        self._check_open(what, deadline)
        if not self._room.has(line):
            await self._room.wait(line, deadline - self._clock())
            self._check_open(what, deadline)

    async def _posted(self, line: Line, posting: Posting) -> Any:
        self._writer.post(line, posting)
        try:
            return await posting.future
        except asyncio.CancelledError:
            self._writer.cancel(line, posting)
            raise

    def _check_open(self, what: str, deadline: float) -> None:
        if self._is_closed:
            raise DisconnectedError(f"{what}: the bus was closed before it was sent", outcome=Outcome.NOT_RUN)
        if deadline <= self._clock():
            text = f"{what}: the deadline passed before it was written"
            raise DeadlineExceededError(text, outcome=Outcome.NOT_RUN, retryable=True)

    def _add(self, cls: type, kind: str) -> _Outlet:
        options = options_of(cls)
        if options.kind != kind:
            raise ConfigurationError(
                f"{cls.__name__} is {_WITH_ARTICLE[options.kind]} and not {_WITH_ARTICLE[kind]}: "
                f"{_WHAT_TO_DO[options.kind]}"
            )
        decode: Callable[[Any], Any] | None = Body(reply_type(cls)).decode if kind == "Command" else None
        outlet = self._outlets[cls] = _Outlet(options.type_name, options.partition_by, schema_hash(cls), decode)
        return outlet

    async def _found(self, outlet: _Outlet, name: str, timeout: float) -> Route:
        """Return the route of a command, or that of the log, which is known by another name."""
        try:
            route = await self._routes.find(name, timeout)
        except JetStreamUnknownError as error:
            raise DeadlineExceededError(str(error), outcome=Outcome.NOT_RUN, retryable=True) from error
        if route is not None:
            return route
        if name == EVENT_LOG:
            text = f"{outlet.type_name}: there is no log of events: start a node that handles durable events"
        else:
            text = f"no service handles the command {outlet.type_name}, or not all of its nodes do yet"
        raise NoHandlerError(text, outcome=Outcome.NOT_RUN, retryable=True)

    async def _check_event(self, cls: type, outlet: _Outlet, deadline: float) -> None:
        """Compare the class of an event with those of its handlers, if there are some and that can be known now."""
        outlet.check_at = self._clock() + _CHECK_SECONDS
        try:
            route = await self._routes.find(outlet.type_name, min(_CHECK_PATIENCE, deadline - self._clock()))
        except JetStreamUnknownError:
            return
        if route is not None:
            self._compare(cls, outlet, route)

    def _compare(self, cls: type, outlet: _Outlet, route: Route) -> None:
        where = f"in the service {route.service!r}" if route.service else "where it is handled"
        if route.partition_by != outlet.key_field:
            raise ConfigurationError(
                f"class {cls.__name__}: partition_by is {outlet.key_field!r} here and {route.partition_by!r} {where}: "
                f"messages with one key would not stay in order; declare both alike"
            )
        if not route.durable:
            raise ConfigurationError(
                f"class {cls.__name__}: the event is durable here and not {where}, which would not get it; declare "
                f"both alike"
            )
        if route.schema and route.schema != outlet.schema and not outlet.is_warned:
            outlet.is_warned = True
            log.warning(
                "class %s has other fields here than %s; that is fine if one of them is newer and its new fields have "
                "defaults",
                cls.__name__,
                where,
            )
        outlet.checked = route


_WITH_ARTICLE = {"Request": "a Request", "Command": "a Command", "Event": "an Event"}
_WHAT_TO_DO = {"Request": "send it", "Command": "send or enqueue it", "Event": "publish or broadcast it"}


def _key(message: Any, outlet: _Outlet, key: object) -> str | None:
    """Return the key of a message as text; None if its id is its key.

    Raises:
        InvalidMessageError: The field that holds it holds none.
    """
    if key is not None:
        return key_as_text(key)
    if outlet.key_field is None:
        return None
    value = getattr(message, outlet.key_field, None)
    if value is None:
        raise InvalidMessageError(
            f"{outlet.type_name}: the key field {outlet.key_field!r} is None; give it a value, or a key= at the call",
            outcome=Outcome.NOT_RUN,
        )
    return key_as_text(value)
