"""Who lives: a state machine over (now, event). No clock, no connection, no randomness of its own.

Unreachable is not dead, busy is not dead, and a beat is a hint:

- A node that misses a beat is suspect, and is asked on its own subject. If it answers it is online again. If the
  server says that nobody listens there it is avoided at once, and dead when the server says so a second time.
- A node is dead after `timeout` seconds of silence. Silence is measured on a clock that goes only while this node
  hears its own beats (`ProvenClock`). While more than half of a view is silent, it is the view that is in doubt:
  each node is dead only when it has not answered a question asked since then.
- A node that is new, a dead one that goes on, a new start with a known id, a longer interval, a beat that is far ahead
  or behind and a good-bye are believed when the node's own subject says the same: an answer, or nobody there.
"""

import math
from typing import TypeVar

import msgspec

from catga_bus.cluster.allowance import Allowance
from catga_bus.cluster.newcomers import QUESTIONS_PER_SECOND, Newcomers
from catga_bus.cluster.proof import ProvenClock
from catga_bus.cluster.records import ChangeKind, Incarnation, NodeChange, NodeInfo, NodeStatus

K = TypeVar("K")
V = TypeVar("V")

MISSED_AFTER = 1.25
"""Intervals after which a beat counts as missed: the thread that sends it may be a quarter of an interval late."""

CONFIRM_AFTER = 0.2
"""Seconds until a second question when the server says that nobody listens: a connection that was lost comes back
after 0.1 s (`reconnect_delay`)."""

QUIET_AFTER_RECONNECT = 1.0
"""Seconds after an own reconnect in which nobody who is not there is missed: they come back at the same time."""

BACK_WITHIN = 2.5
"""Seconds after an own reconnect until a node that has not been heard since may be dead. The longest delay between two
attempts to come back is 2 s, and the server may have restarted for all alike."""

PROBE_AGAIN = 1.0
"""Seconds between questions to a dead node that the server has not evicted, and to one that beats again."""

TIMEOUT_INTERVALS = 4.0
"""A node that announces a long interval is given this many of them."""

FORGET_EVICTED = 60.0
"""Seconds for which a dead node stays in the view: long enough to be seen by people."""

FORGET_SILENT = 600.0
"""The same for one that the server has not evicted, which may still go on: it keeps its place in the view."""

REMEMBER_DEPARTED = 600.0
"""Seconds for which an incarnation that has left or was replaced cannot come back."""

MAX_JUMP = 1_000
"""Beats that may have been missed before one that is believed: one far ahead would make all true ones seem old."""

MAX_STRETCH = 1.5
"""How many times the interval of this node, which grows with the same cluster, another one may announce in passing."""

MAX_NODES = 10_000
"""Nodes in the view, and ids whose incarnations are remembered. A cluster is two hundred."""

MAX_VIEW_BYTES = 33_554_432
"""Memory for the view, in bytes, by estimate: 10,000 nodes of ten types each, or 200 with as many as fit a beat. A node
that does not fit is not taken in, and one that grows is taken without what has grown."""

_VIEW_OF_SEVERAL = 3
_LIVE = (NodeStatus.ONLINE, NodeStatus.SUSPECT, NodeStatus.DRAINING)


class Probe(msgspec.Struct, frozen=True):
    """A question to be asked on a node's own subject."""

    node_id: str
    service: str
    number: int
    """Comes back with the answer."""


class Step(msgspec.Struct, frozen=True):
    """What follows from an event."""

    changes: list[NodeChange]
    probes: list[Probe]


class Peer:
    """What the detector knows of one node.

    Attributes:
        info: Its last beat, with its present status.
        said: The status that it last gave itself.
        seq: Number of its last beat.
        heard: Instant of its last beat.
        heard_proven: The same on the proven clock.
        probe: Number of the question on its way, 0 if there is none.
        probe_sent: When it was asked, on the proven clock.
        probe_due: Not asked again before this instant.
        failed_since: Instant of the last question that nobody answered.
        unheard: How often the server has said in a row that nobody listens.
        is_leaving: It said good-bye, and is being asked.
        dead_since: When it was found dead.
        verify_due: Not asked before this instant because of a beat that is not believed.
        weight: Bytes of memory that it is counted with.
    """

    __slots__ = (
        "dead_since", "failed_since", "heard", "heard_proven", "info", "is_leaving", "probe", "probe_due",
        "probe_sent", "said", "seq", "unheard", "verify_due", "weight",
    )  # fmt: skip

    def __init__(self, info: NodeInfo, seq: int, now: float, proven: float) -> None:
        self.info = info
        self.said = info.status
        self.seq = seq
        self.heard = now
        self.heard_proven = proven
        self.probe = 0
        self.probe_sent = 0.0
        self.probe_due = -math.inf
        self.failed_since = -math.inf
        self.unheard = 0
        self.is_leaving = False
        self.dead_since = math.inf
        self.verify_due = -math.inf
        self.weight = _weight(info)


class Detector:
    """The view of the nodes, this one included.

    Events are its methods; each returns what follows. Instants are monotonic seconds and never go back.

    Args:
        now: The present instant.
        own_id: The id of this node.
        timeout: Seconds of silence after which a node is dead.

    Attributes:
        peers: What is known, by id, without this node.
        own: The last beat of this node that it heard, or None.
        rival: A live node with the id of this one, or None.
        rejected: How many beats were not believed, by reason.
        departed: Incarnations that cannot come back, by id: service and when each departed.
        probes: Questions asked so far.
        deaths: Nodes found dead so far.
        recoveries: Dead nodes that went on.
        interval: Seconds between the beats of this node; a quarter of the timeout until it is set.
    """

    def __init__(
        self,
        now: float,
        own_id: str,
        *,
        timeout: float,
        max_nodes: int = MAX_NODES,
        max_bytes: int = MAX_VIEW_BYTES,
    ) -> None:
        self.peers: dict[str, Peer] = {}
        self.own: NodeInfo | None = None
        self.rival: NodeInfo | None = None
        self.rejected: dict[str, int] = {}
        self.departed: dict[str, tuple[str, dict[Incarnation, float]]] = {}
        self.probes = self.deaths = self.recoveries = self.beats = 0
        self._own_id = own_id
        self._own_incarnation: Incarnation | None = None
        self._own_probe_due = -math.inf
        self._timeout = timeout
        self.interval = timeout / TIMEOUT_INTERVALS
        self._max_nodes = max_nodes
        self._max_bytes = max_bytes
        self._bytes = 0
        self._newcomers = Newcomers(now)
        self._verifications = Allowance(now, QUESTIONS_PER_SECOND)
        self._clock = ProvenClock(now)
        self._is_connected = True
        self._reconnected_at = -math.inf
        self._in_doubt_since = math.inf
        self._expiry_due = now + 1.0
        self._changes: list[NodeChange] = []
        self._probes: list[Probe] = []

    # -- events --------------------------------------------------------------------------------------------

    def announced(self, incarnation: Incarnation) -> None:
        """This node begins to beat."""
        self._own_incarnation = incarnation

    def beat(self, now: float, info: NodeInfo, seq: int) -> Step:
        """A beat was heard on the common subject."""
        if info.id == self._own_id:
            self._own_beat(now, info)
        else:
            self._others_beat(now, info, seq)
        return self._step()

    def answered(self, now: float, info: NodeInfo, seq: int, number: int) -> Step:
        """A node answered a question with a beat: that very incarnation lives."""
        if info.id == self._own_id:
            self._rival_answered(info)
            return self._step()
        peer = self.peers.get(info.id)
        is_newcomer = self._newcomers.answered(number, info)
        if peer is None and is_newcomer:
            self._join(now, info, seq)
        elif peer is None or peer.probe != number:
            self._reject("late")
        elif info.incarnation == peer.info.incarnation:
            peer.probe = 0
            self._alive(peer, now, info, seq)
        elif self._is_departed(info) or (peer.info.status in _LIVE and info.incarnation < peer.info.incarnation):
            self._reject("ancient")  # the one that was asked may answer as well
        else:
            self._replaced(peer, now, info, seq)
        return self._step()

    def no_responders(self, now: float, node_id: str, number: int) -> Step:
        """The server says that nobody listens on a node's own subject."""
        self._newcomers.failed(now, number, evicted=True)
        peer = self.peers.get(node_id)
        if peer is not None and peer.probe == number:
            peer.probe = 0
            self._nobody_there(peer, now)
        return self._step()

    def hint(self, now: float, node_id: str) -> Step:
        """Something says that a node may be gone: ask it, unless it is about to be asked for the second time.

        Of a node with two connections the server tells twice, within a millisecond and before either can be back.
        """
        peer = self.peers.get(node_id)
        is_quiet = now < self._reconnected_at + QUIET_AFTER_RECONNECT
        if peer is not None and peer.info.status in _LIVE and not peer.unheard and not is_quiet:
            self._ask(peer, now)
        return self._step()

    def disconnected(self, now: float) -> None:
        """The connection was lost: nothing is heard, and no question on its way will be answered."""
        self._is_connected = False
        self._clock.stop(now)
        self._newcomers.clear()
        for peer in self.peers.values():
            peer.probe = 0
            peer.unheard = 0

    def reconnected(self, now: float) -> None:
        """The connection is back."""
        self._is_connected = True
        self._reconnected_at = now
        self._in_doubt_since = math.inf

    def tick(self, now: float) -> Step:
        """Time has passed; call this several times in an interval."""
        if self._is_connected:
            self._newcomers.expire(now)
            self._ask_newcomers(now)
            proven = self._clock.read(now)
            is_proven = self._clock.is_proven(now)
            self._doubt(now, proven, is_proven=is_proven)
            for peer in list(self.peers.values()):
                if peer.info.status in _LIVE:
                    self._watch_live(peer, now, proven, is_proven=is_proven)
                else:
                    self._watch_dead(peer, now, proven, is_proven=is_proven)
        if now >= self._expiry_due:
            self._expiry_due = now + 1.0
            self._expire(now)
        return self._step()

    @property
    def newcomers(self) -> int:
        """How many that were heard have not been asked, or have not answered yet."""
        return len(self._newcomers)

    @property
    def unproven(self) -> list[NodeInfo]:
        """Those that were heard lately and did not answer: suspect, and in no other list."""
        return [info for info in self._newcomers.unproven if info.id not in self.peers]

    def timeout_of(self, info: NodeInfo) -> float:
        """Return after how many seconds of silence a node is dead."""
        return max(self._timeout, TIMEOUT_INTERVALS * info.interval)

    def is_departed(self, node_id: str) -> bool:
        """Whether every incarnation of an id that is known has departed."""
        return node_id not in self.peers and node_id in self.departed

    # -- this node -----------------------------------------------------------------------------------------

    def _own_beat(self, now: float, info: NodeInfo) -> None:
        if info.incarnation == self._own_incarnation:
            self.beats += 1
            self._clock.own_beat(now, min(info.interval, MAX_STRETCH * self.interval))  # it may be forged, too
            before, self.own = self.own, info
            if before is None or _differs(before, info):
                self._changes.append(NodeChange(_kind_of(before, info), info))
            return
        self._reject("rival")
        if now >= self._own_probe_due:  # it is real if it answers: anybody can write to the common subject
            self._own_probe_due = now + PROBE_AGAIN
            self._probe(info.id, info.service)

    def _rival_answered(self, info: NodeInfo) -> None:
        if info.incarnation != self._own_incarnation:
            self.rival = info

    # -- others --------------------------------------------------------------------------------------------

    def _others_beat(self, now: float, info: NodeInfo, seq: int) -> None:
        peer = self.peers.get(info.id)
        if peer is None:
            self._new(now, info)
        elif info.incarnation != peer.info.incarnation:
            self._other_incarnation(peer, now, info)
        elif reason := _doubt_of(peer, info, seq):
            self._reject(reason)
            self._verify(peer, now)
        elif info.status is NodeStatus.LEFT:
            peer.is_leaving = True
            self._ask(peer, now)
        elif peer.info.status is NodeStatus.FAULTED:
            self._ask_when_due(peer, now)
        elif seq > peer.seq + MAX_JUMP or MAX_STRETCH * self.interval < info.interval > peer.info.interval:
            self._verify(peer, now)
        else:
            self._alive(peer, now, info, seq)

    def _new(self, now: float, info: NodeInfo) -> None:
        """Ask a node that is not known: in the view is only who has answered."""
        if self._is_departed(info) or info.status is NodeStatus.LEFT:
            self._reject("ancient")
        elif self._is_full(_weight(info)):
            self._reject("full")
        else:
            if not self._newcomers.hear(info):
                self._reject("full")
            self._ask_newcomers(now)

    def _join(self, now: float, info: NodeInfo, seq: int) -> None:
        """Take in a node that has answered."""
        if self._is_departed(info) or info.status is NodeStatus.LEFT:
            self._reject("ancient")
        elif self._is_full(_weight(info)):
            self._reject("full")
        else:
            self.beats += 1
            self.peers[info.id] = peer = Peer(info, seq, now, self._clock.read(now))
            self._bytes += peer.weight
            self._tell(ChangeKind.JOINED, peer)

    def _is_full(self, weight: int) -> bool:
        return len(self.peers) >= self._max_nodes or self._bytes + weight > self._max_bytes

    def _other_incarnation(self, peer: Peer, now: float, info: NodeInfo) -> None:
        is_older = peer.info.status in _LIVE and info.incarnation < peer.info.incarnation
        if is_older or self._is_departed(info):
            self._reject("ancient")
        else:
            self._ask_when_due(peer, now)

    def _alive(self, peer: Peer, now: float, info: NodeInfo, seq: int) -> None:
        """Take a beat that is believed."""
        before = peer.info
        self.beats += 1
        peer.info = info = self._weighed(peer, info)
        peer.said = info.status
        peer.seq = seq
        peer.heard = now
        peer.heard_proven = self._clock.read(now)
        peer.unheard = 0
        peer.is_leaving = False
        if before.status is NodeStatus.FAULTED:
            peer.dead_since = math.inf
            self.recoveries += 1
            self._tell(ChangeKind.RECOVERED, peer)
        elif _differs(before, info):
            self._tell(_kind_of(before, info), peer)

    def _weighed(self, peer: Peer, info: NodeInfo) -> NodeInfo:
        """Count what a known node says now; what there is no room for is left out."""
        weight = _weight(info)
        if weight > peer.weight and self._bytes - peer.weight + weight > self._max_bytes:
            self._reject("full")
            known = peer.info
            info = msgspec.structs.replace(
                info,
                partitions=known.partitions,
                event_partitions=known.event_partitions,
                breakers=known.breakers,
            )
            weight = peer.weight
        self._bytes += weight - peer.weight
        peer.weight = weight
        return info

    def _replaced(self, peer: Peer, now: float, info: NodeInfo, seq: int) -> None:
        """A new start with the id of a node that is known: the old one is gone."""
        self._depart(peer, now)
        self._join(now, info, seq)

    def _depart(self, peer: Peer, now: float) -> None:
        self._remember(peer.info, now)
        self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        del self.peers[peer.info.id]
        self._bytes -= peer.weight
        peer.info = msgspec.structs.replace(peer.info, status=NodeStatus.LEFT)
        self._tell(ChangeKind.LEFT, peer)

    # -- questions -----------------------------------------------------------------------------------------

    def _ask(self, peer: Peer, now: float) -> None:
        """Ask a node whether it lives, unless a question is on its way."""
        if peer.probe or not self._is_connected:
            return
        peer.probe = self._probe(peer.info.id, peer.info.service)
        peer.probe_sent = self._clock.read(now)
        peer.probe_due = now + PROBE_AGAIN

    def _ask_when_due(self, peer: Peer, now: float) -> None:
        if now >= peer.probe_due:
            peer.probe = 0  # what was asked before is lost
            self._ask(peer, now)

    def _verify(self, peer: Peer, now: float) -> None:
        """Ask a node because of a beat that is not believed: its answer says how things are.

        Forged beats put no other question off, and make no storm of questions.
        """
        is_awaited = peer.probe and (peer.info.status is NodeStatus.SUSPECT or peer.is_leaving)
        if is_awaited or now < peer.verify_due or not self._verifications.take(now):
            return
        peer.verify_due = now + PROBE_AGAIN
        due, peer.probe = peer.probe_due, 0
        self._ask(peer, now)
        peer.probe_due = due

    def _ask_newcomers(self, now: float) -> None:
        while self._newcomers.take(now, self._probe):
            pass

    def _probe(self, node_id: str, service: str) -> int:
        self.probes += 1
        self._probes.append(Probe(node_id, service, self.probes))
        return self.probes

    def _nobody_there(self, peer: Peer, now: float) -> None:
        if peer.is_leaving:
            self._depart(peer, now)
            return
        if now < self._reconnected_at + QUIET_AFTER_RECONNECT:
            peer.probe_due = self._reconnected_at + QUIET_AFTER_RECONNECT
            return
        peer.unheard += 1
        if peer.info.status is NodeStatus.FAULTED:
            self._set(peer, NodeStatus.FAULTED, evicted=True)
        elif peer.unheard > 1 and self._may_be_dead(peer, now):
            self._die(peer, now, evicted=True)
        else:
            self._set(peer, NodeStatus.SUSPECT, evicted=True)
            peer.probe_due = now + CONFIRM_AFTER

    def _may_be_dead(self, peer: Peer, now: float) -> bool:
        return peer.heard >= self._reconnected_at or now >= self._reconnected_at + BACK_WITHIN

    def _no_answer(self, peer: Peer, now: float) -> None:
        peer.probe = 0
        peer.unheard = 0
        peer.failed_since = now
        if peer.is_leaving:
            self._depart(peer, now)
        elif peer.info.evicted:
            self._set(peer, peer.info.status, evicted=False)

    # -- time ----------------------------------------------------------------------------------------------

    def _doubt(self, now: float, proven: float, *, is_proven: bool) -> None:
        """See whether more than half of the view is silent: then it is the view that is in doubt."""
        live = silent = 0
        for peer in self.peers.values():
            if peer.info.status in _LIVE:
                live += 1
                silent += proven - peer.heard_proven >= MISSED_AFTER * peer.info.interval
        size = live + 1  # this node, which hears itself
        if is_proven and size >= _VIEW_OF_SEVERAL and 2 * silent > size:
            self._in_doubt_since = min(self._in_doubt_since, now)
        elif silent == 0:
            self._in_doubt_since = math.inf

    def _watch_live(self, peer: Peer, now: float, proven: float, *, is_proven: bool) -> None:
        silence = proven - peer.heard_proven
        timeout = self.timeout_of(peer.info)
        if peer.probe and proven - peer.probe_sent >= timeout:
            self._no_answer(peer, now)
        if peer.info.id not in self.peers or not is_proven:
            return
        if peer.info.status is not NodeStatus.SUSPECT:
            if silence >= MISSED_AFTER * peer.info.interval:
                self._set(peer, NodeStatus.SUSPECT, evicted=False)
                self._ask(peer, now)
        elif silence >= timeout and self._is_silence_death(peer, now):
            self._die(peer, now, evicted=peer.info.evicted)
        elif now >= peer.probe_due:
            self._ask(peer, now)

    def _is_silence_death(self, peer: Peer, now: float) -> bool:
        if not self._may_be_dead(peer, now):
            return False
        return self._in_doubt_since == math.inf or peer.failed_since > self._in_doubt_since

    def _watch_dead(self, peer: Peer, now: float, proven: float, *, is_proven: bool) -> None:
        if peer.probe and proven - peer.probe_sent >= self.timeout_of(peer.info):
            self._no_answer(peer, now)
        if peer.info.id in self.peers and is_proven and not peer.info.evicted and now >= peer.probe_due:
            self._ask(peer, now)

    def _die(self, peer: Peer, now: float, *, evicted: bool) -> None:
        peer.info = msgspec.structs.replace(peer.info, status=NodeStatus.FAULTED, evicted=evicted)
        peer.dead_since = now
        peer.probe_due = min(peer.probe_due, now + PROBE_AGAIN)
        self.deaths += 1
        self._tell(ChangeKind.FAULTED, peer)

    def _set(self, peer: Peer, status: NodeStatus, *, evicted: bool) -> None:
        if (peer.info.status, peer.info.evicted) != (status, evicted):
            peer.info = msgspec.structs.replace(peer.info, status=status, evicted=evicted)
            self._tell(ChangeKind.UPDATED, peer)

    def _expire(self, now: float) -> None:
        for peer in list(self.peers.values()):
            if now - peer.dead_since >= (FORGET_EVICTED if peer.info.evicted else FORGET_SILENT):
                self._drop(peer)
        for node_id, (_, incarnations) in list(self.departed.items()):
            for incarnation, departed in list(incarnations.items()):
                if now - departed >= REMEMBER_DEPARTED:
                    del incarnations[incarnation]
            if not incarnations:
                del self.departed[node_id]

    # -- the rest ------------------------------------------------------------------------------------------

    def _remember(self, info: NodeInfo, now: float) -> None:
        known = self.departed.pop(info.id, (info.service, {}))[1]
        known.pop(info.incarnation, None)
        known[info.incarnation] = now
        _shorten(known, _MAX_LIVES)
        self.departed[info.id] = (info.service, known)
        _shorten(self.departed, self._max_nodes)

    def _is_departed(self, info: NodeInfo) -> bool:
        return info.id in self.departed and info.incarnation in self.departed[info.id][1]

    def _reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def _tell(self, kind: ChangeKind, peer: Peer) -> None:
        self._changes.append(NodeChange(kind, peer.info))

    def _step(self) -> Step:
        if not self._changes and not self._probes:
            return _NOTHING
        step = Step(self._changes, self._probes)
        self._changes, self._probes = [], []
        return step


_MAX_LIVES = 16
# Incarnations remembered of one id: one that restarts more often in ten minutes has other troubles.

_NOTHING = Step([], [])


def _shorten(known: dict[K, V], most: int) -> None:
    """Forget what was learnt first."""
    while len(known) > most:
        del known[next(iter(known))]


def _kind_of(before: NodeInfo | None, after: NodeInfo) -> ChangeKind:
    if before is None:
        return ChangeKind.JOINED
    if after.status is NodeStatus.DRAINING and before.status is not NodeStatus.DRAINING:
        return ChangeKind.DRAINING
    return ChangeKind.UPDATED


def _differs(before: NodeInfo, after: NodeInfo) -> bool:
    """Whether something changed that a watcher is told of."""
    return (
        before.status is not after.status
        or before.is_ready is not after.is_ready
        or before.evicted is not after.evicted
        or before.partitions != after.partitions
        or before.event_partitions != after.event_partitions
        or before.breakers != after.breakers
        or before.types != after.types
        or before.commands != after.commands
        or before.events != after.events
        or before.store != after.store
        or before.version != after.version
    )


def _doubt_of(peer: Peer, info: NodeInfo, seq: int) -> str:
    """Return why a beat of a known incarnation is not believed; empty if it may be."""
    known = peer.info
    is_same = (
        info.types == known.types
        and info.commands == known.commands
        and info.events == known.events
        and info.store == known.store
        and info.partition_count == known.partition_count
        and info.service == known.service
        and info.version == known.version
        and info.zone == known.zone
        and info.region == known.region
        and info.metadata == known.metadata
    )  # from the start of a node to its end
    if not is_same:
        return "forged"
    return "replayed" if seq <= peer.seq else ""


def _weight(info: NodeInfo) -> int:
    """Estimate the bytes of memory that a node takes."""
    pairs = len(info.metadata) + len(info.partitions) + len(info.event_partitions)
    weight = _NODE_BYTES + 2 * pairs * _ENTRY_BYTES
    for names in (info.types, info.commands, info.events, info.breakers):
        if names:
            weight += len(names) * _ENTRY_BYTES + sum(map(len, names))
    for key, value in info.metadata.items():
        weight += len(key) + len(value)
    return weight


_NODE_BYTES = 2_000
_ENTRY_BYTES = 80
