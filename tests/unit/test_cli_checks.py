"""What `catga doctor` makes of facts: servers, settings, streams and nodes."""

from typing import Any

import pytest

from catga_bus.cli.checks import ServerFacts, ServerSettings, check_capture, check_server, check_settings
from catga_bus.cli.findings import Finding, Level, count_levels
from catga_bus.cli.node_checks import ClockReading, NodeFacts, read_clock
from catga_bus.cli.node_checks import check_nodes as check_nodes_of
from catga_bus.cli.node_examination import Answer, facts_of
from catga_bus.cluster.records import NodeInfo, NodeStatus
from catga_bus.wire import Beat, Names


def server(**changes: Any) -> ServerFacts:
    facts = {
        "url": "nats://127.0.0.1:4222",
        "max_payload": 1_048_576,
        "round_trip": 0.0004,
        "is_loopback": True,
        "is_tls": False,
    }
    return ServerFacts(**(facts | changes))


def settings(**changes: Any) -> ServerSettings:
    facts = {
        "name": "n1",
        "version": "2.15.1",
        "ping_interval": 5.0,
        "ping_max": 2,
        "auth_required": True,
        "connections": 10,
        "max_connections": 2_048,
        "slow_consumers": 0,
    }
    return ServerSettings(**(facts | changes))


def node(number: int, **changes: Any) -> NodeFacts:
    facts = {"node_id": f"shop-{number}", "service": "shop", "version": "1.0", "types": ("Quote",)}
    return NodeFacts(**(facts | changes))


def check_nodes(nodes: list[NodeFacts] | None) -> list[Finding]:
    return check_nodes_of(nodes, Names())


def of(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


# -- servers -----------------------------------------------------------------------------------------------


def test_a_good_server_has_nothing_to_be_said_against() -> None:
    findings = check_server(server()) + check_settings([settings()])
    assert levels(findings) == {Level.OK}
    assert "nats://127.0.0.1:4222 answers in 0.4 ms" in findings[0].what
    assert not any(finding.why or finding.fix for finding in findings)


@pytest.mark.parametrize(("size", "level"), [(524_287, Level.WARNING), (524_288, Level.OK)])
def test_a_server_that_takes_little_is_warned_of(size: int, level: Level) -> None:
    (finding,) = of(check_server(server(max_payload=size)), "max_payload")
    assert finding.level is level
    assert f"{size:,}" in finding.what


def test_readable_passwords_on_the_network_are_warned_of() -> None:
    assert of(check_server(server(is_loopback=False)), "tls")[0].level is Level.WARNING
    assert not of(check_server(server(is_loopback=False, is_tls=True)), "tls")
    assert not of(check_server(server()), "tls")


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("2.15.1", Level.OK),
        ("3.0.0", Level.OK),
        ("2.14.3", Level.OK),
        ("2.14.2", Level.WARNING),
        ("2.12.12", Level.OK),
        ("2.12.11", Level.WARNING),
        ("2.11.99", Level.WARNING),
        ("2.9.0", Level.WARNING),
        ("2.16.0-RC.1", Level.OK),
        ("dev", Level.UNKNOWN),
    ],
)
def test_servers_with_published_holes_are_warned_of(version: str, level: Level) -> None:
    (finding,) = of(check_settings([settings(version=version)]), "version")
    assert finding.level is level
    assert version in finding.what


@pytest.mark.parametrize(
    ("interval", "most", "level", "says"),
    [
        (5.0, 2, Level.OK, "10 to 15 s"),
        (120.0, 2, Level.WARNING, "240 to 360 s"),
        (15.0, 2, Level.WARNING, "30 to 45 s"),
        (10.0, 2, Level.OK, "20 to 30 s"),
        (1.0, 2, Level.OK, "2 to 3 s"),
        (0.5, 2, Level.WARNING, "1 to 1.5 s"),
    ],
)
def test_pings_that_are_too_rare_or_too_often_are_warned_of(
    interval: float, most: int, level: Level, says: str
) -> None:
    (finding,) = of(check_settings([settings(ping_interval=interval, ping_max=most)]), "pings")
    assert finding.level is level
    assert says in finding.what
    assert (finding.fix != "") == (level is Level.WARNING)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"connections": 1_700}, "connections"),
        ({"slow_consumers": 3}, "slow consumers"),
        ({"auth_required": False}, "credentials"),
    ],
)
def test_what_goes_wrong_with_clients_is_warned_of(changes: dict[str, Any], check: str) -> None:
    findings = check_settings([settings(**changes)])
    assert [one.check for one in findings if one.level is not Level.OK] == [check]
    assert "n1" in of(findings, check)[0].what


def test_a_server_without_a_bound_of_connections_is_not_crowded() -> None:
    assert levels(check_settings([settings(max_connections=0)])) == {Level.OK}


def test_servers_that_differ_are_warned_of() -> None:
    findings = check_settings([settings(), settings(name="n2", version="2.15.0", ping_interval=6.0)])
    texts = [finding.what for finding in of(findings, "settings")]
    assert texts == [
        "servers differ in their versions: 2.15.0, 2.15.1",
        "servers differ in their ping settings: 5 s x 2, 6 s x 2",
    ]


def test_a_server_that_is_heard_twice_is_judged_once() -> None:
    assert len(of(check_settings([settings(), settings()]), "pings")) == 1


def test_settings_that_nobody_told_are_unknown_and_not_guessed() -> None:
    (finding,) = check_settings([], "ask --monitor")
    assert finding.level is Level.UNKNOWN
    assert finding.fix == "ask --monitor"


def test_streams_that_capture_requests_fail() -> None:
    subjects = ("catga.rpc.>", "catga.to.>")
    assert check_capture([], subjects).level is Level.OK
    assert "no leader" in check_capture(None, subjects).why
    refused = check_capture(None, subjects, is_permitted=False)
    assert "$JS.API.STREAM.NAMES" in refused.fix
    assert refused.level is check_capture(None, subjects).level is Level.UNKNOWN
    one = check_capture(["ALL"], subjects)
    assert one.level is Level.FAILED
    assert "stream ALL captures requests (catga.rpc.> or catga.to.>)" in one.what
    assert "9 streams (s0, s1, s2, s3, s4, ...)" in check_capture([f"s{place}" for place in range(9)], subjects).what


# -- nodes -------------------------------------------------------------------------------------------------


def test_good_nodes_have_nothing_to_be_said_against() -> None:
    facts = {
        "status": "online",
        "is_ready": True,
        "answers": True,
        "wire_versions": (1,),
        "stall": 0.01,
        "clock": ClockReading(0.01, 0.001),
    }
    findings = check_nodes([node(1, **facts), node(2, **facts), node(3, service="billing", types=("Pay",), **facts)])
    assert levels(findings) == {Level.OK}
    assert findings[0].what == "3 nodes of 2 services"


def test_no_node_is_warned_of_and_nodes_that_may_not_be_asked_are_unknown() -> None:
    assert check_nodes([])[0].level is Level.WARNING
    assert check_nodes(None)[0].level is Level.UNKNOWN


def test_a_node_id_used_twice_fails() -> None:
    (finding,) = of(check_nodes([node(1), node(1, version="1.1"), node(2)]), "node id")
    assert finding.level is Level.FAILED
    assert finding.what == "2 nodes have the id 'shop-1'"


def test_a_type_of_two_services_fails_and_names_both() -> None:
    findings = check_nodes([node(1), node(2, service="billing"), node(3, service="billing", types=("Pay",))])
    (finding,) = of(findings, "types")
    assert finding.level is Level.FAILED
    assert finding.what == "Quote is handled by the services billing and shop"


def test_versions_mixed_within_a_service_are_warned_of() -> None:
    findings = check_nodes([node(1), node(2, version="1.1"), node(3, service="billing", types=(), version="7")])
    (finding,) = of(findings, "versions")
    assert finding.level is Level.WARNING
    assert finding.what == "service shop runs 1.0, 1.1"


@pytest.mark.parametrize(
    ("versions", "level", "says"),
    [
        ([(1,), (1,)], Level.OK, "all nodes read wire 1"),
        ([(1, 2), (1,)], Level.WARNING, "wire 1 is spoken, because not all nodes read 2"),
        ([(1, 2), (2, 3), (2,)], Level.WARNING, "wire 2 is spoken, because not all nodes read 3"),
        ([(1, 2), (2,)], Level.OK, "all nodes read wire 2"),
        ([(1,), (2,)], Level.FAILED, "no wire version is read by all nodes; together they read 1, 2"),
    ],
)
def test_wire_versions_are_compared(versions: list[tuple[int, ...]], level: Level, says: str) -> None:
    nodes = [node(place, wire_versions=some) for place, some in enumerate(versions)]
    (finding,) = of(check_nodes(nodes), "wire")
    assert (finding.level, finding.what) == (level, says)


def test_wire_versions_that_nobody_told_are_not_judged() -> None:
    assert not of(check_nodes([node(1), node(2)]), "wire")


@pytest.mark.parametrize(
    ("status", "level"),
    [("suspect", Level.WARNING), ("faulted", Level.FAILED), ("online", None), ("draining", Level.OK)],
)
def test_nodes_that_are_not_well_are_named(status: str, level: Level | None) -> None:
    found = of(check_nodes([node(1, status=status)]), "status")
    assert [finding.level for finding in found] == ([] if level is None else [level])
    assert all(f"node shop-1 of shop is {status}" in finding.what for finding in found)


@pytest.mark.parametrize(("stall", "count"), [(None, 0), (0.2, 0), (0.3, 1), (7.0, 1)])
def test_stalled_nodes_are_named(stall: float | None, count: int) -> None:
    found = of(check_nodes([node(1, stall=stall)]), "stall")
    assert len(found) == count
    assert all(finding.level is Level.WARNING and f"{stall:.1f} s" in finding.what for finding in found)


def test_a_node_that_takes_no_work_is_named_once() -> None:
    assert [one.level for one in of(check_nodes([node(1, status="online", is_ready=False)]), "status")] == [
        Level.WARNING
    ]
    for status in ("faulted", "draining"):  # of these it is known anyway
        assert len(of(check_nodes([node(1, status=status, is_ready=False)]), "status")) == 1


def test_a_node_that_nobody_hears_fails() -> None:
    (finding,) = of(check_nodes([node(1, is_heard=False)]), "heartbeats")
    assert finding.level is Level.FAILED
    assert finding.what == "no heartbeat of node shop-1 of shop is heard"
    assert "'catga.nodes.*'" in finding.fix


@pytest.mark.parametrize(
    ("answers", "status", "count"),
    [(False, "online", 1), (True, "online", 0), (None, "online", 0), (False, "faulted", 0), (False, "draining", 0)],
)
def test_a_node_that_lives_and_does_not_answer_is_warned_of(answers: bool | None, status: str, count: int) -> None:
    found = of(check_nodes([node(1, answers=answers, status=status)]), "answers")
    assert [finding.level for finding in found] == [Level.WARNING] * count
    assert all("allow subscribe 'catga.to.shop.>'" in finding.fix for finding in found)


def test_a_caller_that_does_not_answer_needs_its_pings_and_no_more() -> None:
    """With all that is sent to its nodes permitted it could have requests sent there."""
    (finding,) = of(check_nodes([node(1, answers=False, status="online", types=())]), "answers")
    assert "allow subscribe 'catga.to.shop.*.ping'" in finding.fix


def test_open_breakers_are_named() -> None:
    (finding,) = of(check_nodes([node(1), node(2, breakers=("Quote", "bank-7"))]), "breakers")
    assert finding.level is Level.WARNING
    assert finding.what.startswith("node shop-2 of shop keeps its calls from Quote, bank-7:")


# -- facts from three sides --------------------------------------------------------------------------------


def heard(number: int, **changes: Any) -> NodeInfo:
    facts = {
        "id": f"shop-{number}",
        "service": "shop",
        "version": "1.0",
        "incarnation": (1, number),
        "status": NodeStatus.ONLINE,
        "is_ready": True,
        "types": ("Quote",),
        "wire_versions": (1,),
    }
    return NodeInfo(**(facts | changes))


def answer(number: int, error: float = 0.1, *, life: tuple[int, int] | None = None, version: str = "1.0") -> Answer:
    beat = Beat(
        *(f"shop-{number}", "shop", version, life or (1, number), ["Quote"], [1], None, None, {}),
        *(1, "online", True, 250),
    )
    return Answer(beat, ClockReading(2.0, error))


def test_each_node_is_known_by_its_heartbeats_and_its_answers() -> None:
    nodes = [heard(1, stall=0.4, breakers=("Quote",)), heard(2), heard(3)]
    answers = {"shop-1": [answer(1, 0.3), answer(1, 0.1)], "shop-2": []}
    one, two, three = facts_of(nodes, {"shop-1", "shop-2"}, answers, [])
    assert one == node(
        1,
        status="online",
        is_ready=True,
        wire_versions=(1,),
        stall=0.4,
        breakers=("Quote",),
        answers=True,
        clock=ClockReading(2.0, 0.1),
    )
    assert (two.answers, two.clock) == (False, None)
    assert three.answers is None  # it came after the others had been asked


def test_who_may_not_ask_knows_of_no_answers() -> None:
    assert [one.answers for one in facts_of([heard(1)], None, {}, [])] == [None]


def test_two_that_answer_for_one_id_are_two_nodes() -> None:
    answers = {"shop-1": [answer(1), answer(1, life=(2, 9), version="1.1"), answer(1, life=(2, 9), version="1.1")]}
    facts = facts_of([heard(1)], {"shop-1"}, answers, [])
    assert [(one.node_id, one.version) for one in facts] == [("shop-1", "1.0"), ("shop-1", "1.1")]


def test_discovery_adds_only_those_that_are_not_heard() -> None:
    discovered = [node(1, is_heard=False), node(2, is_heard=False)]
    facts = facts_of([heard(1)], set(), {}, discovered)
    assert [(one.node_id, one.is_heard) for one in facts] == [("shop-1", True), ("shop-2", False)]


# -- clocks ------------------------------------------------------------------------------------------------


def test_a_clock_is_read_in_the_middle_of_the_round_trip() -> None:
    assert read_clock(100.0, 103.5, 101.0) == ClockReading(offset=3.0, error=0.5)
    # The clock here was set back in between: no round trip, so no error, never a negative one.
    assert read_clock(100.0, 100.0, 90.0).error == 0.0


@pytest.mark.parametrize(
    ("offsets", "error", "says"),
    [
        ([0.0, 0.4, -0.4], 0.0, []),
        ([0.0, 0.0, 2.0], 0.0, ["of node shop-2 of shop is 2.0 s ahead of the others"]),
        ([0.0, -3_600.0, 0.0], 0.0, ["of node shop-1 of shop is 3,600.0 s behind the others"]),
        ([0.0, 0.0, 2.0], 1.5, []),
        ([50.0, 50.0, 50.1], 0.0, ["of this machine is 50.0 s behind the others"]),
        ([-50.0, -50.0, -90.0], 0.0, ["node shop-2 of shop is 40.0 s behind", "of this machine is 50.0 s ahead of"]),
        ([0.0, -3_600.0], 0.0, ["of node shop-1 of shop is 3,600.0 s behind the others"]),
        ([-3_600.0, -3_600.0], 0.0, ["of this machine is 3,600.0 s ahead of the others"]),
        ([2.0, 2.0, 0.0, 0.0], 0.0, ["of node shop-0 of shop is 2.0 s ahead", "of node shop-1 of shop is 2.0 s ahead"]),
    ],
)
def test_clocks_that_differ_are_warned_of(offsets: list[float], error: float, says: list[str]) -> None:
    nodes = [node(place, clock=ClockReading(offset, error)) for place, offset in enumerate(offsets)]
    found = of(check_nodes(nodes), "clocks")
    if not says:
        assert levels(found) == {Level.OK}
        return
    assert levels(found) == {Level.WARNING}
    assert len(found) == len(says)
    for finding, text in zip(found, says, strict=True):
        assert text in finding.what


@pytest.mark.parametrize(
    ("offsets", "what"),
    [
        ([2.0], "clocks differ by 2.0 s: this machine +0.0 s, node shop-0 of shop +2.0 s"),
        ([-3_600.0], "clocks differ by 3,600.0 s: node shop-0 of shop -3,600.0 s, this machine +0.0 s"),
        (
            [10.0, 20.0],
            "clocks differ by 20.0 s: this machine +0.0 s, node shop-0 of shop +10.0 s, node shop-1 of shop +20.0 s",
        ),
        (
            [-9.0, 0.0, -9.0],
            (
                "clocks differ by 9.0 s: node shop-0 of shop -9.0 s, node shop-2 of shop -9.0 s, "
                "node shop-1 of shop +0.0 s, this machine +0.0 s"
            ),
        ),
    ],
)
def test_where_no_more_clocks_agree_than_differ_none_is_accused(offsets: list[float], what: str) -> None:
    nodes = [node(place, clock=ClockReading(offset, 0.0)) for place, offset in enumerate(offsets)]
    (finding,) = of(check_nodes(nodes), "clocks")
    assert finding.level is Level.WARNING
    assert finding.what == what
    assert "which of them is right is not known" in finding.why


def test_of_many_clocks_that_differ_only_some_are_named() -> None:
    nodes = [node(place, clock=ClockReading(10.0 * place, 0.0)) for place in range(1, 100)]
    (finding,) = of(check_nodes(nodes), "clocks")
    assert finding.what.startswith("clocks differ by 990.0 s: this machine +0.0 s, node shop-1 of shop +10.0 s, ")
    assert finding.what.endswith("and 95 more")


def test_clocks_that_nobody_told_are_unknown() -> None:
    assert levels(of(check_nodes([node(1)]), "clocks")) == {Level.UNKNOWN}


def test_levels_are_counted() -> None:
    counts = count_levels([*check_nodes([]), *check_nodes(None)])
    assert counts == {Level.OK: 0, Level.UNKNOWN: 1, Level.WARNING: 1, Level.FAILED: 0}
