"""A cluster in virtual time: detectors joined by a simulated server, links that break, loops that stall, processes that
freeze and die. One seed, one run."""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import msgspec

from catga_bus.cluster.detector import Detector, Step
from catga_bus.cluster.records import ChangeKind, NodeChange, NodeInfo, NodeStatus

INTERVAL = 0.25
TIMEOUT = 1.0
TICK = 0.05
LATENCY = (0.0002, 0.005)


def info(node_id: str, incarnation: tuple[int, int] = (1, 1), **fields: Any) -> NodeInfo:
    """What a beat of a node says, unless told otherwise."""
    facts: dict[str, Any] = {
        "service": "shop", "version": "1", "status": NodeStatus.ONLINE, "is_ready": True, "types": ("T",),
        "interval": INTERVAL,
    }  # fmt: skip
    return NodeInfo(id=node_id, incarnation=incarnation, **(facts | fields))


class SimulatedNode:
    """A process: a thread that beats, and a loop that listens."""

    def __init__(self, simulation: "Simulation", node_id: str, incarnation: tuple[int, int]) -> None:
        self.id = node_id
        self.incarnation = incarnation
        self.seq = 0
        self.is_alive = True
        self.status = NodeStatus.ONLINE
        self.hears = True  # its main connection is up
        self.beats = True  # that of its beats
        self.blocked_until = 0.0  # its loop runs nothing
        self.frozen_until = 0.0  # nor does its thread
        self.detector = Detector(simulation.now, node_id, timeout=TIMEOUT)
        self.detector.announced(incarnation)
        self.changes: list[tuple[float, NodeChange]] = []

    def said(self) -> tuple[NodeInfo, int]:
        """Its next beat."""
        self.seq += 1
        return info(self.id, self.incarnation, status=self.status), self.seq

    def told(self, kind: ChangeKind) -> list[tuple[float, str]]:
        """When it saw a kind of change, and of whom."""
        return [(at, change.node.id) for at, change in self.changes if change.kind is kind and change.node is not None]

    def statuses(self) -> dict[str, NodeStatus]:
        """The other nodes in its view."""
        return {node_id: peer.info.status for node_id, peer in self.detector.peers.items()}


class Simulation:
    """Nodes and a server.

    Args:
        seed: Of everything that is random.
        size: Nodes at the beginning: `n0`, `n1` and so on.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.nodes: dict[str, SimulatedNode] = {}
        self.recorded: list[tuple[NodeInfo, int]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for number in range(size):
            self.add(f"n{number}")

    def add(self, node_id: str, incarnation: tuple[int, int] | None = None) -> SimulatedNode:
        """Start a node; one with a known id takes the place of the old one."""
        node = SimulatedNode(self, node_id, incarnation or (1, self.rng.getrandbits(40)))
        self.nodes[node_id] = node
        self.at(self.now + self.rng.uniform(0.0, INTERVAL), lambda: self._beat(node))
        self.at(self.now + self.rng.uniform(0.0, TICK), lambda: self._tick(node))
        return node

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (when, next(self._order), event))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until

    # -- faults --------------------------------------------------------------------------------------------

    def kill(self, node: SimulatedNode) -> None:
        """End a process: the server sees both of its connections close."""
        node.is_alive = node.hears = node.beats = False

    def leave(self, node: SimulatedNode) -> None:
        """End a process that says good-bye."""
        node.status = NodeStatus.LEFT
        self.publish(node.said())
        self.kill(node)

    def stall(self, node: SimulatedNode, seconds: float) -> None:
        """Block a loop; its thread beats on."""
        node.blocked_until = max(node.blocked_until, self.now + seconds)

    def freeze(self, node: SimulatedNode, seconds: float) -> None:
        """Stop a process; its connections stay."""
        node.frozen_until = self.now + seconds
        self.stall(node, seconds)

    def cut(self, node: SimulatedNode) -> None:
        """Break both connections of a node."""
        node.hears = node.beats = False
        node.detector.disconnected(self.now)

    def mend(self, node: SimulatedNode, within: float) -> None:
        """Bring both back, each in its own time."""

        def main() -> None:
            if node.is_alive:
                node.hears = True
                node.detector.reconnected(self.now)

        def beats() -> None:
            node.beats = node.is_alive

        self.at(self.now + self.rng.uniform(0.0, within), main)
        self.at(self.now + self.rng.uniform(0.0, within), beats)

    # -- the wire ------------------------------------------------------------------------------------------

    def publish(self, beat: tuple[NodeInfo, int]) -> None:
        """Carry a beat to all who listen, whoever wrote it."""
        self.recorded.append(beat)
        for node in list(self.nodes.values()):
            if node.hears:
                self._deliver(node, lambda node=node: node.detector.beat(self.now, *self._stamped(beat)))

    def _stamped(self, beat: tuple[NodeInfo, int]) -> tuple[NodeInfo, int]:
        # A wall clock that jumps by an hour: it must decide nothing.
        offset = self.rng.choice((0.0, 3_600.0, -3_600.0))
        return msgspec.structs.replace(beat[0], last_beat=self.now, clock_offset=offset), beat[1]

    def _deliver(self, node: SimulatedNode, event: Callable[[], Step]) -> None:
        self.at(self.now + self.rng.uniform(*LATENCY), lambda: self._arrive(node, event))

    def _arrive(self, node: SimulatedNode, event: Callable[[], Step]) -> None:
        if not node.hears:
            return
        if self.now < node.blocked_until:  # it waits in the socket
            self.at(node.blocked_until, lambda: self._arrive(node, event))
            return
        self._follow(node, event())

    def _beat(self, node: SimulatedNode) -> None:
        if not node.is_alive:
            return
        if self.now < node.frozen_until:
            self.at(node.frozen_until, lambda: self._beat(node))
            return
        if node.beats:
            self.publish(node.said())
        self.at(self.now + INTERVAL, lambda: self._beat(node))

    def _tick(self, node: SimulatedNode) -> None:
        if not node.is_alive:
            return
        if self.now < node.blocked_until:
            self.at(node.blocked_until, lambda: self._tick(node))
            return
        self._follow(node, node.detector.tick(self.now))
        self.at(self.now + TICK, lambda: self._tick(node))

    def _follow(self, node: SimulatedNode, step: Step) -> None:
        node.changes += [(self.now, change) for change in step.changes]
        for probe in step.probes:
            if node.hears:
                self.at(
                    self.now + self.rng.uniform(*LATENCY),
                    lambda probe=probe: self._ask(node, probe.node_id, probe.number),
                )

    def _ask(self, node: SimulatedNode, target_id: str, number: int) -> None:
        target = self.nodes.get(target_id)
        if target is None or not target.beats:
            self._deliver(node, lambda: node.detector.no_responders(self.now, target_id, number))
        elif self.now < target.frozen_until:
            self.at(target.frozen_until, lambda: self._ask(node, target_id, number))
        else:
            beat = target.said()
            self._deliver(node, lambda: node.detector.answered(self.now, *self._stamped(beat), number))

    # -- what must hold ------------------------------------------------------------------------------------

    def deaths(self) -> list[tuple[float, str]]:
        """Every verdict of death so far, in any view."""
        return [one for node in self.nodes.values() for one in node.told(ChangeKind.FAULTED)]

    def assert_converged(self) -> None:
        """Every view holds every live node as online, and no other as such."""
        live = {node.id for node in self.nodes.values() if node.is_alive}
        for node in self.nodes.values():
            if node.is_alive:
                online = {one for one, status in node.statuses().items() if status is NodeStatus.ONLINE}
                assert online == live - {node.id}, (node.id, node.statuses())
