"""The seam to JetStream: streams, consumers and stored messages, with the three outcomes of every call kept apart.

A call is *done* (it returns), *refused* (`JetStreamRefusedError`: the server answered no, nothing happened) or of
*unknown* outcome (`JetStreamUnknownError`: no answer, no leader, no connection: it may have happened, or may still
happen). Whoever calls repeats what is idempotent while it is unknown, and finds out about the rest by reading.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from catga_bus.errors import CatgaError

CHANGE_TIMEOUT = 5.0
"""Seconds for changes of streams and consumers: in a cluster they take an election among their replicas, 0.1 s as a
rule and up to 9 s while a server is gone."""

API_ROOT = "$JS.API."
"""What the subjects of the JetStream API begin with."""

MSG_ID_HEADER = "Nats-Msg-Id"
EXPECTED_LAST_HEADER = "Nats-Expected-Last-Subject-Sequence"


class ApiError(IntEnum):
    """Error codes of the JetStream API that the bus tells apart (nats-server, server/errors.json)."""

    STREAM_NOT_FOUND = 10059
    STREAM_NAME_IN_USE = 10058
    SUBJECTS_OVERLAP = 10065
    CONSUMER_NOT_FOUND = 10014
    CONSUMER_NAME_IN_USE = 10148
    CONSUMER_FILTER_NOT_UNIQUE = 10100
    MESSAGE_NOT_FOUND = 10037
    WRONG_LAST_SEQUENCE = 10071
    STREAM_STORE_FAILED = 10077
    """Also what a full stream with discard new answers ("maximum bytes exceeded")."""

    MESSAGE_DELETE_FAILED = 10057
    SEQUENCE_NOT_FOUND = 10043
    INVALID_CONFIG = 10052
    NOT_ENABLED = 10076
    NOT_ENABLED_FOR_ACCOUNT = 10039
    INSUFFICIENT_RESOURCES = 10023
    INSUFFICIENT_STORAGE = 10047
    NO_SUITABLE_PEERS = 10005


class JetStreamError(CatgaError):
    """A JetStream call did not do what was asked, or nobody knows whether it did."""


class JetStreamRefusedError(JetStreamError):
    """The server answered that it did not do it.

    Attributes:
        code: Its `err_code`; see `ApiError` for those that the bus tells apart.
        text: Its words.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.text = text


class JetStreamUnknownError(JetStreamError):
    """No answer, or none that proves anything: it may have happened, or may still happen."""


class JetStreamUnreachedError(JetStreamUnknownError):
    """No server took it, for want of a connection or of a leader: this call has done nothing and never will."""


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A stream. Times in seconds; -1 is without a limit."""

    name: str
    subjects: tuple[str, ...]
    retention: Literal["limits", "workqueue"] = "limits"
    storage: Literal["file", "memory"] = "file"
    replicas: int = 1
    max_bytes: int = -1
    max_age: float = 0.0
    """0.0: for ever."""

    max_messages_per_subject: int = -1
    discard: Literal["old", "new"] = "old"
    duplicate_window: float = 120.0
    allow_direct: bool = False
    deny_delete: bool = False
    allow_rollup: bool = False
    allow_schedules: bool = False
    """Delayed messages; server 2.12 and newer."""

    first_sequence: int = 0
    """Of the first message, at creation only; 0 and 1 are the same."""

    metadata: Mapping[str, str] = {}


class StreamInfo(msgspec.Struct, frozen=True):
    """A stream as the server has it."""

    config: StreamConfig
    messages: int
    bytes: int
    first_sequence: int
    last_sequence: int
    consumers: int
    raw: Mapping[str, Any] = {}
    """The whole answer of the server, for what is not above: cluster, leader, replicas that lag."""


class ConsumerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A pull consumer. Times in seconds."""

    name: str
    filters: tuple[str, ...]
    """Subjects; several need server 2.10."""

    acks: Literal["explicit", "none"] = "explicit"
    ack_wait: float = 3600.0
    max_ack_pending: int = 1_024
    deliver: Literal["all", "new", "by_start_sequence", "by_start_time", "last_per_subject"] = "all"
    start_sequence: int = 0
    start_time: float = 0.0
    """Seconds since 1970."""

    in_memory: bool = False
    replicas: int = 0
    """0: as many as the stream has."""

    inactive_threshold: float = 0.0
    """Seconds without anybody who pulls after which the server deletes it; 0.0: never."""

    metadata: Mapping[str, str] = {}


class ConsumerInfo(msgspec.Struct, frozen=True):
    """A consumer as the server has it."""

    name: str
    config: ConsumerConfig
    ack_floor: int
    """Sequence in the stream up to which everything is acknowledged; 0 before the first."""

    delivered: int
    """Highest sequence in the stream that was delivered."""

    ack_pending: int
    pending: int
    """Messages that match and were never delivered."""

    has_leader: bool = True
    """Whether there is a server that delivers for it: one of several whose replicas it has, else the only one."""


class PubAck(msgspec.Struct, frozen=True):
    """The server has stored a message."""

    stream: str
    sequence: int
    duplicate: bool = False
    """Whether it was stored before, under this sequence."""


class StoredMessage(msgspec.Struct, frozen=True):
    """A message that lies in a stream."""

    subject: str
    sequence: int
    payload: bytes
    headers: Mapping[str, str]
    time: float
    """When it was stored: seconds since 1970, by the server's clock."""


class DeliveredMessage(msgspec.Struct, frozen=True, gc=False):
    """A message that a consumer has delivered."""

    subject: str
    payload: bytes
    headers: Mapping[str, str] | None
    reply: str
    """Where it is acknowledged."""

    sequence: int
    """In the stream."""

    consumer_sequence: int
    """Of deliveries of this consumer: rises by one each time; a gap means that some were lost on the way."""

    deliveries: int
    """How often this consumer has delivered it; the first is 1."""

    pending: int
    """Messages that match and have not been delivered yet."""

    time: float
    """When it was stored: seconds since 1970."""


MessageSink: TypeAlias = Callable[[DeliveredMessage], None]
StatusSink: TypeAlias = Callable[[int, str], None]
"""Takes a status of the server about a pull (code and words): 100 idle heartbeat; 404, 408 the pull is over; 409 the
consumer was deleted, its leader changed, ...; 503 nobody there. The pull's credit has been corrected by then."""


class Consumption(Protocol):
    """A consumer at work. Its sinks are called on the event loop and return at once."""

    @property
    def credit(self) -> int:
        """Messages that were asked for and have neither come nor been declared over."""
        ...

    @property
    def heard_at(self) -> float:
        """Instant of the last message or status."""
        ...

    def pull(self, batch: int) -> None:
        """Ask for so many more messages, for as long as it takes (asked again by itself when it expires: 408).

        Asking for one at a time is fine: what is asked for little by little goes to the server in larger pulls. Without
        a connection it does nothing: whoever is told of the reconnect starts over.

        Raises:
            ValueError: `batch` is below 1.
        """

    async def close(self) -> None:
        """End it. Nothing reaches the sinks after this returns; what was delivered and not acknowledged stays so."""


class JetStream(Protocol):
    """JetStream as the bus needs it. Every call may raise `JetStreamUnknownError`; times are seconds.

    All names are used as they are given; `catga_bus.wire.Names` makes them.
    """

    def disconnected(self) -> None:
        """Let what waits end now with an unknown outcome, and count every pull as over.

        For the owner of the transport, who is told that the connection was lost. Consumptions stay open: after the
        reconnect each may `pull` again, or be closed.
        """

    async def close(self) -> None:
        """End every consumption, and let what waits end with an unknown outcome. Closing twice is fine."""

    async def account(self) -> Mapping[str, Any]:
        """Return the server's account information: limits, usage, API level.

        Raises:
            JetStreamRefusedError: JetStream is off, for the server or for this account.
        """
        ...

    async def create_stream(self, config: StreamConfig) -> StreamInfo:
        """Create a stream; one that is there already with the same configuration is fine.

        Raises:
            JetStreamRefusedError: It exists with another configuration, or cannot be.
        """
        ...

    async def update_stream(self, config: StreamConfig) -> StreamInfo:
        """Change a stream; refused if it is not there or cannot be changed so."""
        ...

    async def stream(self, name: str) -> StreamInfo | None:
        """Return a stream, or None if there is none of this name."""
        ...

    async def stream_names(self, subject: str = "") -> list[str]:
        """Return the names of all streams, or of those that store a subject."""
        ...

    async def delete_stream(self, name: str) -> bool:
        """Delete a stream; return whether it was there."""
        ...

    async def purge(self, stream: str, *, subject: str = "") -> int:
        """Delete all messages, or those on a subject (wildcards allowed); return how many."""
        ...

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 2.0,
    ) -> PubAck:
        """Store a message.

        Args:
            subject: Where; some stream stores it.
            payload: What.
            message_id: The same id within `duplicate_window` is stored once.
            expected_last: Store it only if the last message on this subject has this sequence; 0: if there never was
                one.
            headers: Others.
            timeout: Seconds until the outcome is unknown.

        Raises:
            JetStreamRefusedError: The stream is full, or the last sequence is another (`WRONG_LAST_SEQUENCE`).
            JetStreamUnreachedError: There is no connection, or no stream takes it for now.
            TooLargeError: Payload and headers exceed what the server takes.
        """
        ...

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """Return the last message on a subject as its leader has it, or None. Delete markers are messages, too.

        Raises:
            JetStreamRefusedError: There is no such stream.
        """
        ...

    async def message(self, stream: str, sequence: int) -> StoredMessage | None:
        """Return one message, or None if it is not there (any more)."""
        ...

    async def next_message(self, stream: str, subject: str, sequence: int) -> StoredMessage | None:
        """Return the first message from a sequence on whose subject matches (wildcards allowed), or None."""
        ...

    async def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message; return whether it was there."""
        ...

    async def create_consumer(
        self, stream: str, config: ConsumerConfig, *, timeout: float = CHANGE_TIMEOUT
    ) -> ConsumerInfo:
        """Create a consumer; one that is there already with the same configuration is fine.

        Args:
            stream: The stream.
            config: The consumer.
            timeout: Seconds until the outcome is unknown.

        Raises:
            JetStreamRefusedError: Another one has the name; or, on a work queue, the filter overlaps that of another
                (`CONSUMER_FILTER_NOT_UNIQUE`).
        """
        ...

    async def consumer(self, stream: str, name: str) -> ConsumerInfo | None:
        """Return a consumer, or None if there is none of this name."""
        ...

    async def consumer_names(self, stream: str) -> list[str]:
        """Return the names of all consumers of a stream."""
        ...

    async def delete_consumer(self, stream: str, name: str, *, timeout: float = CHANGE_TIMEOUT) -> bool:
        """Delete a consumer; return whether it was there.

        Args:
            stream: The stream.
            name: The consumer.
            timeout: Seconds until the outcome is unknown.
        """
        ...

    async def consume(
        self, stream: str, consumer: str, on_message: MessageSink, on_status: StatusSink, *, idle: float = 5.0
    ) -> Consumption:
        """Have a consumer's messages delivered here; nothing comes before the first `pull`.

        Args:
            stream: The stream.
            consumer: The consumer.
            on_message: Takes each message.
            on_status: Takes what the server says about a pull.
            idle: The server says at least this often that it has nothing (status 100).
        """
        ...

    def acknowledge(self, reply: str) -> None:
        """Acknowledge a message, without knowing whether that arrives. Nothing happens without a connection."""

    async def acknowledge_confirmed(self, reply: str, *, timeout: float = 2.0) -> bool:
        """Acknowledge a message and wait for the server to say so; return whether it did (False: consumer gone).

        The server says so to an acknowledgement of any delivery that is at or below where the consumer has come, also
        to one that comes twice or from the owner of an older delivery: it proves receipt, nothing more.
        """
        ...
