"""The ways to spread partitions that the plan is compared with: each as its own project does it."""

import pytest

from benchmarks.partitions import contiguous_ranges, hash_mod_n, sticky_plan


@pytest.mark.parametrize(
    ("partitions", "members", "expected"),
    [
        (6, "ab", "aaabbb"),
        (10, "cab", "aaabbbccca"),
        (11, "abc", "aaabbbcccab"),
        (2, "abc", "ab"),  # members above the number of partitions get nothing
    ],
)
def test_contiguous_ranges_are_those_of_pcgroups(partitions: int, members: str, expected: str) -> None:
    assert "".join(contiguous_ranges(partitions, members, {}).values()) == expected


def test_hash_mod_n_deals_partitions_like_cards() -> None:
    assert "".join(hash_mod_n(7, "cab", {}).values()) == "abcabca"


def test_the_plan_is_asked_with_what_is_owned() -> None:
    assert sticky_plan(4, "ab", {0: "b", 1: "b", 2: "a", 3: "a"}) == {0: "b", 1: "b", 2: "a", 3: "a"}
