"""The durable half of a node: what it stores for others, and what it handles of what is stored. Built and joined.

A node with handlers keeps two sets of partitions, each by itself: its share of the service's work queue (`cmd`), and
its share of the service's position in the event log (`evt`). A node without handlers only sends.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec

from catga_bus.clock import Clock, utc_now
from catga_bus.cluster.beats import Identity
from catga_bus.cluster.directory import Directory
from catga_bus.cluster.records import NodeChange, NodeInfo, NodeStatus
from catga_bus.codec import Gate
from catga_bus.config import BusConfig
from catga_bus.dispatch.deliveries import Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.durability.holdings import Holdings, PartitionStatistics, may_own
from catga_bus.durability.inbox.addresses import check_retention
from catga_bus.durability.inbox.base import Inbox
from catga_bus.durability.inbox.outbox import Relay
from catga_bus.durability.letters.dead_letters import DeadLetters
from catga_bus.durability.routes.announcing import Announcer
from catga_bus.durability.routes.routes import Route, Routes, schema_hash
from catga_bus.durability.sending.schedule import Mover
from catga_bus.durability.sending.sender import Sender, SenderStatistics
from catga_bus.durability.streams.streams import Streams
from catga_bus.durability.working.shop import WorkStatistics
from catga_bus.durability.working.workshop import Workshop
from catga_bus.effects import Effects
from catga_bus.errors import ConfigurationError
from catga_bus.handlers.registry import Registered
from catga_bus.messages import Command, Event
from catga_bus.partition.records import Domain
from catga_bus.partition.work import Keeping, Work
from catga_bus.rarely import RareLog
from catga_bus.requests.answers import Answers
from catga_bus.result import Stored
from catga_bus.transport.base import Transport
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import JetStreamError
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import Names

log = logging.getLogger("catga_bus.durability")

SWEEP_SECONDS: Final = 60.0
"""Seconds between two sweeps of the inbox."""

OUTBOX_SECONDS: Final = 30.0
"""Seconds for which one attempt at storing a message of the outbox goes on; then there is another."""


_MAX_DENIED: Final = 1_000


class DurableStatistics(msgspec.Struct, frozen=True):
    """What a node has stored, and what it has handled of what is stored; counts since its start."""

    sent: SenderStatistics
    work: WorkStatistics
    partitions: dict[str, PartitionStatistics]
    """By domain: `cmd`, `evt`; only those that the node has handlers for."""


class Durable:
    """The durable half of a node.

    Args:
        transport: The connection.
        gate: Lets payloads in.
        names: Subjects, streams and buckets.
        dispatcher: Runs the handlers.
        answers: The ways back to senders of commands.
        directory: The nodes.
        identity: Who this node is.
        config: The options of the bus.
        inbox: Knows what is done; None: effects may happen again.
        start: Where the service begins in the log of events if it has no position in it.
        look: Looks whether the process was paused, and tells of it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        transport: Transport,
        gate: Gate,
        names: Names,
        dispatcher: Dispatcher,
        answers: Answers,
        directory: Directory,
        *,
        identity: Identity,
        config: BusConfig,
        inbox: Inbox | None,
        start: Literal["new", "all"],
        look: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._gate = gate
        self._names = names
        self._directory = directory
        self._identity = identity
        self._config = config
        self._inbox = inbox
        self._start = start
        self._denied: set[str] = set()  # subjects, since the connection came up
        self._clock = clock
        self._log = RareLog(log, clock)
        self._jetstream = make_jetstream(transport, clock)
        self._streams = Streams(self._jetstream, names, identity.service, config, clock, denied=lambda: self._denied)
        self.routes = Routes(self._jetstream, names, clock)
        self.sender = Sender(
            transport,
            self._jetstream,
            self.routes,
            gate,
            names,
            sender=identity.id,
            clock=clock,
            rng=random.Random(),
            ensure_log=self._ensure_log,
            holders=self._holders,
        )
        self._relay = (
            None
            if inbox is None
            else Relay(
                inbox,
                identity.service,
                lambda outbound: self.sender.store(outbound, timeout=OUTBOX_SECONDS),
                clock=clock,
                chance=random.random,
            )
        )
        self.workshop = Workshop(
            dispatcher,
            gate,
            answers,
            DeadLetters(self._jetstream, names, identity.service),
            inbox,
            self._relay,
            service=identity.service,
            node_id=identity.id,
            max_payload=lambda: transport.max_payload,
            unroutable_after=config.unroutable_after,
            clock=clock,
            utc=lambda: utc_now().timestamp(),
            rng=random.Random(),
        )
        self._results = self.workshop.results(transport, names.node_results(identity.service, identity.id))
        self._holdings = Holdings(
            transport,
            self._jetstream,
            gate,
            names,
            directory,
            service=identity.service,
            node_id=identity.id,
            employ=self._employ,
            needed=lambda: () if self._announcer is None else self._announcer.needed,
            timeout=config.heartbeat_timeout,
            look=look,
            clock=clock,
        )
        self._entries: list[Registered] = []
        self._mover: Mover | None = None
        self._moving: asyncio.Task[None] | None = None
        self._announcer: Announcer | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._is_log_there = False
        self._sweeper: asyncio.Task[None] | None = None

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def _has_commands(self) -> bool:
        return bool(self._identity.commands)

    @property
    def _keeps_partitions(self) -> bool:
        """Whether there are handlers of what is stored, and so a work queue.

        A service of events alone has one as well: events that it has given up are retried by it, and events are
        replayed by it, so that no other service sees them.
        """
        return self._has_commands or self._has_events

    @property
    def _has_events(self) -> bool:
        return bool(self._identity.events)

    def add(self, station: Station, entry: Registered) -> None:
        """Take on a command type or a durable event type."""
        (handler,) = entry.handlers
        self._entries.append(entry)
        self.workshop.add(station, handler.options)

    async def prepare(self) -> None:
        """Create or verify the streams that this node needs; before it joins the others.

        Raises:
            ConfigurationError: JetStream is off, a stream is not as it is configured, or the inbox forgets sooner than
                the event log; the text says what to do.
            PermissionDeniedError: This user may not look at streams, or not create them.
            DisconnectedError: The server did not answer.
        """
        if self._keeps_partitions:
            await self._streams.ensure(commands=True, events=self._has_events)
            self._is_log_there = self._has_events
        if self._inbox is not None and self._has_events:
            log_info = await self._streams.info(self._names.event_stream())
            check_retention(self._inbox, self._names.event_stream(), log_info.config.max_age if log_info else 0.0)

    async def start(self) -> None:
        """Listen for results, and keep partitions if there are handlers; after the node has joined the others.

        Raises:
            ConfigurationError: Another node of the service has another inbox.
            PermissionDeniedError: This user may not look at streams.
            DisconnectedError: The server did not answer.
        """
        await self.sender.start()
        if self._keeps_partitions:
            await self._results.start()
        self.routes.listen_on(self._transport)
        if not self._keeps_partitions:
            return
        self._check_stores()
        one = self._identity
        queue = await self._streams.info(self._names.command_stream(one.service))
        replicas = 1 if queue is None else queue.config.replicas
        self._holdings.add(Domain(names=self._names, service=one.service), self._config.partitions, replicas=replicas)
        if self._has_events:
            first = 1 if self._start == "all" else await self._next_event()
            domain = Domain(names=self._names, service=one.service, types=one.events, start=first)
            self._holdings.add(domain, self._streams.log_partitions, replicas=replicas)
        self._directory.on_change.append(self._on_change)
        if self._inbox is not None:
            self._sweeper = asyncio.create_task(self._sweep())
        if self._has_commands and self._streams.has_schedules:
            self._mover = Mover(self._jetstream, self._names, one.service, self._clock, random.Random())
            self._moving = asyncio.create_task(self._mover.run())
        await self._announce(replicas)
        await self._holdings.start()

    def _employ(self, keeping: Keeping, domain: Domain, partition: int, unknown: Callable[[str], bool]) -> Work:
        return self.workshop.worker(keeping, domain.stream, partition, unknown, by_type=domain.is_log)

    async def _announce(self, replicas: int) -> None:
        """Say what is handled here, and go on saying so."""
        self._announcer = Announcer(
            self._jetstream,
            KeyValue(self._jetstream, self._names.routes_bucket(), replicas=replicas),
            self._identity.service,
            [self._route(entry) for entry in self._entries],
            lambda: [
                info.commands
                for info in self._directory.members(self._identity.service)
                if may_own(info) and info.commands
            ],
            self._clock,
            on_needed=self._holdings.wake,
        )
        with contextlib.suppress(JetStreamError):  # it is tried again
            await self._announcer.tend()
        self._announcing = asyncio.create_task(self._announcer.run())

    def _route(self, entry: Registered) -> Route:
        is_command = entry.options.kind == "Command"
        return Route(
            type=entry.type_name,
            kind="command" if is_command else "event",
            service=self._identity.service if is_command else "",
            partitions=self._config.partitions if is_command else self._streams.log_partitions,
            partition_by=entry.options.partition_by,
            durable=entry.options.durable,
            schema=schema_hash(entry.message_type),
        )

    def _check_stores(self) -> None:
        """Refuse to be a second store of a service: what one has done the other would do again.

        Raises:
            ConfigurationError: A live node of the service has another store.
        """
        one = self._identity
        for info in self._directory.members(one.service):
            if self._has_other_store(info):
                raise ConfigurationError(self._two_stores(info))

    def _has_other_store(self, info: NodeInfo) -> bool:
        one = self._identity
        return info.id != one.id and bool(info.store) and bool(one.store) and info.store != one.store

    def _two_stores(self, info: NodeInfo) -> str:
        one = self._identity
        return (
            f"node {info.id!r} of service {one.service!r} has the inbox store {info.store!r} and this one "
            f"{one.store!r}: what one has done the other would do again; give both the same inbox="
        )

    async def _next_event(self) -> int:
        """Return the sequence of the next event that is published: where a service without a position begins."""
        info = await self._streams.info(self._names.event_stream())
        return 1 if info is None else info.last_sequence + 1

    async def retire(self) -> None:
        """Before this node says that it leaves: have what only it handles handled."""
        if self._announcer is not None and self._has_commands:
            patience = self._config.drain_timeout / 2
            await self._announcer.retire(self._names.command_stream(self._identity.service), patience)

    async def leave(self) -> None:
        """Finish what has begun, give all partitions away, and have everything stored that was sent."""
        await self._holdings.leave()
        await self.sender.wait_idle()

    async def close(self) -> None:
        """End everything; what is owned is found by the others."""
        await self._holdings.close()
        tasks = [task for task in (self._sweeper, self._announcing, self._moving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._results.close()
        await self.workshop.close()
        if self._relay is not None:
            await self._relay.close()
        await self.sender.close()
        await self.routes.close()
        await self._jetstream.close()

    def statistics(self) -> DurableStatistics:
        """Return the counts so far."""
        return DurableStatistics(
            sent=self.sender.statistics(),
            work=self.workshop.statistics(),
            partitions=self._holdings.statistics(),
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this node must not be ready: its types clash with what is routed already."""
        return () if self._announcer is None else self._announcer.problems

    def epochs(self, kind: str) -> Mapping[int, int]:
        """Return the partitions that this node works on, each with its epoch: for its heartbeats."""
        return self._holdings.epochs(kind)

    # -- what happens ----------------------------------------------------------------------------------------

    def disconnected(self) -> None:
        """The connection was lost."""
        self._jetstream.disconnected()
        self._holdings.disconnected()

    def reconnected(self) -> None:
        """The connection is back."""
        self._denied.clear()
        self.routes.reconnected()
        self.sender.reconnected()
        if self._mover is not None:
            self._mover.reconnected()
        self._holdings.reconnected()

    def _holders(self, subject: str) -> list[tuple[str, str]]:
        """Return whom to ask about a subject of commands: the owner of its partition, then the others."""
        queue, _, partition = subject.rpartition(".")
        number = int(partition)
        live = [
            info
            for info in self._directory.nodes()
            if info.status is not NodeStatus.FAULTED and self._names.commands(info.service) == f"{queue}.*"
        ]
        live.sort(key=lambda info: -info.partitions.get(number, 0))
        return [(info.service, info.id) for info in live]

    def denied(self, subject: str) -> None:
        """The server refuses a subject."""
        if len(self._denied) < _MAX_DENIED:
            self._denied.add(subject)
        self.routes.denied(subject)
        self.sender.denied(subject)

    def paused(self) -> None:
        """The process stood still: nothing starts before its partitions are known to be still its own."""
        self._holdings.paused()

    def _on_change(self, change: NodeChange) -> None:
        if change.node is not None and change.node.service == self._identity.service:
            if self._has_other_store(change.node):
                # Both have started while they could not hear each other.
                self._log.write(logging.ERROR, "stores", "%s", self._two_stores(change.node))
            self._holdings.wake()
            if self._announcer is not None:
                self._announcer.nudge()

    # -- calls -----------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        command: Command[Any],
        message_id: str,
        *,
        key: object,
        timeout: float,
        trace: str | None,
        due_utc: float | None,
        delay: float | None,
        effects: Effects | None,
    ) -> Stored:
        """Store a command: at once, at its time, or with the commit of whoever sends it."""
        is_later = due_utc is not None or delay is not None
        if effects is not None:
            if is_later:
                raise ConfigurationError(
                    f"{type(command).__name__}: what is sent with a commit cannot be delayed; enqueue it through the "
                    f"bus, or have the handler of another command delay it"
                )
            return await self._with_commit(effects, command, message_id, key, timeout, trace)
        if is_later:
            return await self.sender.enqueue_later(
                command, message_id, at_utc=due_utc, delay=delay or 0.0, timeout=timeout, key=key, trace=trace
            )
        return await self.sender.enqueue(command, message_id, timeout=timeout, key=key, trace=trace)

    async def publish(
        self,
        event: Event,
        message_id: str,
        *,
        key: object,
        timeout: float,
        trace: str | None,
        due_utc: float | None,
        delay: float | None,
        effects: Effects | None,
    ) -> Stored:
        """Store a durable event: at once, or with the commit of whoever publishes it."""
        del due_utc, delay  # events have no time
        if effects is not None:
            return await self._with_commit(effects, event, message_id, key, timeout, trace)
        return await self.sender.publish(event, message_id, timeout=timeout, key=key, trace=trace)

    async def _with_commit(
        self,
        effects: Effects,
        message: Command[Any] | Event,
        message_id: str,
        key: object,
        timeout: float,
        trace: str | None,
    ) -> Stored:
        outbound = await self.sender.prepare(message, message_id, timeout=timeout, key=key, trace=trace)
        effects.send(outbound)
        name = self._names.command_stream(outbound.service) if outbound.service else self._names.event_stream()
        return Stored(name, 0, 0)

    async def _ensure_log(self, timeout: float) -> None:
        """Have a log of events, before the first one is published: nobody else may have been here yet."""
        if self._is_log_there or self._config.manage_streams == "verify":
            return
        await self._streams.ensure(commands=False, events=True, timeout=timeout)
        self._is_log_there = True

    # -- housekeeping ----------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        assert self._inbox is not None
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self._inbox.sweep(utc_now().timestamp())
            except Exception as error:
                self._log.warn("sweep", "the inbox cannot be swept: %s", error)
