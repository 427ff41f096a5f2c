"""The calling side of what is stored: from a command or event to its partition, its record and its result."""

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Gate
from catga_bus.codec.frames import encode_keyed
from catga_bus.durability.routes.routes import Routes
from catga_bus.durability.sending.answers import Answers
from catga_bus.durability.sending.outlets import Outlet, Outlets, key_of
from catga_bus.durability.sending.postings import Line, Posting
from catga_bus.durability.sending.room import Room
from catga_bus.durability.sending.schedule import Scheduler
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
        self._sender = sender
        self._scheduler = Scheduler(jetstream, names, clock, rng)
        self._outlets = Outlets(routes, names, self._writer.line, clock)
        self._turn = asyncio.Lock()  # whose route is being found
        self._queued = 0  # calls that have it or wait for it
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
        """Store what `prepare` has made; raises as `enqueue` does."""
        stream = self._names.command_stream(outbound.service) if outbound.service else self._names.event_stream()
        line = self._writer.line(stream, int(outbound.subject.rpartition(".")[2]))
        deadline = self._clock() + timeout
        subject = outbound.subject
        await self._wait_room(line, subject, deadline)
        posting = Posting(outbound.message_id, subject, subject, outbound.frame, deadline, self._create_future())
        self._writer.post(line, posting)
        try:
            stored: Stored = await posting.future
        except asyncio.CancelledError:
            self._writer.cancel(line, posting)
            raise
        return stored

    # -- to the lines --------------------------------------------------------------------------------------

    async def call(
        self,
        message: Any,
        kind: Literal["Command", "Event"],
        message_id: str,
        timeout: float,
        key: object,
        trace: str | None,
        *,
        wants_result: bool = False,
    ) -> Any:
        """Send a message; `send`, `enqueue` and `publish` are this.

        Where nothing has to be waited for, it is in its line before anything else runs. Where it has to be, because a
        route must be read, what is sent meanwhile waits as well, whatever its type: else a message of another type with
        the same key would overtake it.
        """
        now = self._clock()
        deadline = now + timeout
        remaining = timeout
        outlet = self._outlets.of(type(message), kind)
        if self._queued or self._is_closed or timeout <= 0.0 or not self._outlets.is_ready(outlet, now):
            await self._make_ready(outlet, deadline)
            remaining = deadline - self._clock()
        text = key_of(message, outlet, key)
        line, subject = self._outlets.way(outlet, message_id if text is None else text)
        if not self._room.has(line):
            await self._wait_room(line, outlet.type_name, deadline)
            remaining = deadline - self._clock()
        name = outlet.type_name
        remaining_ms = max(0, int(remaining * 1000.0)) if wants_result else None
        frame = encode_keyed(message, name, message_id, text, remaining_ms, trace, self._max_payload)
        if kind == "Command":
            self._commands += 1
        else:
            self._events += 1
        future = self._create_future()
        if wants_result:
            posting = Posting(message_id, name, subject, frame, deadline, future, outlet.decode)
            self._answers.expect(posting)
        else:
            posting = Posting(message_id, name, subject, frame, deadline, future)
        self._writer.post(line, posting)
        try:
            result = await future
        except asyncio.CancelledError:
            self._writer.cancel(line, posting)
            self._answers.forget(posting)
            raise
        except BaseException:
            self._answers.forget(posting)
            raise
        if type(result) is Err:  # an answer that has come is not waited for any more
            self._answers.forget(posting)
        return result

    async def _make_ready(self, outlet: Outlet, deadline: float) -> None:
        """Have the route of a class, in the order of the calls."""
        self._check_open(outlet.type_name, deadline)
        self._queued += 1
        try:
            async with asyncio.timeout(deadline - self._clock()):
                await self._turn.acquire()
            try:
                await self._outlets.make_ready(outlet, deadline)
            finally:
                self._turn.release()
        except DeadlineExceededError:
            raise
        except TimeoutError:
            pass  # said below
        finally:
            self._queued -= 1
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
