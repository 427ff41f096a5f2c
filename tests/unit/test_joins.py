"""Newcomers are let in together."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catga_bus.partition.joins import Joins, joins_at

instants = st.dictionaries(
    st.sampled_from("abcdefgh"), st.integers(0, 80).map(lambda quarters: quarters / 4), min_size=1
)


def waiting(now: float, seen: dict[str, float], *owning: str) -> str:
    known = {node: at for node, at in seen.items() if at <= now}
    return "".join(sorted(joins_at(now, known, owning, quiet=1.0, longest=3.0).waiting))


def test_a_newcomer_waits_until_it_has_been_quiet_for_a_while() -> None:
    seen = {"a": 0.0, "b": 10.0}
    assert joins_at(10.0, seen, quiet=1.0, longest=3.0) == Joins(frozenset("b"), 11.0)
    assert joins_at(10.99, seen, quiet=1.0, longest=3.0) == Joins(frozenset("b"), 11.0)
    assert joins_at(11.0, seen, quiet=1.0, longest=3.0) == Joins(frozenset(), math.inf)


def test_those_that_come_one_after_the_other_are_let_in_together() -> None:
    seen = {"b": 10.0, "c": 10.5, "d": 11.0}
    assert [waiting(now, seen) for now in (11.9, 12.0)] == ["bcd", ""]


def test_nobody_waits_longer_than_the_bound_however_many_follow() -> None:
    seen = {"b": 10.0, "c": 10.75, "d": 11.5, "e": 12.25, "f": 13.0, "g": 13.5}
    assert [waiting(now, seen) for now in (12.9, 13.0, 14.4, 14.5)] == ["bcde", "f", "fg", ""]
    assert joins_at(12.25, dict(list(seen.items())[:4]), quiet=1.0, longest=3.0).due == 13.0


def test_an_owner_is_not_new() -> None:
    assert joins_at(0.0, {"me": 0.0, "old": 0.0}, {"old"}).waiting == {"me"}  # to one that starts, all are new


def test_a_node_that_was_dead_waits_again() -> None:
    assert waiting(20.0, {"a": 0.0, "b": 0.0}) == ""
    assert waiting(20.0, {"a": 0.0, "b": 19.5}) == "b"


@given(instants, instants.map(lambda later: {node.upper(): at for node, at in later.items()}), st.integers(0, 120))
def test_who_was_let_in_stays_in_whoever_comes_later(
    seen: dict[str, float], later: dict[str, float], quarters: int
) -> None:
    now = quarters / 4
    known = {node: at for node, at in seen.items() if at <= now}
    followers = {node: at + now for node, at in later.items()}
    before = joins_at(now, known, quiet=1.0, longest=3.0)
    after = joins_at(now, known | followers, quiet=1.0, longest=3.0)
    assert after.waiting & set(known) <= before.waiting
    everybody = known | followers
    for node in joins_at(now + 30.0, everybody, quiet=1.0, longest=3.0).waiting:
        assert now + 30.0 - everybody[node] < 3.0


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b")])
def test_the_order_does_not_count(order: tuple[str, ...]) -> None:
    seen = {"a": 1.0, "b": 1.5, "c": 9.0}
    assert waiting(9.5, {node: seen[node] for node in order}) == "c"
