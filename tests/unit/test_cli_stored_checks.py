"""What `catga doctor` makes of facts about JetStream."""

from typing import Any

import pytest

from catga_bus.cli.checks import ServerSettings
from catga_bus.cli.findings import Finding, Level
from catga_bus.cli.stored_checks import StoreFacts, check_store
from catga_bus.transport.jetstream import StreamConfig, StreamInfo
from catga_bus.wire import Names

NAMES = Names()


def stream(name: str = "catga-cmd-shop", *, cluster: dict[str, Any] | None = None, **facts: Any) -> StreamInfo:
    messages = facts.pop("messages", 0)
    config = StreamConfig(name=name, subjects=("x",), **facts)
    return StreamInfo(config, messages, 0, 1, messages, 0, raw={} if cluster is None else {"cluster": cluster})


def settings(**changes: Any) -> ServerSettings:
    facts: dict[str, Any] = {
        "name": "n1", "version": "2.15.1", "ping_interval": 5.0, "ping_max": 2, "auth_required": True, "connections": 1,
        "max_connections": 10, "slow_consumers": 0, "sync_interval": 120.0,
    }  # fmt: skip
    return ServerSettings(**(facts | changes))


def check(
    *streams: StreamInfo, servers: tuple[ServerSettings, ...] = (), needs: bool = False, **facts: Any
) -> dict[str, Finding]:
    store = StoreFacts(**{"state": "on", "level": 5, "streams": streams, **facts})
    return {one.check: one for one in check_store(store, servers, NAMES, needs=needs, missing="ask")}


def replicated(**facts: Any) -> StreamInfo:
    return stream(replicas=3, cluster={"name": "c", "leader": "a"}, **facts)


@pytest.mark.parametrize(
    ("facts", "needs", "level", "text"),
    [
        (
            {"state": "off", "text": "jetstream not enabled"},
            False,
            Level.OK,
            "off (jetstream not enabled): requests work",
        ),
        ({"state": "off"}, True, Level.FAILED, "JetStream is off"),
        ({"state": "refused"}, True, Level.UNKNOWN, "whether JetStream is on is not known"),
        ({"state": "silent"}, False, Level.UNKNOWN, "JetStream does not answer"),
        ({"state": "silent"}, True, Level.FAILED, "JetStream does not answer"),
        ({"state": "on"}, True, Level.OK, "JetStream is on"),
    ],
)
def test_whether_jetstream_is_there(facts: dict[str, Any], needs: bool, level: Level, text: str) -> None:
    finding = check(needs=needs, **facts)["jetstream"]
    assert finding.level is level
    assert text in finding.what
    assert bool(finding.fix) == (level is not Level.OK)


@pytest.mark.parametrize(
    ("level", "said", "lacks"),
    [
        (0, "nats-server 2.10", ("2.12 adds", "2.14 stops")), (1, "2.11", ("2.12 adds", "2.14 stops")),
        (2, "2.12", ("2.14 stops",)), (4, "2.14", ()), (5, "2.15", ()), (9, "newer than 2.15", ()),
    ],
)  # fmt: skip
def test_what_a_version_lacks(level: int, said: str, lacks: tuple[str, ...]) -> None:
    finding = check(level=level)["features"]
    assert finding.level is Level.OK
    assert said in finding.what
    assert all(text in finding.what for text in lacks)
    assert ("all that the bus can use is there" in finding.what) == (not lacks)


def test_what_may_not_be_asked_is_not_known() -> None:
    findings = check(may_list=False)
    assert findings["stored"].level is Level.UNKNOWN
    assert "$JS.API.STREAM.NAMES" in findings["stored"].fix
    assert "grade" not in findings
    assert check(stream(), unheard=True)["stored"].level is Level.UNKNOWN


def test_an_empty_namespace_is_fine() -> None:
    findings = check()
    assert (findings["stored"].level, findings["stored"].what) == (Level.OK, "nothing is stored in namespace catga")
    assert "grade" not in findings


def test_replicas_count_in_a_cluster_only() -> None:
    single = check(stream())["replicas"]
    assert (single.level, single.fix) == (Level.OK, "")
    assert check(replicated())["replicas"].level is Level.OK
    few = check(replicated(), stream("catga-evt", replicas=1, cluster={"name": "c", "leader": "a"}))["replicas"]
    assert (few.level, few.what) == (Level.WARNING, "stream catga-evt of this cluster has fewer than 3 replicas")
    assert "catga streams apply" in few.fix


@pytest.mark.parametrize(
    ("cluster", "level"),
    [
        ({"name": "c", "leader": ""}, Level.FAILED),
        ({"name": "c", "leader": "a", "replicas": [{"name": "b", "offline": True}]}, Level.WARNING),
    ],
)
def test_a_stream_in_trouble_is_named(cluster: dict[str, Any], level: Level) -> None:
    finding = check(stream(replicas=3, cluster=cluster))["stream"]
    assert finding.level is level
    assert finding.what.startswith("stream catga-cmd-shop: ")


def test_when_servers_write_to_the_disk() -> None:
    unknown = check(stream())["sync"]
    assert (unknown.level, unknown.fix) == (Level.UNKNOWN, "ask")
    assert check(stream(), servers=(settings(sync_interval=None),))["sync"].level is Level.UNKNOWN
    assert "every 2 min" in check(stream(), servers=(settings(),))["sync"].what
    assert "sync_interval: always" in check(stream(), servers=(settings(sync_always=True),))["sync"].what
    differ = check(replicated(), servers=(settings(), settings(name="n2", sync_always=True)))["sync"]
    assert (differ.level, differ.what) == (Level.WARNING, "servers differ in their sync_interval")


@pytest.mark.parametrize(
    ("streams", "servers", "level", "texts"),
    [
        ((stream(storage="memory"),), (settings(),), Level.WARNING, ("memory",)),
        ((stream(),), (), Level.UNKNOWN, ("one copy", "the last seconds or minutes")),
        ((stream(),), (settings(),), Level.WARNING, ("one copy", "the last 2 min")),
        ((stream(),), (settings(sync_always=True),), Level.OK, ("grade: fsynced.", "disk of its one server")),
        ((replicated(),), (settings(),), Level.OK, ("grade: replicated.", "the last 2 min")),
        ((replicated(),), (), Level.OK, ("grade: replicated.", "the last seconds or minutes")),
        ((replicated(),), (settings(sync_always=True),), Level.OK, ("grade: replicated and fsynced.",)),
        ((replicated(), stream("catga-evt")), (settings(),), Level.WARNING, ("one copy",)),
        (
            (replicated(),),
            (settings(sync_always=True), settings(name="n2", sync_interval=10.0)),
            Level.OK,
            ("grade: replicated.", "the last 2 min"),
        ),
    ],
)
def test_the_weakest_stream_and_server_give_the_grade(
    streams: tuple[StreamInfo, ...], servers: tuple[ServerSettings, ...], level: Level, texts: tuple[str, ...]
) -> None:
    finding = check(*streams, servers=servers)["grade"]
    assert finding.level is level
    for text in texts:
        assert text in finding.what


def test_a_stream_in_memory_beside_files_is_told() -> None:
    finding = check(stream(), stream("catga-evt", storage="memory"))["storage"]
    assert finding.what == "stream catga-evt is in memory, the other streams in files"
    assert "storage" not in check(stream(storage="memory"), stream("catga-evt", storage="memory"))


def test_dead_letters_are_told() -> None:
    finding = check(stream(), stream("catga-dlq-shop", messages=3))["dead letters"]
    assert (finding.level, finding.what) == (Level.WARNING, "service shop has given up 3 messages")
    assert "catga dlq ls shop" in finding.fix
    assert "dead letters" not in check(stream(messages=9), stream("catga-dlq-shop"))
