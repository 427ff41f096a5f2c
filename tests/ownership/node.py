"""One life of a simulated node: the product's tables, keepers and clients, its heartbeats, its view of others."""

import itertools
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from catga_bus.partition.keeper import Keeper, KeeperStatistics
from catga_bus.partition.owners import Incarnation
from catga_bus.partition.owners_bucket import OwnersBucket
from catga_bus.partition.planner import Peer, Planner
from catga_bus.partition.protocol import Claimed, MayClaim, Party
from catga_bus.partition.records import Domain
from catga_bus.partition.table import Table
from catga_bus.partition.work import Keeping
from catga_bus.pulse import Pulse
from catga_bus.transport.nats_jetstream import NatsJetStream
from catga_bus.wire import Notice
from tests.ownership.network import EPOCH, Link, Network
from tests.ownership.process import Process
from tests.ownership.working import Habits, Work

BEAT = 0.25
TIMEOUT = 1.0
TYPES = frozenset({"Debit"})


class Beat(msgspec.Struct, frozen=True):
    """What a node says of itself."""

    node: str
    incarnation: Incarnation
    epochs: Mapping[str, Mapping[int, int]]
    """By kind of domain."""

    is_draining: bool = False
    has_left: bool = False


class Surroundings(Protocol):
    """What a node needs from the world."""

    now: float
    network: Network
    habits: Habits
    domains: tuple[Domain, ...]
    partitions: int

    def broadcast(self, sender: "Node", beat: Beat) -> None:
        """Carry a heartbeat to all others, if it arrives."""

    def tell(self, sender: "Node", target: str, notice: Notice) -> None:
        """Carry a notice, if it arrives."""

    def granted(self, node: "Node", keeper: Keeper, claimed: Claimed) -> None:
        """A keeper has been granted an epoch."""


class TellingKeeper(Keeper):
    """A keeper that tells of its grants."""

    node: "Node"
    domain: Domain

    def _grant(self, claimed: Claimed) -> None:
        super()._grant(claimed)
        self.node.world.granted(self.node, self, claimed)


class _Known(msgspec.Struct):
    beat: Beat
    heard_at: float
    is_live: bool = True


class Node:
    """One life of a node.

    Args:
        world: Around it.
        node_id: Its id.
        incarnation: Its life.
        process: Where it runs.
    """

    def __init__(self, world: Surroundings, node_id: str, incarnation: Incarnation, process: Process) -> None:
        self.world = world
        self.id = node_id
        self.incarnation = incarnation
        self.process = process
        self.link = Link(world.network, process)
        self.jetstream = NatsJetStream(self.link, self.clock)
        self.pulse = Pulse(self.clock, self._on_gap)
        self.is_draining = self.has_left = False
        self.works: list[Work] = []
        self.statistics = KeeperStatistics()
        self.tables = {domain.kind: self._table(domain) for domain in world.domains}
        self._known: dict[str, _Known] = {}
        self._nonces = itertools.count()

    def clock(self) -> float:
        """Its monotonic clock."""
        return self.world.now

    @property
    def name(self) -> str:
        """Of its process."""
        return self.process.name

    def _table(self, domain: Domain) -> Table:
        world = self.world
        owners = OwnersBucket(self.jetstream, domain.names)

        def work(keeping: Keeping) -> Work:
            made = Work(self.process, world.habits, keeping, self.look)
            self.works.append(made)
            return made

        def keep(partition: int, may_claim: MayClaim, on_change: Callable[[], None]) -> Keeper:
            keeper = TellingKeeper(
                self.jetstream,
                owners,
                domain,
                partition,
                Party(self.id, self.incarnation, self._nonce, lambda: int((EPOCH + world.now) * 1000)),
                work,
                clock=self.clock,
                may_claim=may_claim,
                on_change=on_change,
                look=self.look,
                statistics=self.statistics,
            )
            keeper.node, keeper.domain = self, domain
            return keeper

        return Table(
            domain.kind,
            Planner(world.partitions, self.id, lambda: self.incarnation, TIMEOUT),
            self.id,
            lambda: self.incarnation,
            peers=lambda: self._peers(domain.kind),
            routed=lambda: TYPES,
            read_all=lambda: owners.read_all(domain),
            read=lambda partition: owners.read_one(domain, partition),
            keep=keep,
            tell=lambda target, notice: world.tell(self, target, notice),
            clock=self.clock,
        )

    def _nonce(self) -> str:
        return f"{self.name}-{next(self._nonces)}"

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self.process.loop.call_soon(self._start)

    def _start(self) -> None:
        self.pulse.start()
        self._beat()
        for table in self.tables.values():
            table.start()

    async def leave(self) -> None:
        """Give everything away, say good-bye, end."""
        self.is_draining = True
        self.say()
        for table in self.tables.values():
            table.wake()
        for table in self.tables.values():
            await table.leave()
        self.has_left = True
        self.say()
        for table in self.tables.values():
            await table.close()
        self.process.kill()

    def look(self) -> None:
        """Look whether the process stood still."""
        if self.clock() > self.pulse.late_at:
            self.pulse.beat(self.clock())

    def _on_gap(self, gap: float) -> None:
        for known in self._known.values():
            known.heard_at = self.clock()  # it was this node that did not listen
        for table in self.tables.values():
            table.suspend()

    def disconnected(self) -> None:
        """The connection was lost."""
        self.jetstream.disconnected()
        for table in self.tables.values():
            table.disconnected()

    def reconnected(self) -> None:
        """It is back."""
        for known in self._known.values():
            known.heard_at = self.clock()
        for table in self.tables.values():
            table.reconnected()

    # -- others ----------------------------------------------------------------------------------------------

    def say(self) -> None:
        """Send a heartbeat."""
        if self.link.is_connected:
            epochs = {kind: table.epochs() for kind, table in self.tables.items()}
            self.world.broadcast(self, Beat(self.id, self.incarnation, epochs, self.is_draining, self.has_left))

    def _beat(self) -> None:
        self.say()
        self._find_dead()
        self.process.loop.call_later(BEAT, self._beat)

    def _find_dead(self) -> None:
        self.look()
        if not self.link.is_connected:
            return
        for node, known in self._known.items():
            if known.is_live and self.clock() - known.heard_at > TIMEOUT:
                known.is_live = False
                for table in self.tables.values():
                    table.departed(node)

    def heard(self, beat: Beat) -> None:
        """Another node says something of itself."""
        known = self._known.get(beat.node)
        if known is not None and beat.incarnation < known.beat.incarnation:
            return  # of a former life
        if beat.has_left:
            self._known.pop(beat.node, None)
            for table in self.tables.values():
                table.departed(beat.node)
            return
        is_news = known is None or not known.is_live or known.beat != beat
        self._known[beat.node] = _Known(beat, self.clock())
        if is_news:
            for table in self.tables.values():
                table.wake()

    def _peers(self, kind: str) -> list[Peer]:
        mine = Beat(self.id, self.incarnation, {kind: self.tables[kind].epochs()}, self.is_draining)
        all_known = [_Known(mine, 0.0), *self._known.values()]
        return [
            Peer(
                id=known.beat.node,
                incarnation=known.beat.incarnation,
                is_live=known.is_live,
                is_draining=known.beat.is_draining,
                epochs=known.beat.epochs.get(kind, {}),
                types=TYPES,
            )
            for known in all_known
        ]

    # -- what it owns ----------------------------------------------------------------------------------------

    def owns(self, kind: str) -> dict[int, int]:
        """The partitions that it works on, each with its epoch."""
        return self.tables[kind].epochs() if self.process.is_alive else {}
