"""NATS core as a `Transport`: at most once, in order per publisher and subject, at the speed of the socket."""

import random
import secrets
from collections.abc import Mapping

from catga_bus.errors import ConfigurationError, DisconnectedError, Outcome, TooLargeError
from catga_bus.transport.base import ConnectionOptions, Sink, TransportEvents
from catga_bus.transport.nats_connection import NatsConnection, State
from catga_bus.transport.nats_credentials import wants_tls
from catga_bus.transport.nats_protocol import Encoder, encode_headers
from catga_bus.transport.nats_servers import redacted
from catga_bus.transport.validation import checked_subject

_BOUNDS = {
    "connect_timeout": (0.1, 300.0),
    "reconnect_delay": (0.01, 60.0),
    "ping_interval": (0.1, 600.0),
    "write_limit_bytes": (65_536, 67_108_864),
}
# As `ConnectionOptions` documents them.


class NatsSubscription:
    """A live interest in a subject; see `catga_bus.transport.base.Subscription`."""

    def __init__(self, connection: NatsConnection, subject: str, sid: bytes) -> None:
        self._connection = connection
        self._subject = subject
        self._sid = sid

    @property
    def subject(self) -> str:
        """The subject as subscribed."""
        return self._subject

    async def unsubscribe(self) -> None:
        """Ask for no more; what was sent by then still reaches the sink."""
        self._connection.end_interest(self._sid)

    async def close(self) -> None:
        """End the interest; nothing reaches the sink after this returns. Closing twice is fine."""
        self._connection.remove_route(self._sid)


class NatsTransport:
    """Carries messages over a NATS cluster; `catga_bus.transport.base.Transport` is its contract.

    A sink is called from within the socket's callback: nothing is queued between the two, so the
    bound of what waits is the socket's buffer and the server's. Ten thousand sinks that take ten
    microseconds each hold the event loop for a tenth of a second.

    Args:
        options: How to reach and convince a server.
        events: Who is told of the connection.
        rng: Draws the jitter of reconnects and the order of the servers; seed it for a repeatable
            order.
    """

    def __init__(
        self,
        options: ConnectionOptions,
        events: TransportEvents,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self._options = options
        self._connection = NatsConnection(options, events, rng if rng is not None else random.Random())
        encoder = Encoder()
        self._head = encoder.head
        self._head_with_headers = encoder.head_with_headers
        self._inbox_root = f"{options.inbox_prefix}.{secrets.token_hex(11)}."
        # 88 random bits for the transport and a counter: cheaper than randomness for every inbox.
        self._inboxes = 0

    @property
    def is_connected(self) -> bool:
        """Whether a server would take a message now."""
        return self._connection.is_usable

    @property
    def is_behind(self) -> bool:
        """Whether more than `write_limit_bytes` wait for the socket."""
        return self._connection.waiting_bytes > self._options.write_limit_bytes

    @property
    def max_payload(self) -> int:
        """The largest payload that the server takes, in bytes, headers included."""
        return self._connection.max_payload

    @property
    def url(self) -> str:
        """The server in use, without credentials; the first seed before the first connection."""
        return self._connection.url

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection is one over TLS."""
        return self._connection.tls_required or self.url.startswith("tls://") or wants_tls(self._options)

    @property
    def sink_errors(self) -> int:
        """Messages whose sink raised, since the beginning."""
        return self._connection.sink_errors

    async def connect(self) -> None:
        """Connect within `connect_timeout`, trying every seed; afterwards come back for ever.

        Raises:
            DisconnectedError: No server could be used in time; the text holds each address and why.
            AuthenticationError: A server refused the credentials.
            ConfigurationError: An option, an address or a file cannot be used.
            BusStateError: The transport was connected before, or is closed.
        """
        _check_options(self._options)
        await self._connection.open()

    async def close(self) -> None:
        """Send what waits, end all subscriptions and the connection, within 2 seconds."""
        await self._connection.end()

    async def flush(self, timeout: float = 5.0) -> None:
        """Wait until the server has taken everything published and subscribed so far.

        One that times out leaves the connection as it is.

        Raises:
            DisconnectedError: There is no connection, it was lost, or no answer came in time.
        """
        await self._connection.ping(timeout)

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "") -> NatsSubscription:
        """Express interest in a subject; certain to be in force after the next `flush`.

        Without a connection the interest is sent as soon as there is one again.

        Raises:
            ConfigurationError: The subject or the queue group cannot be used.
            DisconnectedError: The transport was never connected, or is closed.
        """
        checked_subject(subject, wildcards=True)
        if queue:
            checked_subject(queue)
        connection = self._connection
        if not connection.is_alive:
            raise _refused(subject, self.url)
        return NatsSubscription(connection, subject, connection.add_route(subject, queue, sink))

    def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send one message.

        Raises:
            DisconnectedError: There is no connection; nothing was sent or kept.
            TooLargeError: Payload and headers together exceed `max_payload`.
            ConfigurationError: The subject, reply or a header cannot be sent.
        """
        if type(payload) is not bytes:
            # A copy, since it may change before the end of the turn; and text fails here rather than
            # in the middle of everything else that waits for the socket.
            payload = memoryview(payload).tobytes()
        connection = self._connection
        size = len(payload)
        if headers:
            block = encode_headers(headers)
            head = self._head_with_headers(subject, reply, block, size)
            total = size + len(block)
        else:
            head = self._head(subject, reply, size)
            total = size
        if total > connection.max_payload:
            raise TooLargeError(
                f"a message of {total} bytes (headers included) to {subject!r} exceeds max_payload,"
                f" {connection.max_payload}",
                outcome=Outcome.NOT_RUN,
            )
        if connection.state is not State.CONNECTED:
            raise _refused(subject, self.url)
        connection.put(head, payload)

    def push(self) -> None:
        """Hand what was published to the socket now rather than at the end of this turn."""
        self._connection.push()

    async def wait_writable(self) -> None:
        """Wait until the transport is no longer behind, or the connection is gone."""
        await self._connection.wait_writable(self._options.write_limit_bytes)

    def new_inbox(self) -> str:
        """Return a new subject under the inbox prefix that nobody else has."""
        self._inboxes += 1
        return f"{self._inbox_root}{self._inboxes}"


def _refused(subject: str, url: str) -> DisconnectedError:
    return DisconnectedError(f"cannot use {subject!r}: not connected to {url}", outcome=Outcome.NOT_RUN)


def _check_options(options: ConnectionOptions) -> None:
    if isinstance(options.urls, str):
        raise ConfigurationError(f"urls must be a tuple of addresses; write ({redacted(options.urls)!r},)")
    for name, (low, high) in _BOUNDS.items():
        value = getattr(options, name)
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigurationError(f"{name} must be {low} to {high}, got {value!r}")
    checked_subject(options.inbox_prefix)
