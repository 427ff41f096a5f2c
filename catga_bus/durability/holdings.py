"""Holdings: the partitions that a node keeps for its service, of the work queue and of the event log."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import msgspec

from catga_bus.clock import Clock, utc_now
from catga_bus.cluster.directory import Directory
from catga_bus.cluster.records import NodeInfo, NodeStatus
from catga_bus.codec import Gate, GateError
from catga_bus.partition.keeper import Keeper, KeeperStatistics
from catga_bus.partition.owners_bucket import OwnersBucket
from catga_bus.partition.planner import Peer, Planner
from catga_bus.partition.protocol import MayClaim, Party
from catga_bus.partition.records import Domain
from catga_bus.partition.table import Table, TableStatistics
from catga_bus.partition.work import Keeping, Work
from catga_bus.rarely import RareLog
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.jetstream import JetStream
from catga_bus.wire import Kind, Names, Notice, join_notice

log = logging.getLogger("catga_bus.durability")


class PartitionStatistics(msgspec.Struct, frozen=True):
    """The partitions of one domain in this node."""

    table: TableStatistics
    keepers: KeeperStatistics


class Employ(Protocol):
    """Makes what is done with the records of one partition."""

    def __call__(self, keeping: Keeping, domain: Domain, partition: int, unknown: Callable[[str], bool]) -> Work:
        """Return it.

        Args:
            keeping: The keeper of the partition.
            domain: Of the partition.
            partition: Which.
            unknown: Told of a type that this node does not handle; returns whether another one does.
        """
        ...


class Holdings:
    """The partitions of a node.

    Args:
        transport: The connection.
        jetstream: The streams.
        gate: Lets notices in.
        names: Subjects, streams and buckets.
        directory: The nodes.
        service: The service that the node belongs to.
        node_id: The id of the node.
        employ: Makes the work of a partition.
        needed: Returns the command types that an owner should know.
        timeout: Seconds of silence after which an owner of whom nobody has heard is dead.
        look: Looks whether the process was paused, and tells of it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        transport: Transport,
        jetstream: JetStream,
        gate: Gate,
        names: Names,
        directory: Directory,
        *,
        service: str,
        node_id: str,
        employ: Employ,
        needed: Callable[[], Collection[str]],
        timeout: float,
        look: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._jetstream = jetstream
        self._gate = gate
        self._names = names
        self._directory = directory
        self._service = service
        self._me = node_id
        self._employ = employ
        self._needed = needed
        self._timeout = timeout
        self._look = look
        self._clock = clock
        self._log = RareLog(log, clock)
        self._tables: dict[str, Table] = {}
        self._counts: dict[str, KeeperStatistics] = {}
        self._subscription: Subscription | None = None

    # -- life ------------------------------------------------------------------------------------------------

    def add(self, domain: Domain, partitions: int, *, replicas: int) -> None:
        """Take part in a domain.

        Args:
            domain: Which.
            partitions: P.
            replicas: Of the owners' bucket, should it have to be made again.
        """
        me = self._me
        owners = OwnersBucket(self._jetstream, self._names, replicas=replicas)
        counts = self._counts[domain.kind] = KeeperStatistics()

        def keep(partition: int, may_claim: MayClaim, on_change: Callable[[], None]) -> Keeper:
            return Keeper(
                self._jetstream,
                owners,
                domain,
                partition,
                Party(me, self._incarnation(), _nonce, _first_sequence),
                lambda keeping: self._employ(keeping, domain, partition, self._on_unknown),
                clock=self._clock,
                may_claim=may_claim,
                on_change=on_change,
                look=self._look,
                statistics=counts,
            )

        self._tables[domain.kind] = Table(
            domain.kind,
            Planner(partitions, me, self._incarnation, self._timeout),
            me,
            self._incarnation,
            peers=lambda: self._peers(is_log=domain.is_log),
            routed=lambda: self._routed(is_log=domain.is_log),
            read_all=lambda: owners.read_all(domain),
            read=lambda partition: owners.read_one(domain, partition),
            keep=keep,
            tell=self._tell,
            clock=self._clock,
        )

    async def start(self) -> None:
        """Hear what other nodes tell, and begin to claim."""
        self._subscription = await self._transport.subscribe(
            self._names.hand_over(self._service, self._me), self._on_notices
        )
        self._directory.on_dead.append(self._on_dead)
        for table in self._tables.values():
            table.start()

    async def leave(self) -> None:
        """Finish what has begun, and give all partitions away."""
        await asyncio.gather(*(table.leave() for table in self._tables.values()))

    async def close(self) -> None:
        """End everything; what is owned is found by the others."""
        for table in self._tables.values():
            await table.close()
        if self._subscription is not None:
            await self._subscription.close()

    def statistics(self) -> dict[str, PartitionStatistics]:
        """Return the counts so far, by domain."""
        return {
            kind: PartitionStatistics(table.statistics(), self._counts[kind]) for kind, table in self._tables.items()
        }

    def epochs(self, kind: str) -> Mapping[int, int]:
        """Return the partitions that this node works on, each with its epoch: for its heartbeats."""
        table = self._tables.get(kind)
        return {} if table is None else table.epochs()

    # -- what happens ----------------------------------------------------------------------------------------

    def disconnected(self) -> None:
        """The connection was lost."""
        for table in self._tables.values():
            table.disconnected()

    def reconnected(self) -> None:
        """The connection is back."""
        for table in self._tables.values():
            table.reconnected()

    def paused(self) -> None:
        """The process stood still: nothing starts before its partitions are known to be still its own."""
        for table in self._tables.values():
            table.suspend()

    def wake(self) -> None:
        """A node has come, gone, or announced something else."""
        for table in self._tables.values():
            table.wake()

    def _on_dead(self, info: NodeInfo) -> None:
        if info.service == self._service:
            for table in self._tables.values():
                table.departed(info.id)

    def _on_unknown(self, type_name: str) -> bool:
        """A message of a type is here that this node does not handle; return whether another one will."""
        others = [info for info in self._members() if info.id != self._me and may_own(info)]
        is_known = any(type_name in (*info.commands, *info.events) for info in others)
        for table in self._tables.values():
            table.wake()
        return is_known

    def _on_notices(self, _: str, payload: bytes, __: str, ___: Mapping[str, str] | None) -> None:
        try:
            if self._gate.kind(payload) != Kind.NOTICES:
                return
            batch = self._gate.notices(payload)
        except GateError as error:
            self._log.warn("gate", "a notice was not let in: %s", error)
            return
        for notice in batch.frames:
            table = self._tables.get(notice.domain)
            if table is not None:
                table.on_notice(batch.head.sender, notice)

    def _tell(self, node: str, notice: Notice) -> None:
        if self._transport.is_connected:
            self._transport.publish(self._names.hand_over(self._service, node), join_notice(self._me, notice))

    # -- who is there ----------------------------------------------------------------------------------------

    def _incarnation(self) -> tuple[int, int]:
        return self._directory.own.incarnation

    def _members(self) -> list[NodeInfo]:
        return self._directory.members(self._service)

    def _peers(self, *, is_log: bool) -> Sequence[Peer]:
        return [
            Peer(
                id=info.id,
                incarnation=info.incarnation,
                is_live=info.status is not NodeStatus.FAULTED,
                is_draining=info.status is NodeStatus.DRAINING,
                epochs=info.event_partitions if is_log else info.partitions,
                types=frozenset(_types(info, is_log=is_log)),
            )
            for info in self._members()
        ]

    def _routed(self, *, is_log: bool) -> frozenset[str]:
        """The types that an owner should know: those that may be stored and that some live node handles."""
        if not is_log:
            return frozenset(self._needed())
        return frozenset[str]().union(*(info.events for info in self._members() if may_own(info)))


def _types(info: NodeInfo, *, is_log: bool) -> tuple[str, ...]:
    """Return the types that may lie in a domain and that a node handles; events may lie in the work queue, too."""
    return info.events if is_log else (*info.commands, *info.events)


def may_own(info: NodeInfo) -> bool:
    """Whether a node lives and stays."""
    return info.status not in (NodeStatus.FAULTED, NodeStatus.DRAINING, NodeStatus.LEFT)


def _nonce() -> str:
    return secrets.token_hex(8)


def _first_sequence() -> int:
    return int(utc_now().timestamp() * 1000)
