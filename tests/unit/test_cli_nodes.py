"""`catga nodes` on a bus whose view is given by hand."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from catga_bus.cli import nodes as command
from catga_bus.cli.nodes import NodesView, settled
from catga_bus.cli.options import Session
from catga_bus.cluster.records import ChangeKind, NodeChange, NodeInfo, NodeLoad, NodeStatus


def info(**changes: Any) -> NodeInfo:
    load = {"in_flight": 1, "intake": 2, "cpu": 0.1, "memory_bytes": 50_000_000, "handled": 100}
    node = {
        "id": "shop-1",
        "incarnation": (1, 77),
        "service": "shop",
        "version": "1.0.0",
        "status": "online",
        "types": ("Quote",),
        "is_ready": True,
        "last_beat": 1.0,
    }
    counts = {name: changes.pop(name, value) for name, value in load.items()}
    merged = node | changes
    merged["status"] = NodeStatus(merged["status"])
    return NodeInfo(load=NodeLoad(**counts), **merged)


class SeeingBus:
    """A bus that sees what it is told."""

    def __init__(self, *looks: list[NodeInfo], changes: tuple[Any, ...] = ()) -> None:
        self._looks = list(looks)
        self._changes = changes
        self.is_started = False

    async def __aenter__(self) -> "SeeingBus":
        self.is_started = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_started = False

    def nodes(self) -> list[NodeInfo]:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]

    async def watch_nodes(self) -> AsyncIterator[Any]:
        for change in self._changes:
            yield change


def change(kind: str, **changes: Any) -> NodeChange:
    return NodeChange(ChangeKind(kind), info(**changes))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(bus: SeeingBus, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(command, "command_bus", lambda *_: bus)
        code = command.nodes.main(list(words), standalone_mode=False, obj=Session())
        assert not bus.is_started
        return code, capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_RATE_PATIENCE", 0.2)
    monkeypatch.setattr(command, "_POLL", 0.0)


def test_each_node_is_a_line_of_the_table(run):
    code, out = run(SeeingBus([info(), info(id="bank-1", service="bank", status="suspect")]))
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["status", "service", "node"],
        ["suspect", "bank", "bank-1"],
        ["online", "shop", "shop-1"],
    ]


def test_the_json_is_one_document(run):
    code, out = run(SeeingBus([info()]), "--json")
    assert code == 0
    assert json.loads(out)["nodes"][0]["node"] == "shop-1"
    assert out.count("\n") == 1


def test_service_and_status_choose(run):
    bus = SeeingBus([info(), info(id="shop-2", status="faulted"), info(id="bank-1", service="bank", status="faulted")])
    _, out = run(bus, "--json", "--service", "shop", "--status", "faulted")
    assert [node["node"] for node in json.loads(out)["nodes"]] == ["shop-2"]


def test_none_is_said_in_words_or_as_an_empty_list(run):
    assert run(SeeingBus([]), "--service", "shop") == (
        0,
        "no nodes of service shop in namespace catga; a node is a bus that has started, as `catga run` starts one\n",
    )
    assert run(SeeingBus([]), "--json") == (0, '{"nodes":[]}\n')


def test_watching_without_a_terminal_prints_one_line_for_each_change(run):
    bus = SeeingBus([info()], changes=(change("joined"), change("faulted", status="faulted")))
    code, out = run(bus, "--watch")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["joined", "online", "shop", "shop-1"],
        ["faulted", "faulted", "shop", "shop-1"],
    ]


def test_watching_with_json_prints_one_object_for_each_change(run):
    bus = SeeingBus([], changes=(change("joined"), NodeChange(ChangeKind.MISSED, None, 3)))
    _, out = run(bus, "--watch", "--json")
    joined, missed = map(json.loads, out.splitlines())
    assert (joined["kind"], joined["node"]["node"]) == ("joined", "shop-1")
    assert missed == {"kind": "missed", "node": None, "missed": 3}


def test_changes_of_other_nodes_are_not_shown(run):
    bus = SeeingBus([], changes=(change("joined", service="bank"), change("joined"), change("left", status="left")))
    _, out = run(bus, "--watch", "--service", "shop", "--status", "online")
    assert len(out.splitlines()) == 1


async def test_the_first_look_waits_for_a_second_heartbeat():
    looks = [[info(last_beat=1.0)], [info(last_beat=1.0)], [info(last_beat=1.25, handled=300)]]
    (row,) = await settled(NodesView(SeeingBus(*looks), clock=lambda: 1.5))
    assert row.requests_per_second == 200 / 0.25
    assert row.beat_age == 0.25


async def test_the_first_look_does_not_wait_for_nodes_that_are_not_online():
    rows = await asyncio.wait_for(settled(NodesView(SeeingBus([info(status="faulted")]), clock=lambda: 1.0)), 0.1)
    assert [row.requests_per_second for row in rows] == [None]


async def test_a_node_that_beats_slowly_is_shown_without_a_rate():
    (row,) = await settled(NodesView(SeeingBus([info()]), clock=lambda: 1.0))
    assert row.requests_per_second is None


def test_nodes_that_are_commands_are_shown_only_if_asked_for(run):
    looks = [info(), info(id="catga-cli-1", service="catga-cli", metadata={"catga.command": "nodes"})]
    changes = tuple(NodeChange(ChangeKind.JOINED, node) for node in looks)
    assert len(json.loads(run(SeeingBus(looks), "--json")[1])["nodes"]) == 1
    assert len(json.loads(run(SeeingBus(looks), "--json", "--all")[1])["nodes"]) == 2
    assert len(run(SeeingBus(looks, changes=changes), "--watch")[1].splitlines()) == 1
    assert len(run(SeeingBus(looks, changes=changes), "--watch", "--all")[1].splitlines()) == 2


def test_a_node_that_left_is_kept_for_a_while_where_that_is_asked_for():
    now = 1.0
    bus = SeeingBus([info(), info(id="shop-2")], [info()])
    view = NodesView(bus, keep_left=10.0, clock=lambda: now)
    assert [row.status for row in view.rows()] == ["online", "online"]
    now = 2.0
    assert [(row.node, row.status) for row in view.rows()] == [("shop-1", "online"), ("shop-2", "left")]
    now = 11.9
    assert len(view.rows()) == 2
    now = 12.0
    assert [row.node for row in view.rows()] == ["shop-1"]


async def test_watching_for_days_keeps_no_rates_of_nodes_that_are_gone():
    gone = [change(kind, id=f"shop-{number}") for number in range(100) for kind in ("joined", "left")]
    view = NodesView(SeeingBus([info()], changes=(change("joined"), *gone)), clock=lambda: 1.0)
    assert len([one async for one in view.changes()]) == 201
    assert set(view._rates._seen) == {"shop-1"}


def test_silence_is_how_long_the_bus_has_not_heard_itself():
    bus = SeeingBus([])
    bus.node = info(last_beat=4.0)
    assert NodesView(bus, clock=lambda: 7.5).silence == 3.5


def test_a_node_that_is_gone_is_forgotten():
    view = NodesView(SeeingBus([info()], []), clock=lambda: 1.0)
    assert len(view.rows()) == 1
    assert view.rows() == []
    assert view._rates._seen == {}
