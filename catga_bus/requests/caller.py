"""The asking side of the request lane: writes requests, matches answers, and acts on what `attempts` decides."""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import DECODE_ERRORS, Gate, GateError
from catga_bus.codec.frames import encode_frame, key_text
from catga_bus.errors import CatgaError, Code, Outcome, TooLargeError
from catga_bus.rarely import RareLog
from catga_bus.requests import attempts, endings
from catga_bus.requests.attempts import Phase, Step, Verdict
from catga_bus.requests.budget import RetryBudget
from catga_bus.requests.calls import Call, CallerStatistics, Route
from catga_bus.requests.failover import Failover
from catga_bus.requests.grain import grain, smoothed
from catga_bus.requests.guard import Guard
from catga_bus.requests.peers import Address, Choice, OwnerOf, Peers, no_owner
from catga_bus.requests.queries import Queries
from catga_bus.requests.routing import Routing
from catga_bus.resilience.circuit_breaker import BreakerOptions
from catga_bus.result import Err, Ok
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.coalescer import Coalescer
from catga_bus.wire import (
    ERROR_CODE_HEADER,
    ERROR_HEADER,
    NO_RESPONDERS,
    STATUS_HEADER,
    AnswerBatch,
    AnswerFrame,
    Fault,
    IdBatch,
    Kind,
    MessageFrame,
    Names,
    Status,
    join_batch,
)

_SWEEP_SECONDS = 0.01
# How late a time-out or a retry may be. Looking at one waiting call takes about 50 ns, so 1,024 calls in flight cost
# half a percent of a core; with more the sweep comes less often (see `_sweep`).

_SWEEP_SECONDS_PER_CALL = 2e-6

_LATE_SECONDS = 0.25
# A sweep that is later than this says that the loop was blocked: what came meanwhile is read before time counts. One
# sweep is put off for that, never two in a row: a loop that is always late still ends calls.

_BYTES_PER_TURN = 262_144  # of unsent calls written again: the rest of the loop has its turns, too
_MAX_DIGITS = 18

_NOT_RUN = (Status.BUSY, Status.EXPIRED, Status.LOST)

_encode = msgspec.msgpack.Encoder().encode
_decode_fault = msgspec.msgpack.Decoder(Fault).decode
_decode_frame = msgspec.msgpack.Decoder(MessageFrame).decode


class Caller:
    """Sends requests and resolves their futures.

    Args:
        transport: The connection.
        coalescer: Packs the requests.
        gate: Lets answers in.
        names: The subjects.
        peers: What is known of the other nodes.
        sender: Id of this node, for the heads of batches.
        attempt_timeout: Seconds until an attempt of which nobody has said anything is given up.
        breaker: Options of the circuit breakers; None for none.
        clock: Monotonic seconds.
        rng: Jitter of retries.
        owner_of: Finds the owner of a key, to whom requests that have one go first.
    """

    def __init__(
        self,
        transport: Transport,
        coalescer: Coalescer,
        gate: Gate,
        names: Names,
        peers: Peers,
        *,
        sender: str,
        attempt_timeout: float,
        breaker: BreakerOptions | None,
        clock: Clock,
        rng: random.Random,
        owner_of: OwnerOf = no_owner,
    ) -> None:
        self._transport = transport
        self._coalescer = coalescer
        self._gate = gate
        self._names = names
        self._peers = peers
        self._sender = sender
        self._patience = attempt_timeout
        self._clock = clock
        self._log = RareLog(logging.getLogger("catga_bus.requests"), clock)
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._create_future = self._loop.create_future
        self._inbox = transport.new_inbox()
        self._answers_to = f"{self._inbox}.a"
        # Kept up to date by `disconnected` and `reconnected`, because every call looks at them.
        self._is_connected = transport.is_connected
        self._max_payload = transport.max_payload
        self._pending: dict[str, Call] = {}
        self._unsent: deque[Call] = deque()  # to be written when the connection takes them
        self._unheard: set[int] = set()  # batches to which nobody listened, in this turn
        self._is_closed = False
        self._sweeping = False
        self._sweep_due = 0.0
        self._was_late = False
        self._timer: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        self._reconnected_at = -math.inf
        self._budget = RetryBudget(clock())
        self._counted = 0  # calls that the budget has been told of
        self._queries = Queries(transport, names, sender=sender, answers_to=self._answers_to)
        self.guard = Guard(breaker, peers, clock)
        self._held = self.guard.held
        self._routing = Routing(coalescer, names, peers, self.guard, self._seal, owner_of)
        self._routes = self._routing.by_class
        self._failover = Failover(
            peers, self.guard, self._queries, self._budget, write=self._write_again, end=self._end
        )
        self._calls = self._ok = self._failed = self._retries = self._late = self._rejected = 0
        coalescer.owner = self

    async def start(self) -> None:
        """Listen on the inbox."""
        self._subscription = await self._transport.subscribe(f"{self._inbox}.*", self._on_inbox)

    async def close(self) -> None:
        """End what still waits and stop listening; from then on no call is taken."""
        self._is_closed = True
        for call in list(self._pending.values()):
            progress = call.trouble()
            sent = progress.phase in (Phase.SENT, Phase.ACCEPTED) or progress.maybe_ran
            outcome = Outcome.UNKNOWN if sent else Outcome.NOT_RUN
            self._end(call, Verdict(Code.DISCONNECTED, outcome, "the bus was closed before an answer came"))
        self.guard.close()
        if self._timer is not None:
            self._timer.cancel()
        self._unsent.clear()
        if self._subscription is not None:
            await self._subscription.close()

    def statistics(self) -> CallerStatistics:
        """Return the counts so far."""
        return CallerStatistics(
            calls=self._calls,
            in_flight=len(self._pending),
            ok=self._ok,
            failed=self._failed,
            retries=self._retries,
            failovers=self._failover.count,
            asked=self._queries.asked,
            cancels=self._queries.cancels,
            trips=self.guard.trips,
            held_back=self.guard.held_back,
            late_answers=self._late,
            rejected=self._rejected,
        )

    # -- asking --------------------------------------------------------------------------------------------

    def call(
        self,
        request: Any,
        message_id: str,
        timeout: float,
        trace: str | None = None,
        target: Address | None = None,
        choice: Choice | None = None,
    ) -> Call:
        """Write a request and return the call, with the future of its result.

        Whoever stops waiting for the future must `forget` the call.

        Args:
            request: The message.
            message_id: Its id.
            timeout: Seconds until the deadline.
            trace: W3C `traceparent`.
            target: The one node to ask, or None for any. With a `choice` the one to ask first.
            choice: Which nodes may be asked; None for all.

        Raises:
            DeadlineExceededError: The time was up before it could be written.
            DisconnectedError: The caller is closed.
            InvalidMessageError: A field holds what MessagePack cannot carry.
            TooLargeError: The message exceeds what the server takes.
            CircuitOpenError: A circuit breaker holds it back.
            ConfigurationError: The class is no request.
        """
        route = self._routes.get(type(request)) or self._routing.add(type(request))
        if timeout <= 0.0 or self._is_closed:
            raise endings.not_taken(route.type_name, is_closed=self._is_closed)
        frame = encode_frame(
            request, route.type_name, message_id, route.key_field, int(timeout * 1000.0), trace, self._max_payload
        )
        now = self._clock()
        deadline = now + timeout
        due = deadline if timeout < self._patience else now + self._patience
        call = Call(message_id, route, route.lane, self._create_future(), frame, deadline, due, timeout)
        if target is not None or self._peers.troubled or self._held:
            self._routing.aim(call, target, choice)
        if route.key_field is not None and target is None and choice is None and not self._held:
            key = key_text(request, route.key_field)
            if key is not None:
                self._routing.prefer(call, key)
        lane = call.lane
        self._pending[message_id] = call
        self._calls += 1
        if self._is_connected and not self._coalescer.is_blocked:
            call.batch = lane.add(frame)
        else:
            attempts.after_held(call.trouble())
            call.wake()
            if self._is_connected:
                self._unsent.append(call)  # without a connection `reconnected` finds it among the pending
        if not self._sweeping:
            self._sweeping = True
            self._sweep_due = now + _SWEEP_SECONDS
            self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        return call

    def forget(self, call: Call) -> None:
        """Drop a call that nobody waits for any more; its answer will count as late."""
        if self._pending.pop(call.id, None) is not None:
            self.guard.dropped(call)

    def _write_again(self, call: Call, now: float) -> Address | None:
        """Write a call with what is left of its time and its next attempt; return the node it was addressed to."""
        progress = call.trouble()
        target = self._routing.aim_again(call)
        if target is None and call.choice is not None:
            verdict = attempts.after_no_choice(progress, now, self._rng)
            call.wake()
            if verdict is not None:
                self._end(call, verdict)
            return None
        attempts.after_write(progress, now, self._patience, None if target is None else target[1])
        call.wake()
        self._retries += progress.attempt > 1
        frame = msgspec.structs.replace(
            _decode_frame(call.frame),
            remaining_ms=max(0, int((call.deadline - now) * 1000.0)),
            attempt=max(1, progress.attempt),
        )
        call.batch = call.lane.add(_encode(frame))
        return target

    def _seal(self, number: int, frames: Sequence[bytes], _: float) -> tuple[bytes, str]:
        payload = join_batch(Kind.MESSAGES, (self._sender, self._answers_to, number), frames)
        # A message without listeners comes back on its reply subject: the number says which batch it was.
        return payload, f"{self._inbox}.{number}"

    # -- answers -------------------------------------------------------------------------------------------

    def _on_inbox(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        if headers is not None and self._is_about_a_batch(subject, payload, headers):
            return
        if subject != self._answers_to:
            self._rejected += 1  # a stream that captures the request subject acknowledges here: not ours
            return
        try:
            kind = self._gate.kind(payload)
            if kind == Kind.ANSWERS:
                self._on_answers(self._gate.answers(payload))
            elif kind == Kind.ACCEPTED:
                self._on_accepted(self._gate.ids(payload))
            else:
                self._rejected += 1
        except GateError as error:
            self._rejected += 1
            self._log.warn("gate", "an answer was not let in: %s", error)

    def _on_answers(self, batch: AnswerBatch) -> None:
        take = self._pending.pop
        ok, answered, ok_status = 0, 0, int(Status.OK)
        route: Route | None = None
        for frame in batch.frames:
            call = take(frame.id, None)
            if call is None:
                self._late += 1
                continue
            if call.route is not route:
                if route is not None:
                    self._count_answers(route, batch.head.sender, answered)
                route, answered = call.route, 0
            answered += 1
            if frame.status != ok_status:
                answered -= frame.status == Status.LOST  # which is none
                self._on_fault(call, frame)
                continue
            try:
                result = Ok(route.decode(frame.body))
            except DECODE_ERRORS as error:
                self._fail(call, endings.not_a_reply(call, frame, error))
                continue
            ok += 1
            if call.aim is not None:
                self.guard.replied(call, frame.node)
            future = call.future
            if not future.done():
                future.set_result(result)
        self._ok += ok
        if route is not None:
            route.handler_seconds = smoothed(route.handler_seconds, batch.head.handler_us * 1e-6)
            route.lane.limit = grain(route.handler_seconds, len(self._pending), self._coalescer.max_frames)
            self._count_answers(route, batch.head.sender, answered)

    def _count_answers(self, route: Route, node: str, count: int) -> None:
        if count and self.guard.is_on:
            self.guard.answered(route.type_name, node, count)

    def _is_about_a_batch(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> bool:
        """Act on what the server or a node says about a batch as a whole; return whether it was that."""
        if headers.get(STATUS_HEADER) == NO_RESPONDERS and not payload:
            self._on_no_responders(subject)
        elif ERROR_CODE_HEADER in headers:
            self._on_rejected_batch(subject, headers)
        else:
            return False
        return True

    def _on_accepted(self, batch: IdBatch) -> None:
        """A node has these calls, and they are not done yet."""
        now = self._clock()
        node = batch.head.sender
        for message_id in batch.frames:
            call = self._pending.get(message_id)
            if call is not None:
                attempts.after_accepted(call.trouble(), now, node)
                call.wake()

    def _on_fault(self, call: Call, frame: AnswerFrame) -> None:
        """Handle an answer other than OK; the call is no longer pending."""
        progress = call.trouble()
        if frame.status in _NOT_RUN:
            self._on_not_run(call, frame)
            return
        try:
            fault = _decode_fault(frame.body)
        except DECODE_ERRORS as error:
            self._fail(call, endings.not_a_reply(call, frame, error))
            return
        self._fail(call, endings.of_fault(frame, fault, progress))

    def _on_not_run(self, call: Call, frame: AnswerFrame) -> None:
        """Handle what a node says that has not run a call: another attempt may follow."""
        progress = call.trouble()
        now, node = self._clock(), frame.node
        verdict: Verdict | None = None
        if attempts.is_old(progress, node) or (frame.status == Status.LOST and progress.phase is not Phase.ACCEPTED):
            self._late += 1
        elif frame.status == Status.EXPIRED:
            verdict = attempts.after_expired(progress, now, node)
        else:
            self._count_for_budget()
            if frame.status == Status.BUSY:
                verdict = attempts.after_busy(progress, now, node, self._budget, self._rng)
            else:
                self.guard.node_failed(call, node)
                verdict = attempts.after_lost(progress, now, node, self._budget)
        if verdict is None:
            self._pending[call.id] = call
            call.wake()
        else:
            self._fail(call, endings.of_last_word(call, verdict, frame), is_answer=False)

    def _batch_of(self, subject: str) -> int:
        """Return the batch whose number ends this reply subject; 0 if it is none of ours."""
        number = subject.rpartition(".")[2]
        if number.isdecimal() and len(number) <= _MAX_DIGITS:
            return int(number)
        self._rejected += 1
        return 0

    def _calls_in(self, batches: set[int]) -> list[Call]:
        return [call for call in self._pending.values() if call.batch in batches]

    def _on_rejected_batch(self, subject: str, headers: Mapping[str, str]) -> None:
        """A node could not read a batch (it may be older than this one): it did not run there."""
        text = headers.get(ERROR_HEADER, "a node could not read the batch")
        for call in self._calls_in({self._batch_of(subject)}):
            self._end(call, Verdict(Code.INVALID_MESSAGE, attempts.after_invalid(call.trouble()), text))

    def _on_no_responders(self, subject: str) -> None:
        # Collected for a turn, because finding the calls of batches means looking at every pending one.
        if not self._unheard:
            self._loop.call_soon(self._after_no_responders)
        self._unheard.add(self._batch_of(subject))

    def _after_no_responders(self) -> None:
        now = self._clock()
        batches, self._unheard = self._unheard, set()
        for call in self._calls_in(batches):
            if call.trouble().phase is not Phase.SENT:
                continue
            verdict = attempts.after_no_responders(call.trouble(), now, self._reconnected_at, self._rng)
            call.wake()
            if verdict is not None:
                self._end(call, verdict)

    # -- time and connection -------------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = self._clock()
        was_late, self._was_late = self._was_late, now - self._sweep_due >= _LATE_SECONDS
        if was_late or not self._was_late:
            self._end_late(now)
            if self._is_connected and not self._coalescer.is_blocked:
                self._failover.look_at([call for call in self._pending.values() if call.due <= now], now)
        self._count_for_budget()
        if self._pending:
            delay = max(_SWEEP_SECONDS, len(self._pending) * _SWEEP_SECONDS_PER_CALL)
            self._sweep_due = now + delay
            self._timer = self._loop.call_later(delay, self._sweep)
        else:
            self._sweeping = False

    def _end_late(self, now: float) -> None:
        for call in [call for call in self._pending.values() if call.deadline <= now]:
            self._end(call, attempts.after_deadline(call.trouble(), connected=self._is_connected))

    def node_died(self, node_id: str, types: Iterable[str]) -> None:
        """A node is dead: what it has goes elsewhere at once."""
        calls = [call for call in self._pending.values() if call.node == node_id]
        self._failover.node_died(calls, node_id, types, self._clock(), connected=self._is_connected)

    def _count_for_budget(self) -> None:
        self._budget.calls(self._calls - self._counted, self._clock())
        self._counted = self._calls

    def on_held(self, numbers: set[int]) -> None:
        """The coalescer gives back what the connection did not take."""
        for call in self._calls_in(numbers):
            attempts.after_held(call.trouble())
            call.wake()
            self._unsent.append(call)

    def on_refused(self, number: int, error: CatgaError) -> None:
        """The transport does not take a batch at all: a server that takes less has come in between."""
        code = Code.TOO_LARGE if isinstance(error, TooLargeError) else Code.DISCONNECTED
        for call in self._calls_in({number}):
            attempts.after_held(call.trouble())
            self._end(call, Verdict(code, attempts.after_invalid(call.trouble()), str(error)))

    def on_room(self) -> None:
        """Write what is unsent, as much as fits into a turn; the coalescer says when there is room again."""
        now = self._clock()
        while self._unsent and self._is_connected and not self._coalescer.is_blocked:
            if self._coalescer.queued_bytes > _BYTES_PER_TURN:
                self._loop.call_soon(self.on_room)
                return
            call = self._unsent.popleft()
            if call.id in self._pending and call.trouble().phase is Phase.UNSENT:
                self._write_again(call, now)

    def disconnected(self) -> None:
        """The connection was lost: note what may have run."""
        self._is_connected = False
        self._coalescer.drop()
        for call in self._pending.values():
            attempts.after_disconnect(call.trouble())
            call.wake()

    def reconnected(self) -> None:
        """The connection is back: write again what may be written again, and ask after the rest."""
        self._is_connected = True
        self._max_payload = self._transport.max_payload
        self._routing.closed.clear()
        now = self._reconnected_at = self._clock()
        ask: list[Call] = []
        self._unsent.clear()
        for call in self._pending.values():
            progress = call.trouble()
            step = attempts.after_reconnect(progress, now, self._patience)
            call.wake()
            if step is Step.WRITE:
                self._unsent.append(call)
            elif step is Step.ASK:
                ask.append(call)
        self._failover.ask_after(ask)
        self.on_room()

    def denied(self, subject: str) -> None:
        """The server refuses a subject: end the calls that were written to it, or send them another way."""
        now = self._clock()
        for call in [call for call in self._pending.values() if call.lane.subject == subject]:
            if call.progress is not None and call.progress.phase is not Phase.SENT:
                continue  # what a node has, it has
            if self._routing.close(call):
                attempts.after_not_permitted(call.trouble(), now)
                call.wake()
                continue
            self.forget(call)
            self._failed += 1
            if not call.future.done():
                call.future.set_exception(endings.not_permitted(subject))

    # -- ends ----------------------------------------------------------------------------------------------

    def _end(self, call: Call, verdict: Verdict) -> None:
        self._pending.pop(call.id, None)
        self._fail(call, endings.of_verdict(call, verdict, None), is_answer=False)

    def _fail(self, call: Call, result: Err, *, is_answer: bool = True) -> None:
        self._failed += 1
        self.guard.ended(call, result, is_answer=is_answer)
        if not call.future.done():
            call.future.set_result(result)
