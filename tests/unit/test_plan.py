"""The plan by example; its laws are in `tests/property/test_plan_properties.py`."""

import os
import subprocess
import sys

import pytest

from catga_bus.errors import ConfigurationError
from catga_bus.partition.plan import Move, Plan, make_plan, takers_among
from catga_bus.partition.ring import Ring

BEFORE = {0: "a", 1: "a", 2: "a", 3: "b", 4: "b", 5: "b"}


def owners_of(plan: Plan) -> dict[int, str]:
    return {partition: owner for partition, owner in enumerate(plan.owners) if owner is not None}


def test_a_cluster_at_rest_stays_as_it_is() -> None:
    assert make_plan(6, BEFORE, "ab") == Plan(tuple("aaabbb"), (), frozenset("ab"))


def test_a_newcomer_gets_its_share_from_those_that_have_too_much() -> None:
    plan = make_plan(6, BEFORE, "abc")
    assert sorted((move.source, move.target) for move in plan.moves) == [("a", "c"), ("b", "c")]


def test_the_partitions_of_the_dead_go_to_those_that_live_and_nobody_is_asked() -> None:
    plan = make_plan(6, BEFORE, "bc", takers="bc")
    assert {move.partition for move in plan.moves} == {0, 1, 2}
    assert {(move.source, move.target) for move in plan.moves} == {(None, "c")}


def test_a_draining_node_keeps_its_own_until_it_is_asked_and_gets_nothing() -> None:
    takers = takers_among("abc", draining="a")
    plan = make_plan(7, BEFORE, "abc", takers=takers)
    assert {move.partition for move in plan.moves if move.source == "a"} == {0, 1, 2}
    assert "a" not in plan.owners
    assert plan.agrees(0, "a", "b")
    assert plan.agrees(0, "a", "c")
    assert not plan.agrees(0, "a", "d")


def test_an_owner_gives_to_the_planned_successor_only() -> None:
    plan = make_plan(6, BEFORE, "abc")
    moves = {move.partition: move for move in plan.moves}
    for partition, owner in BEFORE.items():
        expected = partition in moves
        assert plan.agrees(partition, owner, "c") is expected
        assert not plan.agrees(partition, owner, "b" if owner == "a" else "a")


def test_when_all_drain_nothing_moves_and_nobody_is_planned() -> None:
    takers = takers_among("ab", draining="ab")
    assert make_plan(6, BEFORE, "ab", takers=takers) == Plan((None,) * 6, (), frozenset())


def test_nobody_alive_is_an_empty_plan() -> None:
    assert make_plan(3, {0: "a"}, []) == Plan((None,) * 3, (), frozenset())


@pytest.mark.parametrize(
    ("draining", "eligible", "waiting", "expected"),
    [
        ("", None, "", "abc"),
        ("a", None, "", "bc"),
        ("", "ab", "", "ab"),
        ("", "", "", "abc"),  # nobody knows every type: all
        ("ab", "ab", "", "c"),  # nobody that stays does: all that stay
        ("", None, "c", "ab"),
        ("", None, "abc", "abc"),  # a first start
        ("", "c", "c", "c"),  # to know the types counts more than to have been there for long
        ("a", "ab", "bc", "b"),
        ("", "abxyz", "", "ab"),  # those that are not alive do not count
    ],
)
def test_who_may_own(draining: str, eligible: str | None, waiting: str, expected: str) -> None:
    assert takers_among("abc", draining=draining, eligible=eligible, waiting=waiting) == set(expected)


def test_takers_that_do_not_live_take_nothing() -> None:
    assert set(make_plan(4, {}, "ab", takers="bc").owners) == {"b"}


def test_a_node_that_comes_back_under_its_old_id_gets_most_of_what_it_had() -> None:
    ids = [f"shop-{number}" for number in range(10)]
    owners = owners_of(make_plan(256, {}, ids))
    back = had = 0
    for node in ids:
        without = owners_of(make_plan(256, owners, [other for other in ids if other != node]))
        after = owners_of(make_plan(256, without, ids))
        mine = {partition for partition, owner in owners.items() if owner == node}
        had += len(mine)
        back += len(mine & {partition for partition, owner in after.items() if owner == node})
        owners = after
    assert back > 0.65 * had


def test_what_a_dead_node_had_spreads_over_the_others() -> None:
    ids = [f"shop-{number}" for number in range(10)]
    owners = owners_of(make_plan(1_000, {}, ids))
    plan = make_plan(1_000, owners, ids[1:])
    gained = [sum(move.target == node for move in plan.moves) for node in ids[1:]]
    assert sum(gained) == 100
    assert set(gained) == {11, 12}


def test_the_plan_is_the_same_in_every_process() -> None:
    """Sets of texts have another order in each process; the plan must not."""
    code = (
        "from catga_bus.partition.plan import make_plan\n"
        "ids = {f'shop-{number}' for number in range(9)}\n"
        "first = make_plan(64, {}, ids)\n"
        "owners = dict(enumerate(first.owners))\n"
        "print(first.owners, make_plan(64, owners, ids | {'shop-9', 'shop-10'}).moves)\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1
    assert "shop-10" in texts.pop()


def test_golden_plan() -> None:
    """Two versions of the bus in one cluster must plan alike: a change here is a change of the protocol."""
    plan = make_plan(16, {}, ["billing-a", "billing-b", "billing-c"])
    assert "".join(str(owner)[-1] for owner in plan.owners) == "cbacababbbcbccaa"
    moves = make_plan(16, owners_of(plan), ["billing-a", "billing-b", "billing-c", "billing-d"]).moves
    assert moves == (
        Move(7, "billing-b", "billing-d"),
        Move(9, "billing-b", "billing-d"),
        Move(13, "billing-c", "billing-d"),
        Move(15, "billing-a", "billing-d"),
    )


def test_the_ring_goes_around_once() -> None:
    ring = Ring(["a", "b"])
    walk = list(ring.walk(3))
    assert len(walk) == 128
    assert walk.count("a") == 64
    assert walk[0] == ring.first(3)


@pytest.mark.parametrize("partitions", [0, -1, 1_025])
def test_an_impossible_number_of_partitions_is_refused(partitions: int) -> None:
    with pytest.raises(ConfigurationError, match=f"partitions must be 1 to 1,024, got {partitions}"):
        make_plan(partitions, {}, "ab")
