"""Everything that leaves the process: subjects, names, kinds and frames. `docs/wire.md` has it byte by byte.

A payload is two bytes (0xC1, which MessagePack never uses, and the version) and the MessagePack array
`[kind, head, frames]`. A batch is put together from frames that are encoded already, so a message is
encoded once however often it is copied.
"""

import re
from collections.abc import Sequence
from enum import IntEnum, StrEnum
from hashlib import blake2b
from typing import Annotated, Any, Final

import msgspec

from catga_bus.errors import ConfigurationError

MAGIC: Final = 0xC1
VERSION: Final = 1
PREFIX: Final = bytes((MAGIC, VERSION))

BATCH_OVERHEAD: Final = 512
"""Bytes to keep free for prefix, head and array headers; ids and inboxes are bounded by `token`."""

QUEUE_RPC: Final = "rpc"
"""The queue group of every request subject; the same for all, so that a type has one set of takers."""

SERVICE_API: Final = "$SRV"
"""The root of ADR-32, the discovery protocol of NATS services."""

ERROR_CODE_HEADER: Final = "Nats-Service-Error-Code"
ERROR_HEADER: Final = "Nats-Service-Error"
STATUS_HEADER: Final = "Status"
NO_RESPONDERS: Final = "503"

MAX_TOKEN: Final = 64

MAX_ID: Final = 256
"""Characters of a message id, a node id and a trace context: several times what the bus writes (about 20, 30 and 55).
They are kept in tables and written to logs."""

MAX_TYPE: Final = 1_024
"""Characters of a type name. A service that needs more than the longest subject the bus sends has made a mistake."""

MAX_REPLY: Final = 1_024
"""Characters of a reply inbox: the longest subject that the bus sends."""

MAX_FRAMES: Final = 4_096
"""Frames of one payload: the intake of a node with default settings; a batch of requests has 64."""

MAX_TYPES: Final = 1_024
"""Types that one heartbeat lists, each of requests, commands and events: ten times what a large service has."""

MAX_METADATA: Final = 64
"""Entries of a node's metadata, each key and value at most `MAX_ID` characters: it travels in every heartbeat."""

MAX_BEAT_BYTES: Final = 65_536
"""Bytes of a heartbeat: 600 types with names of 60 characters, and the most partitions that one node can own, of the
work queue and of the event log. At 400 heartbeats a second, 26 MB/s at worst."""

MAX_INTERVAL_MS: Final = 60_000
"""The longest time between two heartbeats, in milliseconds."""

MAX_COUNT: Final = 2**53 - 1
"""The largest number in a head or a frame: what a double holds exactly, so that any language can write it."""


class Kind(IntEnum):
    """What a payload carries. A receiver ignores and counts kinds that it does not know."""

    MESSAGES = 0
    ANSWERS = 1
    ACCEPTED = 2
    CANCEL = 3
    STATUS = 4
    HEARTBEAT = 5
    NOTICES = 6
    LETTER = 7
    """A dead letter: stored, never sent to a node."""


class Status(IntEnum):
    """How an answer frame ends its message. The body of all but OK is `[code, message, details, retryable]`."""

    OK = 0
    REFUSED = 1
    FAILED = 2
    BUSY = 3
    EXPIRED = 4
    INVALID = 5
    LOST = 6
    """Answers a status query: the node does not know the message, or no longer."""


_Meta = msgspec.Meta
_Id = Annotated[str, _Meta(min_length=1, max_length=MAX_ID)]
_Count = Annotated[int, _Meta(ge=0, le=MAX_COUNT)]
# Checked by the decoder: 8 nanoseconds per frame (measured, msgspec 0.22), where a line of Python would take 50.


class Head(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Who sent a batch, where its answers go, and which batch it is."""

    sender: Annotated[str, _Meta(max_length=MAX_ID)]
    reply: Annotated[str, _Meta(max_length=MAX_REPLY)] | None = None
    number: _Count = 0
    handler_us: _Count = 0
    """Answers only: mean time in the handler of what is answered here, in microseconds; sets the caller's grain."""


class MessageFrame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message in a batch."""

    id: _Id
    type: Annotated[str, _Meta(min_length=1, max_length=MAX_TYPE)]
    key: str | None
    remaining_ms: _Count | None
    """Time left until the caller's deadline when the frame was written; requests only."""

    attempt: Annotated[int, _Meta(ge=1, le=MAX_COUNT)]
    """The first is 1."""

    trace: Annotated[str, _Meta(max_length=MAX_ID)] | None
    """W3C `traceparent`."""

    body: msgspec.Raw


class AnswerFrame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The answer to one message."""

    id: _Id
    status: Annotated[int, _Meta(ge=0, le=MAX_COUNT)]
    """One of `Status`; a receiver takes one that it does not know as FAILED."""

    body: msgspec.Raw
    node: Annotated[str, _Meta(max_length=MAX_ID)]


class MessageBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A payload of kind MESSAGES."""

    kind: int
    head: Head
    frames: Annotated[list[MessageFrame], _Meta(max_length=MAX_FRAMES)]


class AnswerBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A payload of kind ANSWERS."""

    kind: int
    head: Head
    frames: Annotated[list[AnswerFrame], _Meta(max_length=MAX_FRAMES)]


class IdBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A payload of kind ACCEPTED, CANCEL or STATUS: its frames are message ids."""

    kind: int
    head: Head
    frames: Annotated[list[_Id], _Meta(max_length=MAX_FRAMES)]


_Name = Annotated[str, _Meta(min_length=1, max_length=MAX_ID)]
_Text = Annotated[str, _Meta(max_length=MAX_ID)]
_TypeName = Annotated[str, _Meta(min_length=1, max_length=MAX_TYPE)]
_Share = Annotated[float, _Meta(ge=0.0, le=float(MAX_COUNT))]


class BeatLoad(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How busy a node is."""

    in_flight: _Count = 0
    intake: _Count = 0
    handled: _Count = 0
    cpu: _Share = 0.0
    memory_bytes: _Count = 0


class Beat(msgspec.Struct, array_like=True, frozen=True):
    """What a node says of itself.

    The first nine fields, `commands`, `events`, `store` and `partition_count` stay the same from its start to its end.
    What follows `interval_ms` may be left off: it was added later, and always at the end.
    """

    id: _Name
    service: _Name
    version: _Text
    incarnation: tuple[_Count, _Count]
    """A number and random bits: no other start of a node with this id has the same."""

    types: Annotated[list[_TypeName], _Meta(max_length=MAX_TYPES)]
    """Request types that it handles."""

    wire_versions: Annotated[list[_Count], _Meta(max_length=16)]
    region: _Text | None
    zone: _Text | None
    metadata: Annotated[dict[_Text, _Text], _Meta(max_length=MAX_METADATA)]
    seq: _Count
    """Counts the beats of an incarnation, answers to pings included."""

    status: _Text
    """`online`, `draining` or `left`; one that is not known means online."""

    is_ready: bool
    interval_ms: Annotated[int, _Meta(ge=1, le=MAX_INTERVAL_MS)]
    """When the next one is due. At most a minute, so that no beat makes a node live for ever."""

    stall_ms: _Count = 0
    """How late its event loop is."""

    load: BeatLoad = BeatLoad()
    partitions: Annotated[dict[_Count, _Count], _Meta(max_length=MAX_FRAMES)] = {}
    """Owned partitions of the work queue, each with its epoch."""

    utc_ms: _Count = 0
    """The sender's wall clock, in milliseconds since 1970: for comparing clocks, never for deciding."""

    breakers: Annotated[list[_TypeName], _Meta(max_length=MAX_TYPES)] = []
    """Open circuit breakers."""

    commands: Annotated[list[_TypeName], _Meta(max_length=MAX_TYPES)] = []
    """Command types that it handles."""

    events: Annotated[list[_TypeName], _Meta(max_length=MAX_TYPES)] = []
    """Types of durable events that it handles."""

    event_partitions: Annotated[dict[_Count, _Count], _Meta(max_length=MAX_FRAMES)] = {}
    """Owned partitions of the event log, each with its epoch."""

    store: _Text = ""
    """Id of the store of its inbox; empty without one."""

    partition_count: _Count = 0
    """Partitions of its service's work queue; 0 if it keeps none."""


class BeatBatch(msgspec.Struct, array_like=True, frozen=True):
    """A payload of kind HEARTBEAT; one without frames is a ping."""

    kind: int
    head: Head
    frames: Annotated[list[Beat], _Meta(max_length=1)]


class NoticeVerb(StrEnum):
    """What a node tells another one about partitions; nothing is believed that the owners' bucket does not confirm."""

    ASK = "ask"
    """The sender should own them, and asks the owner for them."""

    GIVEN = "given"
    """The sender has released them: they may be claimed."""

    NOT_MINE = "not_mine"
    """The sender was asked for them and works on none of them: they may be claimed."""


class Notice(msgspec.Struct, array_like=True, frozen=True):
    """What a node tells another one about its partitions."""

    domain: _Text
    """`cmd` or `evt`."""

    verb: _Text
    partitions: Annotated[list[_Count], _Meta(max_length=MAX_FRAMES)]


class NoticeBatch(msgspec.Struct, array_like=True, frozen=True):
    """A payload of kind NOTICES."""

    kind: int
    head: Head
    frames: Annotated[list[Notice], _Meta(max_length=16)]


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """The body of an answer that is not OK."""

    code: str
    message: str = ""
    details: Any = None
    retryable: bool = False


_encode = msgspec.msgpack.Encoder().encode


def join_ids(kind: Kind, head: tuple[object, ...], ids: Sequence[str]) -> bytes:
    """Return a payload of kind ACCEPTED, CANCEL or STATUS.

    Args:
        kind: Which.
        head: The fields of `Head`, in order.
        ids: Message ids; at most `MAX_FRAMES`.
    """
    return PREFIX + _encode((kind, head, ids))


def join_batch(kind: Kind, head: tuple[object, ...], frames: Sequence[bytes]) -> bytes:
    """Put encoded frames together as one payload; the frames are copied once.

    Args:
        kind: What the frames are.
        head: The fields of `Head`, in order.
        frames: Each the MessagePack of one frame.
    """
    count = len(frames)
    if count < 16:
        counter = bytes((0x90 | count,))
    elif count < 65_536:
        counter = b"\xdc" + count.to_bytes(2, "big")
    else:
        counter = b"\xdd" + count.to_bytes(4, "big")
    return b"".join((PREFIX, b"\x93", bytes((kind,)), _encode(head), counter, *frames))


def join_notice(sender: str, notice: Notice) -> bytes:
    """Return what tells a node something about partitions."""
    return join_batch(Kind.NOTICES, (sender,), (_encode(notice),))


def ping_payload(sender: str) -> bytes:
    """Return what asks a node whether it lives: a heartbeat without frames."""
    return join_batch(Kind.HEARTBEAT, (sender,), ())


_PLAIN_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_PLAIN_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def token(name: str) -> str:
    """Return the subject token that stands for a name: total, injective, and plain names stay as they are.

    Every byte outside `[A-Za-z0-9_-]` becomes `=XX`; the empty name becomes `=`; what is then longer than
    64 characters becomes `=h` and 32 hexadecimal digits of BLAKE2b of the name.

    Example:
        >>> token("Quote"), token("a.b"), token(""), token("x" * 65)
        ('Quote', 'a=2Eb', '=', '=he7d347aafb04b4783db0f88621284c94')
    """
    if _PLAIN_TOKEN.match(name):
        return name
    if not name:
        return "="
    raw = name.encode("utf-8", "surrogatepass")
    text = "".join(chr(byte) if byte in _PLAIN_BYTES else f"={byte:02X}" for byte in raw)
    if len(text) <= MAX_TOKEN:
        return text
    return "=h" + blake2b(raw, digest_size=16).hexdigest()


class Names:
    """Every subject, queue group, stream and bucket of one namespace.

    Args:
        namespace: The first token of all names; `[A-Za-z0-9_-]`, at most 64 characters.

    Raises:
        ConfigurationError: The namespace is not one plain token.
    """

    def __init__(self, namespace: str = "catga") -> None:
        if not _PLAIN_TOKEN.match(namespace):
            raise ConfigurationError(
                f"namespace must be 1 to {MAX_TOKEN} of the characters A-Z a-z 0-9 _ -, got {namespace!r}"
            )
        self.namespace = namespace

    def request(self, type_name: str) -> str:
        """The subject of a request type."""
        return f"{self.namespace}.rpc.{token(type_name)}"

    def all_requests(self) -> str:
        """The subjects of all request types: for looking at, never for subscribing a handler."""
        return f"{self.namespace}.rpc.>"

    def node_request(self, service: str, node_id: str, type_name: str) -> str:
        """The subject of a request to one named node."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.rpc.{token(type_name)}"

    def node_requests(self, service: str, node_id: str) -> str:
        """The requests to one named node."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.rpc.*"

    def node_status(self, service: str, node_id: str) -> str:
        """The subject on which a node is asked what became of requests that it accepted."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.status"

    def node_cancel(self, service: str, node_id: str) -> str:
        """The subject on which a node is told of requests that it need not start."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.cancel"

    def node_results(self, service: str, node_id: str) -> str:
        """The subject on which a node is asked for the results of commands again, whose answers may be lost."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.results"

    def is_results(self, subject: str) -> bool:
        """Whether this is where a node is asked for the results of commands."""
        return subject.startswith(f"{self.namespace}.to.") and subject.endswith(".results")

    def node_ping(self, service: str, node_id: str) -> str:
        """Where one named node is asked whether it lives."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.ping"

    def is_ping(self, subject: str) -> bool:
        """Whether this is where a node, or all of them, are asked whether they live."""
        if subject == self.roll_call():
            return True
        return subject.startswith(f"{self.namespace}.to.") and subject.endswith(".ping")

    def heartbeat(self, node_id: str) -> str:
        """Where a node says that it lives."""
        return f"{self.namespace}.nodes.{token(node_id)}"

    def heartbeats(self) -> str:
        """Where all nodes say that they live."""
        return f"{self.namespace}.nodes.*"

    def roll_call(self) -> str:
        """Where all nodes are asked for a beat at once, each to the inbox of whoever asks.

        Who may say and hear heartbeats may use it, too; and no node has an empty id.
        """
        return self.heartbeat("")

    def tick(self, type_name: str) -> str:
        """The subject of an event that is not stored."""
        return f"{self.namespace}.tick.{token(type_name)}"

    def broadcast(self, type_name: str) -> str:
        """The subject of an event for every live node."""
        return f"{self.namespace}.all.{token(type_name)}"

    def node(self, service: str, node_id: str) -> str:
        """Whatever is sent to one named node: for permitting and looking at."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.>"

    def all_directed(self) -> str:
        """Whatever is sent to named nodes: for looking at."""
        return f"{self.namespace}.to.>"

    # -- stored ---------------------------------------------------------------------------------------------

    def command_stream(self, service: str) -> str:
        """The work queue of a service's commands."""
        return f"{self.namespace}-cmd-{token(service)}"

    def command(self, service: str, partition: int) -> str:
        """The subject of the commands of one partition, whatever their type: so order holds across types."""
        return f"{self.namespace}.cmd.{token(service)}.{partition}"

    def commands(self, service: str) -> str:
        """The subjects of all commands of a service: what its work queue stores."""
        return f"{self.namespace}.cmd.{token(service)}.*"

    def event_stream(self) -> str:
        """The log of durable events."""
        return f"{self.namespace}-evt"

    def event(self, type_name: str, partition: int) -> str:
        """The subject of a durable event of one type and partition."""
        return f"{self.namespace}.evt.{token(type_name)}.{partition}"

    def events_of(self, type_name: str) -> str:
        """The subjects of the durable events of one type, whatever their partition."""
        return f"{self.namespace}.evt.{token(type_name)}.*"

    def events(self) -> str:
        """The subjects of all durable events: what the log stores."""
        return f"{self.namespace}.evt.*.*"

    def dead_letter_stream(self, service: str) -> str:
        """The log of a service's dead letters."""
        return f"{self.namespace}-dlq-{token(service)}"

    def dead_letter(self, service: str, message_id: str, mark: str) -> str:
        """The subject of one dead letter: of its own, so that it is stored once, and found by its id.

        Args:
            service: That gave the message up.
            message_id: Of the message.
            mark: One token, which no other letter has.
        """
        return f"{self.namespace}.dlq.{token(service)}.{token(message_id)}.{mark}"

    def dead_letters_of(self, service: str, message_id: str) -> str:
        """The subjects of all dead letters of a service with one message id."""
        return f"{self.namespace}.dlq.{token(service)}.{token(message_id)}.*"

    def dead_letters(self, service: str) -> str:
        """The subjects of all dead letters of a service: what their log stores."""
        return f"{self.namespace}.dlq.{token(service)}.*.*"

    def schedule_stream(self, service: str) -> str:
        """The stream in which commands of a service wait for their time.

        It is not the work queue: nats-server has no delayed messages in a stream that refuses when it is full.
        """
        return f"{self.namespace}-at-{token(service)}"

    def due(self, service: str, partition: int) -> str:
        """Where the server puts a command whose time has come, for a node to move it to the work queue."""
        return f"{self.namespace}.due.{token(service)}.{partition}"

    def all_due(self, service: str) -> str:
        """Where all commands of a service lie whose time has come."""
        return f"{self.namespace}.due.{token(service)}.*"

    def schedule(self, service: str, schedule_id: str) -> str:
        """Where a command waits for its time: `catga.at.<service>.<id>`."""
        return f"{self.namespace}.at.{token(service)}.{token(schedule_id)}"

    def schedules(self, service: str) -> str:
        """Where all commands of a service wait for their time."""
        return f"{self.namespace}.at.{token(service)}.*"

    def owners_bucket(self) -> str:
        """The bucket that says who owns which partition."""
        return f"{self.namespace}-owners"

    def routes_bucket(self) -> str:
        """The bucket that says, for each type, which service handles it and how its keys are hashed."""
        return f"{self.namespace}-routes"

    def route_changes(self) -> str:
        """The subjects of all routes: for hearing of changes."""
        return f"$KV.{self.routes_bucket()}.*"

    def hand_over(self, service: str, node_id: str) -> str:
        """The subject on which a node is asked for its partitions."""
        return f"{self.namespace}.to.{token(service)}.{token(node_id)}.handover"

    def owns(self, subject: str) -> bool:
        """Whether a subject lies in this namespace."""
        return subject == self.namespace or subject.startswith(self.namespace + ".")


def owner_key(service: str, kind: str, partition: int) -> str:
    """The key in the owners' bucket of one partition.

    Args:
        service: Name of the service.
        kind: `cmd` for its work queue, `evt` for its position in the event log.
        partition: Counted from 0.
    """
    return f"{token(service)}.{kind}.{partition}"


def partition_consumer(service: str, partition: int, epoch: int, claim: int) -> str:
    """The consumer of one epoch of a partition: `<service>-p<partition>-e<epoch>-<claim>`.

    Args:
        service: Name of the service.
        partition: Counted from 0.
        epoch: Granted by the claim.
        claim: 32 bits that tell two claims of one epoch apart; 8 hexadecimal digits in the name.
    """
    return f"{token(service)}-p{partition}-e{epoch}-{claim:08x}"


def service_subjects(verb: str, service: str, node_id: str) -> tuple[str, str, str]:
    """The three subjects on which a node answers one verb of ADR-32: all, this service, this node.

    Args:
        verb: `PING`, `INFO` or `STATS`.
        service: Name of the service.
        node_id: Id of the node.
    """
    name, instance = token(service), token(node_id)
    return f"{SERVICE_API}.{verb}", f"{SERVICE_API}.{verb}.{name}", f"{SERVICE_API}.{verb}.{name}.{instance}"
