"""The detector under any order of events: what holds after each, found by Hypothesis."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from catga_bus.cluster.detector import Detector, Probe, Step
from catga_bus.cluster.records import ChangeKind, Incarnation, NodeStatus
from tests.cluster_simulation import TIMEOUT, info

IDS = st.sampled_from(["a", "b", "c", "d"])
LIVES = st.tuples(st.integers(0, 3), st.integers(0, 2))
STATUSES = st.sampled_from([NodeStatus.ONLINE, NodeStatus.DRAINING, NodeStatus.LEFT])
OWN = (1, 1)
MAX_NODES = 4


class DetectorMachine(RuleBasedStateMachine):
    """Anybody may say anything at any time; only a node's own subject decides."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        self.detector = Detector(self.now, "me", timeout=TIMEOUT, max_nodes=MAX_NODES)
        self.detector.announced(OWN)
        self.is_connected = True
        self.reconnected_at = -1.0
        self.view: dict[str, NodeStatus] = {}  # put together from the changes alone
        self.departed: dict[tuple[str, Incarnation], float] = {}
        self.asked: list[Probe] = []
        self.own_beat_at = -1_000.0

    def take(self, step: Step) -> None:
        for change in step.changes:
            node = change.node
            assert node is not None
            if node.id == "me":
                continue
            if change.kind is ChangeKind.JOINED:
                assert node.id not in self.view
                assert (node.id, node.incarnation) not in self.departed, "a dead incarnation returned"
            if change.kind is ChangeKind.FAULTED:
                assert self.is_connected, "a death was found without a connection"
                assert self.now >= self.reconnected_at + 1.0, "a death was found just after the connection came back"
                assert self.view[node.id] is NodeStatus.SUSPECT
            if change.kind is ChangeKind.RECOVERED:
                assert self.view[node.id] is NodeStatus.FAULTED
            if change.kind is ChangeKind.LEFT:
                if self.view.pop(node.id) is not NodeStatus.FAULTED or node.id in self.detector.departed:
                    self.departed[node.id, node.incarnation] = self.now
            else:
                self.view[node.id] = node.status
        self.asked = (self.asked + list(step.probes))[-50:]

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.1, 0.3, 1.0, 5.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.departed = {life: at for life, at in self.departed.items() if self.now - at < 600.0}
        self.take(self.detector.tick(self.now))

    @rule(count=st.integers(1, 12))
    def time_passes_with_own_beats(self, count: int) -> None:
        for _ in range(count):
            self.now += 0.25
            if self.is_connected:
                self.take(self.detector.beat(self.now, info("me", OWN), 1))
                self.own_beat_at = self.now
            self.departed = {life: at for life, at in self.departed.items() if self.now - at < 600.0}
            self.take(self.detector.tick(self.now))

    @rule(node_id=IDS, life=LIVES, seq=st.integers(0, 50), status=STATUSES)
    def somebody_beats(self, node_id: str, life: Incarnation, seq: int, status: NodeStatus) -> None:
        before = self.detector.peers.get(node_id)
        known = None if before is None else before.info.incarnation
        self.take(self.detector.beat(self.now, info(node_id, life, status=status), seq))
        after = self.detector.peers.get(node_id)
        if known is not None:  # a beat alone never removes a node, nor changes which life of it is believed
            assert after is not None
            assert after.info.incarnation == known

    @rule(life=LIVES)
    def somebody_has_our_id(self, life: Incarnation) -> None:
        self.take(self.detector.beat(self.now, info("me", life), 1))
        assert self.detector.rival is None

    @rule(index=st.integers(0, 49), life=LIVES, seq=st.integers(0, 50), status=STATUSES)
    def somebody_answers(self, index: int, life: Incarnation, seq: int, status: NodeStatus) -> None:
        if self.asked and self.is_connected:
            probe = self.asked[-1 - index % len(self.asked)]
            if probe.node_id != "me":
                self.take(self.detector.answered(self.now, info(probe.node_id, life, status=status), seq, probe.number))

    @rule(index=st.integers(0, 49))
    def nobody_is_there(self, index: int) -> None:
        if self.asked and self.is_connected:
            probe = self.asked[-1 - index % len(self.asked)]
            self.take(self.detector.no_responders(self.now, probe.node_id, probe.number))

    @rule(node_id=IDS)
    def the_server_hints(self, node_id: str) -> None:
        if self.is_connected:
            self.take(self.detector.hint(self.now, node_id))

    @rule()
    def the_connection_is_lost(self) -> None:
        self.is_connected = False
        self.detector.disconnected(self.now)

    @rule()
    def the_connection_is_back(self) -> None:
        if not self.is_connected:
            self.is_connected = True
            self.reconnected_at = self.now
            self.detector.reconnected(self.now)

    @invariant()
    def changes_tell_the_whole_view(self) -> None:
        assert self.view == {node_id: peer.info.status for node_id, peer in self.detector.peers.items()}

    @invariant()
    def everything_is_bounded(self) -> None:
        assert len(self.detector.peers) <= MAX_NODES
        assert len(self.detector.departed) <= MAX_NODES

    @invariant()
    def only_nodes_that_are_known_are_asked(self) -> None:
        assert all(probe.node_id in "abcdme" for probe in self.asked)


DetectorMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_detector_machine = DetectorMachine.TestCase
