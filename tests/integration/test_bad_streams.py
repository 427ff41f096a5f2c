"""JetStream off, full, read-only and out of space, and what it holds deleted, under a running service."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from catga_bus import ConfigurationError, DisconnectedError, Event, OverloadedError, PermissionDeniedError
from catga_bus.cluster.directory import Directory
from catga_bus.durability.durable import Durable
from catga_bus.errors import Outcome
from catga_bus.testing import eventually
from catga_bus.transport.jetstream import JetStream, JetStreamRefusedError, JetStreamUnknownError, StreamConfig
from tests.integration.till import OWNERS, QUEUE, ROUTES, Customer, Debit, MakeBus, Till, ask_api, jetstream_of, node_of
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

StartServer = Callable[..., NatsServer]

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: needs root")

PATIENCE = 30.0


class Opened(Event):
    pass


class Closed(Event):
    pass


class Disk:
    """A file system of its own, as large as it is told to be."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self._mount("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place))

    def remount(self, options: str) -> None:
        self._mount("mount", "-o", f"remount,{options}", str(self.place))

    def close(self) -> None:
        self._mount("umount", "-l", str(self.place))

    def _mount(self, *command: str) -> None:
        subprocess.run(command, check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


def stored_on(disk: Disk) -> str:
    """The configuration of a server that takes its disk for larger than it is, as all do that share one."""
    return f'jetstream {{ store_dir: "{disk.place}", max_file_store: 1GB }}'


# -- the store ---------------------------------------------------------------------------------------------


@needs_mounts
async def test_a_disk_that_is_full_makes_outcomes_unknown_and_loses_nothing(
    start_server: StartServer, make_bus: MakeBus, disk: Disk
) -> None:
    """nats-server (2.15.1) leaves without an answer what it has no space for, and all after it until its restart."""
    server = start_server(stored_on(disk))
    till = Till()
    till.is_open.clear()
    async with till.on(make_bus(server.url)), make_bus(server.url, "client") as client:
        customer = Customer(client, accounts=3, ballast=300_000)
        while await customer.debit(timeout=2.5):
            pass
        for error in customer.errors:
            assert (error.code, error.outcome) == ("TIMEOUT", Outcome.UNKNOWN)
            assert "the last attempt failed: " in str(error)
            assert "no answer in time" in str(error)
        till.is_open.set()  # handling needs no space
        await eventually(lambda: till.count >= customer.count, PATIENCE)

        disk.remount("size=64m")
        server.restart()
        await customer.debit_again(PATIENCE)
        await eventually(lambda: till.count >= customer.count, PATIENCE)
    till.check(customer.accepted, may_repeat=True)


@needs_mounts
async def test_a_store_that_is_read_only_ends_the_server_and_loses_nothing(
    start_server: StartServer, make_bus: MakeBus, disk: Disk
) -> None:
    server = start_server(stored_on(disk))
    till = Till()
    till.is_open.clear()
    async with till.on(make_bus(server.url)), make_bus(server.url, "client") as client:
        customer = Customer(client)
        assert await customer.debit()
        server.stop()
        disk.remount("ro")
        with pytest.raises(AssertionError, match="storage directory is not writable"):
            server.start()
        await eventually(lambda: not node_of(client).transport.is_connected)
        assert not await customer.debit(timeout=0.3)
        assert {error.outcome for error in customer.errors} == {Outcome.NOT_RUN}
        assert "there was no connection" in str(customer.errors[0])

        disk.remount("rw")
        server.start()
        await customer.debit_again(PATIENCE)
        till.is_open.set()
        await eventually(lambda: till.count >= customer.count, PATIENCE)
    till.check(customer.accepted, may_repeat=True)


async def test_a_work_queue_that_is_sealed_is_named(start_server: StartServer, make_bus: MakeBus) -> None:
    server = start_server(jetstream=True)
    till = Till()
    async with till.on(make_bus(server.url)), make_bus(server.url, "client") as client:
        await client.enqueue(Debit("a", 1))
        await eventually(lambda: till.count == 1)
        config = (await ask_api(client, f"STREAM.INFO.{QUEUE}", {}))["config"]
        config |= {"sealed": True, "discard": "new", "deny_delete": True, "deny_purge": True, "max_age": 0}
        await ask_api(client, f"STREAM.UPDATE.{QUEUE}", config)

        with pytest.raises(OverloadedError, match=f"the stream {QUEUE} has refused it: .*sealed") as caught:
            await client.enqueue(Debit("a", 2))

    assert caught.value.outcome is Outcome.NOT_RUN


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            "accounts { J { jetstream: {max_file: 8MB}, users: [{user: j, password: j}] } }\nno_auth_user: j",
            "resource limits exceeded for account",
        ),
        ("jetstream { max_file_store: 8MB }", "insufficient resources"),
    ],
    ids=["account", "server"],
)
async def test_a_store_that_others_have_filled_refuses_until_there_is_room(
    start_server: StartServer, make_bus: MakeBus, config: str, words: str
) -> None:
    """What a stream has reserved is not kept for it from streams without a bound."""
    url = start_server(config, jetstream=True).url
    small = {"command_max_bytes": 2 << 20}
    till = Till()
    till.is_open.clear()
    bus = till.on(make_bus(url, **small))
    await bus.start()
    async with make_bus(url, "client", **small) as client:
        customer = Customer(client)
        assert await customer.debit()
        streams = jetstream_of(client)
        await fill(streams)

        assert not await customer.debit(timeout=1.0)
        assert words in str(customer.errors[0])
        assert {error.outcome for error in customer.errors} <= {Outcome.NOT_RUN, Outcome.UNKNOWN}
        till.is_open.set()  # what is accepted is handled
        await eventually(lambda: till.count == customer.count)

        await bus.close()
        successor = till.on(make_bus(url, **small))
        await successor.start()  # it can claim when there is room
        await streams.purge("foreign")
        await customer.debit_again(PATIENCE)
        await eventually(lambda: till.count >= customer.count, PATIENCE)
    till.check(customer.accepted)


async def fill(streams: JetStream) -> None:
    """Fill the store with a stream that has no bound, to the last byte."""
    await streams.create_stream(StreamConfig(name="foreign", subjects=("foreign",)))
    for size in (200_000, 1_000, 1):
        with contextlib.suppress(JetStreamRefusedError, JetStreamUnknownError):
            while True:
                await streams.publish("foreign", b"x" * size)


# -- JetStream off -----------------------------------------------------------------------------------------


async def test_jetstream_that_is_switched_off_is_named_and_loses_nothing(
    start_server: StartServer, make_bus: MakeBus, tmp_path: Path
) -> None:
    on = f'jetstream {{ store_dir: "{tmp_path / "store"}" }}'
    server = start_server(on)
    till = Till()
    till.is_open.clear()
    async with till.on(make_bus(server.url)), make_bus(server.url, "client") as client:
        customer = Customer(client)
        assert await customer.debit()

        server.restart("")
        await eventually(lambda: node_of(client).reconnects == 1, PATIENCE)
        assert not await customer.debit(timeout=1.0)
        assert "no stream stores it, or the stream has no leader" in str(customer.errors[0])

        server.restart(on)
        await customer.debit_again(PATIENCE)
        till.is_open.set()
        await eventually(lambda: till.count >= customer.count, PATIENCE)
    till.check(customer.accepted, may_repeat=True)


async def test_without_jetstream_no_handler_of_commands_starts_and_no_command_is_sent(
    start_server: StartServer, make_bus: MakeBus
) -> None:
    url = start_server().url

    with pytest.raises(ConfigurationError, match="need JetStream, which is off on the server: switch it on"):
        await Till().on(make_bus(url)).start()
    async with make_bus(url, "client") as client:
        customer = Customer(client, accounts=1)
        assert not await customer.debit(timeout=1.0)
        assert customer.errors[0].outcome is Outcome.NOT_RUN
        assert "JetStream is off" in str(customer.errors[0])


async def test_an_account_without_jetstream_is_named_to_callers(start_server: StartServer, make_bus: MakeBus) -> None:
    config = """
    accounts { A { users: [{user: a, password: a}] }, J { jetstream: enabled, users: [{user: j, password: j}] } }
    """
    url = start_server(config, jetstream=True).url

    async with make_bus(url, "client", user="a", password="a") as client:
        for call in (client.enqueue, client.send):
            with pytest.raises(ConfigurationError, match="need JetStream, which is off for this account"):
                await call(Debit("a", 1), timeout=5.0)


async def test_a_caller_that_may_not_read_routes_is_told_so(start_server: StartServer, make_bus: MakeBus) -> None:
    permissions = 'permissions: { publish: { deny: ["$JS.API.STREAM.MSG.GET.*"] } }'
    config = f"authorization {{ users: [{{user: u, password: p, {permissions}}}] }}"
    url = start_server(config, jetstream=True).url

    async with make_bus(url, "client", user="u", password="p") as client:
        with pytest.raises(PermissionDeniedError, match=ROUTES):
            await client.enqueue(Debit("a", 1), timeout=20.0)


# -- at the start ------------------------------------------------------------------------------------------


async def test_another_number_of_partitions_than_the_stream_has_fails_the_start(
    start_server: StartServer, make_bus: MakeBus
) -> None:
    url = start_server(jetstream=True).url
    till = Till()
    async with till.on(make_bus(url)), make_bus(url, "client") as client:
        customer = Customer(client)
        assert await customer.debit()
        with pytest.raises(ConfigurationError, match=f"stream {QUEUE}: partitions is 4 and configured is 8"):
            await Till().on(make_bus(url, partitions=8)).start()
        assert await customer.debit()
        await eventually(lambda: till.count == customer.count)
    till.check(customer.accepted)


async def test_handlers_that_begin_in_the_log_at_different_places_fail_the_start(make_bus: MakeBus) -> None:
    bus = make_bus("memory://nobody", "mail")

    @bus.handler(start="all")
    async def on_opened(event: Opened) -> None: ...

    @bus.handler
    async def on_closed(event: Closed) -> None: ...

    with pytest.raises(ConfigurationError, match=r"on_opened.* has start='all' and .*on_closed.* has start='new'"):
        await bus.start()


@pytest.mark.parametrize("operation", ["STREAM.INFO", "STREAM.CREATE"])
async def test_a_service_that_may_not_look_at_streams_or_make_them_is_told_so(
    start_server: StartServer, make_bus: MakeBus, operation: str
) -> None:
    permissions = f'permissions: {{ publish: {{ deny: ["$JS.API.{operation}.>"] }} }}'
    config = f"authorization {{ users: [{{user: u, password: p, {permissions}}}] }}"
    bus = Till().on(make_bus(start_server(config, jetstream=True).url, user="u", password="p"))

    with pytest.raises(PermissionDeniedError) as caught:
        await bus.start()

    assert caught.value.subject == f"$JS.API.{operation}.{QUEUE}"


async def test_a_server_that_falls_silent_during_the_start_is_said_to(
    start_server: StartServer, make_bus: MakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(jetstream=True)
    bus = Till().on(make_bus(server.url, store_timeout=0.5))
    prepare = Durable.prepare

    async def freeze(self: Durable) -> None:
        await prepare(self)
        server.freeze()

    monkeypatch.setattr(Durable, "prepare", freeze)
    # The directory would wait for what it asks, which is another matter.
    monkeypatch.setattr(Directory, "listen", _nothing)
    monkeypatch.setattr(Directory, "join", _nothing)

    with pytest.raises(DisconnectedError, match="JetStream has not done it in time"):
        await bus.start()
    server.thaw()


async def _nothing(_: object) -> None:
    pass


# -- what is deleted under a running service ---------------------------------------------------------------


async def test_owners_and_consumers_that_are_deleted_cost_neither_order_nor_effects(
    start_server: StartServer, make_bus: MakeBus
) -> None:
    url = start_server(jetstream=True).url
    till = Till()
    async with till.on(make_bus(url)), till.on(make_bus(url)), make_bus(url, "client") as client:
        customer = Customer(client)
        streams = jetstream_of(client)
        flow = asyncio.create_task(customer.go_on())
        for _ in range(3):
            await passes(till, 50)
            for name in await streams.consumer_names(QUEUE):
                await streams.delete_consumer(QUEUE, name)
            await passes(till, 50)
            await streams.delete_stream(OWNERS)
            await passes(till, 50)
            for name in await streams.consumer_names(QUEUE):  # so that owners look who they are
                await streams.delete_consumer(QUEUE, name)
        await passes(till, 50)
        assert await streams.stream(OWNERS) is not None
        customer.is_over = True
        await flow
        await eventually(lambda: till.count >= customer.count, PATIENCE)
    assert not customer.errors
    till.check(customer.accepted, may_repeat=True)
    assert any(len(set(epochs)) > 3 for epochs in till.epochs.values())


async def test_routes_that_are_deleted_are_made_again(start_server: StartServer, make_bus: MakeBus) -> None:
    url = start_server(jetstream=True).url
    till = Till()
    async with till.on(make_bus(url)), make_bus(url, "client") as client, make_bus(url, "other") as other:
        customer = Customer(client)
        assert await customer.debit()
        await jetstream_of(client).delete_stream(ROUTES)
        assert await customer.debit()  # by what it knows
        await Customer(other).debit_again(PATIENCE)  # who knows nothing reads


async def passes(till: Till, count: int) -> None:
    """Wait for so many more effects."""
    before = till.count
    await eventually(lambda: till.count >= before + count, PATIENCE, what=f"{count} more effects after {before}")
