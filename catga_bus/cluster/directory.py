"""Directory: the view of the nodes. It runs the detector, and answers who lives, who may be asked, and what changed."""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar
from weakref import WeakSet

import msgspec

from catga_bus.clock import Clock
from catga_bus.cluster.beats import Identity, Report
from catga_bus.cluster.claim import SILENT_STRIDE, Claim
from catga_bus.cluster.detector import Detector, Probe, Step
from catga_bus.cluster.discovery import NodeDiscovery
from catga_bus.cluster.hearing import Hearing
from catga_bus.cluster.records import (
    ChangeKind,
    ClusterStatistics,
    Incarnation,
    NodeChange,
    NodeInfo,
    NodeStatus,
)
from catga_bus.cluster.watching import Watcher
from catga_bus.errors import ConfigurationError
from catga_bus.rarely import RareLog

MAX_BEATS_PER_SECOND = 400
"""Beats that a node hears at most: intervals grow with the number of nodes. At 80 microseconds each, with the wake-up
of the loop, 3 % of a core (`python -m benchmarks heartbeats`); 100 nodes keep the default interval of 0.25 s, 200 beat
every 0.5 s. A server carries this many for each node."""

TICKS_PER_INTERVAL = 5
"""How often silence is looked at: a death is found a twentieth of a second late at most, with the default interval."""

MAX_SHOWN = 10
"""Ids in a text for people."""

MAX_DOUBTFUL = 8
"""Nodes that `doubtful` names at most."""

T = TypeVar("T")

_log = logging.getLogger("catga_bus.cluster")

Address = tuple[str, str]


class Owners(NamedTuple):
    """Who owns what of a service's work queue."""

    partitions: int
    """Partitions that there are; 0 if nobody owns any."""

    by_partition: Mapping[int, Address]


class Directory:
    """The nodes that this one knows.

    Args:
        discovery: Hears and is heard of.
        identity: Who this node is.
        report: Returns how this node is.
        clock: Monotonic seconds.
        rng: Draws the nodes that `pick` compares.
        interval: Seconds between beats.
        timeout: Seconds of silence after which a node is dead.

    Attributes:
        troubled: Names of request types of which some node is not to be trusted; see `requests.peers.Peers`.
        on_self: Called with the time from beat to beat whenever this node has heard itself.
        on_dead: Called with what was known of each node that died, left or was replaced.
        on_change: Called with each change.
        on_replaced: Called when another live process has taken the id of this node, which was ready.
    """

    def __init__(
        self,
        discovery: NodeDiscovery,
        identity: Identity,
        report: Callable[[], Report],
        *,
        clock: Clock,
        rng: random.Random,
        interval: float,
        timeout: float,
    ) -> None:
        self.troubled: Collection[str] = frozenset()
        self.on_self: list[Callable[[float], None]] = []
        self.on_dead: list[Callable[[NodeInfo], None]] = []
        self.on_change: list[Callable[[NodeChange], None]] = []
        self.on_replaced: list[Callable[[], None]] = []
        self._discovery = discovery
        self._identity = identity
        self._report = report
        self._clock = clock
        self._random = rng.random
        self._least_interval = interval
        self._interval = interval
        self._detector = Detector(clock(), identity.id, timeout=timeout)
        self._detector.interval = interval
        self._timeout = timeout
        self._claim = Claim(timeout)
        self._hearing = Hearing()
        self._is_deaf = False
        self._ticked_at = clock()
        self._incarnation: Incarnation = (0, 0)
        self._highest = 0  # number of an incarnation of this id that was heard
        self._status = NodeStatus.ONLINE
        self._is_ready = self._is_replaced = False
        self._takers: dict[str, list[NodeInfo]] = {}  # by type; emptied when the view changes
        self._owners: dict[str, Owners] = {}  # the same
        self._watchers: WeakSet[Watcher] = WeakSet()
        self._missed = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._is_closed = False
        self._heard = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._rare_log = RareLog(_log, clock)

    # -- life ----------------------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Begin to hear of the others."""
        await self._discovery.start(self)
        self._ask_own_id()
        self._tick()

    async def join(self) -> None:
        """Be one of them, not ready yet: returns when the view is one interval old and this node has been heard.

        It takes the timeout longer if somebody has this id who does not answer.

        Raises:
            ConfigurationError: Another live node has this id.
            CatgaError: There is no connection to beat on.
        """
        await self._discovery.settle()
        await self.wait_for(lambda: self._detector.newcomers == 0 or None, _INTRODUCTION_SECONDS)
        await self._claim_id()
        number = self._highest + (1 if not self._claim.is_doubted else SILENT_STRIDE)
        self._incarnation = (number, secrets.randbits(_RANDOM_BITS))
        self._detector.announced(self._incarnation)
        await self._discovery.announce(self._identity, self._incarnation)
        try:
            async with asyncio.timeout(max(self._interval, _HEAR_SECONDS)):
                while self._detector.own is None:
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            _log.warning("%s does not hear its own heartbeats: it will find no other node dead", self._identity.id)
        # Of two that start at once at least the second to listen finds the other.
        for _ in range(_MOST_QUESTIONS):
            self._ask_own_id()
            await self._hear_answers()
            if not self._check_rival():
                break

    async def _claim_id(self) -> None:
        """Wait until nobody has this id: nobody is there, or who is there has been silent for the timeout.

        Raises:
            ConfigurationError: Somebody answers.
        """
        ask_at = self._clock() + _ASK_AGAIN
        while True:
            self._check_rival()
            now = self._clock()
            if self._claim.is_free(now):
                return
            if now >= ask_at:  # a question may be lost
                ask_at = now + _ASK_AGAIN
                self._ask_own_id()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _hear_answers(self) -> None:
        """Wait as long as an answer takes; within a process it is some turns of the event loop."""
        await asyncio.sleep(self._discovery.answer_seconds)
        for _ in range(_ANSWER_TURNS):
            await asyncio.sleep(0)

    def _ask_own_id(self) -> None:
        self._ask(Probe(self._identity.id, self._identity.service, _OWN_PROBE))

    def _ask(self, probe: Probe) -> None:
        if probe.node_id == self._identity.id:
            self._claim.asked(self._clock(), probe.service, probe.number)
        self._discovery.probe(probe)

    def _check_rival(self) -> bool:
        """Refuse to be a second node with an id: who is ready stays, of two that are starting the higher.

        Returns:
            Whether another one is starting, and is to give way.
        """
        rival, self._detector.rival = self._detector.rival, None
        if rival is None:
            return False
        if not rival.is_ready and rival.incarnation < self._incarnation:
            return True  # it finds the same, and gives way; if it has not seen this one, it will be ready
        number, bits = rival.incarnation
        raise ConfigurationError(
            f"node id {self._identity.id!r} is in use by a live node of service {rival.service!r}, version "
            f"{rival.version!r}, incarnation {number}-{bits:x}; stop that one, or choose another node_id"
        )

    def set_ready(self, *, is_ready: bool) -> None:
        """Say whether this node takes work, with a beat at once."""
        self._is_ready = is_ready
        self._discovery.report(self._present_report())
        self._discovery.tell(self._status)

    @property
    def is_replaced(self) -> bool:
        """Whether another live process has taken the id of this node, which was ready; from any thread."""
        return self._is_replaced

    def drain(self) -> None:
        """Say that this node takes no more work, with a beat at once."""
        self._status = NodeStatus.DRAINING
        self.set_ready(is_ready=False)

    async def close(self) -> None:
        """Leave; within a second."""
        self._is_closed = True
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        await self._discovery.close()
        for watcher in list(self._watchers):
            watcher.end()

    def disconnected(self) -> None:
        """The node's own connection was lost."""
        self._detector.disconnected(self._clock())
        self._hearing.start_over(self._discovery.sent)
        self._discovery.report(self._present_report())

    def reconnected(self) -> None:
        """The node's own connection is back."""
        self._detector.reconnected(self._clock())
        self._hearing.start_over(self._discovery.sent)
        self._discovery.report(self._present_report())

    def _present_report(self) -> Report:
        report = self._report()
        if self._is_ready and not self._is_deaf and self._detector.rival is None:
            return report
        return msgspec.structs.replace(report, is_ready=False)

    def _tick(self) -> None:
        now, pause = self._clock(), self._interval / TICKS_PER_INTERVAL
        self._timer = self._loop.call_later(pause, self._tick)
        elapsed, self._ticked_at = now - self._ticked_at, now
        self._hearing.tick(elapsed, pause, self._discovery.sent)
        if self._is_ready and elapsed >= self._timeout:
            self._ask_own_id()  # whoever was silent for so long may have lost its id
        self._listen_to_self()
        self._discovery.report(self._present_report())
        self._follow(self._detector.tick(now))

    def _listen_to_self(self) -> None:
        """Say at once that the connection brings nothing though it seems to be there, or that it does again."""
        is_deaf = self._hearing.is_deaf(self._interval)
        if is_deaf is self._is_deaf:
            return
        self._is_deaf = is_deaf
        if is_deaf:
            self._rare_log.warn(
                "deaf", "%s hears nothing on its connection: not ready until it does", self._identity.id
            )
        self._discovery.report(self._present_report())
        self._discovery.tell(self._status)

    # -- what is heard -------------------------------------------------------------------------------------

    def on_beat(self, info: NodeInfo, seq: int) -> None:
        """A beat was heard."""
        if info.id == self._identity.id:
            if info.incarnation == self._incarnation:
                self._hearing.heard(self._discovery.sent)
                self._listen_to_self()
                for told in self.on_self:
                    self._call(told, self._interval)
            else:
                self._highest = max(self._highest, info.incarnation[0])
        self._follow(self._detector.beat(self._clock(), info, seq), info.id)

    def on_answer(self, info: NodeInfo, seq: int, number: int) -> None:
        """A probe was answered."""
        had_rival = self._detector.rival is not None
        self._follow(self._detector.answered(self._clock(), info, seq, number), info.id)
        if self._is_ready and not had_rival and self._detector.rival is not None:
            self._replaced(info)

    def on_no_responders(self, node_id: str, number: int) -> None:
        """Nobody listens on a node's own subject."""
        if node_id == self._identity.id:
            self._claim.nobody(number)
        self._follow(self._detector.no_responders(self._clock(), node_id, number))

    def on_hint(self, node_id: str) -> None:
        """A node may be gone."""
        self._follow(self._detector.hint(self._clock(), node_id))

    def on_rejected(self, reason: str) -> None:
        """What was heard is no beat."""
        rejected = self._detector.rejected
        rejected[reason] = rejected.get(reason, 0) + 1

    def _replaced(self, rival: NodeInfo) -> None:
        """Another live process took this id while this one was not heard: the higher incarnation keeps it."""
        if not rival.is_ready or rival.incarnation < self._incarnation:
            self._detector.rival = None  # it will find out, and give way
            return
        _log.error(
            "node id %r was taken by another process (service %s, version %s, incarnation %d-%x): this node takes no "
            "more work; restart it, with an id of its own",
            *(rival.id, rival.service, rival.version, *rival.incarnation),
        )
        self._is_replaced = True
        self.set_ready(is_ready=False)
        for told in self.on_replaced:
            self._call(told)

    async def withdraw(self) -> None:
        """Leave the id to another one: beat no more, and answer no questions; within a second."""
        await self._discovery.withdraw()

    def _follow(self, step: Step, heard: str = "") -> None:
        for probe in step.probes:
            self._ask(probe)
        if heard and not self._heard.is_set():
            self._heard.set()
        if not step.changes:
            if heard:
                self._refresh(heard)
            return
        self._view_changed()
        for change in step.changes:
            self._tell(change)

    def _refresh(self, node_id: str) -> None:
        """Put the newest load of a node where `pick` looks, without looking at all others."""
        peer = self._detector.peers.get(node_id)
        info = peer.info if peer is not None else self._detector.own
        if info is None:
            return
        for type_name in info.types:
            takers = self._takers.get(type_name, _NOBODY)
            for place, taker in enumerate(takers):
                if taker.id == node_id:
                    takers[place] = info
                    break

    def _view_changed(self) -> None:
        self._takers.clear()
        self._owners.clear()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self.troubled = frozenset(
            type_name
            for peer in self._detector.peers.values()
            if _is_trouble(peer.info)
            for type_name in peer.info.types
        )
        live = sum(peer.info.status is not NodeStatus.FAULTED for peer in self._detector.peers.values()) + 1
        interval = max(self._least_interval, live / MAX_BEATS_PER_SECOND)
        if interval != self._interval:
            self._interval = self._detector.interval = interval
            self._discovery.set_interval(interval)

    def _tell(self, change: NodeChange) -> None:
        info = change.node
        if info is None:
            return
        if change.kind is ChangeKind.FAULTED:
            _log.warning("node %s of %s is dead%s", info.id, info.service, "" if info.evicted else ": no sign of life")
        elif change.kind in _LOGGED:
            self._rare_log.write(
                logging.INFO, f"{change.kind} {info.id}", "node %s of %s: %s", info.id, info.service, change.kind
            )
        is_over = change.kind in (ChangeKind.FAULTED, ChangeKind.LEFT) and info.id != self._identity.id
        for told in self.on_dead if is_over else ():
            self._call(told, info)
        for listener in self.on_change:
            self._call(listener, change)
        for watcher in list(self._watchers):
            before = watcher.total_missed
            watcher.push(change)
            self._missed += watcher.total_missed - before

    def _call(self, listener: Callable[..., None], *args: object) -> None:
        try:
            listener(*args)
        except Exception as error:  # a listener that fails must not keep the others from knowing
            self._rare_log.write(logging.ERROR, "listener", "a listener to the nodes raised", error=error)

    # -- what is asked -------------------------------------------------------------------------------------

    @property
    def own(self) -> NodeInfo:
        """This node, as others see it."""
        heard = self._detector.own
        if heard is not None:
            return heard
        one = self._identity
        return NodeInfo(
            id=one.id,
            service=one.service,
            version=one.version,
            incarnation=self._incarnation,
            status=self._status,
            is_ready=False,
            types=one.types,
            wire_versions=one.wire_versions,
            region=one.region,
            zone=one.zone,
            metadata=one.metadata,
            commands=one.commands,
            events=one.events,
            store=one.store,
            partition_count=one.partition_count,
            interval=self._interval,
            last_beat=self._clock(),
        )

    @property
    def interval(self) -> float:
        """Seconds between the beats of this node, at present."""
        return self._interval

    def nodes(self) -> list[NodeInfo]:
        """Return what is known, this node included, by service and id.

        A few that were heard and did not answer are among them as suspect; they are nowhere else in the view.
        """
        return sorted([*self._proven(), *self._detector.unproven], key=lambda info: (info.service, info.id))

    def _proven(self) -> list[NodeInfo]:
        return [self.own, *(peer.info for peer in self._detector.peers.values())]

    def members(self, service: str) -> list[NodeInfo]:
        """Return the nodes of a service, dead or alive, this one included; none that was only heard."""
        return [info for info in self._proven() if info.service == service]

    def get(self, node_id: str) -> NodeInfo | None:
        """Return a node that is known, dead or alive."""
        if node_id == self._identity.id:
            return self.own
        peer = self._detector.peers.get(node_id)
        return None if peer is None else peer.info

    async def wait_for(self, find: Callable[[], T | None], timeout: float) -> T | None:
        """Return what `find` finds, now or after one of the changes of the next `timeout` seconds; else None."""
        until = self._clock() + timeout
        while (found := find()) is None and not self._is_closed and (left := until - self._clock()) > 0.0:
            changed: asyncio.Future[None] = self._loop.create_future()
            self._waiting.add(changed)
            try:
                await asyncio.wait({changed}, timeout=left)
            finally:
                self._waiting.discard(changed)
        return found

    def describe(self, node_id: str) -> str:
        """Return what is known of a node that cannot be asked, for people."""
        info = self.get(node_id)
        if info is not None:
            silence = self._clock() - info.last_beat
            return f"node {node_id!r} of service {info.service!r} is {info.status}, last heard of {silence:.1f} s ago"
        departed = self._detector.departed.get(node_id)
        if departed is not None:
            return f"node {node_id!r} of service {departed[0]!r} has left"
        return f"node {node_id!r} is not known; {self.describe_live('')}"

    def describe_live(self, type_name: str) -> str:
        """Return which nodes are live, those that handle a type if one is given, for people."""
        live = [one for one in self.nodes() if one.status is NodeStatus.ONLINE]
        ids = [one.id for one in live if not type_name or type_name in one.types]
        what = f"live nodes that handle {type_name}" if type_name else "live nodes"
        shown = ", ".join(ids[:MAX_SHOWN]) + (f" and {len(ids) - MAX_SHOWN} more" if len(ids) > MAX_SHOWN else "")
        return f"{what}: {shown or 'none'}"

    def watch(self, max_pending: int) -> Watcher:
        """Return an iterator of changes that begins with the present state."""
        watcher = Watcher(self._proven, max_pending)
        self._watchers.add(watcher)
        return watcher

    def statistics(self) -> ClusterStatistics:
        """Return the counts so far."""
        detector = self._detector
        return ClusterStatistics(
            known=len(detector.peers) + 1,
            beats_sent=self._discovery.sent,
            beats_heard=detector.beats,
            rejected=dict(detector.rejected),
            probes=detector.probes,
            deaths=detector.deaths,
            recoveries=detector.recoveries,
            missed_changes=self._missed,
        )

    # -- what the request lane asks: see requests.peers.Peers ----------------------------------------------

    def pick(
        self, type_name: str, avoid: Collection[str] = (), choice: Callable[[NodeInfo], bool] | None = None
    ) -> Address | None:
        """Return the less loaded of two random nodes that are live, ready and handle a type."""
        takers = self._takers.get(type_name)
        if takers is None:
            takers = self._takers[type_name] = [info for info in self._proven() if _takes(info, type_name)]
        if avoid or choice is not None:
            takers = [one for one in takers if one.id not in avoid and (choice is None or choice(one))]
        count = len(takers)
        if not count:
            return None
        one = takers[int(self._random() * count)]
        if count > 1:
            other = takers[int(self._random() * count)]
            if other.load.intake < one.load.intake:
                one = other
        return one.service, one.id

    def owners(self, type_name: str) -> Owners:
        """Return the live, ready nodes that handle a request type, by the partition that each owns."""
        found = self._owners.get(type_name)
        if found is None:
            found = self._owners[type_name] = _owners_among(
                [info for info in self._proven() if _takes(info, type_name)]
            )
        return found

    def address(self, node_id: str) -> Address | None:
        """Return service and id of a node, dead or alive; None if it is not known."""
        info = self.get(node_id)
        if info is not None:
            return info.service, node_id
        departed = self._detector.departed.get(node_id)
        return None if departed is None else (departed[0], node_id)

    def doubtful(self, type_name: str) -> list[Address]:
        """Return the nodes not heard of lately that handle a type; while there are none, some that do."""
        handle = [peer.info for peer in self._detector.peers.values() if type_name in peer.info.types]
        # One that seemed evicted may have come back unseen, so without a better guess it is named, too.
        doubted = [info for info in handle if _is_trouble(info)] or handle
        return [(info.service, info.id) for info in doubted[:MAX_DOUBTFUL]]

    def is_stalled(self, node_id: str) -> bool:
        """Whether a node says that its event loop stands still."""
        peer = self._detector.peers.get(node_id)
        return peer is not None and peer.info.stall > 0.0

    def is_dead(self, node_id: str) -> bool:
        """Whether a node is known to be dead: faulted or left."""
        peer = self._detector.peers.get(node_id)
        if peer is not None:
            return peer.info.status is NodeStatus.FAULTED
        return self._detector.is_departed(node_id)


_RANDOM_BITS = 52  # with the sign they fit a double
_OWN_PROBE = 0
_ANSWER_TURNS = 20
_ASK_AGAIN = 0.25
_LOOK_SECONDS = 0.005  # the answer to a question takes one of them
_MOST_QUESTIONS = 20  # a second, in which another one that is starting gives way or is ready
_INTRODUCTION_SECONDS = 0.25  # in which those that were heard answer: a round trip, unless one of them is frozen
_NOBODY: list[NodeInfo] = []
_HEAR_SECONDS = 1.0  # a beat is heard within a millisecond, unless the machine is very busy
_LOGGED = (ChangeKind.JOINED, ChangeKind.RECOVERED, ChangeKind.DRAINING, ChangeKind.LEFT)


def _takes(info: NodeInfo, type_name: str) -> bool:
    return info.status is NodeStatus.ONLINE and info.is_ready and type_name in info.types


def _owners_among(nodes: Collection[NodeInfo]) -> Owners:
    """Return who owns what; of two that say so, the one with the higher epoch does."""
    best: dict[int, tuple[int, Address]] = {}
    for info in nodes:
        for partition, epoch in info.partitions.items():
            if partition not in best or epoch > best[partition][0]:
                best[partition] = (epoch, (info.service, info.id))
    count = max((info.partition_count for info in nodes), default=0)
    return Owners(count, {partition: address for partition, (_, address) in best.items()})


def _is_trouble(info: NodeInfo) -> bool:
    """Whether the queue group may hand requests to a node that will not answer them soon.

    One that is evicted gets none, and one that is draining answers or refuses what it gets.
    """
    if info.evicted or info.status is NodeStatus.DRAINING:
        return False
    return info.status is not NodeStatus.ONLINE or not info.is_ready
