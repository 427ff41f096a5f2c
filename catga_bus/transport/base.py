"""The seam that every carrier fills: `Transport`, and the promises that its contract suite checks."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

import msgspec

Sink: TypeAlias = Callable[[str, bytes, str, Mapping[str, str] | None], None]
"""Takes one message: subject, payload, reply subject ("" if none), headers (None if none).

A sink is called on the event loop, in the order of arrival per subscription, and returns at once: it may look, decode
and enqueue, never wait. What it raises is logged and counted; the connection and the other messages go on.
"""


class TransportEvents(Protocol):
    """What a transport tells its owner; every method is called on the event loop and returns at once."""

    def on_disconnected(self, reason: str) -> None:
        """The connection was lost; the transport is trying to come back, for ever."""

    def on_reconnected(self, url: str) -> None:
        """The connection is back and every subscription has been sent again to the server."""

    def on_denied(self, subject: str, text: str) -> None:
        """The server refused a publish or a subscription to `subject`; nothing was delivered."""

    def on_error(self, text: str) -> None:
        """Something else went wrong and was survived."""


@runtime_checkable
class Subscription(Protocol):
    """A live interest in a subject."""

    @property
    def subject(self) -> str:
        """The subject as subscribed; may hold the wildcards `*` and `>`."""
        ...

    async def unsubscribe(self) -> None:
        """Ask for no more. What was sent here by then still reaches the sink: all of it has after the next `flush`.

        Whoever serves others leaves like this, and closes after the flush; `close` by itself drops what is on its way.
        A second time does nothing.
        """

    async def close(self) -> None:
        """End the interest. Messages that have arrived before it returns may still reach the sink; none does after."""


class ConnectionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach and convince a server. All times in seconds."""

    urls: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    """Seeds of the cluster; the servers that they name are found from them."""

    name: str = "catga"
    """What the server shows for this connection."""

    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey_seed: str | None = None
    """The seed itself, or the path of a file that holds it."""

    credentials: str | None = None
    """Path of a `.creds` file (user JWT and seed)."""

    tls_ca: str | None = None
    """Path of the certificate authority's PEM file; giving any of the `tls_*` options turns TLS on."""

    tls_cert: str | None = None
    """Path of the client's certificate (PEM)."""

    tls_key: str | None = None
    """Path of the client's key (PEM)."""

    tls_hostname: str | None = None
    """The name that the server's certificate must carry, where it differs from the address."""

    inbox_prefix: str = "_INBOX"
    """Root of the subjects that answers come to."""

    connect_timeout: float = 5.0
    """Bound of the first connection: all seeds, hand-shake and authentication. 0.1 to 300."""

    reconnect_delay: float = 0.1
    """First delay between attempts to come back; doubles with jitter up to 2.0. 0.01 to 60."""

    ping_interval: float = 5.0
    """How often a silent server is pinged; two missed answers in a row are a lost connection. 0.1 to 600."""

    write_limit_bytes: int = 1_048_576
    """Bytes waiting for the socket above which the transport says that it is behind. 65,536 to 67,108,864."""


class Transport(Protocol):
    """Carries messages on subjects, at most once, in order per publisher and subject.

    - `publish` never blocks and never suspends: bytes wait in memory until the socket takes them. Who
      publishes watches `is_behind` and holds back.
    - A message published while `is_connected` is False is refused with `DisconnectedError`; one accepted
      just before the connection broke may be lost without a word.
    - With several members in a queue group each message goes to one of them, chosen at random.
    - A message with a reply subject to which nobody is subscribed comes back at once on that reply
      subject, empty, with the header `Status: 503`.
    - Subjects are checked here: empty tokens, spaces, control characters, wildcards in `publish` and more than 1,024
      bytes are a `ConfigurationError`, before anything reaches the wire.
    - All methods belong to one event loop; the transport is used only there.
    """

    @property
    def is_connected(self) -> bool:
        """Whether a server would take a message now."""
        ...

    @property
    def is_behind(self) -> bool:
        """Whether more than `write_limit_bytes` wait for the socket."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest payload that the server takes, in bytes, headers included."""
        ...

    @property
    def url(self) -> str:
        """The server in use, without credentials; the first seed before the first connection."""
        ...

    async def connect(self) -> None:
        """Connect within `connect_timeout`, or raise; afterwards come back for ever, with jitter.

        Raises:
            DisconnectedError: No server answered in time; the text holds the addresses and the last reason.
            AuthenticationError: The server refused the credentials.
            ConfigurationError: An address or a file of the options cannot be used.
        """

    async def close(self) -> None:
        """Send what waits (for at most 2 seconds), end all subscriptions and the connection. Closing twice is fine."""

    async def flush(self, timeout: float = 5.0) -> None:
        """Wait until the server has taken everything published and subscribed so far (a round trip).

        Raises:
            DisconnectedError: There is no connection, or no answer within `timeout`.
        """

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "") -> Subscription:
        """Express interest in a subject; certain to be in force after the next `flush`.

        A server that does not permit it says so through `TransportEvents.on_denied`.
        """
        ...

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send one message.

        Raises:
            DisconnectedError: There is no connection.
            TooLargeError: Payload and headers together exceed `max_payload`.
            ConfigurationError: The subject, reply or a header cannot be sent.
        """

    def push(self) -> None:
        """Hand what was published to the socket now rather than at the end of this turn of the event loop."""

    async def wait_writable(self) -> None:
        """Wait until the transport is no longer behind, or the connection is gone."""

    def new_inbox(self) -> str:
        """Return a new subject under the inbox prefix that nobody else has."""
        ...
