"""What `catga partitions` and `catga streams` show, from values and from a model of JetStream."""

import io
import json
from typing import Any

import msgspec
import pytest
import rich.console

from catga_bus.cli.partition_facts import PartitionFacts, place_of
from catga_bus.cli.partitions import show_partitions
from catga_bus.cli.partitions_view import (
    Moves,
    PartitionRow,
    Place,
    Waiting,
    change_text,
    changes_between,
    owners_of,
    owners_table,
    partitions_table,
    ranges_text,
    row_of,
    summary_text,
)
from catga_bus.cli.streams import rows_of, show_streams
from catga_bus.cli.streams_view import age_text, kind_of, streams_table
from catga_bus.cli.streams_view import row_of as stream_row
from catga_bus.cluster.records import NodeInfo, NodeStatus
from catga_bus.durability.routes.routes import PARTITIONS_KEY
from catga_bus.errors import ConfigurationError
from catga_bus.partition.records import Held, OwnerRecord, consumer_name, write_record
from catga_bus.testing import eventually
from catga_bus.transport.jetstream import ConsumerConfig, StreamConfig, StreamInfo
from catga_bus.wire import Names, owner_key
from tests.model_jetstream import ModelJetStream

NAMES = Names()
NOW = 1_764_072_000.0
PLACE: Place = ("shop", "cmd", 3)


def node(node_id: str = "shop-1", **facts: Any) -> NodeInfo:
    known: dict[str, Any] = {
        "service": "shop", "version": "1", "incarnation": (1, 7), "status": NodeStatus.ONLINE, "is_ready": True,
        "partitions": {3: 41}, "event_partitions": {3: 52},
    }  # fmt: skip
    return NodeInfo(id=node_id, **(known | facts))


def held(revision: int = 41, **facts: Any) -> Held:
    known: dict[str, Any] = {
        "node": "shop-1", "incarnation": (1, 7), "nonce": "n", "epoch": 41, "last": "shop-p3-e41-0000abcd",
    }  # fmt: skip
    return Held(OwnerRecord(**(known | facts)), revision)


def row(
    place: Place = PLACE,
    record: Held | None = None,
    waiting: Waiting = Waiting(5, 2, NOW - 4.0),  # noqa: B008 - frozen
    nodes: tuple[NodeInfo, ...] = (node(),),
    moves: int = 0,
) -> PartitionRow:
    return row_of(place, record, waiting, {one.id: one for one in nodes}, now_utc=NOW, moves=moves)


def drawn(table: Any) -> list[str]:
    stream = io.StringIO()
    rich.console.Console(file=stream, width=200).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


# -- rows --------------------------------------------------------------------------------------------------


def test_a_partition_is_a_row() -> None:
    assert row(record=held(), moves=2) == PartitionRow(
        service="shop",
        domain="cmd",
        partition=3,
        owner="shop-1",
        owner_status="online",
        epoch=41,
        is_announced=True,
        pending=5,
        in_flight=2,
        oldest_age=4.0,
        deaths=0,
        moves=2,
        troubles=(),
    )


def test_the_domain_says_which_announcement_counts() -> None:
    assert row(("shop", "evt", 3), held(52, epoch=52)).is_announced
    assert not row(("shop", "evt", 3), held()).is_announced
    assert not row(("shop", "cmd", 4), held()).is_announced


@pytest.mark.parametrize(
    ("record", "nodes", "waiting", "troubles"),
    [
        (None, (node(),), Waiting(None, None, None, has_consumer=False), ("never claimed",)),
        (held(state="released"), (node(),), Waiting(0, 0, None), ("no owner",)),
        (held(), (), Waiting(0, 0, None), ("its owner is not heard",)),
        (held(), (node(incarnation=(2, 9)),), Waiting(0, 0, None), ("its owner is not heard",)),
        (held(), (node(status=NodeStatus.FAULTED),), Waiting(0, 0, None), ("its owner is faulted",)),
        (held(), (node(status=NodeStatus.DRAINING),), Waiting(0, 0, None), ()),
        (held(), (node(),), Waiting(None, None, NOW, has_consumer=False), ("no consumer",)),
        (held(deaths=2), (node(),), Waiting(0, 0, None), ("2 owners died at the same record: one message at a time",)),
        (Held(None, 7), (node(),), Waiting(0, 0, None), ("no owner",)),
    ],
)
def test_what_is_wrong_with_a_partition_is_said(
    record: Held | None, nodes: tuple[NodeInfo, ...], waiting: Waiting, troubles: tuple[str, ...]
) -> None:
    assert row(PLACE, record, waiting, nodes).troubles == troubles


def test_moves_are_counted_from_the_first_look() -> None:
    moves = Moves()
    looks = [
        held(), held(), held(42, state="released"), held(43, node="shop-2"), None, held(44, node="shop-2"),
        held(45, node="shop-1"),
    ]  # fmt: skip
    assert [moves.observe(PLACE, look) for look in looks] == [0, 0, 0, 1, 1, 1, 2]
    assert moves.observe(("shop", "cmd", 4), held()) == 0


def test_changes_are_those_of_owner_and_epoch() -> None:
    before = [row(record=held()), row(("shop", "cmd", 4), held())]
    after = [row(record=held(44, node="shop-2", epoch=44)), row(("shop", "cmd", 4), held(), Waiting(9, 9, NOW))]
    [change] = changes_between(before, after)
    assert (change["partition"], change["from"], change["owner"], change["epoch"]) == (3, "shop-1", "shop-2", 44)
    assert changes_between(after, after) == []
    assert [one["from"] for one in changes_between([], after)] == [None, None]
    assert change_text(change) == "shop commands 3: shop-1 -> shop-2, epoch 44"


# -- tables ------------------------------------------------------------------------------------------------


def test_the_table_has_one_line_for_each_partition() -> None:
    header, first, second = drawn(partitions_table([row(("shop", "evt", 0), None), row(record=held())]))
    assert header.split() == [
        "service", "of", "partition", "owner", "epoch", "pending", "in", "flight", "oldest", "moves", "troubles",
    ]  # fmt: skip
    assert first.split() == ["shop", "commands", "3", "shop-1", "41", "5", "2", "4.0", "s", "0", "-"]
    assert second.split()[:5] == ["shop", "events", "0", "-", "-"]


def test_owners_are_put_together() -> None:
    rows = [row(("shop", "cmd", number), held(node="shop-1" if number < 3 else "shop-2")) for number in range(5)]
    rows.append(row(("shop", "cmd", 5), None, Waiting(None, None, None, has_consumer=False)))
    nobody, first, second = owners_of(rows)
    assert (first.owner, first.partitions, first.pending, first.oldest_age) == ("shop-1", (0, 1, 2), 15, 4.0)
    assert (second.owner, second.partitions, second.in_flight) == ("shop-2", (3, 4), 4)
    assert (nobody.owner, nobody.pending, nobody.troubles) == (None, None, ("never claimed",))
    lines = drawn(owners_table(rows))
    assert lines[2].split()[:5] == ["shop", "commands", "shop-1", "3", "0-2"]
    assert summary_text(rows) == (
        "6 partitions, 2 owners, 1 without; 25 records wait, and more in 1 that nobody reads, the oldest for 4.0 s"
    )


def test_numbers_are_put_together() -> None:
    assert ranges_text([]) == ""
    assert ranges_text([7, 1, 2, 3, 5]) == "1-3 5 7"


def test_durations_are_short() -> None:
    assert [age_text(age) for age in (0.04, 9.94, 59, 60, 3_599, 3_600, 86_400 * 3)] == [
        "0.0 s", "9.9 s", "59 s", "1 min", "60 min", "1 h", "3 d",
    ]  # fmt: skip


# -- facts -------------------------------------------------------------------------------------------------


@pytest.fixture
async def jetstream() -> ModelJetStream:
    """A service with two partitions, and one more on the event log."""
    made = ModelJetStream(NOW)
    bucket = NAMES.owners_bucket()
    two = {PARTITIONS_KEY: "2"}
    await made.create_stream(
        StreamConfig(
            name=NAMES.command_stream("shop"), subjects=(NAMES.commands("shop"),), retention="workqueue", metadata=two
        )
    )
    await made.create_stream(StreamConfig(name=NAMES.event_stream(), subjects=(NAMES.events(),), metadata=two))
    await made.create_stream(
        StreamConfig(name=f"KV_{bucket}", subjects=(f"$KV.{bucket}.>",), max_messages_per_subject=1)
    )
    return made


async def claim(jetstream: ModelJetStream, domain: str, partition: int, **facts: Any) -> str:
    """Write an owner's record and make its consumer; return the consumer's name."""
    record = held(**({"last": f"shop-p{partition}-e41-0000abcd"} | facts)).record
    assert record is not None
    bucket = NAMES.owners_bucket()
    await jetstream.publish(f"$KV.{bucket}.{owner_key('shop', domain, partition)}", write_record(record))
    return record.last


async def look(jetstream: ModelJetStream, facts: PartitionFacts | None = None) -> list[PartitionRow]:
    seen = facts if facts is not None else PartitionFacts(jetstream, NAMES)
    return await seen.rows([node(partitions={0: 41})], jetstream.now)


async def test_what_waits_in_a_queue_is_found(jetstream: ModelJetStream) -> None:
    name = await claim(jetstream, "cmd", 0)
    await jetstream.create_consumer(
        NAMES.command_stream("shop"), ConsumerConfig(name=name, filters=(NAMES.command("shop", 0),))
    )
    for _ in range(3):
        await jetstream.publish(NAMES.command("shop", 0), b"")
        await jetstream.publish(NAMES.command("shop", 1), b"")
        jetstream.now += 1.0
    consumption = await jetstream.consume(NAMES.command_stream("shop"), name, lambda _: None, lambda *_: None)
    consumption.pull(2)
    first, second = await look(jetstream)
    assert (first.partition, first.owner, first.epoch, first.is_announced) == (0, "shop-1", 41, True)
    assert (first.pending, first.in_flight, first.oldest_age, first.troubles) == (3, 2, 3.0, ())
    assert (second.owner, second.pending, second.oldest_age, second.troubles) == (None, None, 3.0, ("never claimed",))


async def test_the_consumer_of_a_fresh_claim_is_found_by_its_name(jetstream: ModelJetStream) -> None:
    await claim(jetstream, "cmd", 0, last="", nonce="abc")  # as the claim itself writes it
    name = consumer_name("shop", 0, 41, "abc")
    await jetstream.create_consumer(
        NAMES.command_stream("shop"), ConsumerConfig(name=name, filters=(NAMES.command("shop", 0),))
    )
    first, _ = await look(jetstream)
    assert (first.pending, first.troubles) == (0, ())


async def test_an_empty_queue_without_an_owner_has_nothing_pending(jetstream: ModelJetStream) -> None:
    first, _ = await look(jetstream)
    assert (first.pending, first.in_flight, first.oldest_age) == (0, 0, None)


async def test_what_waits_in_the_log_is_found(jetstream: ModelJetStream) -> None:
    name = await claim(jetstream, "evt", 1)
    filters = (NAMES.event("A", 1), NAMES.event("B", 1))
    await jetstream.create_consumer(NAMES.event_stream(), ConsumerConfig(name=name, filters=filters))
    for type_name in ("A", "Other", "B", "A"):
        await jetstream.publish(NAMES.event(type_name, 1), b"")
        jetstream.now += 1.0
    got: list[Any] = []
    consumption = await jetstream.consume(NAMES.event_stream(), name, got.append, lambda *_: None)
    consumption.pull(1)
    await eventually(lambda: got)
    jetstream.acknowledge(got[0].reply)
    rows = [one for one in await look(jetstream) if one.domain == "evt"]
    assert [one.partition for one in rows] == [0, 1]  # as many as the log has
    assert (rows[1].pending, rows[1].in_flight, rows[1].oldest_age) == (2, 0, 2.0)
    assert rows[0].troubles == ("never claimed",)


async def test_later_looks_read_only_what_has_changed(jetstream: ModelJetStream) -> None:
    facts = PartitionFacts(jetstream, NAMES)
    await claim(jetstream, "cmd", 0)
    await look(jetstream, facts)
    made = jetstream.calls["create_consumer"]
    assert [one.moves for one in await look(jetstream, facts)] == [0, 0]
    assert jetstream.calls["create_consumer"] == made
    await claim(jetstream, "cmd", 0, node="shop-2", epoch=50)
    first, _ = await look(jetstream, facts)
    assert (first.owner, first.epoch, first.moves) == ("shop-2", 50, 1)
    assert jetstream.calls["create_consumer"] == made + 1


async def test_a_bucket_that_was_made_again_is_read_from_its_beginning(jetstream: ModelJetStream) -> None:
    facts = PartitionFacts(jetstream, NAMES)
    bucket = NAMES.owners_bucket()
    for _ in range(3):
        await claim(jetstream, "cmd", 0)
    await look(jetstream, facts)
    await jetstream.delete_stream(f"KV_{bucket}")
    first, _ = await look(jetstream, facts)
    assert first.owner is None
    await jetstream.create_stream(StreamConfig(name=f"KV_{bucket}", subjects=(f"$KV.{bucket}.>",)))
    await claim(jetstream, "cmd", 1, node="shop-2")
    _, second = await look(jetstream, facts)
    assert second.owner == "shop-2"


async def test_only_one_service_is_looked_at(jetstream: ModelJetStream) -> None:
    await jetstream.create_stream(
        StreamConfig(
            name=NAMES.command_stream("bank"),
            subjects=(NAMES.commands("bank"),),
            retention="workqueue",
            metadata={PARTITIONS_KEY: "1"},
        )
    )
    assert {one.service for one in await look(jetstream)} == {"shop", "bank"}
    assert {one.service for one in await look(jetstream, PartitionFacts(jetstream, NAMES, "bank"))} == {"bank"}


async def test_rubbish_in_the_bucket_and_in_metadata_is_survived(jetstream: ModelJetStream) -> None:
    bucket = NAMES.owners_bucket()
    for key, value in (("shop.cmd.0", b"{"), ("shop.cmd.x", b"{}"), ("a.b", b"{}"), ("shop.xyz.1", b"{}")):
        await jetstream.publish(f"$KV.{bucket}.{key}", value)
    await jetstream.publish(f"$KV.{bucket}.{owner_key('shop', 'cmd', 1)}", b"", headers={"KV-Operation": "DEL"})
    await jetstream.create_stream(
        StreamConfig(
            name=NAMES.command_stream("odd"), subjects=(NAMES.commands("odd"),), metadata={PARTITIONS_KEY: "x"}
        )
    )
    rows = await look(jetstream)
    assert [(one.service, one.partition, one.troubles) for one in rows] == [
        ("shop", 0, ("no owner",)), ("shop", 1, ("no owner",)),
    ]  # fmt: skip


def test_keys_of_the_bucket_are_places() -> None:
    assert place_of("shop.cmd.12") == ("shop", "cmd", 12)
    assert place_of("a=2Eb.evt.0") == ("a=2Eb", "evt", 0)
    for key in ("", "shop", "shop.cmd", "shop.cmd.", "shop.cmd.-1", "shop.xyz.1", ".cmd.1", "shop.cmd.1.2"):
        assert place_of(key) is None


def test_partitions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(record=held())]
    show_partitions(rows, NAMES, None, owners=False, as_json=True)
    [document] = json.loads(capsys.readouterr().out)["partitions"]
    assert document == msgspec.to_builtins(rows[0]) | {"troubles": []}
    show_partitions(rows, NAMES, None, owners=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["owners"][0]["partitions"] == [3]
    show_partitions(rows, NAMES, None, owners=False, as_json=False)
    assert capsys.readouterr().out.endswith("1 partitions, 1 owners; 5 records wait, the oldest for 4.0 s\n")
    show_partitions([], NAMES, None, owners=False, as_json=False)
    assert capsys.readouterr().out.startswith("no partitions in namespace catga")
    with pytest.raises(ConfigurationError, match="service 'nix' has no partitions: there is no stream catga-cmd-nix"):
        show_partitions([], NAMES, "nix", owners=False, as_json=False)


# -- streams -----------------------------------------------------------------------------------------------


def test_streams_are_told_apart() -> None:
    assert kind_of("catga-cmd-shop", NAMES) == ("commands", "shop")
    assert kind_of("catga-at-shop", NAMES) == ("delayed", "shop")
    assert kind_of("catga-dlq-a=2Eb", NAMES) == ("dead letters", "a=2Eb")
    assert kind_of("catga-evt", NAMES) == ("events", "")
    assert kind_of("KV_catga-owners", NAMES) == ("owners", "")
    assert kind_of("KV_catga-routes", NAMES) == ("routes", "")
    for other in ("orders", "catga-cmd-", "other-cmd-shop", "KV_owners", "catga-evt-x"):
        assert kind_of(other, NAMES) is None


def info(**facts: Any) -> StreamInfo:
    config: dict[str, Any] = {
        "name": "catga-cmd-shop", "subjects": ("x",), "max_bytes": 1_000, "discard": "new", "retention": "workqueue",
        "metadata": {PARTITIONS_KEY: "64"},
    }  # fmt: skip
    known: dict[str, Any] = {"messages": 5, "bytes": 100, "first_sequence": 1, "last_sequence": 5, "consumers": 2}
    raw = facts.pop("raw", {})
    config |= {name: facts.pop(name) for name in list(facts) if name in StreamConfig.__struct_fields__}
    return StreamInfo(StreamConfig(**config), **(known | facts), raw=raw)


def test_a_stream_is_a_row() -> None:
    one = stream_row(info(), NAMES)
    assert one is not None
    assert (one.what, one.service, one.partitions, one.consumers, one.troubles) == ("commands", "shop", 64, 2, ())
    header, line = drawn(streams_table([one]))
    assert header.split() == [
        "stream", "what", "P", "storage", "replicas", "messages", "size", "limits", "consumers", "troubles",
    ]  # fmt: skip
    assert line.split("  ")[0] == "catga-cmd-shop"
    assert "1.0 kB; full: refused" in line
    assert stream_row(info(name="orders"), NAMES) is None
    log = stream_row(info(name="catga-evt", max_bytes=-1, max_age=604_800.0, discard="old", metadata={}), NAMES)
    assert log is not None
    assert log.partitions is None
    assert "7 d; full: the oldest go" in drawn(streams_table([log]))[1]


@pytest.mark.parametrize(
    ("facts", "troubles"),
    [
        ({"raw": {"cluster": {"leader": ""}}}, ("no leader",)),
        ({"raw": {"cluster": {"leader": "a", "replicas": [{"name": "b", "current": True}]}}}, ()),
        (
            {"raw": {"cluster": {"leader": "a", "replicas": [{"name": "b", "offline": True}, {"name": "c"}]}}},
            ("offline: b", "behind: c"),
        ),
        ({"bytes": 900}, ("90% full: what does not fit is refused",)),
        ({"bytes": 900, "discard": "old"}, ()),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(facts: dict[str, Any], troubles: tuple[str, ...]) -> None:
    one = stream_row(info(**facts), NAMES)
    assert one is not None
    assert one.troubles == troubles


async def test_streams_of_other_namespaces_are_left_out(
    jetstream: ModelJetStream, capsys: pytest.CaptureFixture[str]
) -> None:
    await jetstream.create_stream(StreamConfig(name="orders", subjects=("orders.*",)))
    rows = await rows_of(jetstream, NAMES)
    assert [one.name for one in rows] == ["catga-cmd-shop", "KV_catga-owners", "catga-evt"]
    show_streams(rows, "catga", as_json=True)
    assert len(json.loads(capsys.readouterr().out)["streams"]) == 3
    show_streams([], "catga", as_json=False)
    assert capsys.readouterr().out.startswith("nothing is stored in namespace catga")
