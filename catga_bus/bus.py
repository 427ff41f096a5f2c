"""Bus: what users hold. It builds the rooms of a node and joins them."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from catga_bus import forks
from catga_bus.calling import MAX_TIMEOUT, Calling, after_a_turn, as_err, key_of_request
from catga_bus.clock import Clock, monotonic
from catga_bus.cluster.beats import Identity, check_identity
from catga_bus.cluster.discovery import NodeDiscovery
from catga_bus.cluster.records import NodeChange, NodeInfo, NodeStatus
from catga_bus.config import BusConfig, check_name, check_text, checked_config, checked_metadata, server_urls
from catga_bus.context import Context, Key
from catga_bus.durability.inbox.addresses import make_inbox
from catga_bus.durability.inbox.base import Inbox
from catga_bus.durability.sending.postings import Posting
from catga_bus.embedded import EmbeddedServer
from catga_bus.errors import (
    BusStateError,
    CallError,
    ConfigurationError,
    PermissionDeniedError,
)
from catga_bus.handlers.router import Router
from catga_bus.health import BusState, Facts, Health, HealthLimits, assess
from catga_bus.ids import new_node_id
from catga_bus.messages import Command, Event, Request
from catga_bus.node import BusStatistics, ConnectionEvents, Node
from catga_bus.resilience.circuit_breaker import BreakerChange
from catga_bus.result import Err, Ok, Stored
from catga_bus.signals import Signals
from catga_bus.transport.base import Transport
from catga_bus.transport.carriers import make_transport
from catga_bus.wire import SERVICE_API, Names

R = TypeVar("R")

log = logging.getLogger("catga_bus")


class Bus(Router):
    """A node of a service: handlers that others can reach, and calls to others.

    A bus without handlers is a client. A bus starts once, belongs to the event loop that started it, and shares nothing
    with other buses of the process.

        bus = Bus("billing", url="nats://127.0.0.1:4222")

        @bus.handler
        async def quote(request: Quote) -> Price: ...

        await bus.run()              # serve until SIGTERM or SIGINT, then drain

        async with bus:              # the same without signals
            result = await bus.send(Quote("sku-9"), timeout=2.0)

    Args:
        service: The service that this node belongs to; its nodes share the work.
        url: Servers, separated by commas; `CATGA_URL`, `NATS_URL` or `nats://127.0.0.1:4222` when None.
            `memory://name` is a broker inside this process; `embedded://` and `embedded:///path` start a private
            nats-server.
        node_id: The id of this node; drawn when None, and drawn again at the start in a forked child.
        version: The version of the service, shown to operators.
        zone: Where the node runs.
        region: Where the zone lies.
        metadata: Whatever else others should know of this node.
        namespace: First token of all subjects.
        config: Options as one value; keywords go over it.
        discovery: How the node hears of others and is heard of; over the connection when None. For one bus only.
        inbox: Where it is written down which commands and durable events are done, so that their effects happen once:
            `sqlite:///path` (all nodes of the service on one host share the file), `memory://`, or a store. None:
            they happen at least once.
        **options: The fields of `BusConfig`.

    Raises:
        ConfigurationError: An option is unknown, of the wrong type or out of bounds.
    """

    def __init__(
        self,
        service: str,
        *,
        url: str | None = None,
        node_id: str | None = None,
        version: str = "0.0.0",
        zone: str | None = None,
        region: str | None = None,
        metadata: dict[str, str] | None = None,
        namespace: str | None = None,
        config: BusConfig | None = None,
        discovery: NodeDiscovery | None = None,
        inbox: str | Inbox | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_name("service", service)
        if node_id is not None:
            check_name("node_id", node_id)
        if namespace is not None:
            options["namespace"] = namespace
        self.service = service
        self.node_id = node_id if node_id is not None else new_node_id(service)
        self.version = version
        self.config = checked_config(config, options)
        self._urls = _checked_urls(url)
        check_text("version", version)
        self._metadata = checked_metadata(metadata)
        for name, value in (("zone", zone), ("region", region)):
            if value is not None:
                check_text(name, value)
        self._zone, self._region = zone, region
        self._discovery = discovery
        self._inbox = None if inbox is None else make_inbox(inbox)
        self._is_inbox_open = False
        self._clock: Clock = monotonic
        self._state = BusState.NEW
        self._pid = os.getpid()
        self._forks = forks.count
        self._is_id_drawn = node_id is None
        self._urls_in_use = self._urls
        self._node: Node | None = None
        self._transport: Transport | None = None
        self._server: EmbeddedServer | None = None
        # Starting, draining and closing each happen once, in a task of their own: who asked may be cancelled, and
        # others may ask as well.
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._left = 0  # messages that the drain did not finish
        self._connection = ConnectionEvents()
        self._calling = self._make_calling()

    def _make_calling(self) -> Calling:
        return Calling(self._open, self._connection, self.config, self._clock, self._collected.outbound)

    def __repr__(self) -> str:
        return f"<Bus {self.service} node {self.node_id} {self._state}>"

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers, as they were given: with the credentials in them, if there are any."""
        return self._urls

    def override(self, *, url: str | None = None, node_id: str | None = None) -> None:
        """Replace what the program says by what its operator says; before the start only.

        Args:
            url: As for `Bus`; None leaves it.
            node_id: As for `Bus`; None leaves it.

        Raises:
            BusStateError: The bus has started.
            ConfigurationError: A value cannot be used.
        """
        if self._state is not BusState.NEW:
            raise BusStateError(f"{self!r} has started; override before start()")
        if url is not None:
            self._urls = _checked_urls(url)
        if node_id is not None:
            check_name("node_id", node_id)
            self.node_id = node_id
            self._is_id_drawn = False

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect, subscribe, and return when the server has confirmed the subscriptions.

        Raises:
            BusStateError: The bus was started before, or was closed while it started.
            DisconnectedError: No server answered within `connect_timeout`.
            AuthenticationError: The server refused the credentials.
            PermissionDeniedError: The server refused a subscription that a handler needs.
            ConfigurationError: Something registered cannot work in this version.
        """
        if self._state is not BusState.NEW:
            raise BusStateError(f"{self!r} cannot be started: a bus starts once; make a new one")
        self._check_registrations()
        self._state = BusState.STARTING
        self._collected.sealed = f"{self!r} has started; register before start()"
        self._calling = self._make_calling()  # with the middleware that was registered
        work = self._starting = asyncio.create_task(self._start())
        try:
            await asyncio.wait({work})
        except BaseException:
            await self.close()
            raise
        if not work.cancelled() and work.exception() is not None:
            await self.close()
            work.result()
        if self._closing is not None:
            await self.close()
            raise BusStateError(f"{self!r} was closed while it started; make a new one")

    def _identity(self) -> Identity:
        registry = self._collected.registry
        commands = tuple(entry.type_name for entry in registry.commands())
        events = tuple(entry.type_name for entry in registry.events() if entry.options.durable)
        return Identity(
            service=self.service,
            id=self.node_id,
            version=self.version,
            metadata=self._metadata,
            zone=self._zone,
            region=self._region,
            types=tuple(entry.type_name for entry in registry.requests()),
            commands=commands,
            events=events,
            store="" if self._inbox is None else self._inbox.store_id,
            partition_count=self.config.partitions if commands or events else 0,
        )

    def _check_registrations(self) -> None:
        check_identity(self._identity())
        self._collected.registry.event_start()

    async def _start(self) -> None:
        if self._is_id_drawn and self._forks != forks.count:
            self.node_id = new_node_id(self.service)  # its siblings were made with the same one
        self._pid = os.getpid()
        self._forks = forks.count
        if self._inbox is not None:
            await self._inbox.open()
            self._is_inbox_open = True
        transport = await self._connect()
        self._node = self._connection.node = here = Node(
            self._identity(),
            self.config,
            transport,
            self._collected,
            self,
            self._clock,
            urls=self._urls_in_use,
            discovery=self._discovery,
            inbox=self._inbox,
        )
        await here.start()
        await transport.flush(self.config.connect_timeout)
        if refused := sorted(name for name in self._connection.denied if not self._is_optional(name)):
            raise PermissionDeniedError(
                f"the server does not permit this user to use {', '.join(refused)}, which {self!r} needs", refused[0]
            )
        await here.warn_of_capture()
        here.directory.set_ready(is_ready=True)
        if self._closing is None:
            self._state = BusState.STARTED
        log.info("%s serves %s over %s", self.node_id, self.service, transport.url)

    def _is_optional(self, subject: str) -> bool:
        """Whether a node serves all the same if it may not use a subject: it only knows less of the others.

        These are the discovery of services, what tells of other nodes and of changed routes, and the questions to the
        other nodes, the first of which goes to the node's own id. Which nodes are asked before this is looked at is
        chance.
        """
        names = Names(self.config.namespace)
        others = (names.heartbeats(), self.config.disconnect_events, names.route_changes())
        return subject.startswith(SERVICE_API) or subject in others or names.is_ping(subject)

    async def _connect(self) -> Transport:
        urls = self._urls
        if urls[0].startswith("embedded://"):
            self._server = EmbeddedServer.parse(urls[0])
            urls = (await self._server.start(),)
        self._urls_in_use = urls
        options = self.config.connection(urls, f"catga/{self.node_id}")
        transport = self._transport = make_transport(options, self._connection)
        await transport.connect()
        return transport

    async def drain(self) -> None:
        """Take no more work, finish what runs (for at most `drain_timeout`), answer it, and close.

        A bus that still starts is drained when it has started. Draining or closing a bus that is closed does nothing;
        a second call waits for the first. A call that is cancelled does not end the drain.

        Raises:
            BusStateError: A handler of this bus called, or the bus was started before a fork.
        """
        here = self._node
        if here is not None:
            self._check_process()
            await asyncio.sleep(0)  # a handler in its first turn is not known to run before it has been suspended
            if here.runs(asyncio.current_task()):
                raise BusStateError(
                    f"a handler of {self!r} called drain(), which waits for that handler; "
                    f"give it to a task, asyncio.create_task(bus.drain()), and return, or call close()"
                )
        if self._starting is not None and self._state is not BusState.CLOSED:
            self._check_process()
            if self._draining is None:
                self._draining = asyncio.create_task(self._drain(self._starting))
            await asyncio.wait({self._draining})
        await self.close()
        if self._draining is not None and not self._draining.cancelled():
            self._draining.result()

    async def _drain(self, start: "asyncio.Task[None]") -> None:
        try:
            await asyncio.wait({start})
            if self._state is BusState.STARTED:
                self._state = BusState.DRAINING
                if left := await self._open().drain():
                    log.warning("%s leaves %d messages unfinished", self.node_id, left)
        finally:
            self._begin_close()

    async def close(self) -> None:
        """Close at once: what runs is cancelled, a handler that called included.

        A second call waits for the first. A call that is cancelled does not end the closing. In the forked child of the
        process that started it, the bus is only marked as closed: the connection is the parent's.
        """
        if self._starting is not None and self._forks != forks.count:
            self._state = BusState.CLOSED
            self._node = None
            return
        closing = self._begin_close()
        await asyncio.wait({closing})
        closing.result()

    def _begin_close(self) -> "asyncio.Task[None]":
        if self._closing is None:
            self._state = BusState.CLOSED
            self._closing = asyncio.create_task(self._close())
        return self._closing

    async def _close(self) -> None:
        before = {task for task in (self._starting, self._draining) if task is not None and not task.done()}
        for task in before:
            task.cancel()
        if before:
            await asyncio.wait(before)
        here, self._node = self._node, None
        async with AsyncExitStack() as stack:
            stack.callback(self._closed.set)
            if self._server is not None:
                stack.push_async_callback(self._server.stop)
            if self._inbox is not None and self._is_inbox_open:
                stack.push_async_callback(self._inbox.close)
            if self._transport is not None:
                stack.push_async_callback(self._transport.close)
            self._connection.up.set()  # who waits for a connection finds none
            if here is not None:
                self._left = here.unfinished
                await here.close()

    async def __aenter__(self) -> Self:
        """Start the bus."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drain the bus; a cancellation meanwhile closes it at once."""
        try:
            await self.drain()
        except BaseException:
            await self.close()
            raise

    async def run(self) -> bool:
        """Start, serve until SIGTERM or SIGINT, then drain; a second signal closes at once.

        It returns as well when somebody else has drained or closed the bus. In threads other than the main one, which
        get no signals, that is the only way. The signals' handlers from before are put back in the end.

        What it cannot do is end what will not end. `asyncio.run` waits, for ever, for handlers that swallow their
        cancellation and for functions in threads, and the interpreter for threads that are no daemons. `catga run` does
        not: it ends the process without them.

        Returns:
            Whether everything that had arrived was finished; False if a second signal, `close` or `drain_timeout` cut
            it off.

        Raises:
            CatgaError: As `start`.
        """
        is_new = self._state is BusState.NEW
        asked, hurry, early = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def on_signal(name: str) -> None:
            if asked.is_set():
                log.warning("%s: second signal (%s), closing at once", self.node_id, name)
                hurry.set()
                early.set()
                return
            log.info("%s: %s, draining", self.node_id, name)
            asked.set()
            if self._node is None or not self._node.is_listening:
                early.set()  # nothing has been taken in: the start need not end first

        with Signals(on_signal):
            try:
                try:
                    if not await _first(self.start(), early):
                        return not self._left
                except BusStateError:
                    if not is_new:
                        raise
                    return not self._left  # closed while it started
                await _first(self._closed.wait(), asked)
                drained = await _first(self.drain(), hurry)
                return drained and not self._left
            finally:
                await self.close()

    # -- calls ---------------------------------------------------------------------------------------------

    async def send(
        self,
        request: Request[R] | Command[R],
        *,
        timeout: float | None = None,
        node: str | None = None,
        where: Callable[[NodeInfo], bool] | None = None,
        key: Key | None = None,
    ) -> Ok[R] | Err:
        """Send a request to one node that handles it, or a command to its service, and wait for the result.

        What goes wrong on the way is an `Err`: `NO_HANDLER` when nobody listens, `OVERLOADED` when every node asked is
        full, `TIMEOUT` at the deadline, `DISCONNECTED` when there is no server until then, `INVALID_MESSAGE` and
        `TOO_LARGE` for the message itself. Its `outcome` says whether the handler may have run. A request may run twice
        when its answer was lost, unless its class says `idempotent=False`. Cancelling the call leaves nothing behind.

        A command is stored first. Then it will be handled even if this call ends before, by time-out or by
        cancellation: `DEAD_LETTERED` says that all attempts have failed. A `TIMEOUT` whose `details` say where the
        command is stored means that it waits or runs.

        Args:
            request: The message.
            timeout: Seconds until the deadline; `send_timeout` when None. Above 0.
            node: The id of the one node to ask, or None for any. One that is dead, or that is not known within a
                heartbeat interval, is `NO_HANDLER`. Requests only.
            where: Which nodes may be asked, given what is known of each: `lambda node: node.zone == "eu-1"`. One of
                two that are live, ready and fit is taken, the less loaded; without any it is `NO_HANDLER`. Requests
                only.
            key: Commands: goes over the field that `partition_by` names.

        Raises:
            BusStateError: The bus is not started, closed, or was started before a fork.
            ConfigurationError: The message is no request or command; or `where` raised, or `node` is given as well, or
                one of them for a command, or `key` for a request.
            PermissionDeniedError: The server refuses the subject to this user.
        """
        if node is not None or where is not None or self._calling.has_middleware:
            return await self._calling.send(request, timeout, node, where, key)
        here = self._node
        if here is None or self._forks != forks.count:
            here = self._open()
        limit = here.send_timeout if timeout is None else self._calling.checked_timeout(timeout)
        trace = None if here.trace is None else here.trace()
        if isinstance(request, Command):
            message_id = here.take_id()
            try:
                posting = here.post(request, "Command", message_id, limit, key, trace, wants_result=True)
            except CallError as error:
                return await after_a_turn(as_err(error))
            if posting is None:
                return await self._calling.send_stored(here, request, message_id, limit, key, trace)
            result: Ok[R] | Err
            try:
                result = await posting.future
            except BaseException:
                self._drop(posting)
                del posting  # neither it nor a call is tracked by the collector, and the error's traceback has it
                raise
            if type(result) is Err:
                self._drop(posting)  # unless it is an answer, one is still waited for
            return result
        if key is not None:
            raise key_of_request(request)
        if here.outgoing.is_blocked:
            limit = await here.wait_room(limit)
        try:
            call = here.call(request, here.take_id(), limit, trace)
        except CallError as error:
            return await after_a_turn(as_err(error))
        try:
            return await call.future
        except BaseException:
            here.caller.forget(call)
            del call
            raise

    async def enqueue(
        self,
        command: Command[Any],
        *,
        key: Key | None = None,
        timeout: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
    ) -> Stored:
        """Have a command stored: it will be handled, in order with all others of its key.

        While the outcome is unknown (a server restarts, a leader is elected) the same record is written again until the
        deadline, and stored once.

        Args:
            command: The message.
            key: Goes over the field that `partition_by` names; without both the command is its own key.
            timeout: Seconds until acceptance is given up; `store_timeout` when None.
            delay: Seconds after which it is to be handled, at least, by the server's clock, whatever this machine's is.
                Needs a server from 2.12 on.
            at: When it is to be handled, with a time zone, by the server's clock; instead of `delay`.

        Raises:
            CallError: It was not accepted, or nobody knows: `outcome` says which. `OVERLOADED`: the work queue is full.
                `NO_HANDLER`: no service handles it. `TIMEOUT`: unknown whether it is stored.
            BusStateError: The bus is not started, closed, or was started before a fork.
            ConfigurationError: The message is no command, or its time cannot be; JetStream is off, or the server cannot
                delay.
            PermissionDeniedError: This user may not send it, or not read who handles it.
        """
        posting = None if delay is not None or at is not None else self._post(command, "Command", key, timeout)
        if posting is not None:
            try:
                accepted: Stored = await posting.future
            except BaseException:
                self._drop(posting)
                del posting
                raise
            return accepted
        stored = await self._calling.store("enqueue", command, key=key, timeout=timeout, delay=delay, at=at)
        assert stored is not None
        return stored

    async def publish(self, event: Event, *, key: Key | None = None, timeout: float | None = None) -> Stored | None:
        """Tell every service that handles an event, those that are down included: it is stored, in order per key.

        An event of a class with `durable=False` goes to one node of every service that is up, at most once, and is not
        stored.

        Args:
            event: The message.
            key: Goes over the field that `partition_by` names; without both the event is its own key. Durable events.
            timeout: Seconds until acceptance is given up; `store_timeout` when None. Durable events.

        Returns:
            Where it is stored; None for a class with `durable=False`.

        Raises:
            CallError: As for `enqueue`. `DISCONNECTED` for what is not stored: there is no connection.
            BusStateError: The bus is not started, closed, or was started before a fork.
            ConfigurationError: The message is no event; or `key` or `timeout` is given for one that is not stored.
        """
        posting = self._post(event, "Event", key, timeout)
        if posting is not None:
            try:
                stored: Stored = await posting.future
            except BaseException:
                self._drop(posting)
                del posting
                raise
            return stored
        return await self._calling.store("publish", event, key=key, timeout=timeout)

    def _post(
        self, message: Any, kind: Literal["Command", "Event"], key: Key | None, timeout: float | None
    ) -> Posting | None:
        """Put what is to be stored into its line, which is most of a call; None if it has to go the long way."""
        here = self._node
        if here is None or self._forks != forks.count or self._calling.has_middleware:
            return None
        if timeout is None:
            limit = here.store_timeout
        elif type(timeout) is float and 0.0 < timeout <= MAX_TIMEOUT:  # as nearly always, without another call
            limit = timeout
        else:
            limit = self._calling.checked_timeout(timeout)
        trace = None if here.trace is None else here.trace()
        return here.post(message, kind, here.take_id(), limit, key, trace)

    def _drop(self, posting: Posting) -> None:
        if self._node is not None:
            self._node.durable.sender.forget(posting)

    async def broadcast(self, event: Event) -> None:
        """Send an event to every live node that handles it, at most once, in order per sender and handler.

        Raises as `publish` does; durable classes may be broadcast, too.
        """
        await self._calling.store("broadcast", event)

    @property
    def node(self) -> NodeInfo:
        """This node, as others see it.

        Raises:
            BusStateError: The bus is not started, closed, or was started before a fork.
        """
        return self._open().directory.own

    def nodes(self, service: str | None = None, status: NodeStatus | str | None = None) -> list[NodeInfo]:
        """Return the nodes that are known, this one included, sorted by service and id.

        A node that left is gone from it at once. One that is dead stays for a minute with the status `faulted`, for
        ten minutes if the server still holds its connection: it may only be frozen.

        Args:
            service: Only nodes of this service.
            status: Only nodes with this status, such as `online`.

        Raises:
            BusStateError: The bus is not started, closed, or was started before a fork.
            ConfigurationError: There is no such status.
        """
        here = self._open()
        try:
            wanted = None if status is None else NodeStatus(status)
        except ValueError:
            raise ConfigurationError(f"status must be one of {', '.join(NodeStatus)}, got {status!r}") from None
        return [
            one
            for one in here.directory.nodes()
            if (service is None or one.service == service) and (wanted is None or one.status is wanted)
        ]

    def watch_nodes(self, *, max_pending: int = 1_000) -> AsyncIterator[NodeChange]:
        """Return the changes of the nodes, one after the other: `async for change in bus.watch_nodes()`.

        It begins with `joined` for every node that is known, this one included, and ends when the bus is closed.

        Args:
            max_pending: How many changes may wait for a slow watcher. Over it they are dropped, and the watcher gets
                `missed` with their number, then `joined` for every node that is known by then. At least 1.

        Raises:
            BusStateError: The bus is not started, closed, or was started before a fork.
            ConfigurationError: `max_pending` is below 1.
        """
        return self._open().directory.watch(_checked_pending(max_pending))

    def watch_breakers(self, *, max_pending: int = 1_000) -> AsyncIterator[BreakerChange]:
        """Return the changes of the circuit breakers of this bus's calls: `async for change in bus.watch_breakers()`.

        It begins with the last change of every breaker that is not closed, and ends when the bus is closed.
        `statistics()` has the counts.

        Args:
            max_pending: How many changes may wait for a slow watcher. Over it they are dropped, and the watcher gets
                one whose `missed` is their number, then the last change of every breaker that is not closed by then.
                At least 1.

        Raises:
            BusStateError: The bus is not started, closed, or was started before a fork.
            ConfigurationError: `max_pending` is below 1.
        """
        return self._open().caller.guard.watch(_checked_pending(max_pending))

    def statistics(self) -> BusStatistics:
        """Return a snapshot of what the bus has done since its start."""
        return self._open().statistics()

    def health(self) -> Health:
        """Return whether the bus lives and takes work, and what that rests on.

        It may be called from any thread, also while the event loop is blocked, and at any time in the life of the bus.

        Raises:
            BusStateError: The bus was started before a fork.
        """
        self._check_process()
        here, config = self._node, self.config
        if here is None:
            facts = Facts(state=self._state)
        else:
            # Draining takes the subscriptions back, one after the other.
            is_subscribed = self._state is BusState.STARTED and self._connection.up.is_set()
            is_subscribed = is_subscribed and all(map(self._is_optional, self._connection.taken_back))
            facts = here.facts(self._state, is_subscribed=is_subscribed)
        limits = HealthLimits(stall=config.stall_timeout, intake=config.intake, intake_bytes=config.intake_bytes)
        return assess(facts, limits)

    # -- calls made by handlers ----------------------------------------------------------------------------

    async def send_from(
        self,
        parent: Context,
        request: Request[R] | Command[R],
        timeout: float | None,
        node: str | None,
        where: Callable[[NodeInfo], bool] | None,
        key: Key | None,
    ) -> Ok[R] | Err:
        """Send on behalf of a handler: `Context.send` calls this."""
        return await self._calling.send(request, timeout, node, where, key, parent)

    async def enqueue_from(
        self,
        parent: Context,
        command: Command[Any],
        key: Key | None,
        timeout: float | None,
        delay: float | None,
        at: datetime | None,
    ) -> Stored:
        """Have a command stored on behalf of a handler: `Context.enqueue` calls this."""
        stored = await self._calling.store(
            "enqueue", command, key=key, timeout=timeout, delay=delay, at=at, parent=parent
        )
        assert stored is not None
        return stored

    async def publish_from(
        self, parent: Context, event: Event, key: Key | None, timeout: float | None
    ) -> Stored | None:
        """Publish on behalf of a handler: `Context.publish` calls this."""
        return await self._calling.store("publish", event, key=key, timeout=timeout, parent=parent)

    async def broadcast_from(self, parent: Context, event: Event) -> None:
        """Broadcast on behalf of a handler: `Context.broadcast` calls this."""
        await self._calling.store("broadcast", event, parent=parent)

    # -- checks --------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if self._starting is not None and self._forks != forks.count:
            raise BusStateError(
                f"{self!r} was started in process {self._pid} and is used in its fork {os.getpid()}; "
                f"make and start a bus in each process"
            )

    def _open(self) -> Node:
        self._check_process()
        if self._node is None:
            fix = "`async with bus:` or `await bus.start()` first" if self._state is BusState.NEW else "make a new one"
            raise BusStateError(f"{self!r} is not started; {fix}")
        return self._node


def _checked_pending(max_pending: int) -> int:
    if max_pending < 1:
        raise ConfigurationError(f"max_pending must be a number of changes, at least 1, got {max_pending!r}")
    return max_pending


def _checked_urls(url: str | None) -> tuple[str, ...]:
    urls = server_urls(url)
    if urls[0].startswith("embedded://"):
        EmbeddedServer.parse(urls[0])
    return urls


async def _first(work: Any, interrupted: asyncio.Event) -> bool:
    """Run `work` until it is done or `interrupted` is set; return whether it was done. What it raises is raised."""
    task = asyncio.ensure_future(work)
    signalled = asyncio.ensure_future(interrupted.wait())
    try:
        await asyncio.wait({task, signalled}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        signalled.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, signalled, return_exceptions=True)
    if task.cancelled():
        return False
    task.result()
    return True
