"""What the takeover benchmark makes of the record of all effects: every violation is seen, every move is timed."""

from benchmarks.takeovers import Count, Effect, Hit, Move, count, moves


def effect(number, *, account="a", node="n1", partition=0, epoch=1, at=0.0):
    return Effect(account, number, node, partition, epoch, at)


def counted(effects, accepted, unknown=None):
    return count(effects, accepted, unknown or {})


def test_all_in_order_and_once_is_no_violation():
    effects = [effect(0), effect(0, account="b"), effect(1)]

    assert counted(effects, {"a": [0, 1], "b": [0]}) == Count(3, 2, 0, 0, 0, 0, 0)


def test_every_violation_is_counted():
    assert counted([effect(0)], {"a": [0, 1], "b": [0]}).lost == 2
    assert counted([effect(0), effect(0), effect(0)], {"a": [0]}).doubled == 2
    assert counted([effect(1), effect(0), effect(2)], {"a": [0, 1, 2]}).out_of_order == 1
    assert counted([effect(0, epoch=2), effect(1, epoch=1)], {"a": [0, 1]}).falls == 1
    assert counted([effect(0), effect(7)], {"a": [0]}).foreign == 1
    assert counted([effect(0), effect(0)], {"a": [0, 1]}).violations == 2


def test_what_nobody_knows_may_have_an_effect_or_none():
    for effects in ([effect(0)], [effect(0), effect(1)]):
        assert counted(effects, {"a": [0]}, {"a": [1]}).violations == 0


def test_epochs_are_those_of_their_partition():
    assert counted([effect(0, epoch=5), effect(0, account="b", partition=1, epoch=1)], {"a": [0], "b": [0]}).falls == 0


def test_a_takeover_counts_from_the_fault_and_a_hand_over_from_the_last_effect():
    effects = [
        effect(0, node="n1", at=1.0),
        effect(1, node="n2", at=3.5),
        effect(2, node="n3", at=3.75),
        effect(0, account="b", node="n1", partition=1, at=1.0),
        effect(1, account="b", node="n1", partition=1, at=5.0),
    ]

    assert moves(effects, [Hit("kill", "n1", 1.5)]) == [Move("kill", 0, 2.0), Move("hand-over", 0, 0.25)]


def test_an_effect_that_was_on_its_way_at_the_fault_does_not_hide_the_takeover():
    effects = [effect(0, node="n1", at=1.05), effect(1, node="n2", at=2.0)]

    assert moves(effects, [Hit("freeze", "n1", 1.0)]) == [Move("freeze", 0, 1.0)]


def test_a_roll_and_a_fault_that_is_long_over_are_hand_overs():
    effects = [effect(0, node="n1", at=9.0), effect(1, node="n2", at=9.5)]

    assert moves(effects, [Hit("freeze", "n1", 1.0), Hit("roll", "n1", 9.25)]) == [Move("hand-over", 0, 0.5)]
