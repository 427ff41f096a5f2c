"""Points in the life of a node process at which the rig may have it killed or frozen, and what it sees on the way.

A point is armed by a file, `<directory>/<node>.point`: the process that comes there takes the file away, writes down
that it was hit, and does it to itself. All of it hangs on seams of the bus: an inbox that tells what it is told, and a
keeper and a broker of partitions that tell what they do.

    run         a handler runs, and has written nothing
    commit      the handler has ended and its effects are written, not committed
    committed   its effects are committed, and it is not acknowledged
    burying     a message is given up, and its dead letter is not stored
    buried      the dead letter is stored, and the message is not acknowledged
    claimed     the compare-and-set of a claim is done, and its consumer is not made
    emptied     the consumer before is deleted, and the claim's own is not made
    made        the claim's consumer is made, and the claim is not confirmed
"""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from catga_bus.durability import durable, holdings
from catga_bus.durability.inbox.base import FencedError, Recorded
from catga_bus.durability.inbox.sql_inbox import SqlUnit
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.durability.letters.dead_letters import DeadLetters
from catga_bus.durability.letters.letters import DeadLetter
from catga_bus.effects import Fence
from catga_bus.partition import keeper
from catga_bus.partition.broker import Broker
from catga_bus.partition.keeper import Keeper
from catga_bus.partition.protocol import (
    Claimed,
    CreateConsumer,
    DeleteConsumer,
    Done,
    Operation,
    Outcome,
    Read,
    Write,
)
from catga_bus.transport.jetstream import PubAck
from tests.chaos.history import Recorder
from tests.chaos.stored.history import Hit, Kept, Owned
from tests.chaos.stored.messages import NodePlan

LEAVING = 0.02
"""Seconds that a process waits at its point: what it has written before has left it then."""


class Arming(msgspec.Struct, frozen=True):
    """What is to happen where."""

    point: str
    action: Literal["kill", "freeze"]
    prefix: str = ""
    """Of the operation, or the partition, with which the process comes there."""


def point_file(directory: Path, node: str) -> Path:
    """Return the file that arms a point of a node."""
    return directory / f"{node}.point"


class Points:
    """The points of one process, and what it tells of itself.

    Args:
        plan: Of the node.
        recorder: Of this process.

    Attributes:
        ops: The operations that are being executed here, by message id.
    """

    def __init__(self, plan: NodePlan, recorder: Recorder) -> None:
        self.plan = plan
        self.recorder = recorder
        self.ops: dict[str, str] = {}
        self._path = point_file(Path(plan.history), plan.node_id)

    async def reach(self, point: str, what: str) -> None:
        """Come to a point with something; returns at once if nothing is armed, and otherwise after the thaw if ever."""
        if not os.path.exists(self._path) or (arming := self._take(point, what)) is None:
            return
        await asyncio.sleep(LEAVING)
        one = self.plan
        self.recorder.write(Hit(self.recorder.clock(), one.node_id, os.getpid(), point, arming.action, what))
        os.kill(os.getpid(), signal.SIGKILL if arming.action == "kill" else signal.SIGSTOP)
        time.sleep(LEAVING)  # the whole process: no step more until the signal has reached every thread

    def _take(self, point: str, what: str) -> Arming | None:
        try:
            arming = msgspec.json.decode(self._path.read_bytes(), type=Arming)
            if arming.point != point or not what.startswith(arming.prefix):
                return None
            self._path.unlink()
        except FileNotFoundError:
            return None  # another one was faster
        return arming

    def kept(self, message_id: str, how: Any, fence: Fence | None = None) -> None:
        """Write down what the inbox said."""
        one = self.plan
        domain, partition, epoch = ("", -1, 0) if fence is None else (fence.domain, fence.partition, fence.epoch)
        self.recorder.write(
            Kept(
                self.recorder.clock(), message_id, one.service, one.node_id, os.getpid(), how, domain, partition, epoch
            )
        )

    def owned(self, domain: str, partition: int, epoch: int, step: Any, **rest: Any) -> None:
        """Write down a step of the ownership of a partition."""
        one = self.plan
        self.recorder.write(
            Owned(self.recorder.clock(), one.service, domain, partition, epoch, one.node_id, os.getpid(), step, **rest)
        )


class TellingInbox(SqliteInbox):
    """An inbox that writes down what it says, and has points."""

    def __init__(self, path: str, points: Points) -> None:
        super().__init__(path)
        self._points = points

    async def find_many(self, service: str, message_ids: Sequence[str]) -> dict[str, Recorded]:
        found = await super().find_many(service, message_ids)
        for message_id in found:
            self._points.kept(message_id, "known")
        return found

    def unit(self, service: str, message_id: str, fence: Fence) -> SqlUnit:
        unit = TellingUnit(self._open_writer(), service, message_id, fence)
        unit.points = self._points
        return unit


class TellingUnit(SqlUnit):
    """A unit of that inbox."""

    points: Points

    async def commit(self, result: Recorded) -> Recorded:
        points, message_id, fence = self.points, self._message_id, self._fence
        op = points.ops.pop(message_id, "")
        await points.reach("commit", op)
        try:
            recorded = await super().commit(result)
        except FencedError:
            points.kept(message_id, "fenced", fence)
            raise
        except Exception:
            points.kept(message_id, "failed", fence)
            raise
        points.kept(message_id, "committed" if recorded == result else "repeated", fence)
        await points.reach("committed", op)
        return recorded


def install(points: Points) -> None:
    """Let what this process does about its partitions and dead letters tell of itself."""

    class TellingBroker(Broker):
        read_at = 0.0

        async def perform(self, operation: Operation, patience: float | None = None) -> Outcome:
            if isinstance(operation, Read):
                self.read_at = points.recorder.clock()
            outcome = await super().perform(operation, patience)
            if isinstance(outcome, Done):
                await self._tell(operation, outcome.value)
            return outcome

        async def _tell(self, operation: Operation, value: Any) -> None:
            domain, partition = self._domain.kind, int(self._key.rpartition(".")[2])
            match operation:
                case Write(record) if record.state == "released":
                    points.owned(domain, partition, record.epoch, "released")
                case Write(record) if not record.last:
                    points.owned(domain, partition, max(record.epoch, value), "written")
                    await points.reach("claimed", f"{domain}.{partition}")
                case DeleteConsumer():
                    await points.reach("emptied", f"{domain}.{partition}")
                case CreateConsumer():
                    await points.reach("made", f"{domain}.{partition}")

    class TellingKeeper(Keeper):
        def _grant(self, claimed: Claimed) -> None:
            super()._grant(claimed)
            broker = self._broker
            assert isinstance(broker, TellingBroker)
            points.owned(
                self._domain.kind,
                self.partition,
                claimed.epoch,
                "granted",
                read_at=broker.read_at,
                takes_over=self._is_takeover,
                consumer=claimed.consumer,
            )

        async def hand_over(self, timeout: float | None = None) -> None:
            points.owned(self._domain.kind, self.partition, self.epoch, "draining")
            await super().hand_over(timeout)

    class TellingDeadLetters(DeadLetters):
        async def bury(self, letter: DeadLetter) -> PubAck:
            await points.reach("burying", letter.id)
            ack = await super().bury(letter)
            await points.reach("buried", letter.id)
            return ack

    for module, base, telling in (
        (keeper, Broker, TellingBroker),
        (holdings, Keeper, TellingKeeper),
        (durable, DeadLetters, TellingDeadLetters),
    ):
        assert getattr(module, base.__name__) is base  # otherwise nothing would be told, and nothing be waited for
        setattr(module, base.__name__, telling)
