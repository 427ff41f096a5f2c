"""The map of the partitions: who owns what, and how it is written."""

from catga_bus.demo.partition_map import is_shared_out, mark_of, owners_of, text_of_map


def test_the_highest_epoch_owns_a_partition_whoever_says_so_first():
    claims = [("desk-1", {0: 5, 1: 9}), ("desk-2", {0: 6, 1: 8, 2: 1})]
    assert owners_of(claims, 4) == ("desk-2", "desk-1", "desk-2", None)
    assert owners_of(reversed(claims), 4) == ("desk-2", "desk-1", "desk-2", None)


def test_partitions_beyond_the_map_are_not_on_it():
    assert owners_of([("desk-1", {1: 1, 16: 1})], 2) == (None, "desk-1")


def test_partitions_are_shared_out_when_no_node_has_two_more_than_another():
    assert is_shared_out(("a", "b", "b", "c"), "abc")
    assert not is_shared_out(("a", "b", "b", None), "abc")
    assert not is_shared_out(("b", "b", "c", "c"), "abc")
    assert not is_shared_out(("a", "b", "b", "x"), "ab")


def test_a_map_is_written_with_one_character_for_each_partition():
    assert text_of_map(("desk-1", "desk-2", None, "desk-10", "desk-36")) == "12·a A"


def test_every_node_has_a_mark():
    marks = [mark_of(f"desk-{number}") for number in range(1, 62)]
    assert len(set(marks)) == 61
    assert (mark_of("desk-62"), mark_of("desk"), mark_of(None)) == ("?", "?", "·")
