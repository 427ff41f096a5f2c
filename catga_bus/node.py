"""Node: the rooms of a started bus, built and joined."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from catga_bus.clock import Clock, utc_now
from catga_bus.cluster.beats import Identity, Report
from catga_bus.cluster.directory import Directory
from catga_bus.cluster.discovery import MemoryDiscovery, NatsDiscovery, NodeDiscovery
from catga_bus.cluster.heartbeat import Gauge
from catga_bus.cluster.records import ClusterStatistics
from catga_bus.codec import Gate, Limits
from catga_bus.config import BusConfig
from catga_bus.context import Calls, Context
from catga_bus.dispatch.deliveries import Delivery, DispatcherStatistics, Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.dispatch.stations import build_station
from catga_bus.dispatch.threads import HandlerThreads
from catga_bus.durability.durable import Durable, DurableStatistics
from catga_bus.durability.inbox.base import Inbox
from catga_bus.durability.working.workshop import HANDLER_SECONDS
from catga_bus.errors import CallError, InvalidMessageError
from catga_bus.fanout import Fanout, FanoutStatistics
from catga_bus.handlers.registry import Handler
from catga_bus.handlers.router import Collected
from catga_bus.health import BusState, Facts
from catga_bus.ids import MessageIds
from catga_bus.partition.hashing import partition_of
from catga_bus.pulse import Pulse
from catga_bus.requests.answers import Answers
from catga_bus.requests.caller import Caller
from catga_bus.requests.calls import CallerStatistics
from catga_bus.requests.inboxes import Inboxes
from catga_bus.requests.kept import KeptBatches
from catga_bus.requests.responder import Responder, ResponderStatistics
from catga_bus.requests.service_api import EndpointCounts, NodeFacts, ServiceApi
from catga_bus.resilience.circuit_breaker import BreakerStatistics
from catga_bus.telemetry.propagation import trace_source
from catga_bus.transport.asking import ask
from catga_bus.transport.base import Transport
from catga_bus.transport.carriers import make_transport
from catga_bus.transport.coalescer import Coalescer, CoalescerStatistics
from catga_bus.transport.memory import MemoryTransport
from catga_bus.vitals import Vitals
from catga_bus.wire import Names

log = logging.getLogger("catga_bus")


class BusStatistics(msgspec.Struct, frozen=True):
    """A snapshot of what a bus has done since its start."""

    calls: CallerStatistics
    requests: ResponderStatistics
    events: FanoutStatistics
    """Events that are not stored."""

    stored: DurableStatistics
    """Commands and durable events."""

    handlers: DispatcherStatistics
    sent: CoalescerStatistics
    """Batches of requests and events."""

    answered: CoalescerStatistics
    """Batches of answers."""

    reconnects: int
    breakers: tuple[BreakerStatistics, ...]
    """Of this node's calls: those that have seen a failure lately."""

    nodes: ClusterStatistics
    """Heartbeats, probes and deaths."""


class Node:
    """The rooms of a started bus.

    Args:
        identity: Who it is.
        config: Its options.
        transport: Its connection, connected.
        collected: Its handlers and middleware.
        calls: Makes calls on behalf of handlers.
        clock: Monotonic seconds.
        urls: Its servers, for the connection of its heartbeats.
        discovery: How it hears of other nodes; by default over its transport.
        inbox: Knows which stored messages are done, opened; None: their effects may happen again.
    """

    def __init__(
        self,
        identity: Identity,
        config: BusConfig,
        transport: Transport,
        collected: Collected,
        calls: Calls,
        clock: Clock,
        *,
        urls: tuple[str, ...],
        discovery: NodeDiscovery | None = None,
        inbox: Inbox | None = None,
    ) -> None:
        names = self._names = Names(config.namespace)
        ids = MessageIds()
        gate = Gate(Limits(max_bytes=transport.max_payload))
        inboxes = Inboxes({*config.reply_roots, config.inbox_prefix}, names)
        self.identity = identity
        self.config = config
        self.transport = transport
        self.collected = collected
        self.clock = clock
        self.reconnects = 0
        self.is_listening = False  # whether messages for handlers may come
        self._urls = urls
        self._calls = calls
        self._threads: list[HandlerThreads] = []
        self._standing_down: asyncio.Task[None] | None = None
        self.vitals = Vitals(clock)
        self.pulse = Pulse(clock, self._on_gap)
        self.outgoing = self._coalescer()
        self.answers = self._coalescer()
        self.dispatcher = Dispatcher(
            self._context, pulse=self.pulse, clock=clock, intake=config.intake, intake_bytes=config.intake_bytes
        )
        self.answers.watch(partial(self.dispatcher.pause, "behind"), partial(self.dispatcher.resume, "behind"))
        self.directory = Directory(
            self._discovery(discovery, gate, inboxes.allow),
            identity,
            self._report,
            clock=clock,
            rng=random.Random(),
            interval=config.heartbeat_interval,
            timeout=config.heartbeat_timeout,
        )
        self.caller = Caller(
            transport,
            self.outgoing,
            gate,
            names,
            self.directory,
            sender=identity.id,
            attempt_timeout=config.attempt_timeout,
            breaker=config.breaker,
            clock=clock,
            rng=random.Random(),
            owner_of=self._owner_of,
        )
        self.responder = Responder(
            transport,
            self.answers,
            gate,
            names,
            self.dispatcher,
            inboxes,
            ids,
            service=identity.service,
            node_id=identity.id,
            default_timeout=config.send_timeout,
            kept_bytes=config.kept_bytes,
            pulse=self.pulse,
            clock=clock,
        )
        self.durable = Durable(
            transport,
            gate,
            names,
            self.dispatcher,
            Answers(self.answers, inboxes, identity.id, KeptBatches(config.kept_bytes, clock)),
            self.directory,
            identity=identity,
            config=config,
            inbox=inbox,
            start=collected.registry.event_start(),
            look=self._look_at_pulse,
            clock=clock,
        )
        self.directory.on_dead.append(lambda info: self.caller.node_died(info.id, info.types))
        self.directory.on_self.append(self.responder.heard_itself)
        self.directory.on_replaced.append(self._stand_down)
        self.fanout = Fanout(
            transport,
            self.outgoing,
            gate,
            names,
            self.dispatcher,
            ids,
            service=identity.service,
            sender=identity.id,
            clock=clock,
        )
        metadata = dict(identity.metadata)
        metadata |= {f"catga.{name}": value for name in ("zone", "region") if (value := getattr(identity, name))}
        facts = NodeFacts(identity.service, identity.id, identity.version, "", metadata, identity.types)
        self.service_api = ServiceApi(transport, names, inboxes, facts, self._counts, utc_now())
        # Looked up once, because they are used for every call.
        self.trace = trace_source()
        self.send_timeout = config.send_timeout
        self.store_timeout = config.store_timeout
        self.take_id = ids.take
        self.call = self.caller.call
        self.post = self.durable.sender.post

    def _on_gap(self, gap: float) -> None:
        self.responder.on_gap(gap)
        self.durable.paused()

    def _look_at_pulse(self) -> None:
        now = self.clock()
        if now > self.pulse.late_at:
            self.pulse.beat(now)

    def _owner_of(self, type_name: str, key: str) -> tuple[str, str] | None:
        owners = self.directory.owners(type_name)
        if not owners.partitions:
            return None
        try:
            return owners.by_partition.get(partition_of(key, owners.partitions))
        except InvalidMessageError:
            return None  # a key that cannot be hashed has no owner; requests may have any

    def _coalescer(self) -> Coalescer:
        config = self.config
        return Coalescer(
            self.transport,
            max_frames=config.max_batch_frames,
            max_bytes=config.max_batch_bytes,
            max_held_bytes=config.max_held_bytes,
        )

    def _discovery(self, given: NodeDiscovery | None, gate: Gate, allow: Callable[[str], bool]) -> NodeDiscovery:
        if given is not None:
            return given
        config, transport, node_id = self.config, self.transport, self.identity.id
        gauge = Gauge(self.pulse, self.vitals, self.clock, config.stall_timeout)
        interval = config.heartbeat_interval
        if isinstance(transport, MemoryTransport):
            return MemoryDiscovery(
                transport,
                self._names,
                gate,
                self.clock,
                gauge=gauge,
                allow=allow,
                node_id=node_id,
                interval=interval,
                inbox_prefix=config.inbox_prefix,
            )
        options = config.connection(self._urls, f"catga/{node_id}/beats")
        return NatsDiscovery(
            transport,
            self._names,
            gate,
            self.clock,
            gauge=gauge,
            allow=allow,
            connect=lambda events: make_transport(options, events),
            node_id=node_id,
            interval=interval,
            inbox_prefix=config.inbox_prefix,
            hints=config.disconnect_events,
        )

    def _report(self) -> Report:
        """Say how this node is; the cluster asks several times in an interval."""
        counts = self.dispatcher.statistics()
        return Report(
            is_ready=self.transport.is_connected and not self.durable.problems,
            in_flight=counts.running,
            intake=counts.intake,
            handled=sum(one.ok + one.refused + one.failed for one in counts.handlers),
            breakers=self.caller.guard.held_names()[:_MAX_BREAKERS],
            partitions=self.durable.epochs("cmd"),
            event_partitions=self.durable.epochs("evt"),
        )

    def _context(self, delivery: Delivery) -> Context:
        return Context(
            self._calls,
            self.clock,
            message_id=delivery.id,
            message_type=delivery.station.type_name,
            key=delivery.key,
            attempt=delivery.attempt,
            node=self.identity.id,
            sender=delivery.sender,
            trace=delivery.trace,
            deadline=delivery.deadline,
            stake=delivery.stake,
        )

    def _counts(self) -> list[EndpointCounts]:
        return [
            EndpointCounts(one.type_name, one.ok + one.refused + one.failed, one.failed, one.seconds)
            for one in self.dispatcher.statistics().handlers
            if one.type_name in self.identity.types
        ]

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen for answers, be one of the nodes, and if there are handlers build a station for each and subscribe.

        Raises:
            ConfigurationError: Another live node has this id.
        """
        self.pulse.start()
        self.vitals.start()
        await self.durable.prepare()
        await self.directory.listen()
        await self.caller.start()
        await self.directory.join()  # before anything is taken in: another node may have this id
        registry = self.collected.registry
        if not registry.handlers():
            await self.durable.start()
            return
        for entry in registry.requests():
            for handler in entry.handlers:
                self.responder.add(self._station(handler, entry.message_type, None), _encode_json)
        for entry in registry.events():
            for handler in entry.handlers:
                station = self._station(handler, entry.message_type, self.config.event_timeout)
                self.fanout.add(station, durable=entry.options.durable)
        stored = [*registry.commands(), *(entry for entry in registry.events() if entry.options.durable)]
        for entry in stored:
            (handler,) = entry.handlers
            self.durable.add(self._station(handler, entry.message_type, HANDLER_SECONDS), entry)
        self.is_listening = True
        await self.fanout.start()
        await self.responder.start()
        await self.service_api.start()
        await self.durable.start()

    def _station(self, handler: Handler, message_type: type, timeout: float | None) -> Station:
        middleware = (*self.collected.inbound, *handler.middleware)
        station, threads = build_station(handler, message_type, self.dispatcher, middleware, timeout)
        if threads is not None:
            self._threads.append(threads)
        return station

    async def warn_of_capture(self) -> None:
        """Look for a stream that stores requests: its acknowledgements would reach foreign clients as answers."""
        if not self.collected.registry.requests():
            return
        subjects = self._names.all_requests()
        query = msgspec.json.encode({"subject": subjects})
        try:
            reply = await ask(self.transport, "$JS.API.STREAM.NAMES", query, _CAPTURE_SECONDS)
        except CallError:
            return
        if reply is None or reply.is_no_responders:
            return
        with contextlib.suppress(msgspec.MsgspecError):
            streams = msgspec.json.decode(reply.payload, type=_StreamNames).streams
            if streams:
                log.warning(
                    "stream %s captures requests (%s): its acknowledgements race the answers to clients that are "
                    "no bus; take these subjects out of it",
                    ", ".join(streams),
                    subjects,
                )

    def _stand_down(self) -> None:
        """Take nothing more in, by type or by name, because another process has this id; what runs is finished."""
        if self._standing_down is None:
            self._standing_down = asyncio.create_task(self._withdraw_or_say_why())

    async def _withdraw_or_say_why(self) -> None:
        try:
            await self._withdraw()
        except Exception:  # `close` only waits for the task
            log.exception("%s has lost its id and could not stop its work", self.identity.id)

    async def _withdraw(self) -> None:
        await self.responder.leave()
        await self.responder.stop_intake()
        await self.fanout.stop_intake()
        await self.service_api.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_timeout):
                await self.dispatcher.wait_idle()
        await self.directory.withdraw()

    async def drain(self) -> int:
        """Say so, take no more work, finish what runs, and have the server confirm the answers.

        Returns:
            How many messages are left after `drain_timeout`, or when only a connection was missing for too long.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_timeout):
                await self.durable.retire()
                began, reconnects = self.clock(), self.reconnects
                self.directory.drain()
                await self.service_api.close()
                await self.fanout.stop_intake()
                await self.responder.stop_intake()
                await self.durable.leave()
                is_heard = await self._last_call()
                await self._finish(_PATIENCE_SECONDS - (self.clock() - began))
                if self.reconnects != reconnects:
                    # Whoever asked has to come back as well, and then asks for what was answered meanwhile.
                    await asyncio.sleep(_REUNION_SECONDS)
                    is_heard = True
                # What is addressed to this node is answered busy until nothing can come any more; and who hears that
                # it has left has its answer by then, so that nobody runs the request again.
                await self.responder.leave()
                if is_heard:
                    await self._last_call()
        return self.unfinished

    async def _finish(self, patience: float) -> None:
        """Wait until everything is finished and its answers have left.

        Answers that cannot leave hold back what has not started, for as long as the connection is gone. So once nothing
        runs, the connection is waited for only while there is patience.

        Args:
            patience: Seconds; not above 0 if the server has been silent for too long already.
        """
        idle = asyncio.ensure_future(self.dispatcher.wait_idle())
        try:
            while not idle.done() or self.answers.is_blocked:
                if self.answers.is_blocked and not self.dispatcher.is_running:
                    if patience <= 0.0:
                        return
                    patience -= _LOOK_SECONDS
                    await asyncio.sleep(_LOOK_SECONDS)
                else:
                    await asyncio.wait({idle}, timeout=_LOOK_SECONDS)
        finally:
            idle.cancel()
            await asyncio.gather(idle, return_exceptions=True)

    async def _last_call(self) -> bool:
        """Wait until the server has taken and sent all that was before; return whether it has."""
        if not self.transport.is_connected:
            return False
        try:
            await self.transport.flush(_LAST_CALL_SECONDS)
        except CallError:
            return False
        return True

    def runs(self, task: "asyncio.Task[Any] | None") -> bool:
        """Whether a task is that of a handler; one that has not been suspended yet may not be known."""
        return self.dispatcher.runs(task)

    @property
    def unfinished(self) -> int:
        """Messages that were taken in and are not settled."""
        return self.dispatcher.statistics().intake

    async def close(self) -> None:
        """End everything that was built, in the order in which it hangs together."""
        if self._standing_down is not None:
            self._standing_down.cancel()
            await asyncio.wait({self._standing_down})
        self.pulse.stop()
        self.vitals.stop()
        await self.durable.close()
        await self.dispatcher.close()
        await self.responder.close()
        await self.fanout.close()
        for threads in self._threads:
            threads.close()
        await self.caller.close()
        await self.outgoing.close()
        await self.answers.close()
        # Last, because the others believe that a node has left when nobody listens on its subject any more.
        await self.directory.close()
        await self.transport.close()

    def statistics(self) -> BusStatistics:
        """Return a snapshot of the counts of all rooms."""
        return BusStatistics(
            calls=self.caller.statistics(),
            requests=self.responder.statistics(),
            events=self.fanout.statistics(),
            stored=self.durable.statistics(),
            handlers=self.dispatcher.statistics(),
            sent=self.outgoing.statistics(),
            answered=self.answers.statistics(),
            reconnects=self.reconnects,
            breakers=self.caller.guard.statistics(),
            nodes=self.directory.statistics(),
        )

    def facts(self, state: BusState, *, is_subscribed: bool) -> Facts:
        """Return what health is judged from; from any thread."""
        counts = self.dispatcher.statistics()
        return Facts(
            state=state,
            is_connected=self.transport.is_connected,
            is_subscribed=is_subscribed,
            is_replaced=self.directory.is_replaced,
            stall=self.pulse.stall(self.clock()),
            in_flight=counts.running,
            intake=counts.intake,
            intake_bytes=counts.intake_bytes,
            signs=self.vitals.read(),
        )

    # -- connection ----------------------------------------------------------------------------------------

    def disconnected(self) -> None:
        """The connection was lost."""
        self.directory.disconnected()
        self.responder.lost_connection()
        self.caller.disconnected()
        self.durable.disconnected()

    def reconnected(self) -> None:
        """The connection is back."""
        self.reconnects += 1
        self.directory.reconnected()
        self.outgoing.reconnected()
        self.answers.reconnected()
        self.caller.reconnected()
        self.durable.reconnected()

    async def wait_room(self, timeout: float) -> float:
        """Wait while the connection is behind, for at most `timeout` seconds; return what is left of them."""
        if not self.transport.is_connected:
            return timeout  # the call waits for the connection itself
        began = self.clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.outgoing.wait_room()
        return timeout - (self.clock() - began)


class ConnectionEvents:
    """Takes what a transport tells, and hands it to the node once there is one.

    Attributes:
        node: The node that the connection belongs to.
        denied: Subjects that the server refused to this user; at most 1,000 of them.
        taken_back: Subscriptions that it has refused since the last reconnect, or taken back when its permissions were
            changed; at most 1,000. Never changed in place: other threads read it.
        up: Set while there is a connection.
    """

    def __init__(self) -> None:
        self.node: Node | None = None
        self.denied: set[str] = set()
        self.taken_back: frozenset[str] = frozenset()
        self.up = asyncio.Event()
        self.up.set()

    def on_disconnected(self, reason: str) -> None:
        """The connection was lost."""
        del reason  # the transport has logged it
        self.up.clear()
        self.taken_back = frozenset()  # the next connection is asked for all of them again
        if self.node is not None:
            self.node.disconnected()

    def on_reconnected(self, url: str) -> None:
        """The connection is back."""
        del url
        self.up.set()
        if self.node is not None:
            self.node.reconnected()

    def on_denied(self, subject: str, text: str) -> None:
        """The server refuses a subject."""
        if len(self.denied) < _MAX_DENIED:
            self.denied.add(subject)
        if _OF_SUBSCRIPTION in text.lower() and len(self.taken_back) < _MAX_DENIED:
            self.taken_back |= {subject}
        if self.node is not None:
            self.node.caller.denied(subject)
            self.node.durable.denied(subject)

    def on_error(self, text: str) -> None:
        """The transport has logged it."""


_OF_SUBSCRIPTION = "violation for subscription"
# nats-server, server/client.go: Permissions Violation for Subscription to "a.b" using queue "q"


class _StreamNames(msgspec.Struct):
    streams: list[str] | None = None


_PATIENCE_SECONDS = 2.0
# How long a leaving node waits for its connection once nothing runs any more. A server that is restarted is back in one
# second; together with the good-byes (of the heartbeats 0.75 s, of the connection 2 s) it stays below the promised 5 s.

_REUNION_SECONDS = 0.5
# How long it stays when the connection came back: longer than the pause between two attempts of most callers.

_LOOK_SECONDS = 0.02

_CAPTURE_SECONDS = 0.5  # a server answers in a millisecond; one whose user may not ask does not answer at all
_LAST_CALL_SECONDS = 1.0
# In which a server says that it sends nothing more. One that is frozen is asked once, and takes another 0.8 s for the
# heartbeats and 2 s for the connection: with a second for handlers that are cancelled, leaving is over within 5 s.
_MAX_DENIED = 1_000
_MAX_BREAKERS = 64  # that a heartbeat names
_encode_json = msgspec.json.Encoder().encode
