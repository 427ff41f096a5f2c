"""The laws of the plan, up to 1,000 partitions and 100 nodes, and nodes whose views differ for a while."""

import random
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import product
from typing import TypeAlias

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from catga_bus.partition.owners import Holding, merge_owners
from catga_bus.partition.plan import Plan, make_plan, takers_among
from catga_bus.partition.steps import steps_of

relaxed = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no failure
)

partitions = st.integers(1, 1_000)
node_counts = st.integers(1, 100)
seeds = st.integers(0, 2**32)


def ids(count: int, rng: random.Random) -> list[str]:
    return [f"billing-{rng.getrandbits(48):012x}" for _ in range(count)]


def scattered(size: int, nodes: Collection[str], rng: random.Random) -> dict[int, str]:
    """Owners as no plan would make them: lopsided, some dead, some nobody's."""
    choices = [*nodes, "dead-1", "dead-2"]
    weights = [rng.random() ** 3 for _ in choices]
    drawn = rng.choices(choices, weights, k=size)
    return {partition: owner for partition, owner in enumerate(drawn) if rng.random() < 0.9}


def owners_of(plan: Plan) -> dict[int, str]:
    return {partition: owner for partition, owner in enumerate(plan.owners) if owner is not None}


def settled(size: int, nodes: Collection[str]) -> dict[int, str]:
    return owners_of(make_plan(size, {}, nodes))


def unavoidable(size: int, owners: Mapping[int, str], takers: Collection[str]) -> int:
    """How many must move whatever the plan: each taker may keep its floor, and P mod n of them one more."""
    floor, extra = divmod(size, len(takers))
    load = Counter(owner for owner in owners.values() if owner in takers)
    kept = sum(min(count, floor) for count in load.values())
    return size - kept - min(extra, sum(count > floor for count in load.values()))


def assert_balanced(size: int, plan: Plan, takers: Collection[str]) -> None:
    assert len(plan.owners) == size
    load = Counter(plan.owners)
    floor, extra = divmod(size, len(takers))
    assert set(load) <= set(takers)
    assert sorted(load[node] for node in takers) == sorted([floor] * (len(takers) - extra) + [floor + 1] * extra)


@relaxed
@example(size=1_000, count=100, seed=0)
@example(size=1_000, count=1, seed=0)
@example(size=1, count=100, seed=0)
@given(size=partitions, count=node_counts, seed=seeds)
def test_every_partition_has_one_owner_and_every_node_its_share_whatever_there_was(
    size: int, count: int, seed: int
) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    owners = scattered(size, nodes, rng)
    plan = make_plan(size, owners, nodes)
    assert_balanced(size, plan, nodes)
    assert len(plan.moves) == unavoidable(size, owners, nodes)
    for move in plan.moves:
        owner = owners.get(move.partition)
        assert move.source == (owner if owner in nodes else None)
        assert move.target == plan.owners[move.partition] != move.source
    unmoved = set(range(size)) - {move.partition for move in plan.moves}
    assert all(plan.owners[partition] == owners[partition] for partition in unmoved)


@relaxed
@given(size=partitions, count=node_counts, seed=seeds)
def test_planning_again_from_the_result_moves_nothing(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    plan = make_plan(size, scattered(size, nodes, rng), nodes)
    assert make_plan(size, owners_of(plan), nodes) == Plan(plan.owners, (), plan.takers)


@relaxed
@given(size=partitions, count=node_counts, seed=seeds)
def test_the_order_of_what_is_given_does_not_count(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    owners = scattered(size, nodes, rng)
    plan = make_plan(size, owners, nodes, takers=nodes)
    shuffled = rng.sample(list(owners.items()), len(owners))
    again = make_plan(size, dict(shuffled), rng.sample(nodes, count), takers=rng.sample(nodes, count))
    assert again == plan


@relaxed
@example(size=64, count=2, seed=0)
@example(size=1_000, count=99, seed=0)
@given(size=partitions, count=st.integers(1, 99), seed=seeds)
def test_a_join_moves_the_newcomers_share_and_nothing_else(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    *nodes, newcomer = ids(count + 1, rng)
    before = settled(size, nodes)
    plan = make_plan(size, before, [*nodes, newcomer])
    assert len(plan.moves) == size // (count + 1)
    assert all(move.target == newcomer and move.source == before[move.partition] for move in plan.moves)


@relaxed
@example(size=64, count=3, seed=0)
@example(size=1_000, count=100, seed=0)
@given(size=partitions, count=st.integers(2, 100), seed=seeds)
def test_a_leave_moves_what_the_node_had_and_nothing_else(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    before = settled(size, nodes)
    gone = rng.choice(nodes)
    plan = make_plan(size, before, [node for node in nodes if node != gone])
    had = [partition for partition, owner in before.items() if owner == gone]
    assert [move.partition for move in plan.moves] == had
    assert all(move.source is None for move in plan.moves)


@relaxed
@given(size=partitions, count=st.integers(2, 100), seed=seeds)
def test_a_chain_of_joins_and_leaves_moves_what_each_makes_unavoidable(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    everybody = ids(count, rng)
    nodes = set(everybody[:1])
    owners = settled(size, nodes)
    for _ in range(10):
        nodes ^= {rng.choice(everybody)}
        nodes = nodes or {everybody[0]}
        plan = make_plan(size, owners, nodes)
        assert_balanced(size, plan, nodes)
        assert len(plan.moves) == unavoidable(size, owners, nodes)
        assert not [move for move in plan.moves if {move.source, move.target} <= nodes & set(owners.values())]
        owners = owners_of(plan)


@settings(relaxed, max_examples=300)
@given(
    owners=st.dictionaries(st.integers(0, 4), st.sampled_from(["a", "b", "c", "dead"]), max_size=5),
    takers=st.sets(st.sampled_from(["a", "b", "c"]), min_size=1),
)
def test_no_balanced_assignment_at_all_moves_fewer(owners: dict[int, str], takers: set[str]) -> None:
    def is_balanced(assignment: tuple[str, ...]) -> bool:
        load = [assignment.count(node) for node in takers]
        return max(load) - min(load) <= 1

    fewest = min(
        sum(owners.get(partition) != owner for partition, owner in enumerate(assignment))
        for assignment in product(sorted(takers), repeat=5)
        if is_balanced(assignment)
    )
    assert len(make_plan(5, owners, takers).moves) == fewest


@relaxed
@given(size=partitions, count=node_counts, seed=seeds)
def test_who_drains_is_new_or_knows_too_little_owns_nothing_new(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    draining, eligible, waiting = (set(rng.sample(nodes, rng.randint(0, count))) for _ in range(3))
    owners = scattered(size, nodes, rng)
    takers = takers_among(nodes, draining=draining, eligible=eligible, waiting=waiting)
    plan = make_plan(size, owners, nodes, takers=takers)
    assert not takers & draining
    assert takers <= eligible or not (set(nodes) - draining) & eligible
    if not takers:
        assert draining == set(nodes)
        assert plan == Plan((None,) * size, (), frozenset())
        return
    assert_balanced(size, plan, takers)
    kept_by_them = {partition for partition, owner in owners.items() if owner in set(nodes) - takers}
    asked_of_them = {move.partition for move in plan.moves if move.source is not None and move.source not in takers}
    assert asked_of_them == kept_by_them  # each is told to give all it has, and is asked first


View: TypeAlias = tuple[Collection[str], Mapping[int, Holding]]
"""Who lives, and the records, as one node sees them."""


class Cluster:
    """Partitions whose owner changes by compare-and-set, and nodes that act on views that may be behind."""

    def __init__(self, size: int, owners: Mapping[int, str], rng: random.Random) -> None:
        self.size = size
        self.records = {partition: Holding(owner, 1) for partition, owner in owners.items()}
        self.revision = 1
        self.rng = rng
        self.changes: list[tuple[int, str | None, str]] = []

    def owned_by(self, node: str) -> set[int]:
        return {partition for partition, record in self.records.items() if record.node == node}

    def owners(self) -> dict[int, str]:
        return merge_owners(self.size, self.records, {}, {})

    def round(self, views: Mapping[str, View], takers: Mapping[str, Collection[str]] | None = None) -> int:
        """Let each node plan on its live nodes and records, then act in any order; returns how much changed hands."""
        before = len(self.changes)
        plans = {}
        for node, (live, records) in views.items():
            owners = merge_owners(self.size, records, {node: dict.fromkeys(self.owned_by(node), 1)}, {})
            able = None if takers is None else takers[node]
            plans[node] = (make_plan(self.size, owners, live, takers=able), owners)
        for node in self.rng.sample(sorted(views), len(views)):
            plan, owners = plans[node]
            steps = steps_of(plan, node, owners, self.owned_by(node))
            for partition in steps.claim:
                self._claim(partition, node, views[node][1].get(partition))
            for source, asked in steps.ask.items():
                for partition in asked:
                    works_there = partition in self.owned_by(source)
                    if source in plans and works_there and plans[source][0].agrees(partition, source, node):
                        self._write(partition, node)
        return len(self.changes) - before

    def _claim(self, partition: int, node: str, seen: Holding | None) -> None:
        if self.records.get(partition) == seen:  # the compare-and-set
            self._write(partition, node)

    def _write(self, partition: int, node: str) -> None:
        self.revision += 1
        before = self.records.get(partition)
        self.changes.append((partition, before.node if before else None, node))
        self.records[partition] = Holding(node, self.revision)


@settings(relaxed, max_examples=100)
@given(size=st.integers(1, 128), count=st.integers(2, 8), seed=seeds)
def test_nodes_with_different_views_come_to_rest_and_agree_when_their_views_do(
    size: int, count: int, seed: int
) -> None:
    """Some have not heard of a newcomer, some not of a death, some read old records; nobody is wrongly found dead."""
    rng = random.Random(seed)
    nodes = ids(count, rng)
    newcomers, dead = set(nodes[: count // 3]), {"dead-1"}
    cluster = Cluster(size, settled(size, [*nodes[count // 3 :], *dead]), rng)
    old = dict(cluster.records)
    unheard = {node: {other for other in newcomers - {node} if rng.random() < 0.5} for node in nodes}
    lingering = {node: dead if rng.random() < 0.5 else set() for node in nodes}

    def views(*, stale: bool) -> dict[str, View]:
        present = dict(cluster.records)
        owning = set(cluster.owners().values()) - dead  # an owner that was never heard is not dead yet
        return {
            node: (
                (set(nodes) - unheard[node]) | lingering[node] | owning,
                old if stale and rng.random() < 0.5 else present,
            )
            for node in nodes
        }

    for _ in range(3):
        cluster.round(views(stale=True))
    rounds = 0
    while cluster.round(views(stale=False)):
        rounds += 1
        assert rounds <= size, "nodes take partitions from each other in turn"

    for node in nodes:  # now all hear the same
        unheard[node], lingering[node] = set(), set()
    expected = unavoidable(size, cluster.owners(), nodes)
    moved = cluster.round(views(stale=False))
    assert moved == expected
    assert_balanced(size, make_plan(size, cluster.owners(), nodes), nodes)
    assert cluster.round(views(stale=False)) == 0


@settings(relaxed, max_examples=100)
@given(size=st.integers(1, 128), count=st.integers(2, 8), seed=seeds)
def test_nodes_that_never_agree_on_who_may_own_do_not_take_from_each_other_in_turn(
    size: int, count: int, seed: int
) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    cluster = Cluster(size, settled(size, nodes), rng)
    takers = {node: rng.sample(nodes, rng.randint(1, count)) for node in nodes}
    rounds = 0
    while cluster.round({node: (nodes, dict(cluster.records)) for node in nodes}, takers):
        rounds += 1
        assert rounds <= count, "partitions go round"


@settings(relaxed, max_examples=100)
@given(size=st.integers(1, 128), count=st.integers(2, 8), seed=seeds)
def test_what_a_wrong_verdict_took_is_balanced_again_in_one_round(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    nodes = ids(count, rng)
    cluster = Cluster(size, settled(size, nodes), rng)
    accused = rng.choice(nodes)
    believers = {node for node in nodes if node != accused and rng.random() < 0.5}
    for _ in range(2):
        records = dict(cluster.records)
        cluster.round({node: (set(nodes) - ({accused} if node in believers else set()), records) for node in nodes})
    expected = unavoidable(size, cluster.owners(), nodes)
    records = dict(cluster.records)
    assert cluster.round(dict.fromkeys(nodes, (nodes, records))) == expected
    records = dict(cluster.records)
    assert cluster.round(dict.fromkeys(nodes, (nodes, records))) == 0


@relaxed
@given(size=partitions, count=st.integers(2, 99), seed=seeds)
def test_two_nodes_that_disagree_on_a_newcomer_disagree_on_its_share_alone(size: int, count: int, seed: int) -> None:
    rng = random.Random(seed)
    *nodes, newcomer = ids(count + 1, rng)
    before = settled(size, nodes)
    without, with_it = make_plan(size, before, nodes), make_plan(size, before, [*nodes, newcomer])
    differ = [each for each in range(size) if without.owners[each] != with_it.owners[each]]
    assert len(differ) == size // (count + 1)
    assert {with_it.owners[each] for each in differ} <= {newcomer}
