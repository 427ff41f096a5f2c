"""What is known of a node, and how that changes."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from catga_bus.wire import Beat

Incarnation: TypeAlias = tuple[int, int]
"""One life of a node id: a number one above the highest seen for the id when it started, and random bits."""


class NodeStatus(StrEnum):
    """How a node stands in the view of this one."""

    ONLINE = "online"
    """It is heard of."""

    SUSPECT = "suspect"
    """It missed a beat and is being probed; nothing new is sent to it."""

    FAULTED = "faulted"
    """It is taken for dead: silent for `heartbeat_timeout`, or the server says twice that nobody is there."""

    DRAINING = "draining"
    """It finishes what it has and takes no more."""

    LEFT = "left"
    """It said good-bye."""


class NodeLoad(msgspec.Struct, frozen=True):
    """How busy a node was at its last beat."""

    in_flight: int = 0
    """Messages that handlers work on."""

    intake: int = 0
    """Messages admitted and not settled, those in flight included."""

    handled: int = 0
    """Messages settled since its start."""

    cpu: float = 0.0
    """Share of one core that its process used between the last two beats; above 1.0 with several threads."""

    memory_bytes: int = 0
    """Resident memory of its process; 0 where the system does not tell."""


_NOTHING: Final[Mapping[int, int]] = MappingProxyType({})
_NO_TEXTS: Final[Mapping[str, str]] = MappingProxyType({})


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A node as this one sees it: what its last beat said, and how it stands. A snapshot that never changes."""

    id: str
    service: str
    version: str
    incarnation: Incarnation
    status: NodeStatus
    is_ready: bool
    """Whether it takes work: it has its connection, its event loop keeps up, and it is neither starting nor draining.
    What it said itself; a node that is not online is not to be sent to either way."""

    types: tuple[str, ...] = ()
    """Request types that it handles."""

    commands: tuple[str, ...] = ()
    """Command types that it handles."""

    events: tuple[str, ...] = ()
    """Types of durable events that it handles."""

    wire_versions: tuple[int, ...] = ()
    load: NodeLoad = NodeLoad()
    stall: float = 0.0
    """Seconds that its event loop was late, at most, since the beat before."""

    partitions: Mapping[int, int] = _NOTHING
    """Partitions of its service's work queue that it owns, each with its epoch."""

    event_partitions: Mapping[int, int] = _NOTHING
    """Partitions of the event log that it owns for its service, each with its epoch."""

    store: str = ""
    """Id of the store of its inbox; empty without one."""

    partition_count: int = 0
    """Partitions of its service's work queue; 0 if it keeps none."""

    region: str | None = None
    zone: str | None = None
    metadata: Mapping[str, str] = _NO_TEXTS
    interval: float = 0.25
    """Seconds between its beats."""

    last_beat: float = 0.0
    """Instant at which it was last heard of, on the clock of this process (`time.monotonic`)."""

    clock_offset: float = 0.0
    """How far its wall clock is ahead of this process's, in seconds; too low by the time that
    the beat travelled."""

    breakers: tuple[str, ...] = ()
    """Its open circuit breakers."""

    evicted: bool = False
    """Whether the server said that nobody listens for it any more."""


class ChangeKind(StrEnum):
    """What happened to a node."""

    JOINED = "joined"
    UPDATED = "updated"
    """It became or ceased to be suspect or ready, or changed its partitions or breakers. Load alone is no change."""

    FAULTED = "faulted"
    RECOVERED = "recovered"
    DRAINING = "draining"
    LEFT = "left"
    """It said good-bye, was replaced by a new start with the same id, or was forgotten after it had been faulted."""

    MISSED = "missed"
    """The watcher was too slow: changes were left out, and the present state follows."""


class NodeChange(msgspec.Struct, frozen=True):
    """One change of the view."""

    kind: ChangeKind
    node: NodeInfo | None = None
    """The node after the change; None only if the kind is `missed`."""

    missed: int = 0
    """How many changes were left out; 0 unless the kind is `missed`."""


class ClusterStatistics(msgspec.Struct, frozen=True):
    """What a node has done to know the others; counts since its start."""

    known: int
    """Nodes in the view, this one included."""

    beats_sent: int
    beats_heard: int
    """Those that were believed, its own included."""

    rejected: dict[str, int]
    """Those that were not, by reason: malformed, forged, replayed, ancient, rival (of the id of this
    one), late (answers that nobody waits for any more), full (the view)."""

    probes: int
    deaths: int
    recoveries: int
    missed_changes: int
    """Changes that slow watchers were not told one by one."""


_SENT_STATUSES: Final = {str(status): status for status in (NodeStatus.DRAINING, NodeStatus.LEFT)}


def info_of(beat: Beat, now: float, utc_ms: int) -> NodeInfo:
    """Return what a beat says.

    Args:
        beat: The beat.
        now: When it was heard, on the monotonic clock.
        utc_ms: The same in milliseconds of the wall clock.
    """
    load = beat.load
    return NodeInfo(
        id=beat.id,
        service=beat.service,
        version=beat.version,
        incarnation=beat.incarnation,
        status=_SENT_STATUSES.get(beat.status, NodeStatus.ONLINE),
        is_ready=beat.is_ready,
        types=tuple(beat.types),
        wire_versions=tuple(beat.wire_versions),
        load=NodeLoad(load.in_flight, load.intake, load.handled, load.cpu, load.memory_bytes),
        stall=beat.stall_ms / 1000,
        commands=tuple(beat.commands),
        events=tuple(beat.events),
        partitions=MappingProxyType(beat.partitions) if beat.partitions else _NOTHING,
        event_partitions=MappingProxyType(beat.event_partitions) if beat.event_partitions else _NOTHING,
        store=beat.store,
        partition_count=beat.partition_count,
        region=beat.region,
        zone=beat.zone,
        metadata=MappingProxyType(beat.metadata) if beat.metadata else _NO_TEXTS,
        interval=beat.interval_ms / 1000,
        last_beat=now,
        clock_offset=(beat.utc_ms - utc_ms) / 1000 if beat.utc_ms else 0.0,
        breakers=tuple(beat.breakers),
    )
