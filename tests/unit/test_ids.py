"""Message ids: no two alike, whatever their number."""

from itertools import islice

from catga_bus.ids import MessageIds


def test_ids_are_different_and_begin_with_what_was_drawn() -> None:
    ids = MessageIds(b"\0" * 12)
    taken = list(islice(iter(ids.take, None), 70_000))
    assert len(set(taken)) == 70_000
    assert all(one.startswith("A" * 16) for one in taken)
    assert [taken[n].removeprefix("A" * 16) for n in (0, 10, 255, 256, 4_096)] == ["00", "0a", "ff", "100", "1000"]


def test_two_starts_have_nothing_in_common() -> None:
    assert MessageIds().prefix != MessageIds().prefix
