"""The contract of `catga_bus.cluster.discovery.NodeDiscovery` as tests: every discovery inherits and passes them.

Inherit `DiscoveryContract` and give it the fixture `make`: a function that returns a new discovery for a node id, all
on the same server or broker.
"""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import ClassVar, TypeAlias

import pytest

from catga_bus.cluster.beats import Identity, Report
from catga_bus.cluster.detector import Probe
from catga_bus.cluster.discovery import NodeDiscovery
from catga_bus.cluster.records import NodeInfo, NodeStatus
from catga_bus.testing.waiting import eventually

Make: TypeAlias = Callable[[str], Awaitable[NodeDiscovery]]
"""Returns a new discovery of the node with an id; whoever makes it ends what it stands on."""


class RecordedNodes:
    """What a discovery told, in order."""

    def __init__(self) -> None:
        self.beats: list[tuple[NodeInfo, int]] = []
        self.answers: list[tuple[NodeInfo, int, int]] = []
        self.absent: list[tuple[str, int]] = []
        self.hints: list[str] = []
        self.rejected: list[str] = []

    def on_beat(self, info: NodeInfo, seq: int) -> None:
        """Record a beat."""
        self.beats.append((info, seq))

    def on_answer(self, info: NodeInfo, seq: int, number: int) -> None:
        """Record an answer."""
        self.answers.append((info, seq, number))

    def on_no_responders(self, node_id: str, number: int) -> None:
        """Record that nobody is there."""
        self.absent.append((node_id, number))

    def on_hint(self, node_id: str) -> None:
        """Record a hint."""
        self.hints.append(node_id)

    def on_rejected(self, reason: str) -> None:
        """Record a reason."""
        self.rejected.append(reason)

    def answers_of(self, node_id: str) -> list[NodeInfo]:
        """What one node answered."""
        return [info for info, _, _ in self.answers if info.id == node_id]

    def of(self, node_id: str) -> list[NodeInfo]:
        """What was heard of one node."""
        return [info for info, _ in self.beats if info.id == node_id]


Listen: TypeAlias = Callable[[str], Awaitable[tuple[NodeDiscovery, RecordedNodes]]]
"""Returns a discovery that listens, and what it tells."""


def _identity(node_id: str) -> Identity:
    return Identity(
        *("shop", node_id, "1.2", {"team": "a"}),
        zone="eu-1",
        region="eu",
        types=("Quote",),
        commands=("Debit",),
        events=("Debited",),
        store="s-1",
    )


class DiscoveryContract:
    """The promises of `NodeDiscovery`, one test each. Inherit it and give it the fixture `make`."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    @pytest.fixture
    def make(self) -> Make:
        """How to make a discovery; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `make`")

    @pytest.fixture
    async def listening(self, make: Make) -> AsyncIterator[Listen]:
        """Make discoveries that listen, closed at the end."""
        made: list[NodeDiscovery] = []

        async def start(node_id: str) -> tuple[NodeDiscovery, RecordedNodes]:
            discovery, told = await make(node_id), RecordedNodes()
            made.append(discovery)
            await discovery.start(told)
            return discovery, told

        yield start
        await asyncio.gather(*(one.close() for one in made))

    async def test_a_node_hears_the_others_and_itself(self, listening: Listen) -> None:
        a, by_a = await listening("a")
        _, by_b = await listening("b")
        await a.announce(_identity("a"), (1, 7))
        for told in (by_a, by_b):
            await eventually(partial(told.of, "a"))
            info = told.of("a")[0]
            assert (info.service, info.version, info.incarnation) == ("shop", "1.2", (1, 7))
            assert (info.zone, info.region, dict(info.metadata), info.types) == (
                "eu-1",
                "eu",
                {"team": "a"},
                ("Quote",),
            )
            assert (info.commands, info.events, info.store) == (("Debit",), ("Debited",), "s-1")

    async def test_beats_go_on_in_order(self, listening: Listen) -> None:
        a, _ = await listening("a")
        _, told = await listening("b")
        await a.announce(_identity("a"), (1, 7))
        await eventually(lambda: len(told.beats) >= 4)
        numbers = [seq for _, seq in told.beats]
        assert numbers == sorted(set(numbers))
        assert a.sent >= 4

    async def test_who_settles_knows_all_that_live(self, listening: Listen) -> None:
        for name in ("a", "b", "c"):
            discovery, _ = await listening(name)
            await discovery.announce(_identity(name), (1, 7))
        late, told = await listening("late")
        await late.settle()
        assert {info.id for info, _ in told.beats} == {"a", "b", "c"}

    async def test_who_beats_rarely_is_known_to_who_settles(self, listening: Listen) -> None:
        a, _ = await listening("a")
        await a.announce(_identity("a"), (1, 7))
        a.set_interval(60.0)
        _, told = await listening("b")
        await eventually(lambda: len(told.of("a")) >= 2)  # the one beat that was due
        for number in range(3):
            late, told = await listening(f"late{number}")
            await late.settle()
            assert told.of("a")
            assert not told.rejected

    async def test_a_report_is_in_the_next_beat_and_a_status_is_told_at_once(self, listening: Listen) -> None:
        a, _ = await listening("a")
        _, told = await listening("b")
        await a.announce(_identity("a"), (1, 7))
        await eventually(lambda: told.of("a"))
        assert not told.of("a")[-1].is_ready
        owned = {"partitions": {1: 2}, "event_partitions": {3: 4}}
        a.report(Report(is_ready=True, in_flight=3, intake=5, handled=7, breakers=("Quote",), **owned))
        await eventually(lambda: told.of("a")[-1].is_ready)
        info = told.of("a")[-1]
        assert (info.load.in_flight, info.load.intake, info.load.handled) == (3, 5, 7)
        assert (info.breakers, dict(info.partitions)) == (("Quote",), {1: 2})
        assert dict(info.event_partitions) == {3: 4}
        a.set_interval(60.0)
        a.tell(NodeStatus.DRAINING)
        await eventually(lambda: told.of("a")[-1].status is NodeStatus.DRAINING)
        assert not told.of("a")[-1].is_ready

    async def test_a_probe_is_answered_by_who_is_asked(self, listening: Listen) -> None:
        a, _ = await listening("a")
        b, told = await listening("b")
        await a.announce(_identity("a"), (1, 7))
        b.probe(Probe("a", "shop", 41))
        await eventually(lambda: told.answers)
        [(info, seq, number)] = told.answers
        assert (info.id, info.incarnation, number) == ("a", (1, 7), 41)
        assert seq >= 1
        assert not told.absent

    async def test_a_probe_of_nobody_says_so(self, listening: Listen) -> None:
        b, told = await listening("b")
        b.probe(Probe("nobody", "shop", 42))
        await eventually(lambda: told.absent)
        assert told.absent == [("nobody", 42)]

    async def test_a_node_that_only_listens_is_not_there(self, listening: Listen) -> None:
        await listening("a")
        b, told = await listening("b")
        b.probe(Probe("a", "shop", 43))
        await eventually(lambda: told.absent)

    async def test_who_leaves_says_so_and_is_gone(self, listening: Listen) -> None:
        a, _ = await listening("a")
        b, told = await listening("b")
        await a.announce(_identity("a"), (1, 7))
        await eventually(lambda: told.of("a"))
        await a.close()
        await a.close()
        await eventually(lambda: told.of("a")[-1].status is NodeStatus.LEFT)
        b.probe(Probe("a", "shop", 44))
        await eventually(lambda: told.absent == [("a", 44)])

    async def test_who_withdraws_is_gone_and_hears_of_the_others(self, listening: Listen) -> None:
        a, by_a = await listening("a")
        b, told = await listening("b")
        await a.announce(_identity("a"), (1, 7))
        await a.withdraw()
        sent = a.sent
        assert sent >= 2
        await eventually(lambda: told.of("a")[-1].status is NodeStatus.LEFT)
        b.probe(Probe("a", "shop", 45))
        await eventually(lambda: told.absent == [("a", 45)])
        await b.announce(_identity("b"), (1, 8))
        await eventually(lambda: by_a.of("b"))
        assert a.sent == sent

    async def test_any_node_id_travels(self, listening: Listen) -> None:
        b, told = await listening("b")
        for node_id in ("*", ">", "a.b", "with space", "x" * 200):
            a, _ = await listening(node_id)
            await a.announce(_identity(node_id), (1, 7))
            await eventually(partial(told.of, node_id))
            b.probe(Probe(node_id, "shop", 50))
            await eventually(partial(told.answers_of, node_id))

    async def test_closing_before_anything_is_fine(self, make: Make) -> None:
        await (await make("a")).close()
