"""The asking side of the request lane: writes requests, matches answers, and acts on what `attempts` decides."""

import asyncio
import logging
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import DECODE_ERRORS, Body, Gate, GateError, explain
from catga_bus.codec.frames import encode_frame
from catga_bus.errors import Code, ConfigurationError, DeadlineExceededError, Outcome, PermissionDeniedError
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
        self._inbox = transport.new_inbox()
        self._answers_to = f"{self._inbox}.a"
        self._pending: dict[str, Call] = {}
        self._routes: dict[type, Route] = {}
        self._sweeping = False
        self._timer: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        self._reconnected_at = -math.inf
        self._budget = RetryBudget(clock())
        self._counted = 0  # calls that the budget has been told of
        self._calls = self._ok = self._failed = self._retries = self._late = self._rejected = 0

    async def start(self) -> None:
        """Listen on the inbox."""
        self._subscription = await self._transport.subscribe(f"{self._inbox}.*", self._on_inbox)

    async def close(self) -> None:
        """End what still waits and stop listening."""
        for call in list(self._pending.values()):
            sent = call.progress.phase is Phase.SENT or call.progress.maybe_ran
            outcome = Outcome.UNKNOWN if sent else Outcome.NOT_RUN
            self._end(call, Verdict(Code.DISCONNECTED, outcome, "the bus was closed before an answer came"))
        if self._timer is not None:
            self._timer.cancel()
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
            InvalidMessageError: A field holds what MessagePack cannot carry.
            TooLargeError: The message exceeds what the server takes.
            ConfigurationError: The class is no request.
        """
        route = self._routes.get(type(request)) or self._add_route(type(request))
        transport = self._transport
        if timeout <= 0.0:
            text = f"{route.type_name}: the connection was behind until the deadline"
            raise DeadlineExceededError(text, outcome=Outcome.NOT_RUN)
        frame = encode_frame(
            request, route.type_name, message_id, route.key_field, int(timeout * 1000.0), trace, transport.max_payload
        )
        lane = route.lane if target is None else self._lane_to(route, target)
        future: asyncio.Future[Ok[Any] | Err] = self._loop.create_future()
        call = Call(message_id, route, lane, future, frame, Progress(self._clock() + timeout, route.idempotent))
        self._pending[message_id] = call
        self._calls += 1
        route.in_flight += 1
        if transport.is_connected:
            call.progress.attempt = 1
            call.progress.phase = Phase.SENT
            call.batch = lane.add(frame)
        if not self._sweeping:
            self._sweeping = True
            self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        return call

    def forget(self, call: Call) -> None:
        """Drop a call that nobody waits for any more; its answer will count as late."""
        if self._pending.pop(call.id, None) is not None:
            call.route.in_flight -= 1

    def _write_again(self, call: Call, remaining: float) -> None:
        """Write a call with what is left of its time and its next attempt."""
        progress = call.progress
        progress.attempt += 1
        progress.phase = Phase.SENT
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
            lane=self._coalescer.lane(self._names.request(name), self._seal),
        )
        self._routes[cls] = route
        return route

    def _lane_to(self, route: Route, target: tuple[str, str]) -> Lane:
        service, node_id = target
        return self._coalescer.lane(self._names.node_request(service, node_id, route.type_name), self._seal)

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
        pending = self._pending
        ok = 0
        route: Route | None = None
        for frame in batch.frames:
            call = pending.pop(frame.id, None)
            if call is None:
                self._late += 1
                continue
            route = call.route
            route.in_flight -= 1
            if frame.status != Status.OK:
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
            route.lane.limit = grain(route.handler_seconds, route.in_flight, self._coalescer.max_frames)

    def _on_fault(self, call: Call, frame: AnswerFrame) -> None:
        """Handle an answer other than OK; the call is no longer pending."""
        now = self._clock()
        progress = call.progress
        if frame.status == Status.BUSY:
            self._count_for_budget()
            verdict = attempts.after_busy(progress, now, self._budget, self._rng)
            if verdict is None:
                self._pending[call.id] = call
                call.route.in_flight += 1
            else:
                self._fail(call, self._err(call, verdict, frame.node))
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
                _outcome(frame.status, fault.code),
                fault.retryable,
                progress.attempt,
                frame.node,
            ),
        )

    def _calls_of(self, subject: str) -> list[Call]:
        """Return the calls of the batch whose number ends this reply subject."""
        number = subject.rpartition(".")[2]
        if not number.isdecimal() or len(number) > 20:
            self._rejected += 1
            return []
        batch = int(number)
        return [call for call in self._pending.values() if call.batch == batch]

    def _on_rejected_batch(self, subject: str, headers: Mapping[str, str]) -> None:
        """A node could not read a batch (it may be older than this one): none of it ran."""
        text = headers.get(ERROR_HEADER, "a node could not read the batch")
        for call in self._calls_of(subject):
            self._end(call, Verdict(Code.INVALID_MESSAGE, Outcome.NOT_RUN, text))

    def _on_no_responders(self, subject: str) -> None:
        now = self._clock()
        for call in self._calls_of(subject):
            verdict = attempts.after_no_responders(call.progress, now, self._reconnected_at, self._rng)
            if verdict is not None:
                self._end(call, verdict)

    # -- time and connection -------------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = self._clock()
        for call in [call for call in self._pending.values() if call.progress.deadline <= now]:
            self._end(call, attempts.after_deadline(call.progress, connected=self._transport.is_connected))
        if self._transport.is_connected and not self._coalescer.is_blocked:
            for call in [call for call in self._pending.values() if call.progress.due <= now]:
                call.progress.due = math.inf
                self._retries += 1
                self._write_again(call, call.progress.deadline - now)
        self._count_for_budget()
        if self._pending:
            delay = max(_SWEEP_SECONDS, len(self._pending) * _SWEEP_SECONDS_PER_CALL)
            self._timer = self._loop.call_later(delay, self._sweep)
        else:
            self._sweeping = False

    def _count_for_budget(self) -> None:
        self._budget.calls(self._calls - self._counted)
        self._counted = self._calls

    def disconnected(self) -> None:
        """The connection was lost: note what may have run; nothing is held for later."""
        self._coalescer.drop()
        for call in self._pending.values():
            attempts.after_disconnect(call.progress)

    def reconnected(self) -> None:
        """The connection is back: write again what may be written again."""
        now = self._reconnected_at = self._clock()
        for call in self._pending.values():
            if attempts.after_reconnect(call.progress):
                self._retries += call.progress.attempt > 0
                self._write_again(call, call.progress.deadline - now)

    def denied(self, subject: str) -> None:
        """The server refuses a subject: end the calls that were written to it."""
        for call in [call for call in self._pending.values() if call.lane.subject.lower() == subject.lower()]:
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
            verdict.outcome is Outcome.NOT_RUN,
            call.progress.attempt,
            node,
        )

    def _fail(self, call: Call, result: Err) -> None:
        self._failed += 1
        if not call.future.done():
            call.future.set_result(result)


def _outcome(status: int, code: str) -> Outcome:
    if status == Status.REFUSED:
        return Outcome.REFUSED
    if status == Status.INVALID:
        return Outcome.NOT_RUN
    # A handler that was cut off at its own time-out may have done anything.
    return Outcome.UNKNOWN if code == Code.TIMEOUT else Outcome.FAILED


def _not_a_reply(call: Call, frame: AnswerFrame, error: BaseException) -> Err:
    return Err(
        str(Code.HANDLER_ERROR),
        f"{call.route.type_name}: node {frame.node} answered what the message does not promise: {explain(error)}",
        None,
        Outcome.FAILED,
        attempts=call.progress.attempt,
        node=frame.node,
    )
