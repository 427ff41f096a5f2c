"""Events that nobody stores and nobody answers: `publish` of ticks to each service, `broadcast` to every node."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Gate, GateError
from catga_bus.codec.frames import encode_frame
from catga_bus.dispatch.deliveries import Delivery, Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.errors import ConfigurationError, DisconnectedError, Outcome
from catga_bus.ids import MessageIds
from catga_bus.messages import Event, options_of
from catga_bus.rarely import RareLog
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.coalescer import Coalescer, Lane
from catga_bus.wire import Kind, MessageFrame, Names, Status, join_batch, token


class FanoutStatistics(msgspec.Struct, frozen=True):
    """What was sent and received as ticks and broadcasts; counts since start."""

    sent: int
    received: int
    dropped: int
    """Events that found the intake full, or were turned away by a limit: at most once is the promise."""

    rejected: int
    """Payloads that were not let in."""


class _Outlet(msgspec.Struct):
    """What is known of one event class on its way out."""

    type_name: str
    key_field: str | None
    tick: Lane
    broadcast: Lane


class Fanout:
    """Sends and receives events over core NATS.

    Args:
        transport: The connection.
        coalescer: Packs the events.
        gate: Lets events in.
        names: The subjects.
        dispatcher: Runs the handlers.
        ids: Ids for messages that come without.
        service: The queue group of ticks.
        sender: The id of this node, for the heads of batches.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        transport: Transport,
        coalescer: Coalescer,
        gate: Gate,
        names: Names,
        dispatcher: Dispatcher,
        ids: MessageIds,
        *,
        service: str,
        sender: str,
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._coalescer = coalescer
        self._gate = gate
        self._names = names
        self._dispatcher = dispatcher
        self._ids = ids
        self._service = service
        self._sender = sender
        self._log = RareLog(logging.getLogger("catga_bus.fanout"), clock)
        self._outlets: dict[type, _Outlet] = {}
        self._stations: dict[str, list[Station]] = {}
        self._durable: set[str] = set()
        self._by_token: dict[str, str] = {}
        self._subscriptions: list[Subscription] = []
        self._sent = self._received = self._dropped = self._rejected = 0

    def statistics(self) -> FanoutStatistics:
        """Return the counts so far."""
        return FanoutStatistics(self._sent, self._received, self._dropped, self._rejected)

    # -- out -----------------------------------------------------------------------------------------------

    async def publish(self, event: Event, message_id: str, trace: str | None) -> None:
        """Send an event of a class with `durable=False` to one node of every service that handles it.

        Raises:
            ConfigurationError: The class is durable.
            DisconnectedError: There is no connection.
            TooLargeError: It exceeds what the server takes.
            InvalidMessageError: A field holds what MessagePack cannot carry.
        """
        outlet = self._outlet(type(event))
        if options_of(type(event)).durable:
            raise ConfigurationError(
                f"{outlet.type_name} is a durable event, and this version stores no events yet; declare it with "
                f"durable=False, or broadcast it"
            )
        await self._send(outlet, outlet.tick, event, message_id, trace)

    async def broadcast(self, event: Event, message_id: str, trace: str | None) -> None:
        """Send an event to every live node that handles it; raises as `publish` does."""
        outlet = self._outlet(type(event))
        await self._send(outlet, outlet.broadcast, event, message_id, trace)

    async def _send(self, outlet: _Outlet, lane: Lane, event: Event, message_id: str, trace: str | None) -> None:
        if self._coalescer.is_blocked and self._transport.is_connected:
            await self._coalescer.wait_room()
        if not self._transport.is_connected:
            raise DisconnectedError(
                f"{outlet.type_name} was not sent: there is no connection to {self._transport.url}",
                outcome=Outcome.NOT_RUN,
            )
        frame = encode_frame(
            event, outlet.type_name, message_id, outlet.key_field, None, trace, self._transport.max_payload
        )
        self._sent += 1
        lane.add(frame)

    def _outlet(self, cls: type) -> _Outlet:
        outlet = self._outlets.get(cls)
        if outlet is None:
            options = options_of(cls)
            if options.kind != "Event":
                raise ConfigurationError(f"{cls.__name__} is a {options.kind}, not an Event: send it")
            name = options.type_name
            outlet = self._outlets[cls] = _Outlet(
                type_name=name,
                key_field=options.partition_by,
                tick=self._coalescer.lane(self._names.tick(name), self._seal),
                broadcast=self._coalescer.lane(self._names.broadcast(name), self._seal),
            )
        return outlet

    def _seal(self, number: int, frames: Sequence[bytes], _: float) -> tuple[bytes, str]:
        return join_batch(Kind.MESSAGES, (self._sender, None, number), frames), ""

    # -- in ------------------------------------------------------------------------------------------------

    def add(self, station: Station, *, durable: bool) -> None:
        """Take on a handler of an event type."""
        name = station.type_name
        self._stations.setdefault(name, []).append(station)
        self._by_token[token(name)] = name
        if durable:
            self._durable.add(name)
        self._dispatcher.add(station)

    async def start(self) -> None:
        """Subscribe to what is handled here."""
        for name in self._stations:
            everyone = await self._transport.subscribe(self._names.broadcast(name), self._on_broadcast)
            self._subscriptions.append(everyone)
            if name not in self._durable:
                tick = await self._transport.subscribe(
                    self._names.tick(name), self._on_tick, queue=token(self._service)
                )
                self._subscriptions.append(tick)

    async def stop_intake(self) -> None:
        """Take no more events; those that are on their way here are still handled."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()

    async def close(self) -> None:
        """Be deaf."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()

    def _on_broadcast(self, subject: str, payload: bytes, _: str, __: Mapping[str, str] | None) -> None:
        self._receive(subject, payload, in_order=True)

    def _on_tick(self, subject: str, payload: bytes, _: str, __: Mapping[str, str] | None) -> None:
        self._receive(subject, payload, in_order=False)

    def _receive(self, subject: str, payload: bytes, *, in_order: bool) -> None:
        gate = self._gate
        try:
            if gate.is_json(payload):
                gate.json(payload)
                self._take_json(subject, payload, in_order=in_order)
                return
            if gate.kind(payload) != Kind.MESSAGES:
                self._rejected += 1
                return
            batch = gate.messages(payload)
        except GateError as error:
            self._rejected += 1
            self._log.warn("gate", "an event on %r was not let in: %s", subject, error)
            return
        sender = batch.head.sender
        # The server checks subjects, not frames: a frame of another type would get around its permissions.
        allowed = self._allowed(subject, in_order=in_order)
        alone = len(batch.frames) == 1
        for frame in batch.frames:
            self._received += 1
            if frame.type != allowed:
                self._rejected += 1
                continue
            # A copy, else one slow event would keep the bytes of all its batch mates.
            self._admit(frame, sender, frame.body if alone else frame.body.copy(), in_order=in_order)
        self._dispatcher.wake()

    def _allowed(self, subject: str, *, in_order: bool) -> str | None:
        """Return the type that may come on a subject; durable events come as broadcasts only."""
        name = self._by_token.get(subject.rpartition(".")[2])
        return None if name in self._durable and not in_order else name

    def _take_json(self, subject: str, payload: bytes, *, in_order: bool) -> None:
        """Take one JSON event from a client that is not a bus; its type is in the subject."""
        self._received += 1
        name = self._allowed(subject, in_order=in_order)
        if name is None:
            self._rejected += 1
            return
        body = msgspec.Raw(payload)
        frame = MessageFrame(self._ids.take(), name, None, None, 1, None, body)
        self._admit(frame, "json", body, in_order=in_order, json=True)
        self._dispatcher.wake()

    def _admit(
        self, frame: MessageFrame, sender: str, body: msgspec.Raw, *, in_order: bool, json: bool = False
    ) -> None:
        for station in self._stations[frame.type]:
            delivery = Delivery(
                station=station,
                id=frame.id,
                key=frame.key,
                attempt=frame.attempt,
                trace=frame.trace,
                sender=sender,
                body=body,
                size=len(body),
                deadline=math.inf,
                settle=self._settled,
                lane=sender if in_order else None,
                json=json,
            )
            if not self._dispatcher.admit(delivery):
                self._dropped += 1

    def _settled(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        """Nobody waits for an answer to an event; what went wrong is in the log."""
        del seconds
        self._dropped += status is Status.BUSY
        if status in (Status.INVALID, Status.BUSY):
            name = delivery.station.type_name
            self._log.warn(name, "%s %r was not handled: %s", name, delivery.id, value.message)
