"""The asking side of the request lane: writes requests, matches answers, and acts on what `attempts` decides."""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import DECODE_ERRORS, Body, Gate, GateError, explain
from catga_bus.codec.frames import encode_frame
from catga_bus.errors import (
    CallError,
    CatgaError,
    Code,
    ConfigurationError,
    DeadlineExceededError,
    DisconnectedError,
    Outcome,
    PermissionDeniedError,
    TooLargeError,
)
from catga_bus.messages import options_of, reply_type
from catga_bus.rarely import RareLog
from catga_bus.requests import attempts
from catga_bus.requests.attempts import Phase, Progress, RetryBudget, Verdict
from catga_bus.requests.calls import Call, CallerStatistics, Route
from catga_bus.requests.grain import grain, smoothed
from catga_bus.result import Err, Ok
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.coalescer import Coalescer, Lane
from catga_bus.wire import (
    ERROR_CODE_HEADER,
    ERROR_HEADER,
    NO_RESPONDERS,
    STATUS_HEADER,
    AnswerFrame,
    Fault,
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

_BYTES_PER_TURN = 262_144  # of unsent calls written again: the rest of the loop has its turns, too
_MAX_DIGITS = 18

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
        sender: Id of this node, for the heads of batches.
        clock: Monotonic seconds.
        rng: Jitter of retries.
    """

    def __init__(
        self,
        transport: Transport,
        coalescer: Coalescer,
        gate: Gate,
        names: Names,
        *,
        sender: str,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._coalescer = coalescer
        self._gate = gate
        self._names = names
        self._sender = sender
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
        self._waiting: set[Call] = set()  # to be written again when they are due
        self._unsent: deque[Call] = deque()  # to be written when the connection takes them
        self._unheard: set[int] = set()  # batches to which nobody listened, in this turn
        self._is_closed = False
        self._routes: dict[type, Route] = {}
        self._sweeping = False
        self._timer: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        self._reconnected_at = -math.inf
        self._budget = RetryBudget(clock())
        self._counted = 0  # calls that the budget has been told of
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
            sent = progress.phase is Phase.SENT or progress.maybe_ran
            outcome = Outcome.UNKNOWN if sent else Outcome.NOT_RUN
            self._end(call, Verdict(Code.DISCONNECTED, outcome, "the bus was closed before an answer came"))
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
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
        target: tuple[str, str] | None = None,
    ) -> Call:
        """Write a request and return the call, with the future of its result.

        Whoever stops waiting for the future must `forget` the call.

        Args:
            request: The message.
            message_id: Its id.
            timeout: Seconds until the deadline.
            trace: W3C `traceparent`.
            target: Service and id of the one node to ask, or None for any.

        Raises:
            DeadlineExceededError: The time was up before it could be written.
            DisconnectedError: The caller is closed.
            InvalidMessageError: A field holds what MessagePack cannot carry.
            TooLargeError: The message exceeds what the server takes.
            ConfigurationError: The class is no request.
        """
        route = self._routes.get(type(request)) or self._add_route(type(request))
        if timeout <= 0.0 or self._is_closed:
            raise _not_taken(route.type_name, is_closed=self._is_closed)
        frame = encode_frame(
            request, route.type_name, message_id, route.key_field, int(timeout * 1000.0), trace, self._max_payload
        )
        lane = route.lane if target is None else self._lane_to(route, target)
        call = Call(message_id, route, lane, self._create_future(), frame, self._clock() + timeout)
        self._pending[message_id] = call
        self._calls += 1
        if self._is_connected and not self._coalescer.is_blocked:
            call.batch = lane.add(frame)
        else:
            call.progress = Progress(idempotent=route.idempotent)
            if self._is_connected:
                self._unsent.append(call)  # without a connection `reconnected` finds it among the pending
        if not self._sweeping:
            self._sweeping = True
            self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        return call

    def forget(self, call: Call) -> None:
        """Drop a call that nobody waits for any more; its answer will count as late."""
        self._pending.pop(call.id, None)

    def _write_again(self, call: Call, remaining: float) -> None:
        """Write a call with what is left of its time and its next attempt."""
        progress = call.trouble()
        progress.attempt += 1
        progress.phase = Phase.SENT
        self._retries += progress.attempt > 1
        frame = msgspec.structs.replace(
            _decode_frame(call.frame), remaining_ms=max(0, int(remaining * 1000.0)), attempt=progress.attempt
        )
        call.batch = call.lane.add(_encode(frame))

    def _add_route(self, cls: type) -> Route:
        options = options_of(cls)
        if options.kind == "Command":
            raise ConfigurationError(
                f"{cls.__name__} is a command, and this version stores no commands yet; make it a Request"
            )
        if options.kind != "Request":
            raise ConfigurationError(f"{cls.__name__} is an {options.kind}: publish or broadcast it")
        name = options.type_name
        route = Route(
            type_name=name,
            subject=self._names.request(name),
            key_field=options.partition_by,
            idempotent=options.idempotent,
            decode=Body(reply_type(cls)).decode,
            lane=self._coalescer.lane(self._names.request(name), self._seal, returnable=True),
        )
        self._routes[cls] = route
        return route

    def _lane_to(self, route: Route, target: tuple[str, str]) -> Lane:
        service, node_id = target
        subject = self._names.node_request(service, node_id, route.type_name)
        return self._coalescer.lane(subject, self._seal, returnable=True)

    def _seal(self, number: int, frames: Sequence[bytes], _: float) -> tuple[bytes, str]:
        payload = join_batch(Kind.MESSAGES, (self._sender, self._answers_to, number), frames)
        # A message without listeners comes back on its reply subject: the number says which batch it was.
        return payload, f"{self._inbox}.{number}"

    # -- answers -------------------------------------------------------------------------------------------

    def _on_inbox(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        if headers is not None and headers.get(STATUS_HEADER) == NO_RESPONDERS and not payload:
            self._on_no_responders(subject)
            return
        if headers is not None and ERROR_CODE_HEADER in headers:
            self._on_rejected_batch(subject, headers)
            return
        if subject != self._answers_to:
            self._rejected += 1  # a stream that captures the request subject acknowledges here: not ours
            return
        try:
            if self._gate.kind(payload) != Kind.ANSWERS:
                self._rejected += 1
                return
            batch = self._gate.answers(payload)
        except GateError as error:
            self._rejected += 1
            self._log.warn("gate", "an answer was not let in: %s", error)
            return
        take = self._pending.pop
        ok, ok_status = 0, int(Status.OK)
        route: Route | None = None
        for frame in batch.frames:
            call = take(frame.id, None)
            if call is None:
                self._late += 1
                continue
            route = call.route
            if frame.status != ok_status:
                self._on_fault(call, frame)
                continue
            try:
                result = Ok(route.decode(frame.body))
            except DECODE_ERRORS as error:
                self._fail(call, _not_a_reply(call, frame, error))
                continue
            ok += 1
            future = call.future
            if not future.done():
                future.set_result(result)
        self._ok += ok
        if route is not None:
            route.handler_seconds = smoothed(route.handler_seconds, batch.head.handler_us * 1e-6)
            route.lane.limit = grain(route.handler_seconds, len(self._pending), self._coalescer.max_frames)

    def _on_fault(self, call: Call, frame: AnswerFrame) -> None:
        """Handle an answer other than OK; the call is no longer pending."""
        now = self._clock()
        progress = call.trouble()
        if frame.status == Status.BUSY:
            self._count_for_budget()
            verdict = attempts.after_busy(progress, now, self._budget, self._rng)
            if verdict is None:
                self._pending[call.id] = call
                self._waiting.add(call)
            else:
                self._fail(call, self._busy(call, verdict, frame))
            return
        if frame.status == Status.EXPIRED:
            self._fail(call, self._err(call, attempts.after_expired(progress), frame.node))
            return
        try:
            fault = _decode_fault(frame.body)
        except DECODE_ERRORS as error:
            self._fail(call, _not_a_reply(call, frame, error))
            return
        self._fail(
            call,
            Err(
                fault.code,
                fault.message,
                fault.details,
                _outcome(frame.status, fault.code, progress),
                fault.retryable,
                progress.attempt,
                frame.node,
            ),
        )

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
            if verdict is None:
                self._waiting.add(call)
            else:
                self._end(call, verdict)

    # -- time and connection -------------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = self._clock()
        for call in [call for call in self._pending.values() if call.deadline <= now]:
            self._end(call, attempts.after_deadline(call.trouble(), connected=self._is_connected))
        if self._waiting and self._is_connected and not self._coalescer.is_blocked:
            self._write_due(now)
        self._count_for_budget()
        if self._pending:
            delay = max(_SWEEP_SECONDS, len(self._pending) * _SWEEP_SECONDS_PER_CALL)
            self._timer = self._loop.call_later(delay, self._sweep)
        else:
            self._waiting.clear()
            self._sweeping = False

    def _write_due(self, now: float) -> None:
        for call in [call for call in self._waiting if call.trouble().due <= now or call.id not in self._pending]:
            self._waiting.discard(call)
            if call.id in self._pending:
                call.trouble().due = math.inf
                self._write_again(call, call.deadline - now)

    def _count_for_budget(self) -> None:
        self._budget.calls(self._calls - self._counted)
        self._counted = self._calls

    def on_held(self, numbers: set[int]) -> None:
        """The coalescer gives back what the connection did not take."""
        for call in self._calls_in(numbers):
            attempts.after_held(call.trouble())
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
                self._write_again(call, call.deadline - now)

    def disconnected(self) -> None:
        """The connection was lost: note what may have run."""
        self._is_connected = False
        self._coalescer.drop()
        for call in self._pending.values():
            attempts.after_disconnect(call.trouble())
        self._waiting.clear()

    def reconnected(self) -> None:
        """The connection is back: write again what may be written again."""
        self._is_connected = True
        self._max_payload = self._transport.max_payload
        self._reconnected_at = self._clock()
        self._unsent = deque(call for call in self._pending.values() if call.trouble().phase is Phase.UNSENT)
        self.on_room()

    def denied(self, subject: str) -> None:
        """The server refuses a subject: end the calls that were written to it."""
        for call in [call for call in self._pending.values() if call.lane.subject == subject]:
            self.forget(call)
            self._failed += 1
            if not call.future.done():
                call.future.set_exception(
                    PermissionDeniedError(
                        f"the server does not permit this user to publish to {call.lane.subject!r}",
                        call.lane.subject,
                    )
                )

    # -- ends ----------------------------------------------------------------------------------------------

    def _end(self, call: Call, verdict: Verdict) -> None:
        self.forget(call)
        self._fail(call, self._err(call, verdict, None))

    def _err(self, call: Call, verdict: Verdict, node: str | None) -> Err:
        return Err(
            str(verdict.code),
            f"{call.route.type_name}: {verdict.message}",
            None,
            verdict.outcome,
            verdict.outcome is Outcome.NOT_RUN and verdict.code not in (Code.INVALID_MESSAGE, Code.TOO_LARGE),
            call.attempts,
            node,
        )

    def _busy(self, call: Call, verdict: Verdict, frame: AnswerFrame) -> Err:
        """Return the end of a call that no node would take, with the reason and details of the last one asked."""
        result = self._err(call, verdict, frame.node)
        try:
            fault = _decode_fault(frame.body)
        except DECODE_ERRORS:
            return result
        text = f"{result.message}; the last one said: {fault.message}"
        return msgspec.structs.replace(result, message=text, details=fault.details)

    def _fail(self, call: Call, result: Err) -> None:
        self._failed += 1
        if not call.future.done():
            call.future.set_result(result)


def _outcome(status: int, code: str, progress: Progress) -> Outcome:
    if status == Status.REFUSED:
        return Outcome.REFUSED
    if status == Status.INVALID:
        return attempts.after_invalid(progress)
    # A handler that was cut off at its own time-out may have done anything.
    return Outcome.UNKNOWN if code == Code.TIMEOUT else Outcome.FAILED


def _not_taken(type_name: str, *, is_closed: bool) -> CallError:
    if is_closed:
        return DisconnectedError(f"{type_name}: the bus was closed before it was sent", outcome=Outcome.NOT_RUN)
    text = f"{type_name}: the connection was behind until the deadline"
    return DeadlineExceededError(text, outcome=Outcome.NOT_RUN)


def _not_a_reply(call: Call, frame: AnswerFrame, error: BaseException) -> Err:
    return Err(
        str(Code.HANDLER_ERROR),
        f"{call.route.type_name}: node {frame.node} answered what the message does not promise: {explain(error)}",
        None,
        Outcome.FAILED,
        attempts=call.attempts,
        node=frame.node,
    )
