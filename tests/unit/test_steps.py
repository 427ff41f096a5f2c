"""What a node does about a plan."""

from catga_bus.partition.plan import make_plan, takers_among
from catga_bus.partition.steps import Steps, steps_of

BEFORE = {0: "a", 1: "a", 2: "a", 3: "b", 4: "b", 5: "b"}


def test_nothing_is_done_about_a_plan_that_is_carried_out() -> None:
    plan = make_plan(6, BEFORE, "ab")
    assert steps_of(plan, "a", BEFORE, {0, 1, 2}) == Steps((), {}, {}, ())


def test_a_newcomer_asks_and_the_owners_wait_to_be_asked() -> None:
    plan = make_plan(6, BEFORE, "abc")
    from_a, from_b = (next(move.partition for move in plan.moves if move.source == node) for node in "ab")
    assert steps_of(plan, "c", BEFORE, ()) == Steps((), {"a": (from_a,), "b": (from_b,)}, {}, ())
    assert steps_of(plan, "a", BEFORE, {0, 1, 2}) == Steps((), {}, {"c": (from_a,)}, ())


def test_what_the_dead_had_and_what_nobody_owns_is_claimed_at_once() -> None:
    owners = {0: "dead", 1: "b"}
    plan = make_plan(4, owners, "ab", takers="a")
    assert steps_of(plan, "a", owners, ()) == Steps((0, 2, 3), {"b": (1,)}, {}, ())


def test_a_record_of_this_node_that_it_does_not_work_on_is_claimed_anew() -> None:
    plan = make_plan(2, {0: "a", 1: "a"}, "a")
    assert steps_of(plan, "a", {0: "a", 1: "a"}, {1}).claim == (0,)


def test_a_node_that_drains_claims_nothing_and_gives_everything() -> None:
    owners = BEFORE | {5: "dead"}
    plan = make_plan(6, owners, "ab", takers=takers_among("ab", draining="a"))
    assert steps_of(plan, "a", owners, {0, 1, 2}) == Steps((), {}, {"b": (0, 1, 2)}, ())
    assert steps_of(plan, "b", owners, {3, 4}) == Steps((5,), {"a": (0, 1, 2)}, {}, ())


def test_when_all_drain_each_keeps_what_it_has() -> None:
    plan = make_plan(6, BEFORE, "ab", takers=takers_among("ab", draining="ab"))
    assert steps_of(plan, "a", BEFORE, {0, 1, 2}) == Steps((), {}, {}, ())


def test_a_partition_that_another_has_claimed_since_is_in_doubt_and_nothing_else() -> None:
    owners = BEFORE | {0: "b", 1: "dead"}
    plan = make_plan(6, owners, "ab")
    steps = steps_of(plan, "a", owners, {0, 1, 2})
    assert steps.doubt == (0, 1)
    assert not {0, 1} & {*steps.claim, *sum(steps.ask.values(), ()), *sum(steps.give.values(), ())}


def test_a_claim_that_the_view_has_not_heard_of_is_no_doubt() -> None:
    plan = make_plan(2, {}, "a")
    assert steps_of(plan, "a", {}, {0, 1}) == Steps((), {}, {}, ())
