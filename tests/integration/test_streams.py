"""The streams of a service, on a real server and on the broker in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus.clock import monotonic
from catga_bus.config import checked_config
from catga_bus.durability.streams.streams import Streams
from catga_bus.errors import ConfigurationError, DisconnectedError, PermissionDeniedError
from catga_bus.testing import RecordedEvents
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream, make_transport
from catga_bus.transport.jetstream import JetStream, StreamConfig
from catga_bus.wire import Names
from tests.servers import NatsServer, start_cluster

NAMESPACE = "t"
NAMES = Names(NAMESPACE)
BUCKETS = ["KV_t-owners", "KV_t-routes"]
QUEUE, LATER, LOG, LETTERS = "t-cmd-billing", "t-at-billing", "t-evt", "t-dlq-billing"


class Client:
    """A connection with JetStream, and what the server has refused on it."""

    def __init__(self, *urls: str, **options: Any) -> None:
        self.events = RecordedEvents()
        self.transport = make_transport(ConnectionOptions(urls=urls, **options), self.events)
        self.js: JetStream

    async def __aenter__(self) -> "Client":
        await self.transport.connect()
        self.js = make_jetstream(self.transport, monotonic)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.js.close()
        await self.transport.close()

    def streams(self, service: str = "billing", **options: Any) -> Streams:
        config = checked_config(None, {"namespace": NAMESPACE, "partitions": 8, **options})
        return Streams(
            self.js, NAMES, service, config, monotonic, denied=lambda: [subject for subject, _ in self.events.denied]
        )


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    if request.param == "memory":
        url = f"memory://{uuid4().hex}"
    else:
        start: Callable[..., NatsServer] = request.getfixturevalue("start_server")
        url = start(jetstream=True).url
    async with Client(url) as client:
        yield client


@pytest.fixture
async def client_of_server(start_server: Callable[..., NatsServer]) -> AsyncIterator[Client]:
    async with Client(start_server(jetstream=True).url) as client:
        yield client


async def config_of(client: Client, name: str) -> StreamConfig:
    info = await client.js.stream(name)
    assert info is not None
    return info.config


async def test_the_start_creates_what_the_service_needs(client: Client) -> None:
    await client.streams().ensure(commands=True, events=True)

    queue, event_log, letters = [await config_of(client, name) for name in (QUEUE, LOG, LETTERS)]
    assert (queue.subjects, queue.retention, queue.discard) == (("t.cmd.billing.*",), "workqueue", "new")
    assert (queue.max_bytes, queue.storage, queue.replicas) == (1 << 30, "file", 1)
    assert queue.metadata["catga.partitions"] == "8"
    assert queue.metadata["catga.max_bytes"] == str(1 << 30)
    assert (event_log.subjects, event_log.retention, event_log.discard) == (("t.evt.*.*",), "limits", "old")
    assert (event_log.max_bytes, event_log.max_age) == (4 << 30, 7 * 86_400)
    assert (letters.subjects, letters.max_bytes, letters.max_age) == (("t.dlq.billing.*.*",), 1 << 30, 30 * 86_400)
    later = await config_of(client, LATER)
    assert (later.allow_schedules, later.max_bytes) == (True, -1)


async def test_a_service_without_commands_has_no_work_queue(client: Client) -> None:
    await client.streams().ensure(commands=False, events=True)

    assert await client.js.stream_names() == [*BUCKETS, LETTERS, LOG]


async def test_a_second_start_and_a_second_node_find_everything_as_it_is(client: Client) -> None:
    await asyncio.gather(*(client.streams().ensure(commands=True, events=True) for _ in range(3)))
    await client.streams(manage_streams="verify").ensure(commands=True, events=True)

    changes = await client.streams().plan_changes()
    assert {change.kind for change in changes} == {"keep"}


async def test_another_number_of_partitions_is_an_error_for_good(client: Client) -> None:
    await client.streams().ensure(commands=True, events=True)

    with pytest.raises(ConfigurationError) as caught:
        await client.streams(partitions=16).ensure(commands=True, events=True)
    with pytest.raises(ConfigurationError, match="never changes"):
        await client.streams(partitions=16).apply()

    text = str(caught.value)
    assert "stream t-cmd-billing: partitions is 8 and configured is 16" in text
    assert (await config_of(client, QUEUE)).metadata["catga.partitions"] == "8"


async def test_the_log_keeps_the_partitions_of_the_service_that_made_it(client: Client) -> None:
    await client.streams().ensure(commands=True, events=True)
    other = client.streams("shipping", partitions=32)

    await other.ensure(commands=True, events=True)

    assert other.log_partitions == 8
    assert (await config_of(client, "t-cmd-shipping")).metadata["catga.partitions"] == "32"


@pytest.mark.parametrize(
    ("options", "words", "can_change"),
    [
        (
            {"command_max_bytes": 1 << 20},
            "stream t-cmd-billing: max_bytes is 1073741824 and configured is 1048576",
            True,
        ),
        ({"event_max_age": 3_600.0}, "stream t-evt: max_age is 604800.0 and configured is 3600.0", True),
        ({"dead_letter_max_bytes": 1 << 20}, "stream t-dlq-billing: max_bytes", True),
        ({"stream_storage": "memory"}, "stream t-cmd-billing: storage is 'file' and configured is 'memory'", False),
    ],
)
async def test_what_differs_is_named_and_not_changed(
    client: Client, options: dict[str, Any], words: str, *, can_change: bool
) -> None:
    await client.streams().ensure(commands=True, events=True)

    with pytest.raises(ConfigurationError) as caught:
        await client.streams(**options).ensure(commands=True, events=True)

    assert words in str(caught.value)
    assert {change.kind for change in await client.streams().plan_changes()} == {"keep"}
    if can_change:
        assert "catga streams apply" in str(caught.value)
        await client.streams(**options).apply()
        await client.streams(**options).ensure(commands=True, events=True)
    else:
        with pytest.raises(ConfigurationError):
            await client.streams(**options).apply()


async def test_a_foreign_stream_of_this_name_is_not_touched(client: Client) -> None:
    await client.js.create_stream(StreamConfig(name=QUEUE, subjects=("t.cmd.billing.*",)))

    with pytest.raises(ConfigurationError, match=r"stream t-cmd-billing: partitions is None and configured is 8"):
        await client.streams().ensure(commands=True, events=False)


async def test_a_stream_that_stores_our_subjects_is_named(client: Client) -> None:
    await client.js.create_stream(StreamConfig(name="foreign", subjects=("t.cmd.>",)))

    with pytest.raises(ConfigurationError, match=r"refuses to create the stream t-cmd-billing.*another stream stores"):
        await client.streams().ensure(commands=True, events=False)


async def test_where_nodes_may_not_create_streams_somebody_else_does(client: Client) -> None:
    nodes = client.streams(manage_streams="verify")
    with pytest.raises(ConfigurationError, match=r"stream t-cmd-billing is not there.*catga streams apply"):
        await nodes.ensure(commands=True, events=True)

    done = await client.streams(manage_streams="verify").apply()

    assert [change.kind for change in done] == ["create"] * 6
    await nodes.ensure(commands=True, events=True)


# -- servers that cannot -----------------------------------------------------------------------------------


@pytest.mark.nats
async def test_replicas_that_differ_are_named_where_they_are_configured(client_of_server: Client) -> None:
    client = client_of_server
    await client.streams().ensure(commands=True, events=False)

    with pytest.raises(ConfigurationError, match="stream t-cmd-billing: replicas is 1 and configured is 3"):
        await client.streams(stream_replicas=3).ensure(commands=True, events=False)
    with pytest.raises(ConfigurationError, match="refuses to change the stream t-cmd-billing"):
        await client.streams(stream_replicas=3).apply(events=False)


@pytest.mark.nats
async def test_a_server_without_jetstream_is_named_at_once(start_server: Callable[..., NatsServer]) -> None:
    async with Client(start_server().url) as client:
        with pytest.raises(ConfigurationError, match="need JetStream, which is off on the server"):
            await client.streams().ensure(commands=True, events=False)


@pytest.mark.nats
async def test_an_account_without_jetstream_is_named_at_once(start_server: Callable[..., NatsServer]) -> None:
    config = (
        "accounts { A { users: [{user: a, password: a}] }, J { jetstream: enabled, users: [{user: j, password: j}] } }"
    )
    server = start_server(config, jetstream=True)

    async with Client(server.url, user="a", password="a") as client:
        with pytest.raises(ConfigurationError, match="off for this account"):
            await client.streams().ensure(commands=True, events=False)


@pytest.mark.nats
async def test_an_account_that_is_full_is_named(start_server: Callable[..., NatsServer]) -> None:
    config = "accounts { J { jetstream: {max_store: 1MB, max_streams: 5}, users: [{user: j, password: j}] } }"
    server = start_server(config, jetstream=True)

    async with Client(server.url, user="j", password="j") as client:
        with pytest.raises(ConfigurationError, match=r"refuses to create the stream t-cmd-billing.*raise the limits"):
            await client.streams().ensure(commands=True, events=False)
        small = client.streams(command_max_bytes=65_536, dead_letter_max_bytes=65_536)
        await small.ensure(commands=True, events=False)


@pytest.mark.nats
async def test_an_account_with_room_for_one_replica_of_each_stream_is_enough_for_a_server_alone(
    start_server: Callable[..., NatsServer],
) -> None:
    config = "accounts { J { jetstream: {max_file: 7GB}, users: [{user: j, password: j}] } }"
    server = start_server("jetstream { max_file_store: 10GB }\n" + config, jetstream=True)

    async with Client(server.url, user="j", password="j") as client:
        await client.streams().ensure(commands=True, events=True)
        await client.streams().ensure(commands=True, events=True)
        with pytest.raises(ConfigurationError, match=r"refuses to create the stream t-at-shipping.*raise the limits"):
            await client.streams("shipping").ensure(commands=True, events=True)


@pytest.mark.nats
async def test_a_user_who_may_not_look_or_not_create_is_told_so(start_server: Callable[..., NatsServer]) -> None:
    looks = '"$JS.API.INFO", "$JS.API.STREAM.INFO.>"'
    config = f"""authorization {{ users: [
        {{user: blind, password: x, permissions: {{publish: ["$JS.API.INFO"], subscribe: ["_INBOX.>"]}}}},
        {{user: reader, password: x, permissions: {{publish: [{looks}], subscribe: ["_INBOX.>"]}}}}
    ] }}"""
    server = start_server(config, jetstream=True)

    for user, operation in (("blind", "STREAM.INFO"), ("reader", "STREAM.CREATE")):
        async with Client(server.url, user=user, password="x") as client:
            with pytest.raises(PermissionDeniedError) as caught:
                await client.streams(store_timeout=10.0).ensure(commands=True, events=False)
            assert caught.value.subject == f"$JS.API.{operation}.{QUEUE}"


@pytest.mark.nats
async def test_a_server_without_space_is_named(start_server: Callable[..., NatsServer]) -> None:
    server = start_server("jetstream { max_file_store: 1MB }", jetstream=True)

    async with Client(server.url) as client:
        with pytest.raises(ConfigurationError, match=r"refuses to create the stream t-cmd-billing.*raise the limits"):
            await client.streams().ensure(commands=True, events=False)


@pytest.mark.nats
async def test_a_server_that_does_not_answer_is_given_up(start_server: Callable[..., NatsServer]) -> None:
    server = start_server(jetstream=True)
    async with Client(server.url) as client:
        server.freeze()
        with pytest.raises(DisconnectedError, match="JetStream has not done it in time"):
            await client.streams(store_timeout=0.1).ensure(commands=True, events=False)
        server.thaw()


async def test_a_new_bucket_of_owners_has_revisions_above_all_old_ones(client: Client) -> None:
    await client.streams().ensure(commands=True, events=False)
    first = await config_of(client, "KV_t-owners")
    await client.js.delete_stream("KV_t-owners")
    await client.streams().ensure(commands=True, events=False)

    assert 1_500_000_000_000 < first.first_sequence <= (await config_of(client, "KV_t-owners")).first_sequence


@pytest.mark.nats
@pytest.mark.slow
async def test_a_cluster_of_three_holds_three_replicas(start_server: Callable[..., NatsServer]) -> None:
    servers = start_cluster(start_server, 3, jetstream=True)
    async with Client(*(server.url for server in servers)) as client:
        await client.streams(store_timeout=60.0).ensure(commands=True, events=True)

        for name in (QUEUE, LATER, LOG, LETTERS, *BUCKETS):
            config = await config_of(client, name)
            assert (config.replicas, config.metadata["catga.replicas"]) == (3, "3")
        with pytest.raises(ConfigurationError, match="stream_replicas=5 needs as many servers"):
            await client.streams("shipping", stream_replicas=5).ensure(commands=True, events=False)


@pytest.mark.nats
@pytest.mark.slow
async def test_a_cluster_without_room_for_all_replicas_is_named_and_no_stream_has_fewer(
    start_server: Callable[..., NatsServer],
) -> None:
    small = {"command_max_bytes": 2 << 20, "event_max_bytes": 12 << 20, "dead_letter_max_bytes": 2 << 20}
    servers = start_cluster(start_server, 3, "jetstream { max_file_store: 10MB }", jetstream=True)
    servers[0].restart(servers[0].config.replace("10MB", "100MB"))  # it alone has room for one
    async with Client(*(server.url for server in servers)) as client:
        with pytest.raises(
            ConfigurationError, match=r"refuses to create the stream t-evt: .*storage.*raise the limits"
        ):
            await client.streams(store_timeout=60.0, **small).ensure(commands=True, events=True)

        assert await client.js.stream(LOG) is None
        assert (await config_of(client, QUEUE)).replicas == 3


def test_a_change_reads_as_a_sentence() -> None:
    from catga_bus.durability.streams.plans import Change, Difference

    change = Change("s", "update", (Difference("s", "max_bytes", 1, 2, can_change=True),))

    assert str(change) == (
        "update s (stream s: max_bytes is 1 and configured is 2: run `catga streams apply`, or configure what is there)"
    )
    assert msgspec.structs.asdict(change)["kind"] == "update"
