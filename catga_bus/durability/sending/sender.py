"""The calling side of what is stored: from a command or event to its partition, its record and its result."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Gate
from catga_bus.codec.frames import encode_keyed
from catga_bus.durability.routes.routes import Routes
from catga_bus.durability.sending.answers import Answers
from catga_bus.durability.sending.inquiries import Address, Holders
from catga_bus.durability.sending.outlets import Kind as MessageKind
from catga_bus.durability.sending.outlets import Outlet, Outlets, key_of
from catga_bus.durability.sending.postings import Line, Posting
from catga_bus.durability.sending.room import Room
from catga_bus.durability.sending.schedule import Scheduler
from catga_bus.durability.sending.turnstile import Turnstile
from catga_bus.durability.sending.writer import Writer, WriterStatistics
from catga_bus.effects import Outbound
from catga_bus.errors import DeadlineExceededError, DisconnectedError, Outcome
from catga_bus.messages import Command, Event
from catga_bus.result import Err, Ok, Stored
from catga_bus.transport.base import Transport
from catga_bus.transport.jetstream import JetStream
from catga_bus.wire import Kind, Names, join_batch


def draw_record_id() -> str:
    """Return 96 random bits as text: nobody can store another record under it first."""
    return os.urandom(12).hex()


async def _nothing(_: float) -> None:
    """There is a log of events already."""


def _nobody(_: str) -> Sequence[Address]:
    """There is no view of the nodes."""
    return ()


class SenderStatistics(msgspec.Struct, frozen=True):
    """What was sent into streams; counts since start."""

    commands: int
    """Commands that were given to `send` or `enqueue`."""

    events: int
    """Durable events that were published."""

    pending: int
    """Commands that wait for their result, now."""

    asked: int
    """Questions about commands whose result did not come at once."""

    late_answers: int
    rejected: int
    """What came to the inbox and was no answer."""

    written: WriterStatistics


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
        ensure_log: Has a log of events made if there is none, within so many seconds.
        holders: Whom to ask for a result that does not come.
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
        ensure_log: Callable[[float], Awaitable[None]] = _nothing,
        holders: Holders = _nobody,
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
        self._answers = Answers(transport, gate, self._drop, names, holders, sender=sender, clock=clock)
        self._writer = Writer(
            transport,
            jetstream,
            self._room,
            unanswered=self._answers.__len__,
            sender=sender,
            reply=self._answers.inbox,
            window=duplicate_window,
            draw_id=draw_id,
            clock=clock,
            rng=rng,
        )
        self._sender = sender
        self._scheduler = Scheduler(jetstream, names, clock, rng)
        self._outlets = Outlets(routes, names, self._writer.line, ensure_log, clock)
        self._turnstile = Turnstile(self._outlets, clock)
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
            asked=self._answers.inquiries.asked,
            late_answers=self._answers.late,
            rejected=self._answers.rejected,
            written=self._writer.statistics(),
        )

    def reconnected(self) -> None:
        """The connection is back."""
        self._max_payload = self._transport.max_payload
        self._writer.reconnected()
        self._answers.inquiries.reconnected()

    def denied(self, subject: str) -> None:
        """The server refuses a subject."""
        self._writer.denied(subject)
        self._answers.inquiries.denied(subject)

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
        result: Ok[Any] | Err = await self.call(command, "Command", message_id, timeout, key, trace, wants_result=True)
        return result

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
        stored: Stored = await self.call(command, "Command", message_id, timeout, key, trace)
        return stored

    async def enqueue_later(
        self,
        command: Command[Any],
        message_id: str,
        *,
        at_utc: float | None = None,
        delay: float = 0.0,
        timeout: float,
        key: object = None,
        trace: str | None = None,
    ) -> Stored:
        """Store a command that is to be handled later and return when that is certain. Raises as `enqueue` does.

        It comes to its partition behind what was stored there by then; delayed commands have no order among themselves.

        Args:
            command: The command.
            message_id: Its id.
            at_utc: When, in seconds since 1970 by the server's clock; an instant that has passed means at once.
            delay: Where `at_utc` is None: seconds after which, by the server's clock, whatever this machine's says.
            timeout: Seconds until the deadline.
            key: A str, int, UUID or Enum in place of what `partition_by` says.
            trace: W3C `traceparent`.

        Raises:
            ConfigurationError: The servers are older than 2.12, or the stream for delayed commands is not there.
        """
        deadline = self._clock() + timeout
        outbound = await self.prepare(command, message_id, timeout=timeout, key=key, trace=trace)
        partition = int(outbound.subject.rpartition(".")[2])
        payload = join_batch(Kind.MESSAGES, (self._sender, None, 0), [outbound.frame])
        self._commands += 1
        name = type(command).__name__
        if at_utc is None:
            at_utc = await self._scheduler.instant(outbound.service, delay)
        return await self._scheduler.store(outbound.service, partition, payload, at_utc, name, deadline)

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
        stored: Stored = await self.call(event, "Event", message_id, timeout, key, trace)
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
        deadline = self._clock() + timeout
        outlet = self._outlets.of(type(message), "Event" if isinstance(message, Event) else "Command")
        await self._make_ready(outlet, deadline)
        text = key_of(message, outlet, key)
        _, subject = self._outlets.way(outlet, message_id if text is None else text)
        frame = encode_keyed(message, outlet.type_name, message_id, text, None, trace, self._max_payload)
        return Outbound(subject, message_id, frame, "" if outlet.route is None else outlet.route.service)

    async def store(self, outbound: Outbound, *, timeout: float) -> Stored:
        """Store what `prepare` has made; raises as `enqueue` does.

        If it is not stored, neither is what was given for its subject after it and is not stored yet.
        """
        stream = self._names.command_stream(outbound.service) if outbound.service else self._names.event_stream()
        line = self._writer.line(stream, int(outbound.subject.rpartition(".")[2]))
        deadline = self._clock() + timeout
        subject = outbound.subject
        await self._wait_room(line, subject, deadline)
        future = self._create_future()
        posting = Posting(outbound.message_id, subject, subject, outbound.frame, deadline, future, is_ordered=True)
        self._writer.post(line, posting)
        try:
            stored: Stored = await future
        except BaseException:
            self._writer.cancel(posting)
            del posting  # see `Posting`
            raise
        return stored

    # -- to the lines --------------------------------------------------------------------------------------

    def post(
        self,
        message: Any,
        kind: MessageKind,
        message_id: str,
        timeout: float,
        key: object,
        trace: str | None,
        *,
        wants_result: bool = False,
    ) -> Posting | None:
        """Put a message into its line, before anything else runs; None if something has to be waited for: see `call`.

        Whoever gets a posting awaits its future, and gives it to `forget` if that ends otherwise than by a success.
        """
        now = self._clock()
        outlet = self._outlets.ready(type(message), kind, now)
        if outlet is None or self._turnstile.count or self._is_closed or timeout <= 0.0:
            return None
        text = key_of(message, outlet, key)
        line, subject = self._outlets.way(outlet, message_id if text is None else text)
        if not self._room.has(line):
            return None
        remaining_ms = int(timeout * 1000.0) if wants_result else None
        frame = encode_keyed(message, outlet.type_name, message_id, text, remaining_ms, trace, self._max_payload)
        return self._put(
            outlet, line, subject, message_id, frame, now + timeout, outlet.decode if wants_result else None
        )

    async def call(
        self,
        message: Any,
        kind: MessageKind,
        message_id: str,
        timeout: float,
        key: object,
        trace: str | None,
        *,
        wants_result: bool = False,
    ) -> Any:
        """Send a message and return its end: what `send`, `enqueue` and `publish` have in common.

        Where a route must be read first, what is sent meanwhile waits as well, whatever its type: else a message of
        another type with the same key would overtake it.
        """
        posting = self.post(message, kind, message_id, timeout, key, trace, wants_result=wants_result)
        if posting is None:
            deadline = self._clock() + timeout
            outlet = self._outlets.of(type(message), kind)
            await self._make_ready(outlet, deadline)
            text = key_of(message, outlet, key)
            line, subject = self._outlets.way(outlet, message_id if text is None else text)
            await self._wait_room(line, outlet.type_name, deadline)
            remaining_ms = max(0, int((deadline - self._clock()) * 1000.0)) if wants_result else None
            frame = encode_keyed(message, outlet.type_name, message_id, text, remaining_ms, trace, self._max_payload)
            posting = self._put(
                outlet, line, subject, message_id, frame, deadline, outlet.decode if wants_result else None
            )
        try:
            result = await posting.future
        except BaseException:
            self.forget(posting)
            del posting  # see `Posting`
            raise
        if type(result) is Err:
            self.forget(posting)
        return result

    def forget(self, posting: Posting) -> None:
        """Nobody waits for a posting any more: it is not written if it was not. Without effect if it has an end."""
        self._writer.cancel(posting)
        self._answers.forget(posting)

    def _drop(self, posting: Posting) -> None:
        self._writer.cancel(posting)

    def _put(
        self,
        outlet: Outlet,
        line: Line,
        subject: str,
        message_id: str,
        frame: bytes,
        deadline: float,
        decode: Callable[[Any], Any] | None,
    ) -> Posting:
        future = self._create_future()
        posting = Posting(message_id, outlet.type_name, subject, frame, deadline, future, decode)
        if decode is not None:
            self._answers.expect(posting)
        if outlet.kind == "Command":
            self._commands += 1
        else:
            self._events += 1
        self._writer.post(line, posting)
        return posting

    async def _make_ready(self, outlet: Outlet, deadline: float) -> None:
        """Have the route of a class, in the order of the calls."""
        self._check_open(outlet.type_name, deadline)
        try:
            await self._turnstile.enter(outlet, deadline)
        except DeadlineExceededError:
            if self._is_closed:
                self._check_open(outlet.type_name, deadline)
            raise
        except TimeoutError:
            pass  # said below
        self._check_open(outlet.type_name, deadline)

    async def _wait_room(self, line: Line, what: str, deadline: float) -> None:
        """Wait for room; what was awaited before may have used up the time."""
        self._check_open(what, deadline)
        if not self._room.has(line):
            await self._room.wait(line, deadline - self._clock())
            self._check_open(what, deadline)

    def _check_open(self, what: str, deadline: float) -> None:
        if self._is_closed:
            raise DisconnectedError(f"{what}: the bus was closed before it was sent", outcome=Outcome.NOT_RUN)
        if deadline <= self._clock():
            text = f"{what}: the deadline passed before it was written"
            raise DeadlineExceededError(text, outcome=Outcome.NOT_RUN, retryable=True)
