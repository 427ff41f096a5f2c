"""What `catga nodes` shows, from values alone."""

import io
import json

import msgspec
import pytest
import rich.console

from catga_bus.cli.nodes_view import (
    Departures,
    NodeRow,
    Rates,
    change_object,
    change_text,
    nodes_object,
    nodes_table,
    nothing_text,
    row_of,
    silence_text,
)
from catga_bus.cluster.records import NodeInfo, NodeLoad, NodeStatus

ROW = NodeRow(
    status="online",
    service="shop",
    node="shop-1",
    incarnation=(1, 77),
    is_ready=True,
    version="1.2.3",
    zone="eu-1",
    region=None,
    types=("Quote",),
    metadata={},
    in_flight=3,
    intake=1_012,
    cpu=0.254,
    memory_bytes=58_400_000,
    stall=0.0,
    beat_age=0.12,
    requests_per_second=1_234.5,
    breakers=(),
    is_evicted=False,
)


def changed(**changes) -> NodeRow:
    return msgspec.structs.replace(ROW, **changes)


def drawn(*rows: NodeRow, colours: bool = False, width: int = 200) -> str:
    stream = io.StringIO()
    console = rich.console.Console(
        file=stream, width=width, force_terminal=colours, color_system="standard" if colours else None
    )
    console.print(nodes_table(rows, width))
    return stream.getvalue()


def words(line: str) -> list[str]:
    return [cell for cell in line.rstrip().split("  ") if cell.strip()]


def test_the_table_has_one_line_for_each_node():
    header, line = drawn(ROW).splitlines()
    assert [cell.strip() for cell in words(header)] == [
        "status", "service", "node", "load", "CPU", "memory", "stall", "version", "zone", "beat", "requests/s",
        "open breakers",
    ]  # fmt: skip
    assert [cell.strip() for cell in words(line)] == [
        "online", "shop", "shop-1", "3/1,012", "25%", "58 MB", "-", "1.2.3", "eu-1", "0.1 s", "1,234", "-",
    ]  # fmt: skip


def test_a_narrow_terminal_gets_fewer_columns_and_no_cut_ones():
    row = changed(service="flight-desk", node="flight-desk-7k2m9x4pqa", stall=0.5)
    widest = len(drawn(row).splitlines()[0].rstrip())
    assert "memory" in drawn(row, width=widest)
    assert "memory" not in drawn(row, width=widest - 1)
    for width in range(widest, 63, -1):
        lines = drawn(row, width=width).splitlines()
        assert len(lines) == 2
        assert all(len(line) <= width for line in lines)
        assert "…" not in lines[1]
        for part in ("online", "flight-desk-7k2m9x4pqa", "0.1 s", "1,234"):
            assert part in lines[1]


def test_nodes_stand_in_the_order_of_service_and_id():
    rows = [changed(node="shop-2"), changed(service="bank", node="bank-9"), ROW]
    assert [line.split()[2] for line in drawn(*rows).splitlines()[1:]] == ["bank-9", "shop-1", "shop-2"]
    assert [row["node"] for row in nodes_object(rows)["nodes"]] == ["bank-9", "shop-1", "shop-2"]


def test_what_is_wrong_with_a_node_can_be_seen():
    text = drawn(
        changed(
            status="suspect",
            stall=1.5,
            zone=None,
            requests_per_second=None,
            breakers=("Quote", "Order"),
            beat_age=0.94,
        )
    )
    for part in ("suspect", "1.50 s", "Quote, Order", "0.9 s"):
        assert part in text
    assert "eu-1" not in text


@pytest.mark.parametrize(
    ("status", "is_ready", "shown"),
    [("online", True, "online"), ("online", False, "not ready"), ("draining", False, "draining")],
)
def test_an_online_node_that_is_not_ready_says_so(status, is_ready, shown):
    assert drawn(changed(status=status, is_ready=is_ready)).splitlines()[1].startswith(f"{shown} ")


def test_a_faulted_node_is_red_on_a_terminal():
    assert "31mfaulted" in drawn(changed(status="faulted"), colours=True)


def test_a_node_cannot_move_the_cursor():
    text = drawn(changed(node="a\x1b[2Jb", zone="x\ry\u202e", version="[red]1[/]"))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\u202e" not in text
    assert "[red]1[/]" in text
    assert "\x1b" not in change_text("joined", changed(node="\x1b[2J"))


def test_the_json_has_every_field():
    document = json.loads(msgspec.json.encode(nodes_object([changed(breakers=("Quote",), metadata={"team": "desk"})])))
    assert document == {
        "nodes": [
            {
                "status": "online",
                "service": "shop",
                "node": "shop-1",
                "incarnation": [1, 77],
                "is_ready": True,
                "version": "1.2.3",
                "zone": "eu-1",
                "region": None,
                "types": ["Quote"],
                "commands": [],
                "events": [],
                "partitions": {},
                "event_partitions": {},
                "store": "",
                "metadata": {"team": "desk"},
                "in_flight": 3,
                "intake": 1_012,
                "cpu": 0.254,
                "memory_bytes": 58_400_000,
                "stall": 0.0,
                "beat_age": 0.12,
                "requests_per_second": 1_234.5,
                "breakers": ["Quote"],
                "is_evicted": False,
            }
        ]
    }


def test_partitions_are_shown_where_somebody_owns_some():
    row = changed(partitions={3: 41, 7: 2}, event_partitions={1: 9})
    header, line, other = (words(text) for text in drawn(row, changed(node="shop-2")).splitlines())
    assert (header[3].strip(), line[3].strip(), other[3].strip()) == ("owns", "2+1", "0+0")
    document = json.loads(msgspec.json.encode(nodes_object([row])))["nodes"][0]
    assert (document["partitions"], document["event_partitions"]) == ({"3": 41, "7": 2}, {"1": 9})


def test_a_change_is_one_line_and_one_object():
    row = changed(status="faulted")
    assert change_text("faulted", row).split() == ["faulted", "faulted", "shop", "shop-1"]
    assert change_object("faulted", row) == {
        "kind": "faulted",
        "node": nodes_object([row])["nodes"][0],
        "missed": 0,
    }


def test_missed_changes_are_told():
    assert change_text("missed", None, 1_200).startswith("missed    1,200 changes")
    assert change_object("missed", None, 3) == {"kind": "missed", "node": None, "missed": 3}


def test_a_rate_needs_two_heartbeats_and_stays_until_the_next():
    rates = Rates()
    assert rates.observe("a", 1, 100, 10.0) is None
    assert rates.observe("a", 1, 100, 10.0) is None  # the same heartbeat, looked at again
    assert rates.observe("a", 1, 150, 10.25) == 200.0
    assert rates.observe("a", 1, 150, 10.25) == 200.0
    assert rates.observe("a", 1, 150, 10.5) == 0.0


def test_the_rate_of_a_new_life_starts_anew():
    rates = Rates()
    rates.observe("a", 1, 100, 10.0)
    rates.observe("a", 1, 200, 11.0)
    assert rates.observe("a", 2, 5, 12.0) is None
    assert rates.observe("a", 2, 15, 13.0) == 10.0


def test_a_count_that_goes_back_is_no_negative_rate():
    rates = Rates()
    rates.observe("a", 1, 100, 10.0)
    assert rates.observe("a", 1, 90, 11.0) == 0.0


def test_nodes_that_are_gone_are_forgotten():
    rates = Rates()
    for node in ("a", "b"):
        rates.observe(node, 1, 0, 10.0)
    rates.keep(["a"])
    assert rates.observe("a", 1, 10, 11.0) == 10.0
    assert rates.observe("b", 1, 10, 11.0) is None


@pytest.mark.parametrize(
    ("service", "status", "said"),
    [
        (None, None, "no nodes in namespace catga;"),
        ("shop", None, "no nodes of service shop in namespace catga;"),
        ("shop", "faulted", "no faulted nodes of service shop in namespace catga;"),
    ],
)
def test_that_there_are_none_is_said_in_words(service, status, said):
    assert nothing_text("catga", service, status).startswith(said)


def test_a_node_is_a_row():
    node = NodeInfo(
        id="shop-1",
        service="shop",
        version="1.2.3",
        incarnation=(1, 77),
        status=NodeStatus.ONLINE,
        is_ready=True,
        types=("Quote",),
        commands=("Debit",),
        events=("Debited",),
        partitions={3: 41},
        event_partitions={1: 9},
        store="s-1",
        load=NodeLoad(3, 1_012, 99, 0.254, 58_400_000),
        zone="eu-1",
        last_beat=9.75,
    )
    owner = changed(
        beat_age=0.25,
        commands=("Debit",),
        events=("Debited",),
        partitions={3: 41},
        event_partitions={1: 9},
        store="s-1",
    )
    assert row_of(node, 10.0, 1_234.5) == owner
    assert row_of(node, 9.0, None).beat_age == 0.0
    dead = msgspec.structs.replace(node, status=NodeStatus.FAULTED, evicted=True)
    assert row_of(dead, 10.0, 1_234.5) == msgspec.structs.replace(
        owner, status="faulted", is_evicted=True, requests_per_second=None
    )


def test_a_node_that_comes_back_has_not_left():
    departures = Departures(10.0)
    assert departures.observe([ROW], 1.0) == [ROW]
    (left,) = departures.observe([], 2.0)
    assert (left.status, left.requests_per_second) == ("left", None)
    assert departures.observe([], 4.0)[0].beat_age == pytest.approx(ROW.beat_age + 2.0)
    assert departures.observe([ROW], 5.0) == [ROW]
    assert departures.observe([ROW], 6.0) == [ROW]


def test_nobody_is_kept_without_seconds():
    departures = Departures(0.0)
    departures.observe([ROW], 1.0)
    assert departures.observe([], 1.0) == []


@pytest.mark.parametrize(("stall", "shown"), [(0.0, "-"), (0.004, "-"), (0.006, "0.01 s"), (1.5, "1.50 s")])
def test_the_jitter_of_a_loop_is_no_stall(stall, shown):
    assert [cell.strip() for cell in words(drawn(changed(stall=stall)).splitlines()[1])][6] == shown


def test_a_line_below_the_table_says_that_it_is_old():
    stream = io.StringIO()
    rich.console.Console(file=stream, width=200).print(nodes_table([ROW], 200, silence_text(3.4)))
    assert stream.getvalue().splitlines()[2].startswith("nothing has been heard for 3 s, ")
