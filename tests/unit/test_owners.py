"""Who owns what, when records and heartbeats do not say the same."""

from itertools import permutations

import pytest

from catga_bus.partition.owners import Announced, Holding, merge_owners

NOW, BEFORE = (7, 1), (6, 1)


@pytest.mark.parametrize(
    ("held", "announced", "owner"),
    [
        (None, {}, None),
        (Holding("a", 3), {}, "a"),
        (None, {"a": {0: 3}}, "a"),
        (Holding("a", 3), {"b": {0: 4}}, "b"),  # claimed since the record was read
        (Holding("a", 5), {"b": {0: 4}}, "a"),  # b has not noticed yet
        (Holding(None, 5), {"b": {0: 4}}, None),  # released since the heartbeat
        (Holding(None, 5), {"b": {0: 6}}, "b"),
        (Holding("a", 4), {"b": {0: 4}}, "a"),  # one epoch for two: the record counts
        (None, {"b": {0: 4}, "a": {0: 4}}, "a"),  # no record to decide: all choose the same
        (None, {"c": {0: 2}, "b": {0: 3}, "a": {0: 1}}, "b"),
    ],
)
def test_the_highest_epoch_counts(held: Holding | None, announced: Announced, owner: str | None) -> None:
    records = {} if held is None else {0: held}
    for order in permutations(announced.items()):
        assert merge_owners(1, records, dict(order), {}) == ({} if owner is None else {0: owner})


def test_what_a_former_life_of_a_node_held_nobody_owns() -> None:
    held = {0: Holding("a", 3, BEFORE), 1: Holding("a", 4, NOW), 2: Holding("unheard", 5, BEFORE)}
    assert merge_owners(3, held, {}, {"a": NOW}) == {1: "a", 2: "unheard"}
    assert merge_owners(3, held, {"a": {0: 6}}, {"a": NOW})[0] == "a"  # it has claimed it again


def test_a_node_with_more_partitions_is_not_believed_about_those() -> None:
    assert merge_owners(2, {5: Holding("a", 1)}, {"b": {1: 1, 2: 1, 10**9: 1}}, {}) == {1: "b"}
