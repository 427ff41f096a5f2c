"""The effect log: rows in the order of their commits, read while others write."""

import sqlite3

import pytest

from catga_bus.demo.effects import (
    INSERT,
    Effect,
    EffectCounts,
    EffectLog,
    EffectLogError,
    create_effect_log,
    read_effects,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "effects.db"
    create_effect_log(path)
    return path


@pytest.fixture
def writer(path):
    connection = sqlite3.connect(path, isolation_level=None)
    yield connection
    connection.close()


def effect(number: int, **changes) -> Effect:
    one = Effect(number, number - 1, f"N{number % 3}", None, 100, f"desk-{number % 2}", 3, 9, number / 4)
    return one._replace(**changes)


def test_what_is_written_is_read_in_the_order_of_the_commits(path, writer):
    for number in (1, 2, 3):
        writer.execute(INSERT, effect(number).values)
    assert list(read_effects(path)) == [effect(1), effect(2), effect(3)]


def test_nothing_keeps_a_flight_from_being_written_twice(path, writer):
    writer.execute(INSERT, effect(1).values)
    writer.execute(INSERT, effect(1).values)
    assert [one.row for one in read_effects(path)] == [0, 0]


def test_a_log_is_read_on_from_where_it_was_read(path, writer):
    with EffectLog(path) as log:
        assert log.more() == []
        writer.execute(INSERT, effect(1).values)
        assert list(log.more()) == [effect(1)]
        assert log.more() == []
        writer.execute(INSERT, effect(2).values)
        assert list(log.more()) == [effect(2)]


def test_what_is_not_committed_is_not_read_and_is_not_waited_for(path, writer):
    writer.execute("BEGIN IMMEDIATE")
    writer.execute(INSERT, effect(1).values)
    with EffectLog(path) as log:
        assert log.more() == []
        writer.execute("ROLLBACK")
        assert log.more() == []


def test_counts_know_flights_and_nodes(path, writer):
    with EffectLog(path) as log:
        counts = EffectCounts(log)
        assert (counts.look(), counts.flights, counts.per_node) == (0, 0, {})
        for number in (1, 2, 1):
            writer.execute(INSERT, effect(number).values)
        assert counts.look() == counts.flights == 2
        assert counts.per_node == {"desk-1": 2, "desk-0": 1}


def test_a_log_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    with pytest.raises(EffectLogError, match=r"nowhere/effects\.db: cannot be made: unable to open"):
        create_effect_log(tmp_path / "nowhere" / "effects.db")


def test_a_log_that_is_none_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "effects.db"
    path.write_text("no database" * 100)
    with pytest.raises(EffectLogError, match=r"effects\.db: cannot be (opened|read): file is not a database"):
        read_effects(path)


def test_a_log_without_its_table_is_an_error_that_names_it(tmp_path):
    sqlite3.connect(tmp_path / "effects.db").close()
    with pytest.raises(EffectLogError, match=r"effects\.db: cannot be read: no such table"):
        read_effects(tmp_path / "effects.db")
