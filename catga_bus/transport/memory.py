"""The memory twin: a transport over the broker inside the process, which keeps the promises of NATS core, for tests."""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from catga_bus.errors import (
    BusStateError,
    ConfigurationError,
    DisconnectedError,
    Outcome,
    TooLargeError,
)
from catga_bus.transport.base import ConnectionOptions, Sink, TransportEvents
from catga_bus.transport.memory_broker import (
    SCHEME,
    Link,
    MemoryBroker,
    MemorySubscription,
    brokers,
    brokers_lock,
    refused,
)
from catga_bus.transport.validation import check_header, checked_subject

_CLOSE_TIMEOUT: Final = 2.0
# Promised by `Transport.close`.

_HEADER_BASE_BYTES: Final = 12
_HEADER_LINE_BYTES: Final = 4
# "NATS/1.0\r\n" and the empty line; ": " and "\r\n" of each line. They count towards the payload's
# bound.

MAX_PAYLOAD_BYTES: Final = 1_048_576
"""Largest message by default; the default of nats-server's `max_payload`."""


class MemoryTransport:
    """Carries messages within the process; `catga_bus.transport.base.Transport` is its contract.

    Delivery is never part of `publish`: a message reaches its sinks on a later turn of the
    receiving transport's event loop, which may run in another thread. At most `MAX_QUEUED_MESSAGES`
    messages and `MAX_QUEUED_BYTES` bytes wait for one transport; what comes on top is dropped, the
    newest first, and `on_error` is told how many.

    Of the options only `urls[0]` (`memory://name`), `inbox_prefix` and `write_limit_bytes` mean
    something here; a connection is made or refused at once, and a lost one comes back when the
    broker is healed (see `broker_of`).

    Args:
        options: How to connect.
        events: Who is told of the connection.
        max_payload: The largest payload with headers, in bytes.
        rng: Chooses the members of queue groups for what this transport publishes; seed it for a
            repeatable choice.
    """

    def __init__(
        self,
        options: ConnectionOptions,
        events: TransportEvents,
        *,
        max_payload: int = MAX_PAYLOAD_BYTES,
        rng: random.Random | None = None,
    ) -> None:
        self._options = options
        self._events = events
        self._max_payload = max_payload
        self._rng = rng if rng is not None else random.Random()
        self._inbox_root = f"{options.inbox_prefix}.{secrets.token_hex(11)}."
        # Not drawn from `rng`: two transports with the same seed must not share their inboxes.
        self._inboxes = 0
        self._link: Link | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the broker would take a message now."""
        return self._link is not None and self._link.is_connected

    @property
    def is_behind(self) -> bool:
        """Whether more than `write_limit_bytes` wait for a stalled broker."""
        link = self._link
        return link is not None and link.waiting_bytes > self._options.write_limit_bytes

    @property
    def max_payload(self) -> int:
        """The largest payload that is taken, in bytes, headers included."""
        return self._max_payload

    @property
    def url(self) -> str:
        """The address of the broker."""
        return self._options.urls[0] if self._options.urls else ""

    @property
    def subjects(self) -> list[str]:
        """The subjects without wildcards that somebody listens to, on any connection of the broker."""
        return self._link.broker.subjects() if self._link is not None else []

    @property
    def sink_errors(self) -> int:
        """Messages whose sink raised, since the beginning."""
        return self._link.sink_errors if self._link is not None else 0

    async def connect(self) -> None:
        """Join the broker of the address, or make it.

        Raises:
            ConfigurationError: The address or the inbox prefix cannot be used.
            DisconnectedError: The broker is cut.
            BusStateError: The transport was connected before.
        """
        if self._link is not None:
            raise BusStateError(f"the transport to {self.url} connects once; make a new one")
        name = self.url.removeprefix(SCHEME)
        if not name or name == self.url:
            raise ConfigurationError(f"a memory address reads {SCHEME}name, got {self.url!r}")
        checked_subject(self._options.inbox_prefix)
        with brokers_lock:
            broker = brokers.get(name)
            if broker is None or not broker.has_links():
                broker = MemoryBroker(name)
            link = Link(broker, self._events, self._rng)
            broker.attach(link)
            brokers[name] = broker
        self._link = link

    async def close(self) -> None:
        """Leave the broker; the last one to leave ends it.

        What waits for a stalled broker gets 2 seconds to go.
        """
        link = self._link
        if link is None:
            return
        try:
            if link.waiting:
                with contextlib.suppress(DisconnectedError):
                    await self.flush(_CLOSE_TIMEOUT)
        finally:
            broker = link.broker
            with brokers_lock:
                broker.detach(link)
                if brokers.get(broker.name) is broker and not broker.has_links():
                    del brokers[broker.name]
            link.changed.set()

    async def flush(self, timeout: float = 5.0) -> None:
        """Wait until the broker has taken everything, and this loop what the broker had for it.

        Raises:
            DisconnectedError: There is no connection, it was cut meanwhile, or the broker stayed
                stalled.
        """
        link = self._link
        if link is None or not link.is_connected:
            raise DisconnectedError(f"cannot flush: not connected to {self.url}")
        losses = link.losses
        try:
            async with asyncio.timeout(timeout):
                await asyncio.sleep(0)
                while link.broker.is_stalled and link.losses == losses:
                    await _next_change(link)
                until = link.handed_over + len(link.queue)
                while link.handed_over < until and link.losses == losses:  # noqa: ASYNC110 - every turn hands over more
                    await asyncio.sleep(0)
        except TimeoutError:
            raise DisconnectedError(f"cannot flush: {self.url} has not answered within {timeout} s") from None
        if link.losses != losses:
            raise DisconnectedError(f"cannot flush: the connection to {self.url} was lost")

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "") -> MemorySubscription:
        """Express interest in a subject; in force at once, or when the connection is back.

        Raises:
            ConfigurationError: The subject or the queue group cannot be used.
            DisconnectedError: The transport was never connected, or is closed.
        """
        checked_subject(subject, wildcards=True)
        if queue:
            checked_subject(queue)
        link = self._link
        if link is None or link.is_closed:
            raise refused(subject, self.url)
        subscription = MemorySubscription(link, subject, queue, sink)
        link.broker.subscribe(subscription)
        return subscription

    def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send one message; see `catga_bus.transport.base.Transport.publish`."""
        checked_subject(subject)
        if reply:
            checked_subject(reply)
        if type(payload) is not bytes:
            # A copy, since it may change before it is delivered; text fails here, as it does on a socket.
            payload = memoryview(payload).tobytes()
        size = len(payload)
        carried: Mapping[str, str] | None = None
        if headers:
            carried, header_bytes = _carried_headers(headers)
            size += header_bytes
        if size > self._max_payload:
            raise TooLargeError(
                f"a message of {size} bytes (headers included) to {subject!r} exceeds max_payload, {self._max_payload}",
                outcome=Outcome.NOT_RUN,
            )
        link = self._link
        if link is None:
            raise refused(subject, self.url)
        link.broker.accept(link, (subject, payload, reply, carried), size)

    def push(self) -> None:
        """Do nothing: the broker has it already."""

    async def wait_writable(self) -> None:
        """Wait until the transport is no longer behind, or the connection is gone."""
        while self._link is not None and self.is_behind:
            await _next_change(self._link)

    def new_inbox(self) -> str:
        """Return a new subject under the inbox prefix that nobody else has."""
        self._inboxes += 1
        return f"{self._inbox_root}{self._inboxes}"


async def _next_change(link: Link) -> None:
    # Every waiter looks again after each change, so one that clears the event for itself wakes
    # nobody too late.
    link.changed.clear()
    await link.changed.wait()


def _carried_headers(headers: Mapping[str, str]) -> tuple[Mapping[str, str], int]:
    """Return the headers as they arrive (a copy, values trimmed) and their size on the wire."""
    carried: dict[str, str] = {}
    size = _HEADER_BASE_BYTES
    for key, value in headers.items():
        check_header(key, value)
        carried[key] = value.strip()
        size += _HEADER_LINE_BYTES + len(key) + len(value.encode())
    return MappingProxyType(carried), size
