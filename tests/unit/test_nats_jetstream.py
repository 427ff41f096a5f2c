"""What the client asks a server for, and what it makes of odd answers; the contract has the ordinary ones."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import eventually
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.jetstream_json import consumer_to_json, stream_to_json
from catga_bus.transport.key_value import KeyValue
from catga_bus.transport.nats_jetstream import NatsJetStream
from tests.unit.played_server import PlayedServer, Published

STATE = {"messages": 0, "bytes": 0, "first_seq": 0, "last_seq": 0, "consumer_count": 0}
LOG = StreamConfig(name="s", subjects=("s.*",))
NAME_IN_USE = {"error": {"code": 400, "err_code": 10058, "description": "stream name already in use"}}


@pytest.fixture
def server() -> PlayedServer:
    return PlayedServer()


@pytest.fixture
def js(server: PlayedServer) -> NatsJetStream:
    return NatsJetStream(server, monotonic)


async def played(server: PlayedServer, call: Awaitable[Any], *answers: Any) -> Any:
    """Return the outcome of a call whose requests are answered in turn; None stands for nobody there."""
    task = asyncio.ensure_future(call)
    before = len(server.published)
    for count, answer in enumerate(answers, 1):
        await eventually(lambda wanted=before + count: len(server.published) == wanted)  # type: ignore[misc]
        if answer is None:
            server.say_nobody()
        else:
            server.answer(answer)
    return await task


async def test_a_publish_carries_its_headers_and_nothing_else(server: PlayedServer, js: NatsJetStream) -> None:
    ack = {"stream": "s", "seq": 7}
    await played(server, js.publish("s.0", b"x"), ack)
    await played(server, js.publish("s.0", b"x", message_id="id", expected_last=0, headers={"A": "1"}), ack)
    plain, full = server.published
    assert plain == Published("s.0", b"x", plain.reply, None)
    assert full.headers == {"A": "1", "Nats-Msg-Id": "id", "Nats-Expected-Last-Subject-Sequence": "0"}


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({"stream": "s", "seq": 7}, (7, False)),
        ({"stream": "s", "seq": 7, "duplicate": True, "domain": "hub", "batch": "x"}, (7, True)),
    ],
)
async def test_an_acknowledged_publish_says_where(
    server: PlayedServer, js: NatsJetStream, answer: Any, outcome: tuple[int, bool]
) -> None:
    ack = await played(server, js.publish("s.0", b""), answer)
    assert (ack.stream, ack.sequence, ack.duplicate) == ("s", *outcome)


@pytest.mark.parametrize(
    "answer",
    [None, b"", b"hello", b"\xff", b"[]", {"price": 9}, {"seq": "7", "stream": "s"}],
    ids=["nobody", "empty", "text", "bytes", "list", "of somebody else", "of another shape"],
)
async def test_an_answer_that_proves_nothing_leaves_a_publish_unknown(
    server: PlayedServer, js: NatsJetStream, answer: Any
) -> None:
    with pytest.raises(JetStreamUnknownError, match=r"^s\.0: "):
        await played(server, js.publish("s.0", b""), answer)


@pytest.mark.parametrize("answer", [None, b"", b"hello", b"[]", b"7", b'{"config":"\xff"}', b"[" * 100_000])
async def test_an_api_answer_that_cannot_be_read_is_unknown(
    server: PlayedServer, js: NatsJetStream, answer: Any
) -> None:
    with pytest.raises(JetStreamUnknownError, match=r"STREAM\.INFO\.s"):
        await played(server, js.stream("s"), answer)


@pytest.mark.parametrize("answer", [{}, {"config": {}}, {"config": {"name": "s"}, "state": None}])
async def test_an_api_answer_that_lacks_something_is_unknown(
    server: PlayedServer, js: NatsJetStream, answer: Any
) -> None:
    with pytest.raises(JetStreamUnknownError, match="not of JetStream"):
        await played(server, js.stream("s"), answer)


async def test_jetstream_that_is_off_is_a_refusal(server: PlayedServer, js: NatsJetStream) -> None:
    with pytest.raises(JetStreamRefusedError) as caught:
        await played(server, js.account(), None)
    assert caught.value.code == ApiError.NOT_ENABLED


async def test_a_stream_that_differs_only_in_what_the_server_adds_is_the_same(
    server: PlayedServer, js: NatsJetStream
) -> None:
    config = StreamConfig(name="s", subjects=("s.*",), metadata={"partitions": "16"})
    fields = stream_to_json(config) | {
        "metadata": {"partitions": "16", "_nats.req.level": "0", "_nats.ver": "2.99"},
        "compression": "none",
        "something_new": {"a": 1},
        "first_seq": 1,
    }
    there = {"config": fields, "state": STATE, "cluster": {"leader": "n1"}}
    info = await played(server, js.create_stream(config), NAME_IN_USE, there)
    assert info.config.metadata["partitions"] == "16"
    assert info.raw["cluster"] == {"leader": "n1"}


@pytest.mark.parametrize(
    "other",
    [{"max_bytes": 7}, {"metadata": {"partitions": "32"}}, {"num_replicas": 3}, {"first_seq": 9}, {"retention": "x"}],
)
async def test_a_stream_that_differs_in_what_we_set_is_another(
    server: PlayedServer, js: NatsJetStream, other: dict[str, Any]
) -> None:
    config = StreamConfig(name="s", subjects=("s.*",), metadata={"partitions": "16"})
    there = {"config": stream_to_json(config) | other, "state": STATE}
    with pytest.raises(JetStreamRefusedError) as caught:
        await played(server, js.create_stream(config), NAME_IN_USE, there)
    assert caught.value.code == ApiError.STREAM_NAME_IN_USE


async def test_an_old_server_that_ignores_schedules_is_found_out(server: PlayedServer, js: NatsJetStream) -> None:
    config = StreamConfig(name="s", subjects=("s.*",), allow_schedules=True)
    answer = {"config": stream_to_json(LOG), "state": STATE}
    with pytest.raises(JetStreamRefusedError, match=r"need nats-server 2\.12 or newer"):
        await played(server, js.create_stream(config), answer)


async def test_what_only_new_servers_know_is_not_said_to_old_ones(server: PlayedServer, js: NatsJetStream) -> None:
    await played(server, js.create_stream(LOG), {"config": stream_to_json(LOG), "state": STATE})
    asked = server.published[0].json
    assert "allow_msg_schedules" not in asked
    assert "first_seq" not in asked
    assert "metadata" not in asked


@pytest.mark.parametrize(
    ("filters", "subject", "fields"),
    [
        (("s.0",), "$JS.API.CONSUMER.CREATE.s.c.s.0", {"filter_subject": "s.0"}),
        (("s.*",), "$JS.API.CONSUMER.CREATE.s.c", {"filter_subject": "s.*"}),
        (("s.0", "s.1"), "$JS.API.CONSUMER.CREATE.s.c", {"filter_subjects": ["s.0", "s.1"]}),
    ],
)
async def test_a_consumer_is_created_and_never_changed(
    server: PlayedServer, js: NatsJetStream, filters: tuple[str, ...], subject: str, fields: dict[str, Any]
) -> None:
    config = ConsumerConfig(name="c", filters=filters)
    answer = {
        "name": "c",
        "config": consumer_to_json(config),
        "ack_floor": {"stream_seq": 0},
        "delivered": {"stream_seq": 0},
        "num_ack_pending": 0,
        "num_pending": 0,
    }
    await played(server, js.create_consumer("s", config), answer)
    (asked,) = server.published
    assert asked.subject == subject
    assert asked.json["action"] == "create"
    assert asked.json["stream_name"] == "s"
    assert asked.json["config"] | fields == asked.json["config"]
    assert asked.json["config"]["durable_name"] == "c"
    assert asked.json["config"]["max_deliver"] == -1


async def test_names_come_in_pages(server: PlayedServer, js: NatsJetStream) -> None:
    pages = [
        {"total": 5, "streams": ["e", "d"]},
        {"total": 5, "streams": ["c", "b"]},
        {"total": 5, "streams": ["a"]},
    ]
    assert await played(server, js.stream_names("x"), *pages) == ["a", "b", "c", "d", "e"]
    assert [each.json for each in server.published] == [{"subject": "x", "offset": each} for each in (0, 2, 4)]


async def test_a_page_that_stays_empty_ends_the_list(server: PlayedServer, js: NatsJetStream) -> None:
    assert await played(server, js.consumer_names("s"), {"total": 5, "consumers": ["a"]}, {"total": 5}) == ["a"]


async def test_a_message_is_read_with_headers_time_and_bytes(server: PlayedServer, js: NatsJetStream) -> None:
    answer = {
        "message": {
            "subject": "s.0",
            "seq": 7,
            "hdrs": "TkFUUy8xLjANCkE6IDENCg0K",
            "data": "AP8=",
            "time": "2023-11-14T22:13:20.250000999Z",
        }
    }
    message = await played(server, js.last_message("s", "s.0"), answer)
    assert (message.subject, message.sequence, message.payload, message.headers, message.time) == (
        "s.0",
        7,
        b"\x00\xff",
        {"A": "1"},
        1_700_000_000.25,
    )
    (asked,) = server.published
    assert (asked.subject, asked.json) == ("$JS.API.STREAM.MSG.GET.s", {"last_by_subj": "s.0"})


async def test_a_denied_delete_of_a_message_that_is_there_stays_an_error(
    server: PlayedServer, js: NatsJetStream
) -> None:
    denied = {"error": {"code": 500, "err_code": 10057, "description": "message delete not permitted"}}
    there = {"message": {"subject": "s.0", "seq": 7, "time": "2023-11-14T22:13:20Z"}}
    with pytest.raises(JetStreamRefusedError, match="not permitted"):
        await played(server, js.delete_message("s", 7), denied, there)


async def test_an_acknowledgement_without_a_connection_does_nothing(server: PlayedServer, js: NatsJetStream) -> None:
    server.is_connected = False
    js.acknowledge("$JS.ACK.s.c.1.1.1.0.0")
    assert server.published == []


# A bucket, where its server is played.


@pytest.fixture
def bucket(js: NatsJetStream) -> KeyValue:
    return KeyValue(js, "b")


async def test_keys_that_another_stream_stores_are_an_error_of_configuration(
    server: PlayedServer, bucket: KeyValue
) -> None:
    with pytest.raises(ValueError, match=r"bucket 'b' are stored by another stream, 'everything'"):
        await played(server, bucket.write("k", b"", 0), {"stream": "everything", "seq": 1})


async def test_a_listing_that_stays_silent_is_unknown_and_leaves_no_reader(
    server: PlayedServer, bucket: KeyValue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catga_bus.transport.key_value._SILENCE", 0.05)
    config = ConsumerConfig(name="r", filters=("$KV.b.>",), acks="none")
    made = {
        "name": "r",
        "config": consumer_to_json(config),
        "ack_floor": {"stream_seq": 0},
        "delivered": {"stream_seq": 0},
        "num_ack_pending": 0,
        "num_pending": 2,
    }
    task = asyncio.ensure_future(bucket.entries())
    await eventually(lambda: len(server.published) == 1)
    server.answer(made)
    await eventually(lambda: len(server.published) == 2)
    reply = "$JS.ACK.KV_b.r.1.5.1.1700000000000000000.1"
    server.say(server.published[1].reply, b"v", subject="$KV.b.k", reply=reply)
    await eventually(lambda: len(server.published) == 3)
    assert ".CONSUMER.DELETE.KV_b.list-" in server.published[2].subject
    server.say_nobody()
    with pytest.raises(JetStreamUnknownError, match="1 of 2 entries did not come"):
        await task
    assert len(server.subscriptions) == 1


def test_the_name_of_a_bucket_is_one_token(js: NatsJetStream) -> None:
    make: Callable[[str], KeyValue] = lambda name: KeyValue(js, name)  # noqa: E731
    for name in ("", "a b", "a*"):
        with pytest.raises(ValueError, match="subject"):
            make(name)
