"""The answering side of the request lane: lets batches in, hands them to the dispatcher, and sends the answers."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Gate, GateError
from catga_bus.dispatch.deliveries import Delivery, Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.errors import CatgaError, Code
from catga_bus.ids import MessageIds
from catga_bus.pulse import GAP, Pulse
from catga_bus.rarely import RareLog
from catga_bus.requests.answers import Answers
from catga_bus.requests.arrivals import Arrivals
from catga_bus.requests.inboxes import Inboxes
from catga_bus.requests.json_door import FULL, Endpoint, JsonDoor, not_encodable, too_large
from catga_bus.requests.kept import KeptAnswers
from catga_bus.requests.thaw import Thaw
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.coalescer import Coalescer, Lane
from catga_bus.wire import (
    BATCH_OVERHEAD,
    QUEUE_RPC,
    Fault,
    IdBatch,
    Kind,
    MessageBatch,
    MessageFrame,
    Names,
    Status,
    join_ids,
    token,
)

_encode = msgspec.msgpack.Encoder().encode
_LEAVING = Fault(Code.OVERLOADED, "the node is about to leave", retryable=True)
_LOST = Fault(Code.TIMEOUT, "the node does not know the message, or no longer")
_ID_IN_USE = Fault(Code.INVALID_MESSAGE, "another caller's message with this id is running: ids must be unique")
_RAN = (Status.OK, Status.REFUSED, Status.FAILED)  # what another attempt would do again


class ResponderStatistics(msgspec.Struct, frozen=True):
    """What the responder has done; counts since start."""

    batches: int
    requests: int
    rejected: int
    """Payloads that were not let in, and requests with nowhere to answer to."""

    answers_dropped: int
    """Refusals that found the way back full."""

    notices: int
    """Requests whose caller was told that they have arrived, because the answer took longer."""

    joined: int
    """Copies of a request that was still running, or whose answer was kept: not run again."""

    cancelled: int
    """Requests that had not started when their caller went elsewhere: not run."""

    gaps: int
    """Times that the event loop stood still for so long that what arrived meanwhile was taken as old."""


class Responder:
    """Answers requests.

    Args:
        transport: The connection.
        answers: Packs the answers.
        gate: Lets requests in.
        names: The subjects.
        dispatcher: Runs the handlers.
        inboxes: Where answers may go.
        ids: Ids for messages that come without.
        service: The service that this node belongs to.
        node_id: The id of this node.
        default_timeout: Seconds for requests that do not say how long their caller waits.
        kept_bytes: The most bytes of answers kept for callers that ask again.
        pulse: Tells when the event loop stood still.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        transport: Transport,
        answers: Coalescer,
        gate: Gate,
        names: Names,
        dispatcher: Dispatcher,
        inboxes: Inboxes,
        ids: MessageIds,
        *,
        service: str,
        node_id: str,
        default_timeout: float,
        kept_bytes: int,
        pulse: Pulse,
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._answers = answers
        self._gate = gate
        self._names = names
        self._dispatcher = dispatcher
        self._inboxes = inboxes
        self._service = service
        self._node_id = node_id
        self._default_timeout = default_timeout
        self._clock = clock
        self._log = RareLog(logging.getLogger("catga_bus.requests"), clock)
        self._endpoints: dict[str, Endpoint] = {}
        self._by_token: dict[str, str] = {}
        self._ways_back = Answers(answers, inboxes, node_id)
        self._own: list[Subscription] = []  # the subjects of this node alone
        self._is_leaving = False
        self._arrivals = Arrivals(self._tell_accepted)
        self._kept = KeptAnswers(kept_bytes, clock)
        self._json = JsonDoor(
            transport, answers, dispatcher, ids, default_timeout=default_timeout, publish=self._publish, clock=clock
        )
        self._pulse = pulse
        self._thaw = Thaw(transport, dispatcher)
        self._heard_at = -math.inf  # when this node last heard itself
        self._deaf_at = math.inf  # when this node should have heard itself; infinite if that says nothing
        self._batches = self._requests = self._rejected = self._dropped = 0
        self._told = self._joined = self._cancelled = 0

    def add(self, station: Station, encode_json: Callable[[Any], bytes]) -> None:
        """Take on a request type."""
        self._endpoints[station.type_name] = Endpoint(station, encode_json)
        self._by_token[token(station.type_name)] = station.type_name
        self._dispatcher.add(station)

    async def start(self) -> None:
        """Subscribe: this node's own subjects first, so that who finds it by a type can also address it."""
        service, node_id, names = self._service, self._node_id, self._names
        for subject, sink in (
            (names.node_requests(service, node_id), self._on_request),
            (names.node_status(service, node_id), self._on_status),
            (names.node_cancel(service, node_id), self._on_cancel),
        ):
            self._own.append(await self._transport.subscribe(subject, sink))
        for type_name, endpoint in self._endpoints.items():
            subject = self._names.request(type_name)
            endpoint.subscription = await self._transport.subscribe(subject, self._on_request, queue=QUEUE_RPC)

    async def stop_intake(self) -> None:
        """Take no more requests: what still comes is answered busy, what has come is still answered."""
        self._is_leaving = True
        for endpoint in self._endpoints.values():
            if endpoint.subscription is not None:
                await endpoint.subscription.unsubscribe()

    async def leave(self) -> None:
        """Have nobody send here any more, by name neither; what still comes is answered busy until `close`."""
        for subscription in self._own:
            await subscription.unsubscribe()

    async def close(self) -> None:
        """Be deaf."""
        self._arrivals.close()
        await self._thaw.close()
        for endpoint in self._endpoints.values():
            if endpoint.subscription is not None:
                await endpoint.subscription.close()
        for subscription in self._own:
            await subscription.close()

    def on_gap(self, seconds: float) -> None:
        """The event loop stood still for so long: what arrived meanwhile is old."""
        self._thaw.begin(seconds)

    def heard_itself(self, interval: float) -> None:
        """The connection has brought this node's own heartbeat, so what comes now has not waited on the way.

        Args:
            interval: Seconds until the next one.
        """
        self._heard_at = self._clock()
        self._deaf_at = self._heard_at + interval + GAP

    def lost_connection(self) -> None:
        """What waited in the connection is gone with it."""
        self._deaf_at = math.inf

    def statistics(self) -> ResponderStatistics:
        """Return the counts so far."""
        return ResponderStatistics(
            self._batches,
            self._requests,
            self._rejected,
            self._dropped,
            self._told,
            self._joined,
            self._cancelled,
            self._thaw.count,
        )

    # -- in ------------------------------------------------------------------------------------------------

    def _on_request(self, subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
        gate = self._gate
        try:
            if gate.is_json(payload):
                gate.json(payload)
                self._take_json(subject, payload, reply)
                return
            if gate.kind(payload) != Kind.MESSAGES:
                self._rejected += 1
                return
            batch = gate.messages(payload)
        except GateError as error:
            self._reject(reply, str(error))
            return
        self._take(batch, self._by_token.get(subject.rpartition(".")[2]))

    def _take(self, batch: MessageBatch, allowed: str | None) -> None:
        """Take a batch of messages of the one type that its subject allows.

        The server checks subjects, not frames: a frame of another type would get around its permissions.
        """
        head = batch.head
        inbox = head.reply
        if inbox is None or not self._ways_back.allow(inbox):
            self._rejected += 1
            self._log.warn("reply", "a batch of %r was not run: it may not be answered on %r", head.sender, inbox)
            return
        frames = batch.frames
        self._batches += 1
        self._requests += len(frames)
        now = self._clock()
        if now > self._pulse.late_at or now > self._deaf_at:
            self._after_gap(now)
        lane = self._ways_back.lane(inbox, allowed or "")
        if self._is_leaving or allowed is None:
            self._refuse_all(lane, frames, allowed)
            return
        endpoint, arrivals = self._endpoints[allowed], self._arrivals
        young, middle, told = arrivals.young, arrivals.middle, arrivals.told
        admit, settle = self._dispatcher.admit, self._settle
        counted_from = now - self._thaw.gap  # nobody knows when in the gap it came
        has_older = bool(middle or told)
        default = self._default_timeout
        alone = len(frames) == 1
        again: list[str] | None = None  # what comes in a later attempt, and is to be run
        for frame in frames:
            message_id = frame.id
            if frame.type != allowed:
                self._refuse(lane, message_id, Status.INVALID, self._unknown(frame.type))
                continue
            is_again = frame.attempt > 1
            is_here = message_id in young or (has_older and (message_id in middle or message_id in told))
            if (is_here or is_again) and self._is_known(message_id, lane):
                continue
            body = frame.body
            if not alone:
                body = body.copy()  # else one slow message would keep the bytes of all its batch mates
            remaining = frame.remaining_ms
            deadline = counted_from + (default if remaining is None else remaining * 0.001)
            delivery = Delivery(
                endpoint.station,
                message_id,
                frame.key,
                frame.attempt,
                frame.trace,
                head.sender,
                body,
                len(body),
                deadline,
                settle,
                lane,
            )
            if not admit(delivery):
                self._refuse(lane, message_id, Status.BUSY, FULL)
            elif is_again:
                told[message_id] = delivery
                again = again or []
                again.append(message_id)
            else:
                young[message_id] = delivery
        if again is not None:
            self._tell_at_once(inbox, again)
        if not arrivals.is_watched:
            arrivals.watch()
        self._dispatcher.wake()

    def _tell_at_once(self, inbox: str, ids: list[str]) -> None:
        """Tell of a later attempt before a handler runs, which may be one that kills its process."""
        self._tell_accepted(inbox, ids)
        self._transport.push()

    def _after_gap(self, now: float) -> None:
        """Take what comes now as old: the loop stood still, or the connection brought nothing."""
        if now > self._deaf_at:
            self._deaf_at = math.inf
            self._thaw.begin(now - self._heard_at)
        self._pulse.beat(now)

    def _is_known(self, message_id: str, lane: Lane) -> bool:
        """Whether a request is here already, or was: then it joins what runs, or gets the same answer."""
        known = self._arrivals.get(message_id)
        if known is not None and known.target.subject != lane.subject:
            self._refuse(lane, message_id, Status.INVALID, _ID_IN_USE)
            return True
        if known is not None:
            self._joined += 1
            self._tell_accepted(lane.subject, [message_id])
            return True
        answer = self._kept.find(message_id, lane.subject)
        if answer is None:
            return False
        self._joined += 1
        lane.add(answer)
        return True

    def _refuse_all(self, lane: Lane, frames: Sequence[MessageFrame], allowed: str | None) -> None:
        for frame in frames:
            if frame.type != allowed:
                self._refuse(lane, frame.id, Status.INVALID, self._unknown(frame.type))
            elif not self._is_known(frame.id, lane):  # else it runs, or ran: another node would run it again
                self._refuse(lane, frame.id, Status.BUSY, _LEAVING)

    # -- what callers ask and say about requests -----------------------------------------------------------

    def _on_status(self, subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
        """Say of each id that it is here, or send its answer again, or say that it is not known."""
        batch = self._ids_in(subject, payload, Kind.STATUS)
        if batch is None:
            return
        inbox = batch.head.reply or ""
        lane = self._ways_back.lane(inbox, "")
        here: list[str] = []
        for message_id in batch.frames:
            delivery = self._arrivals.get(message_id)
            if delivery is not None and delivery.target.subject == inbox:
                here.append(message_id)
                continue
            answer = self._kept.find(message_id, inbox)
            if answer is None:
                self._refuse(lane, message_id, Status.LOST, _LOST)
            elif not self._answers.is_full:
                lane.add(answer)
        if here:
            self._tell_accepted(inbox, here)

    def _on_cancel(self, subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
        """Drop what has not started: another node has it."""
        batch = self._ids_in(subject, payload, Kind.CANCEL)
        if batch is None:
            return
        for message_id in batch.frames:
            delivery = self._arrivals.get(message_id)
            if delivery is None or delivery.target.subject != batch.head.reply or delivery.task is not None:
                continue
            self._cancelled += 1
            self._arrivals.leave(message_id)
            delivery.settle = _settle_silently
            delivery.deadline = -math.inf

    def _ids_in(self, subject: str, payload: bytes, kind: Kind) -> IdBatch | None:
        try:
            if self._gate.kind(payload) == kind:
                batch = self._gate.ids(payload)
                inbox = batch.head.reply
                if inbox is not None and self._ways_back.allow(inbox):
                    return batch
        except GateError as error:
            self._log.warn("gate", "what came on %r was not let in: %s", subject, error)
        self._rejected += 1
        return None

    def _tell_accepted(self, inbox: str, ids: list[str]) -> None:
        self._told += len(ids)
        payload = join_ids(Kind.ACCEPTED, (self._node_id,), ids)
        self._publish(inbox, payload, None)

    def _unknown(self, type_name: str) -> Fault:
        text = f"node {self._node_id} of service {self._service} has no handler for {type_name}"
        return Fault(Code.NO_HANDLER, text, retryable=True)

    # -- out -----------------------------------------------------------------------------------------------

    def _settle(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        lane: Lane = delivery.target
        try:
            frame = _encode((delivery.id, status, value, self._node_id))
        except Exception as error:
            frame = self._ways_back.fault(delivery.id, Status.FAILED, not_encodable(delivery, error))
        if len(frame) + BATCH_OVERHEAD > self._transport.max_payload:
            fault = too_large(delivery, len(frame), self._transport.max_payload)
            frame = self._ways_back.fault(delivery.id, Status.FAILED, fault)
        arrivals, message_id = self._arrivals, delivery.id
        if (
            arrivals.young.pop(message_id, None) is None
            and arrivals.middle.pop(message_id, None) is None
            and arrivals.told.pop(message_id, None) is not None
            and status in _RAN
        ):
            self._kept.keep(message_id, lane.subject, frame)
        lane.add(frame)
        lane.sums += seconds

    def _refuse(self, lane: Lane, message_id: str, status: Status, fault: Fault) -> None:
        """Answer what was not admitted; while the way back is full such answers are dropped, never stored."""
        if self._answers.is_full:
            self._dropped += 1
            return
        lane.add(self._ways_back.fault(message_id, status, fault))

    def _take_json(self, subject: str, payload: bytes, reply: str) -> None:
        """Take one JSON message from a client that is not a bus; its type is in the subject."""
        if not self._inboxes.allow(reply):
            self._rejected += 1
            self._log.warn("reply", "a JSON request on %r was not run: it may not be answered on %r", subject, reply)
            return
        type_name = self._by_token.get(subject.rpartition(".")[2], "")
        endpoint = self._endpoints.get(type_name)
        self._requests += 1
        if endpoint is None:
            self._json.refuse(reply, self._unknown(type_name or subject))
        elif self._is_leaving:
            self._json.refuse(reply, _LEAVING)
        else:
            self._json.take(endpoint, payload, reply)

    def _publish(self, subject: str, payload: bytes, headers: Mapping[str, str] | None) -> None:
        try:
            self._transport.publish(subject, payload, headers=headers)
            self._answers.check()  # these answers go beside the lanes, and fill the same connection
        except CatgaError as error:
            self._dropped += 1
            self._log.warn("lost", "an answer to %r was lost: %s", subject, error)

    def _reject(self, reply: str, reason: str) -> None:
        """Count a payload that was not let in, and say so where there is an inbox."""
        self._rejected += 1
        self._log.warn("gate", "a request was not let in: %s", reason)
        if self._inboxes.allow(reply):
            self._json.refuse(reply, Fault(Code.INVALID_MESSAGE, reason))


def _settle_silently(delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
    """Nobody waits for it here any more."""
