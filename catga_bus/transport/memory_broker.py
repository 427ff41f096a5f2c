"""The broker in memory: subjects, queue groups and the connections to it.

Transports whose first address is `memory://name` and that live in one process meet at one
`MemoryBroker`, on however many event loops and threads they run. The module holds the brokers by
name, counted by their connections: the first connect makes one, the last close ends it. That table
is the package's one exception to "no module-level state"; without it two buses could not find each
other by address, as they do through a server.
"""

import asyncio
import contextlib
import logging
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from catga_bus.clock import monotonic
from catga_bus.errors import ConfigurationError, DisconnectedError, Outcome
from catga_bus.transport.base import Sink, TransportEvents
from catga_bus.transport.memory_jetstream import MemoryJetStream
from catga_bus.transport.subjects import covers
from catga_bus.wire import NO_RESPONDERS, STATUS_HEADER

SCHEME: Final = "memory://"

MAX_QUEUED_MESSAGES: Final = 65_536
"""Messages that may wait for one receiving transport; what comes on top is dropped.

Chosen: a loop that is 65,536 messages behind has stood still for longer than the deadlines of most
tests; ten times more would hide it, ten times less would catch bursts that a connection carries.
"""

MAX_QUEUED_BYTES: Final = 67_108_864
"""Bytes that may wait for one receiving transport; nats-server's default `max_pending`, 64 MiB."""

_TURN_MESSAGES: Final = 256
# Messages handed to sinks in one turn of the loop, or half of those that wait if that is more. So
# timers and other tasks get turns while a burst drains, and yet the queue never grows beyond twice
# what is published in one turn. Chosen: at 5 microseconds a sink, 256 hold the loop for 1 ms.

_MAX_ROUTES: Final = 4_096
# Subjects whose receivers are remembered; answers go to subjects without end, so the memory is
# thrown away when full.

_Message: TypeAlias = tuple[str, bytes, str, Mapping[str, str] | None]
# The arguments of a sink.

_NO_RESPONDERS_HEADERS: Final[Mapping[str, str]] = MappingProxyType({STATUS_HEADER: NO_RESPONDERS})

_logger = logging.getLogger("catga_bus.transport")

brokers: dict[str, "MemoryBroker"] = {}
brokers_lock = threading.Lock()
# Guards `brokers`; always taken before the lock of a broker, never the other way round.


def broker_of(name: str) -> "MemoryBroker":
    """Return the broker that the transports of one address share, to break and mend it in a test.

    Args:
        name: The name behind `memory://`; the whole address is taken too.

    Raises:
        ConfigurationError: No transport is connected to that name, so there is no broker.

    Example:
        >>> broker_of("nobody-is-there")
        Traceback (most recent call last):
        ...
        catga_bus.errors.ConfigurationError: no transport is connected to memory://nobody-is-there
    """
    name = name.removeprefix(SCHEME)
    with brokers_lock:
        broker = brokers.get(name)
    if broker is None:
        raise ConfigurationError(f"no transport is connected to {SCHEME}{name}")
    return broker


class _Route(NamedTuple):
    """Who gets the messages of one subject: all of `plain`, one member of each of `groups`."""

    plain: "tuple[MemorySubscription, ...]"
    groups: "tuple[tuple[MemorySubscription, ...], ...]"


class Link:
    """One connection as the broker sees it.

    The broker's lock guards everything that changes here but `changed`, which belongs to `loop`.

    - `queue` holds what was routed here and waits for a turn of `loop`; `queued_bytes` is its size;
      `is_awake` says that such a turn is booked, which it always is while the queue is not empty.
    - `handed_over` counts what has left the queue for its sink.
    - `waiting` holds what this connection published while the broker was stalled.
    - `losses` counts how often the connection was cut, so that a wait can tell that it was.
    """

    def __init__(self, broker: "MemoryBroker", events: TransportEvents, rng: random.Random) -> None:
        self.broker = broker
        self.events = events
        self.rng = rng
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()
        self.is_connected = True
        self.is_closed = False
        self.losses = 0
        self.sink_errors = 0
        self.subscriptions: dict[MemorySubscription, None] = {}
        self.queue: deque[tuple[MemorySubscription, _Message, int]] = deque()
        self.queued_bytes = 0
        self.handed_over = 0
        self.dropped = 0
        self.is_awake = False
        self.waiting: deque[tuple[_Message, int]] = deque()
        self.waiting_bytes = 0

    def lose(self) -> None:
        """Drop everything on its way; the caller holds the broker's lock."""
        self.is_connected = False
        self.losses += 1
        self.queue.clear()
        self.queued_bytes = 0
        self.waiting.clear()
        self.waiting_bytes = 0

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Run a callback on a later turn of the connection's loop, from any thread.

        A loop that was closed without closing the transport is a process that died: nobody is left
        to be told.
        """
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback, *args)

    def deliver(self) -> None:
        """Hand the next messages to their sinks; runs on the connection's loop."""
        with self.broker.lock:
            waiting = len(self.queue)
            count = min(waiting, max(_TURN_MESSAGES, waiting // 2))
            batch = [self.queue.popleft() for _ in range(count)]
            self.handed_over += count
            for _, _, size in batch:
                self.queued_bytes -= size
            dropped, self.dropped = self.dropped, 0
            self.is_awake = bool(self.queue)
            if self.is_awake:
                # Booked before any sink runs, so nothing that a sink does can strand the rest.
                self.loop.call_soon(self.deliver)
        if dropped and not self.is_closed:
            self.events.on_error(
                f"slow consumer: {dropped} messages dropped, more than {MAX_QUEUED_MESSAGES}"
                f" messages or {MAX_QUEUED_BYTES} bytes waited for this event loop"
            )
        for subscription, message, _ in batch:
            if subscription.is_closed:
                continue
            try:
                subscription.sink(*message)
            except (Exception, asyncio.CancelledError):
                self.sink_errors += 1
                _logger.exception("the sink of %r raised; the message is skipped", message[0])

    def tell_lost(self, reason: str) -> None:
        """Tell the owner and whoever waits; runs on the connection's loop."""
        self.changed.set()
        if not self.is_closed:
            self.events.on_disconnected(reason)

    def tell_back(self) -> None:
        """Tell the owner; runs on the connection's loop."""
        if not self.is_closed:
            self.events.on_reconnected(self.broker.url)


class MemorySubscription:
    """A live interest in a subject; see `catga_bus.transport.base.Subscription`."""

    def __init__(self, link: Link, subject: str, queue: str, sink: Sink) -> None:
        self._subject = subject
        self.link = link
        self.queue = queue
        self.sink = sink
        self.is_closed = False

    @property
    def subject(self) -> str:
        """The subject as subscribed."""
        return self._subject

    async def unsubscribe(self) -> None:
        """Ask for no more; what was sent by then still reaches the sink."""
        self.link.broker.unsubscribe(self)

    async def close(self) -> None:
        """End the interest; nothing reaches the sink after this returns. Closing twice is fine."""
        self.is_closed = True
        self.link.broker.unsubscribe(self)


class MemoryBroker:
    """Stands where the server stands: knows who listens to what, and fails when a test says so.

    Every method may be called from any thread. Transports learn of what happens here on later turns
    of their own loops.

    Args:
        name: The name behind `memory://`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()
        # Guards everything below and the queues of the links. No foreign code runs under it.
        self._links: dict[Link, None] = {}
        self._exact: dict[str, dict[MemorySubscription, None]] = {}
        self._patterns: dict[MemorySubscription, list[str]] = {}
        self._routes: dict[str, _Route] = {}
        # Follows from `_exact` and `_patterns`: emptied whenever one of them changes.
        self._is_up = True
        self._is_stalled = False
        self.jetstream = MemoryJetStream(self._send, self._hears)
        """What is stored here. Its `is_on` may be set; the rest is called with the lock held."""

        self._here: asyncio.AbstractEventLoop | None = None
        # The loop of the thread that is in `accept`, for what JetStream sends meanwhile.

        self._timer_loop: asyncio.AbstractEventLoop | None = None
        self._timer_at = math.inf
        # One timer for JetStream, on the loop of some connection; it is never cancelled, only moved forward.

    @property
    def url(self) -> str:
        """The address of the broker."""
        return SCHEME + self.name

    @property
    def is_up(self) -> bool:
        """Whether the broker takes connections; False between `cut` and `heal`."""
        return self._is_up

    @property
    def is_stalled(self) -> bool:
        """Whether the broker reads nothing; True between `stall` and `resume`."""
        return self._is_stalled

    def cut(self, reason: str = "the memory broker was cut") -> None:
        """Break the connection of every transport, as a server does that is killed.

        They refuse to publish at once, what was on its way is lost, and `on_disconnected` follows.
        New connections fail. Cutting twice is cutting once.

        Args:
            reason: What `on_disconnected` is told.
        """
        with self.lock:
            if not self._is_up:
                return
            self._is_up = False
            self._is_stalled = False
            self.jetstream.model.restart()
            for link in self._links:
                link.lose()
                link.call(link.tell_lost, reason)

    def heal(self) -> None:
        """Bring every connection back with its subscriptions; `on_reconnected` follows.

        Does nothing if the broker is not cut.
        """
        with self.lock:
            if self._is_up:
                return
            self._is_up = True
            for link in self._links:
                link.is_connected = True
                link.call(link.tell_back)
            self._arm(None)

    def stall(self) -> None:
        """Read nothing more, as a frozen server: what is published waits with its publisher."""
        with self.lock:
            self._is_stalled = self._is_up

    def resume(self) -> None:
        """Take what has waited, in the order of each publisher, and go on."""
        with self.lock:
            if not self._is_stalled:
                return
            self._is_stalled = False
            for link in tuple(self._links):
                while link.waiting:
                    self._route(link, *link.waiting.popleft(), here=None)
                link.waiting_bytes = 0
                link.call(link.changed.set)
            self._arm(None)

    def attach(self, link: Link) -> None:
        """Take a connection.

        Raises:
            DisconnectedError: The broker is cut.
        """
        with self.lock:
            if not self._is_up:
                raise DisconnectedError(f"cannot connect to {self.url}: the broker was cut", outcome=Outcome.NOT_RUN)
            self._links[link] = None

    def detach(self, link: Link) -> None:
        """End a connection and its subscriptions; a second time does nothing."""
        with self.lock:
            self._forget(link)

    def has_links(self) -> bool:
        """Whether a connection is left; forgets those whose event loop was closed under them."""
        with self.lock:
            for link in tuple(self._links):
                if link.loop.is_closed():
                    self._forget(link)
            return bool(self._links)

    def subjects(self) -> list[str]:
        """Return the subjects without wildcards that somebody listens to."""
        with self.lock:
            return [subject for subject, interests in self._exact.items() if interests]

    def subscribe(self, subscription: MemorySubscription) -> None:
        """Take an interest; it is in force when this returns, or when the connection is back."""
        subject = subscription.subject
        tokens = subject.split(".")
        with self.lock:
            if "*" in tokens or tokens[-1] == ">":
                self._patterns[subscription] = tokens
            else:
                self._exact.setdefault(subject, {})[subscription] = None
            subscription.link.subscriptions[subscription] = None
            self._routes.clear()

    def unsubscribe(self, subscription: MemorySubscription) -> None:
        """End an interest; a second time does nothing."""
        with self.lock:
            self._drop(subscription)

    def accept(self, link: Link, message: _Message, size: int) -> None:
        """Take a message from a connection.

        Raises:
            DisconnectedError: The connection was lost in this very moment.
        """
        with self.lock:
            if not link.is_connected:
                raise refused(message[0], self.url)
            if self._is_stalled:
                link.waiting.append((message, size))
                link.waiting_bytes += size
            else:
                self._here = link.loop
                self._route(link, message, size, link.loop)
                self._here = None
                self._arm(link.loop)

    def _tick(self) -> None:
        with self.lock:
            self._timer_at = math.inf
            if self._is_up and not self._is_stalled:
                self.jetstream.run()
                self._arm(None)

    # What follows is called with the lock held. `here` is the event loop of the calling thread, if
    # it has to be one.

    def _route(self, origin: Link, message: _Message, size: int, here: asyncio.AbstractEventLoop | None) -> None:
        subject, payload, reply, headers = message
        plain, groups = self._routes.get(subject) or self._find_route(subject)
        for subscription in plain:
            self._enqueue(subscription, message, size, here)
        for members in groups:
            chosen = members[int(origin.rng.random() * len(members))]
            self._enqueue(chosen, message, size, here)
        is_stored = self.jetstream.accept(subject, payload, reply, headers)
        if reply and not is_stored and not plain and not groups:
            self._answer_nobody(origin, reply, here)

    def _answer_nobody(self, origin: Link, reply: str, here: asyncio.AbstractEventLoop | None) -> None:
        # As the server does: one copy, to a plain subscription of the connection that asked, and to
        # no one else.
        for subscription in (self._routes.get(reply) or self._find_route(reply)).plain:
            if subscription.link is origin:
                self._enqueue(subscription, (reply, b"", "", _NO_RESPONDERS_HEADERS), 0, here)
                return

    def _send(self, to: str, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        """Send what JetStream answers or delivers: to those who listen to `to`, under another subject."""
        size = len(payload)
        plain, groups = self._routes.get(to) or self._find_route(to)
        for subscription in (*plain, *(members[0] for members in groups)):
            self._enqueue(subscription, (subject, payload, reply, headers), size, self._here)

    def _hears(self, subject: str) -> bool:
        plain, groups = self._routes.get(subject) or self._find_route(subject)
        return bool(plain or groups)

    def _arm(self, here: asyncio.AbstractEventLoop | None) -> None:
        """Have JetStream looked at when it has something to do by itself."""
        delay = self.jetstream.seconds_to_next()
        if delay == math.inf:
            return
        instant = monotonic() + delay
        if self._timer_loop is not None and self._timer_loop.is_closed():
            self._timer_at = math.inf
        if instant >= self._timer_at:
            return
        for loop in (link.loop for link in self._links):
            with contextlib.suppress(RuntimeError):
                if loop is here:
                    loop.call_later(delay, self._tick)
                else:
                    loop.call_soon_threadsafe(loop.call_later, delay, self._tick)
                self._timer_loop, self._timer_at = loop, instant
                return

    def _find_route(self, subject: str) -> _Route:
        tokens = subject.split(".")
        interested = list(self._exact.get(subject, ()))
        interested += (sub for sub, pattern in self._patterns.items() if covers(pattern, tokens))
        plain: list[MemorySubscription] = []
        groups: dict[str, list[MemorySubscription]] = {}
        for subscription in interested:
            members = groups.setdefault(subscription.queue, []) if subscription.queue else plain
            members.append(subscription)
        if len(self._routes) >= _MAX_ROUTES:
            self._routes.clear()
        route = _Route(tuple(plain), tuple(map(tuple, groups.values())))
        self._routes[subject] = route
        return route

    def _enqueue(
        self,
        subscription: MemorySubscription,
        message: _Message,
        size: int,
        here: asyncio.AbstractEventLoop | None,
    ) -> None:
        link = subscription.link
        queue = link.queue
        is_full = len(queue) >= MAX_QUEUED_MESSAGES or link.queued_bytes + size > MAX_QUEUED_BYTES
        if is_full and queue:
            link.dropped += 1
            return
        queue.append((subscription, message, size))
        link.queued_bytes += size
        if link.is_awake:
            return
        link.is_awake = True
        if link.loop is here:
            here.call_soon(link.deliver)
            return
        try:
            link.loop.call_soon_threadsafe(link.deliver)
        except RuntimeError:
            # Its loop was closed without closing the transport: to the others a process that died.
            self._forget(link)

    def _forget(self, link: Link) -> None:
        if link.is_closed:
            return
        link.is_closed = True
        link.lose()
        self._links.pop(link, None)
        for subscription in tuple(link.subscriptions):
            subscription.is_closed = True
            self._drop(subscription)

    def _drop(self, subscription: MemorySubscription) -> None:
        if subscription not in subscription.link.subscriptions:
            return
        del subscription.link.subscriptions[subscription]
        if self._patterns.pop(subscription, None) is None:
            same = self._exact[subscription.subject]
            del same[subscription]
            if not same:
                del self._exact[subscription.subject]
        self._routes.clear()


def refused(subject: str, url: str) -> DisconnectedError:
    """Return the error for using a subject without a connection."""
    return DisconnectedError(f"cannot use {subject!r}: not connected to {url}", outcome=Outcome.NOT_RUN)
