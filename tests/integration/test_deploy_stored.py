"""The users of `deploy/nats` that store and handle what is stored: each can do its work, and nothing else."""

import asyncio
import json
import re
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from catga_bus import Bus, ConfigurationError, Ok, PermissionDeniedError
from catga_bus.cli import main
from catga_bus.clock import monotonic
from catga_bus.config import BusConfig
from catga_bus.durability.streams.plans import wanted_streams
from catga_bus.durability.streams.streams import Streams
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.testing.carrier import Received
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream, make_transport
from catga_bus.wire import Names
from tests.deployment import FILES, Deployment
from tests.integration.banking import OPTIONS, SERVICE, Bank, Debit, Debited
from tests.servers import NatsServer, server_binary

pytestmark = pytest.mark.nats

PATIENCE = 30.0

Shell = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    server_binary()
    return Deployment(tmp_path_factory.mktemp("deployment"))


@pytest.fixture(scope="module")
def server(deployment: Deployment) -> Iterator[NatsServer]:
    server = deployment.server()
    with deployment.started(server):
        yield server


@pytest.fixture
def shell(server: NatsServer, deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Run a command as a user, in a thread; returns its code and all that it wrote."""

    async def shell(user: str, *arguments: str) -> tuple[int, str]:
        url = f"nats://{user}:{deployment.password(user)}@{server.address}"
        code = await asyncio.to_thread(main, [*arguments, "--url", url])
        output = capsys.readouterr()
        return code, output.out + output.err

    return shell


def bus_of(server: NatsServer, deployment: Deployment, user: str, service: str, **options: Any) -> Bus:
    return Bus(service, url=server.url, manage_streams="verify", **OPTIONS, **deployment.account(user), **options)


def denied(bus: Bus) -> set[str]:
    return bus._connection.denied


async def test_a_service_its_callers_its_deployer_and_its_operators_have_all_that_they_need(
    server: NatsServer, deployment: Deployment, shell: Shell, tmp_path: Path
) -> None:
    code, text = await shell("deployer", "streams", "apply", "tests.integration.banking:bus")
    assert code == 0, text
    assert "created  catga-cmd-bank" in text
    bank = Bank()
    inbox = f"sqlite://{tmp_path / 'bank.db'}"
    first = bank.on(bus_of(server, deployment, "bank", SERVICE, inbox=inbox))
    second = bank.on(bus_of(server, deployment, "bank", SERVICE, inbox=inbox))
    async with first, second, bus_of(server, deployment, "office", "office") as office:
        assert [await office.send(Debit(f"a-{n}", n), timeout=PATIENCE) for n in range(20)] == [
            Ok(n) for n in range(20)
        ]
        await office.enqueue(Debit("later", 20), delay=0.2)
        await eventually(lambda: sorted(bank.told) == list(range(21)), PATIENCE)
        await second.close()  # what it owned is handed over
        assert await office.send(Debit("a-1", 21), timeout=PATIENCE) == Ok(21)

        bank.is_closed = True
        result = await office.send(Debit("a-1", 22), timeout=PATIENCE)
        assert not result.is_ok
        assert result.code == "DEAD_LETTERED"
        bank.is_closed = False
        for user, arguments, words in (
            ("operator", ["partitions"], "8 partitions, 1 owners"),
            ("operator", ["streams"], "catga-cmd-bank"),
            ("operator", ["dlq", "ls", SERVICE], "attempts"),
            ("operator", ["dlq", "show", SERVICE, "1"], '"cents": 22'),
            ("operator", ["nodes"], first.node_id),
            ("clerk", ["dlq", "retry", SERVICE, "1"], "retried 1 dead letter"),
        ):
            code, text = await shell(user, *arguments)
            assert code == 0, text
            assert words in text
        await eventually(lambda: 22 in bank.told, PATIENCE)
        assert [sorted(denied(bus)) for bus in (first, second, office)] == [[], [], []]


@pytest.mark.slow
async def test_three_servers_hold_three_replicas_and_carry_a_service(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    servers = deployment.cluster()
    with deployment.started(*servers):
        urls = ",".join(server.url for server in servers)
        applied = [f"nats://deployer:{deployment.password('deployer')}@{server.address}" for server in servers]
        arguments = ["streams", "apply", "tests.integration.banking:bus", "--url", ",".join(applied)]
        async with asyncio.timeout(60.0):
            while await asyncio.to_thread(main, arguments) != 0:  # until they have elected a leader
                await asyncio.sleep(0.5)
        bank = Bank()
        options: dict[str, Any] = {"url": urls, "manage_streams": "verify", **OPTIONS}
        inbox = f"sqlite://{tmp_path / 'bank.db'}"
        service = bank.on(Bus(SERVICE, inbox=inbox, **options, **deployment.account("bank")))
        async with service, Bus("office", **options, **deployment.account("office")) as office:
            results = [await office.send(Debit(f"a-{n}", n), timeout=PATIENCE) for n in range(8)]
            await eventually(lambda: sorted(bank.told) == list(range(8)), PATIENCE)
            assert service._node is not None
            info = await service._node.durable._jetstream.stream("catga-cmd-bank")
        assert results == [Ok(n) for n in range(8)]
        assert info is not None
        assert info.config.replicas == 3
        assert [denied(service), denied(office)] == [set(), set()]


# -- what is refused ---------------------------------------------------------------------------------------

SUBSCRIBE_ABUSES = [
    ("bank", "catga.cmd.>", "read along what is sent to any service, past the stream"),
    ("bank", "catga.cmd.bank.*", "read along what is sent to it, past the stream"),
    ("bank", "catga.evt.>", "read events past the log"),
    ("bank", "catga.dlq.>", "read dead letters"),
    ("bank", "$KV.catga-owners.>", "read along who owns what"),
    ("bank", "_INBOX.office.>", "read a caller's answers"),
    ("bank", "$JS.>", "pretend to be the store"),
    ("office", "catga.cmd.bank.*", "read commands of others"),
    ("office", "catga.evt.>", "read events"),
    ("office", "catga.to.office.>", "be sent requests"),
    ("office", "_INBOX.bank.>", "read a service's answers"),
    ("office", "$JS.>", "pretend to be the store"),
    ("deployer", "catga.>", "read anything"),
    ("deployer", "$KV.>", "read buckets"),
    ("deployer", "_INBOX.bank.>", "read a service's answers"),
    ("clerk", "catga.>", "read anything"),
    ("clerk", "_INBOX.office.>", "read a caller's answers"),
    ("operator", "catga.cmd.>", "read commands with the inboxes for their answers"),
    ("operator", "catga.evt.>", "read events past the log"),
]

PUBLISH_ABUSES = [
    ("bank", "catga.cmd.shop.1", "send commands to a service that it does not call"),
    ("bank", "catga.evt.Sold.1", "publish an event of another"),
    ("bank", "catga.dlq.shop.a.b", "forge a dead letter of another service"),
    ("bank", "$KV.catga-owners.shop.cmd.1", "take a partition away from another service"),
    ("bank", "$KV.catga-routes.Quote", "have the commands of another service sent to itself"),
    ("bank", "catga.to.shop.shop-1.handover", "hand partitions to another service"),
    ("bank", "$JS.API.STREAM.CREATE.catga-cmd-bank", "make its own work queue otherwise"),
    ("bank", "$JS.API.STREAM.UPDATE.catga-cmd-bank", "change its work queue"),
    ("bank", "$JS.API.STREAM.DELETE.catga-cmd-bank", "delete its work queue"),
    ("bank", "$JS.API.STREAM.PURGE.catga-cmd-bank", "empty its work queue"),
    ("bank", "$JS.API.STREAM.MSG.DELETE.catga-dlq-bank", "drop a dead letter"),
    ("bank", "$JS.API.STREAM.MSG.GET.catga-dlq-shop", "read dead letters of another service"),
    ("bank", "$JS.API.STREAM.MSG.GET.catga-cmd-shop", "read commands of another service"),
    ("bank", "$JS.API.STREAM.UPDATE.KV_catga-owners", "change the bucket of owners"),
    ("bank", "$JS.API.STREAM.DELETE.KV_catga-owners", "delete the bucket of owners"),
    ("bank", "$JS.API.STREAM.PURGE.KV_catga-owners", "forget who owns what"),
    ("bank", "$JS.API.CONSUMER.CREATE.catga-cmd-shop.x.catga.cmd.shop.1", "take commands of another service"),
    ("bank", "$JS.API.CONSUMER.CREATE.catga-cmd-bank.x", "have a consumer of everything in its work queue"),
    ("bank", "$JS.API.CONSUMER.CREATE.catga-evt.x.catga.evt.Sold.1", "read events of a type that it does not handle"),
    ("bank", "$JS.API.CONSUMER.DELETE.catga-cmd-shop.x", "stop another service"),
    ("bank", "$JS.API.CONSUMER.MSG.NEXT.catga-cmd-shop.x", "take commands of another service"),
    ("bank", "$JS.ACK.catga-cmd-shop.x.1.1.1.1.0", "acknowledge for another service"),
    ("office", "catga.cmd.shop.1", "send commands to another service"),
    ("office", "catga.evt.Debited.1", "publish an event of the service"),
    ("office", "catga.dlq.bank.a.b", "forge a dead letter"),
    ("office", "$KV.catga-routes.Debit", "have the commands sent elsewhere"),
    ("office", "$KV.catga-owners.bank.cmd.1", "take a partition"),
    ("office", "$JS.API.STREAM.MSG.GET.catga-cmd-bank", "read commands of others"),
    ("office", "$JS.API.STREAM.MSG.GET.KV_catga-owners", "read who owns what"),
    ("office", "$JS.API.CONSUMER.CREATE.catga-cmd-bank.x", "take commands away"),
    ("office", "$JS.API.STREAM.CREATE.catga-evt", "make a stream"),
    ("office", "$JS.API.STREAM.PURGE.catga-cmd-bank", "empty the work queue"),
    ("office", "$JS.ACK.catga-cmd-bank.x.1.1.1.1.0", "acknowledge for the service"),
    ("office", "_INBOX.bank.abc.1.a", "forge an answer"),
    ("deployer", "catga.cmd.bank.1", "send commands"),
    ("deployer", "$KV.catga-routes.Debit", "change routes"),
    ("deployer", "$JS.API.STREAM.CREATE.other", "make a stream that could capture requests"),
    ("deployer", "$JS.API.STREAM.DELETE.catga-cmd-bank", "delete a work queue"),
    ("deployer", "$JS.API.STREAM.PURGE.catga-cmd-bank", "empty a work queue"),
    ("deployer", "$JS.API.STREAM.MSG.GET.catga-cmd-bank", "read commands"),
    ("deployer", "$JS.API.CONSUMER.CREATE.catga-cmd-bank.x", "take commands away"),
    ("clerk", "catga.cmd.shop.1", "send commands to another service"),
    ("clerk", "catga.evt.Debited.1", "publish events"),
    ("clerk", "$JS.API.STREAM.MSG.DELETE.catga-cmd-bank", "delete a command"),
    ("clerk", "$JS.API.STREAM.MSG.DELETE.catga-dlq-shop", "drop a dead letter of another service"),
    ("clerk", "$JS.API.STREAM.PURGE.catga-dlq-bank", "empty the dead letters"),
    ("clerk", "$JS.API.STREAM.MSG.GET.catga-evt", "read events"),
    ("operator", "catga.cmd.bank.1", "send commands"),
    ("operator", "catga.evt.Debited.1", "publish events"),
    ("operator", "$KV.catga-owners.bank.cmd.1", "take a partition"),
    ("operator", "$KV.catga-routes.Debit", "change routes"),
    ("operator", "$JS.API.STREAM.MSG.DELETE.catga-dlq-bank", "drop a dead letter"),
    ("operator", "$JS.API.CONSUMER.CREATE.catga-cmd-bank.x", "take commands away"),
    ("operator", "$JS.API.CONSUMER.DELETE.catga-cmd-bank.x", "stop a service"),
    ("operator", "$JS.API.STREAM.PURGE.KV_catga-owners", "forget who owns what"),
    ("operator", "$JS.ACK.catga-cmd-bank.x.1.1.1.1.0", "acknowledge for a service"),
]


@pytest.mark.parametrize(("user", "subject", "why"), SUBSCRIBE_ABUSES)
async def test_a_subscription_that_nobody_needs_is_refused(
    server: NatsServer, deployment: Deployment, user: str, subject: str, why: str
) -> None:
    async with deployment.client(server, user) as one:
        await one.transport.subscribe(subject, Received())
        assert await one.denied() == [subject], why


@pytest.mark.parametrize(("user", "subject", "why"), PUBLISH_ABUSES)
async def test_a_message_that_nobody_should_send_is_refused(
    server: NatsServer, deployment: Deployment, user: str, subject: str, why: str
) -> None:
    async with deployment.client(server, user) as one:
        one.transport.publish(subject, b"abuse")
        assert await one.denied() == [subject], why


async def test_a_caller_is_told_at_once_what_it_may_not_send(
    server: NatsServer, deployment: Deployment, shell: Shell, tmp_path: Path
) -> None:
    await shell("deployer", "streams", "apply", "tests.integration.banking:bus")
    bank = Bank().on(bus_of(server, deployment, "bank", SERVICE, inbox=f"sqlite://{tmp_path / 'bank.db'}"))
    async with bank, bus_of(server, deployment, "operator", "operator") as operator:
        with pytest.raises(PermissionDeniedError, match=r"catga\.cmd\.bank"):
            await operator.enqueue(Debit("a", 1), timeout=PATIENCE)
        with pytest.raises(PermissionDeniedError, match=r"catga\.evt\.Debited"):
            await operator.publish(Debited("a", 1), timeout=PATIENCE)


async def test_who_may_only_look_retries_and_drops_nothing(
    server: NatsServer, deployment: Deployment, shell: Shell, tmp_path: Path
) -> None:
    await shell("deployer", "streams", "apply", "tests.integration.banking:bus")
    bank = Bank()
    bank.is_closed = True
    async with (
        bank.on(bus_of(server, deployment, "bank", SERVICE, inbox=f"sqlite://{tmp_path / 'bank.db'}")),
        bus_of(server, deployment, "office", "office") as office,
    ):
        await office.send(Debit("looked at", 1), timeout=PATIENCE)
        code, text = await shell("operator", "dlq", "ls", SERVICE, "--json")
        number = str(json.loads(text)["letters"][0]["number"])
        for verb in ("retry", "drop"):
            code, text = await shell("operator", "dlq", verb, SERVICE, number, *(["--yes"] if verb == "drop" else []))
            assert code != 0
            assert "Permissions Violation" in text
        assert (await shell("clerk", "dlq", "drop", SERVICE, number, "--yes"))[0] == 0


# -- how much room -----------------------------------------------------------------------------------------

README = (FILES / "README.md").read_text()
COMPOSE = FILES.parents[1] / "docker-compose.yml"
GIB = 1 << 30


def promised(stream: str) -> int:
    """Return what the table says that a stream reserves, in bytes."""
    found = re.search(rf"^\| `{re.escape(stream)}`[^|]*\|[^|]*\| (?:(\d+) GiB|nothing) \|", README, re.MULTILINE)
    assert found is not None, stream
    return int(found[1] or 0) * GIB


def test_the_table_says_what_each_stream_reserves() -> None:
    wanted = wanted_streams(
        Names("catga"), "x", BusConfig(), commands=True, events=True, schedules=True, log_partitions=64
    )

    said = {one.name: promised(one.name.replace("-x", "-<service>")) for one in wanted}

    assert said == {one.name: max(0, one.max_bytes) for one in wanted}
    of_all = said["catga-evt"] // GIB
    of_each = (sum(said.values()) - said["catga-evt"]) // GIB
    assert f"max_file_store of each server >= {of_all} GiB + {of_each} GiB x services" in README


async def test_a_store_has_room_for_as_many_services_as_the_readme_says(
    start_server: Callable[..., NatsServer],
) -> None:
    (services,) = map(int, re.findall(r"\*\*(\d+) services to the last byte", README))
    server = start_server(f"jetstream {{ {(FILES / 'store.conf').read_text()} }}", jetstream=True)
    transport = make_transport(ConnectionOptions(urls=(server.url,)), RecordedEvents())
    await transport.connect()
    jetstream = make_jetstream(transport, monotonic)

    def streams(number: int) -> Streams:
        return Streams(jetstream, Names("catga"), f"s{number}", BusConfig(), monotonic)

    for number in range(services):
        await streams(number).ensure(commands=True, events=True)
    with pytest.raises(ConfigurationError, match=r"insufficient storage.*raise the limits"):
        await streams(services).ensure(commands=True, events=True)
    await jetstream.close()
    await transport.close()


def test_the_server_of_docker_compose_has_its_volume_and_its_bound(tmp_path: Path) -> None:
    compose, config = COMPOSE.read_text(), (FILES / "compose.conf").read_text()
    mounted = set(re.findall(r"\./deploy/nats/(\S+):/etc/nats/(\S+):ro", compose))
    included = set(re.findall(r'include "(.*)"', config))

    assert mounted == {(name, name) for name in ("compose.conf", *included)}
    assert 'command: ["-c", "/etc/nats/compose.conf"]' in compose
    assert "nats-data:/data" in compose
    assert 'store_dir: "/data"' in config
    for name, _ in mounted:
        text = (FILES / name).read_text()
        (tmp_path / name).write_text(text.replace('"/data"', f'"{tmp_path}"'))
    checked = subprocess.run(
        [str(server_binary()), "-t", "-c", str(tmp_path / "compose.conf")], capture_output=True, text=True, timeout=20
    )
    assert checked.returncode == 0, checked.stderr
