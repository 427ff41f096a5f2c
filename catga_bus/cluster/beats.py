"""A node's own words: who it is, how it is, and the bytes of its beats."""

from collections.abc import Mapping

import msgspec

from catga_bus.cluster.records import Incarnation, NodeLoad, NodeStatus
from catga_bus.errors import ConfigurationError
from catga_bus.wire import MAX_BEAT_BYTES, MAX_METADATA, MAX_TYPES, VERSION, BeatLoad, Kind, join_batch

_encode = msgspec.msgpack.Encoder().encode


class Identity(msgspec.Struct, frozen=True):
    """What a node is from its start to its end."""

    service: str
    id: str
    version: str
    metadata: Mapping[str, str]
    zone: str | None = None
    region: str | None = None
    types: tuple[str, ...] = ()
    """Request types that it handles."""

    wire_versions: tuple[int, ...] = (VERSION,)
    commands: tuple[str, ...] = ()
    """Command types that it handles."""

    events: tuple[str, ...] = ()
    """Types of durable events that it handles."""

    store: str = ""
    """Id of the store of its inbox; empty without one."""

    partition_count: int = 0
    """Partitions of its service's work queue; 0 if it keeps none."""


class Report(msgspec.Struct, frozen=True):
    """How a node is, as its event loop says; read by the thread that beats."""

    is_ready: bool = False
    in_flight: int = 0
    intake: int = 0
    handled: int = 0
    breakers: tuple[str, ...] = ()
    partitions: Mapping[int, int] = {}
    """Owned partitions of the work queue, each with its epoch."""

    event_partitions: Mapping[int, int] = {}
    """The same of the event log."""


class BeatWriter:
    """Writes the beats of one incarnation; what does not change is encoded once.

    Args:
        identity: Who beats.
        incarnation: Which life this is.

    Raises:
        ConfigurationError: The identity does not fit a beat; the text says what to shorten.
    """

    def __init__(self, identity: Identity, incarnation: Incarnation) -> None:
        one = identity
        fixed: tuple[object, ...] = (
            *(one.id, one.service, one.version, incarnation, one.types, one.wire_versions),
            *(one.region, one.zone, dict(one.metadata)),
        )
        self._first = b"".join((bytes((0xDC, 0, _FIELDS)), *map(_encode, fixed)))
        self._handled = _encode(one.commands) + _encode(one.events)
        self._last = _encode(one.store) + _encode(one.partition_count)
        self._sender = one.id
        self._seq = 0
        check_identity(identity)

    def write(
        self,
        status: NodeStatus,
        report: Report,
        *,
        is_ready: bool,
        interval: float,
        stall: float,
        load: NodeLoad,
        utc_ms: int,
    ) -> bytes:
        """Return the payload of the next beat."""
        self._seq += 1
        counts = BeatLoad(load.in_flight, load.intake, load.handled, round(load.cpu, 3), load.memory_bytes)
        moving = (
            *(self._seq, status, is_ready, max(1, round(interval * 1000)), round(stall * 1000), counts),
            *(report.partitions, utc_ms, report.breakers),
        )
        # In the order of `wire.Beat`, which has what was added later at its end, whether it moves or not.
        middle = _encode(moving)[1:]  # without the head of its own array
        frame = b"".join((self._first, middle, self._handled, _encode(report.event_partitions), self._last))
        return join_batch(Kind.HEARTBEAT, (self._sender,), (frame,))


_FIELDS = 23
_SPARE_BYTES = 28_672
# Of a beat, for what moves: a node alone may own 1,024 partitions twice over, each of 12 bytes at most; and breakers.


def check_identity(identity: Identity) -> None:
    """Refuse what does not fit a beat.

    Raises:
        ConfigurationError: Too much metadata, or too many types.
    """
    if len(identity.metadata) > MAX_METADATA:
        raise ConfigurationError(
            f"metadata must have at most {MAX_METADATA} entries, got {len(identity.metadata)}: it is in every heartbeat"
        )
    for kind, types in (("request", identity.types), ("command", identity.commands), ("event", identity.events)):
        if len(types) > MAX_TYPES:
            raise ConfigurationError(
                f"a node handles at most {MAX_TYPES:,} {kind} types, got {len(types):,}; make it two services"
            )
    size = len(_encode((identity.types, identity.commands, identity.events, dict(identity.metadata))))
    if size > MAX_BEAT_BYTES - _SPARE_BYTES:
        raise ConfigurationError(
            f"the names of the types and the metadata of node {identity.id!r} are {size:,} bytes, at most "
            f"{MAX_BEAT_BYTES - _SPARE_BYTES:,} fit a heartbeat; shorten them"
        )
