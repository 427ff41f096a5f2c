"""Random runs: a world, what is sent, and faults, all from one seed."""

import random
from collections.abc import Callable, Sequence

from catga_bus.partition.records import Domain
from tests.ownership.network import Weather
from tests.ownership.world import LOG, QUEUE, Habits, World

SECONDS = 20.0
"""Virtual time in which there are faults."""

_KEYS = (["a"], ["b"], ["a", "b"], ["c", "a"], ["a", "a", "b"])
FAULTS = ("kill", "kill", "freeze", "freeze", "cut", "roll", "outage", "consumer", "bucket", "doubt")


class Storm:
    """One random run.

    Args:
        seed: Of everything.
        faults: What may happen to nodes and to the server.
        weather: How bad the network is; None: drawn.
        habits: How handlers behave; None: drawn.
        kills: Whether there are messages that kill their process; None: drawn.
        is_calm: Whether nothing happens that excuses a repetition: handlers do not fail.
    """

    def __init__(
        self,
        seed: int,
        *,
        faults: Sequence[str] = FAULTS,
        weather: Weather | None = None,
        habits: Habits | None = None,
        kills: bool | None = None,
        is_calm: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.domains: tuple[Domain, ...] = self.rng.choice(((QUEUE,), (LOG,), (QUEUE, LOG)))
        self.partitions = self.rng.choice((1, 2, 4))
        self.size = self.rng.choice((2, 3))
        drawn = Weather(
            lost_requests=self._often(0.03),
            lost_answers=self._often(0.03),
            late_requests=self._often(0.03),
            lost_acks=self._often(0.05),
            lost_deliveries=self._often(0.02),
            stale_reads=self._often(0.2),
            lost_words=self._often(0.2),
            late_words=self._often(0.2),
            # An acknowledgement that is lost without a word is sent again when the record is delivered again. The bus
            # asks for an hour; here the longest is half a minute, so that what waits for it ends within a run.
            ack_wait=self.rng.choice((1.0, 5.0, 30.0)),
        )
        usual = Habits(
            longest=self.rng.choice((0.003, 0.03, 0.2)),
            failing=0.0 if is_calm else self._often(0.1),
            window=self.rng.choice((3, 8)),
        )
        self.kills = self.rng.random() < 0.3 if kills is None else kills
        self.world = World(
            seed,
            domains=self.domains,
            partitions=self.partitions,
            weather=weather or drawn,
            habits=habits or usual,
            is_calm=is_calm,
        )

    def run(self) -> World:
        """Let it rage, and see that everything comes to rest.

        Raises:
            Violation: A law does not hold.
        """
        world = self.world
        with world:
            for number in range(self.size):
                world.add(f"n{number}")
            self._plan(0.1, 10.0, self._send)
            if self.faults:
                self._plan(1.0, 0.7, self._fault)
            if self.kills:
                self._plan(2.0, 0.2, self._send_killer)
            world.run(SECONDS)
            world.settle()
        return world

    def _often(self, chance: float) -> float:
        return self.rng.choice((0.0, 0.0, chance))

    def _plan(self, start: float, rate: float, what: Callable[[], Callable[[], object]]) -> None:
        """Let something happen again and again, `rate` times a second."""
        at = start
        while at < SECONDS:
            self.world.at(at, what())
            at += self.rng.expovariate(rate)

    # -- what happens: drawn beforehand, so that it does not depend on the course of the run -----------------

    def _send(self) -> Callable[[], object]:
        kind, partition = self.rng.choice(self.domains).kind, self.rng.randrange(self.partitions)
        keys = self.rng.choice(_KEYS)
        return lambda: self.world.send(kind, partition, keys)

    def _send_killer(self) -> Callable[[], object]:
        kind, partition = self.rng.choice(self.domains).kind, self.rng.randrange(self.partitions)
        return lambda: self.world.killers.update(self.world.send(kind, partition, ["a", "k", "b"])[1:2])

    def _fault(self) -> Callable[[], object]:
        world, rng = self.world, self.rng
        fault, node_id, size, kind = (
            rng.choice(self.faults), f"n{rng.randrange(self.size)}", rng.random(), rng.choice(self.domains).kind
        )  # fmt: skip

        def revive() -> None:
            if not world.nodes[node_id].process.is_alive:
                world.add(node_id)

        def strike() -> None:
            node = world.nodes[node_id]
            if fault == "kill":
                world.kill(node)
                world.at(world.now + 0.05 + 5.0 * size, revive)
            elif fault == "freeze":
                world.freeze(node, 0.1 + 4.0 * size)
            elif fault == "cut":
                world.cut(node, 0.05 + 4.0 * size)
            elif fault == "roll":
                world.roll(node)
                world.at(world.now + 2.0 + 3.0 * size, revive)
            elif fault == "outage" and size < 0.4:
                world.outage(4.0 + 12.5 * size)
            elif fault == "consumer":
                world.delete_consumer(kind)
            elif fault == "bucket" and size < 0.3:
                world.delete_bucket()
            elif fault == "doubt":
                world.doubt(node)

        return strike
