"""A world of nodes around one server, in virtual time: one seed, one run."""

import contextlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from catga_bus.durability.inbox.base import FencedError
from catga_bus.effects import Fence
from catga_bus.partition.keeper import Keeper
from catga_bus.partition.protocol import Claimed
from catga_bus.partition.records import Domain
from catga_bus.transport.jetstream import MSG_ID_HEADER, StreamConfig
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import Names, Notice
from tests.ownership import network as net
from tests.ownership.checker import Checker, ViolationError
from tests.ownership.network import Network, Weather
from tests.ownership.node import Beat, Node
from tests.ownership.process import Killed, Process
from tests.ownership.store import SERVICE, Store

NAMES = Names("catga")
QUEUE = Domain(names=NAMES, service=SERVICE)
LOG = Domain(names=NAMES, service=SERVICE, types=("Debited",))
SETTLED = 120.0
"""Virtual seconds after the last fault in which everything must come to rest."""

CALM = 10.0
"""Virtual seconds after which, and for which, nothing moves any more."""

_STEPS = 2_000_000  # callbacks after which a run is taken to go round in circles


class Habits(msgspec.Struct):
    """How handlers behave."""

    longest: float = 0.03
    """Seconds that one takes at most, as a rule."""

    failing: float = 0.0
    window: int = 8
    """Frames in hand."""


class _TellingStore(Store):
    def __init__(self, checker: Checker) -> None:
        super().__init__()
        self._checker = checker

    def commit(self, message_id: str, fence: Fence) -> bool | FencedError:
        outcome = super().commit(message_id, fence)
        if isinstance(outcome, FencedError):
            self._checker.refused(outcome)
        return outcome


class Sender:
    """Sends records to one partition, one at a time, each until it is known to be stored."""

    is_patient = True
    """Whether it waits for one before it sends the next."""

    def __init__(self, world: "World", subject: str) -> None:
        self._world = world
        self._subject = subject
        self._waiting: deque[bytes] = deque()
        self._is_busy = False

    def send(self, ids: Sequence[str]) -> None:
        """Have a record stored."""
        payload = " ".join(ids).encode()
        if not self.is_patient:
            self._try(payload)
            return
        self._waiting.append(payload)
        if not self._is_busy:
            self._is_busy = True
            self._try(self._waiting[0])

    def _try(self, payload: bytes) -> None:
        world, rng = self._world, self._world.rng
        fate = rng.random()
        is_out = world.network.is_out
        if (is_out and fate < 0.8) or (not is_out and fate < world.network.weather.lost_requests):
            self._again(payload)
            return
        message_id = payload.split(b" ", 1)[0].decode()
        world.network.server.accept(self._subject, payload, "", {MSG_ID_HEADER: message_id})
        world.network.run()
        if is_out or fate < world.network.weather.lost_requests + world.network.weather.lost_answers:
            self._again(payload)  # it does not know
        elif self.is_patient:
            self._waiting.popleft()
            self._is_busy = bool(self._waiting)
            if self._waiting:
                world.at(world.now + rng.uniform(*world.network.weather.latency), lambda: self._try(self._waiting[0]))

    def _again(self, payload: bytes) -> None:
        world = self._world
        world.at(world.now + world.rng.uniform(0.1, 0.5), lambda: self._try(payload))

    @property
    def is_idle(self) -> bool:
        """Whether all is stored."""
        return not self._is_busy


class World:
    """Nodes, a server, and a store that all share.

    Args:
        seed: Of everything that is random.
        domains: What is owned.
        partitions: P.
        habits: How handlers behave.
        weather: How bad the network is.
        is_calm: Whether nothing happens that excuses a repetition.
    """

    def __init__(
        self,
        seed: int,
        *,
        domains: Sequence[Domain] = (QUEUE,),
        partitions: int = 1,
        habits: Habits | None = None,
        weather: Weather | None = None,
        is_calm: bool = False,
    ) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.domains = tuple(msgspec.structs.replace(domain, window=16) for domain in domains)
        self.partitions = partitions
        self.is_calm = is_calm
        self.killers: set[str] = set()
        self.on_point: Callable[[Process, str], None] = lambda _, __: None
        self.points = 0
        self.steps = 0
        self.nodes: dict[str, Node] = {}
        self.lives: list[Node] = []
        self.checker = self.told = Checker(cast(Any, self))
        self.store = _TellingStore(self.checker)
        self._habits = habits or Habits()
        self.window = self._habits.window
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._lives = itertools.count(1)
        self._numbers: dict[str, int] = {}
        bucket = KeyValue(cast(Any, None), NAMES.owners_bucket())
        self.network = Network(self, bucket.stream)
        self.network.weather = weather or Weather()
        server = self.network.server
        server.watcher = self.checker
        server.model.create_stream(server.now(), bucket.config(int(net.EPOCH * 1000) - 1_000_000))
        for domain in self.domains:
            subjects = NAMES.events() if domain.is_log else NAMES.commands(SERVICE)
            retention: Any = "limits" if domain.is_log else "workqueue"
            server.model.create_stream(
                server.now(), StreamConfig(name=domain.stream, subjects=(subjects,), retention=retention)
            )
        self.senders = {
            (domain.kind, partition): Sender(self, domain.filters(partition)[0])
            for domain in self.domains
            for partition in range(partitions)
        }

    @property
    def habits(self) -> "World":
        """How handlers behave, for nodes."""
        return self

    # -- time ------------------------------------------------------------------------------------------------

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (max(when, self.now), next(self._order), event))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; return whether the condition came true before that."""
        end = self.now + seconds
        while not until():
            if self.checker.violation is not None:
                raise self.checker.violation
            ready = [node.process for node in self.nodes.values() if node.process.can_step]
            if ready:
                process = ready[0] if len(ready) == 1 else self.rng.choice(ready)
                self._step(process)
                continue
            due = min((node.process.next_timer() for node in self.nodes.values()), default=end + 1.0)
            if self._events and self._events[0][0] <= due:
                due, _, event = heapq.heappop(self._events)
                if due > end:
                    heapq.heappush(self._events, (due, next(self._order), event))
                    break
                self.now = max(self.now, due)
                event()
            elif due > end:
                break
            else:
                self.now = max(self.now, due)
        else:
            return True
        self.now = end
        return until()

    def _step(self, process: Process) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise ViolationError("everything_comes_to_rest", "it goes round in circles")
        with contextlib.suppress(Killed):
            process.loop.step()
        if process.errors:
            raise ViolationError("nothing_fails", "; ".join(process.errors))

    # -- nodes -----------------------------------------------------------------------------------------------

    def add(self, node_id: str) -> Node:
        """Start a node, or a new life of one."""
        life = next(self._lives)
        process = Process(f"{node_id}.{life}", lambda: self.now, self.rng, self._on_point)
        node = Node(cast(Any, self), node_id, (1, life), process)
        self.nodes[node_id] = node
        self.lives.append(node)
        node.start()
        return node

    def _on_point(self, process: Process, name: str) -> None:
        self.points += 1
        self.on_point(process, name)

    def live(self) -> list[Node]:
        """The nodes that live."""
        return [node for node in self.nodes.values() if node.process.is_alive]

    # -- faults ----------------------------------------------------------------------------------------------

    def kill(self, node: Node) -> None:
        """SIGKILL."""
        node.process.kill()

    def freeze(self, node: Node, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later."""
        node.process.freeze(seconds)

    def cut(self, node: Node, seconds: float) -> None:
        """Break the connection of a node for a while."""
        if not node.link.is_connected:
            return
        self.network.cut(node.link)
        node.process.loop.call_soon(node.disconnected)

        def mend() -> None:
            self.network.mend(node.link)
            if node.process.is_alive:
                node.process.loop.call_soon(node.reconnected)

        self.at(self.now + seconds, mend)

    def roll(self, node: Node) -> None:
        """SIGTERM."""
        if not node.is_draining and node.process.is_alive:
            node.process.loop.call_soon(lambda: node.process.spawn(node.leave()) and None)

    def outage(self, seconds: float) -> None:
        """Kill the leader of the streams."""
        self.network.begin_outage(seconds)

    def doubt(self, node: Node) -> None:
        """Let a node doubt all that it owns."""

        def doubt() -> None:
            for table in node.tables.values():
                for kept in list(table.kept().values()):
                    kept.doubt("told")

        node.process.loop.call_soon(doubt)

    def delete_bucket(self) -> None:
        """Delete the bucket of owners."""
        self.checker.bucket_was_lost = True
        self.network.server.forget_bucket()

    def delete_consumer(self, kind: str) -> None:
        """Delete a consumer under its owner."""
        domain = next(domain for domain in self.domains if domain.kind == kind)
        model, now = self.network.server.model, self.network.server.now()
        names = model.consumer_names(now, domain.stream)
        if names:
            model.delete_consumer(now, domain.stream, self.rng.choice(names))
            self.network.run()

    # -- between nodes ---------------------------------------------------------------------------------------

    def broadcast(self, sender: Node, beat: Beat) -> None:
        """Carry a heartbeat."""
        for node in self.live():
            if node is not sender:
                self._word(sender, node, lambda node=node: node.heard(beat))

    def tell(self, sender: Node, target: str, notice: Notice) -> None:
        """Carry a notice."""
        node = self.nodes.get(target)
        if node is not None and node.process.is_alive and sender.link.is_connected:
            self._word(sender, node, lambda: node.tables[notice.domain].on_notice(sender.id, notice))

    def _word(self, sender: Node, node: Node, word: Callable[[], None]) -> None:
        weather, rng = self.network.weather, self.rng
        if not sender.process.is_alive or rng.random() < weather.lost_words:
            return
        delay = rng.uniform(0.0, 0.7) if rng.random() < weather.late_words else rng.uniform(*weather.latency)

        def arrive() -> None:
            if node.process.is_alive and node.link.is_connected:
                node.process.loop.call_soon(word)

        self.at(self.now + delay, arrive)

    # -- work ------------------------------------------------------------------------------------------------

    def send(self, kind: str, partition: int, keys: Sequence[str]) -> list[str]:
        """Have a record with one message for each key stored; return their ids."""
        ids = []
        for key in keys:
            name = f"{kind}{partition}{key}"
            self._numbers[name] = self._numbers.get(name, 0) + 1
            ids.append(f"{name}-{self._numbers[name]}")
        self.senders[kind, partition].send(ids)
        return ids

    @property
    def reads_are_stale(self) -> bool:
        """Whether the server may answer as it would have a moment ago."""
        return self.network.weather.stale_reads > 0.0

    def duration(self) -> float:
        """Return how long a handler takes."""
        longest = self._habits.longest
        return self.rng.uniform(0.0, longest) * (10.0 if self.rng.random() < 0.03 else 1.0)

    def fails(self) -> bool:
        """Return whether it fails."""
        return self.rng.random() < self._habits.failing

    def granted(self, node: Node, keeper: Keeper, claimed: Claimed) -> None:
        """A keeper has been granted an epoch."""
        self.checker.granted(node, keeper, claimed)

    # -- the end ---------------------------------------------------------------------------------------------

    def settle(self, calm: float = CALM) -> None:
        """Let all faults end, and see that everything comes to rest.

        Args:
            calm: Virtual seconds after which, and for which, nothing may move any more.

        Raises:
            ViolationError: It does not.
        """
        weather = self.network.weather
        ack_wait = weather.ack_wait
        self.network.weather = Weather(ack_wait=ack_wait)
        self.run(max([0.0, *(node.process.thaws_at - self.now for node in self.live())]))
        self._keep_alive()
        if not self.run(SETTLED, self.is_at_rest):
            raise ViolationError("everything_comes_to_rest", self.unrest())
        self.run(calm)
        before = self._epochs()
        self.run(calm)
        if not self.is_at_rest() or self._epochs() != before:
            raise ViolationError(
                "everything_comes_to_rest", f"not for long: {self.unrest()}; {before}, then {self._epochs()}"
            )

    def _keep_alive(self) -> None:
        """Start what has died, as a supervisor does, while messages may still kill."""
        if not self.live():
            self.add("n0")
        if not self.is_at_rest():
            self.at(self.now + 1.0, self._keep_alive)

    def _epochs(self) -> dict[str, dict[str, dict[int, int]]]:
        return {node.name: {kind: node.owns(kind) for kind in node.tables} for node in self.live()}

    def is_at_rest(self) -> bool:
        """Whether each partition has one living owner, and nothing waits."""
        return not self.unrest()

    def unrest(self) -> str:
        """Return what is not at rest."""
        if left := self.checker.left():
            return f"{len(left)} left, {left[:3]}; owners {self._owned()}"
        if any(not sender.is_idle for sender in self.senders.values()):
            return "a sender waits"
        if any(node.is_draining for node in self.live()):
            return "a node leaves"
        for domain in self.domains:
            owners = self._owned()[domain.kind]
            for partition in range(self.partitions):
                if len(owners.get(partition, ())) != 1:
                    return f"{domain.kind}.{partition} is owned by {owners.get(partition)}"
            text = self._waiting(domain)
            if text:
                return text
        return ""

    def _owned(self) -> dict[str, dict[int, list[str]]]:
        owned: dict[str, dict[int, list[str]]] = {domain.kind: {} for domain in self.domains}
        for node in self.live():
            for kind, by_partition in owned.items():
                for partition in node.owns(kind):
                    by_partition.setdefault(partition, []).append(node.name)
        return owned

    def _waiting(self, domain: Domain) -> str:
        model, now = self.network.server.model, self.network.server.now()
        if not domain.is_log:
            info = model.stream(now, domain.stream)
            assert info is not None
            return f"{info.messages} messages in the queue" if info.messages else ""
        for node in self.live():
            for partition, kept in node.tables[domain.kind].kept().items():
                claimed = cast(Keeper, kept).tenure.claimed
                consumer = None if claimed is None else model.consumer(now, domain.stream, claimed.consumer)
                if consumer is None:
                    return f"{node.name} has no consumer of {partition}"
                if consumer.ack_pending or consumer.pending:
                    return f"{consumer.ack_pending} pending, {consumer.pending} to come in {partition}"
        return ""

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        """Take it apart."""
        for node in self.lives:
            node.process.bury()
        self.store.close()
