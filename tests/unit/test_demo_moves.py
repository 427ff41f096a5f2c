"""How partitions moved, read off effects."""

from catga_bus.demo.effects import Effect
from catga_bus.demo.moves import Move, hand_overs, moves_of, standstill, takeovers


def effects(*told: tuple[float, int, str]) -> list[Effect]:
    """Effects by instant, partition and node."""
    return [
        Effect(number, number, "N1", 0, 0, node, partition, 1, at) for number, (at, partition, node) in enumerate(told)
    ]


LOG = effects(
    (1.0, 0, "desk-1"),
    (1.0, 1, "desk-2"),
    (1.5, 2, "desk-2"),
    (2.0, 1, "desk-2"),
    (2.5, 0, "desk-1"),
    (2.75, 1, "desk-1"),  # desk-2 was killed at 2.25
    (3.0, 1, "desk-1"),
    (3.5, 2, "desk-3"),
    (4.0, 1, "desk-3"),
)
KILLED_1 = Move(1, "desk-2", "desk-1", 2.0, 2.75)
KILLED_2 = Move(2, "desk-2", "desk-3", 1.5, 3.5)
HANDED = Move(1, "desk-1", "desk-3", 3.0, 4.0)


def test_a_move_is_an_effect_by_another_node_than_the_one_before_in_its_partition():
    assert moves_of(LOG) == [KILLED_1, KILLED_2, HANDED]
    assert moves_of(effects((1.0, 0, "a"), (2.0, 1, "b"), (3.0, 0, "a"), (4.0, 1, "b"))) == []


def test_a_takeover_takes_from_the_fault_to_the_first_effect_of_the_next_owner():
    assert takeovers(moves_of(LOG), "desk-2", 2.25, float("inf")) == [0.5, 1.25]
    assert takeovers(moves_of(LOG), "desk-1", 2.25, float("inf")) == [1.75]


def test_what_a_node_lost_before_its_fault_or_gave_away_after_it_is_no_takeover():
    assert takeovers([KILLED_1, KILLED_2], "desk-2", 3.0, float("inf")) == [0.5]
    assert takeovers([HANDED], "desk-1", 1.0, until=2.0) == []  # it had effects after it was thawed
    assert takeovers([HANDED], "desk-1", 1.0, until=3.25) == [3.0]


def test_a_hand_over_pauses_from_the_last_effect_to_the_first_of_the_next_owner():
    assert hand_overs([KILLED_1, KILLED_2, HANDED], "desk-1", 3.5) == [1.0]
    assert hand_overs([HANDED], "desk-1", 4.0) == []


def test_a_standstill_is_the_longest_time_without_an_effect_anywhere():
    assert standstill(LOG, 2.25, 3.25) == 0.5
    assert standstill(LOG, 0.0, 9.0) == 0.5
    assert standstill(LOG, 1.25, 1.25) == 0.5  # the pause that it lies in counts whole
    assert standstill(LOG[:1], 0.0, 9.0) is None


def test_a_pause_is_never_below_nothing():
    # Instants are taken before rows are written, so the last one of the source may be the later.
    assert Move(0, "a", "b", last=2.0, first=1.5).pause == 0.0
