"""The server files in `deploy/nats`: every feature works under them, and every abuse they promise to refuse is refused.

Real servers with the files as they are; only ports and stores are the test's own.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from catga_bus import AuthenticationError, Bus, Code, Context, Err, Event, Ok, PermissionDeniedError, Request
from catga_bus.cluster.beats import BeatWriter, Identity, Report
from catga_bus.cluster.records import NodeLoad, NodeStatus
from catga_bus.testing import eventually
from catga_bus.testing.carrier import Received
from catga_bus.wire import PREFIX
from tests.deployment import FILES, Client, Deployment, sample_environment
from tests.servers import Certificates, NatsServer, server_binary

pytestmark = pytest.mark.nats

NOTHING = PREFIX + b"\x93\x7f\x91\xa0\x90"
# A payload of a kind that does not exist: a node counts it and goes on.


class Quote(Request[str]):
    sku: str
    seconds: float = 0.0


class Sold(Event, durable=False):
    sku: str


class PricesChanged(Event, durable=False):
    pass


class Secret(Request[str]):
    """No user of the sample may ask or answer this."""


class Heard:
    """What the handlers of a service have got."""

    def __init__(self) -> None:
        self.sold: list[str] = []
        self.price_changes = 0


def shop(urls: str, deployment: Deployment, *, heard: Heard | None = None, **options: str) -> Bus:
    heard = heard or Heard()
    bus = Bus("shop", url=urls, **deployment.account("shop"), **options)

    @bus.handler(concurrency=64)
    async def quote(request: Quote, ctx: Context) -> str:
        await asyncio.sleep(request.seconds)
        if request.sku == "all":
            await ctx.broadcast(PricesChanged())
        return f"{request.sku} by {ctx.node}"

    @bus.handler
    async def sold(event: Sold) -> None:
        heard.sold.append(event.sku)

    @bus.handler
    async def prices_changed(event: PricesChanged) -> None:
        heard.price_changes += 1

    return bus


def web(urls: str, deployment: Deployment) -> Bus:
    return Bus("web", url=urls, **deployment.account("web"))


def refused(bus: Bus) -> set[str]:
    return bus._connection.denied


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    server_binary()
    return Deployment(tmp_path_factory.mktemp("deployment"))


@pytest.fixture(scope="module")
def server(deployment: Deployment) -> Iterator[NatsServer]:
    """One server with `single.conf`, for all tests that change nothing."""
    server = deployment.server()
    with deployment.started(server):
        yield server


@pytest.fixture
def another(tmp_path: Path) -> Deployment:
    """A deployment for one test, to be changed."""
    server_binary()
    return Deployment(tmp_path)


# -- the files ---------------------------------------------------------------------------------------------


def check(file: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(server_binary()), "-t", "-c", str(file)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("file", ["single.conf", "cluster/n1.conf", "cluster/n2.conf", "cluster/n3.conf"])
def test_the_server_takes_each_file_as_it_is(file: str) -> None:
    checked = check(FILES / file, sample_environment())
    assert checked.returncode == 0, checked.stderr


def test_without_a_password_the_server_does_not_start() -> None:
    environment = sample_environment()
    del environment["CATGA_SHOP_PASSWORD"]
    checked = check(FILES / "single.conf", environment)
    assert checked.returncode != 0
    assert "CATGA_SHOP_PASSWORD" in checked.stderr


def test_a_user_that_is_included_and_not_listed_is_not_forgotten_silently(another: Deployment) -> None:
    another.edit("accounts.conf", ("$USER_SHOP, ", ""))
    checked = check(another.files / "single.conf", another.environment)
    assert checked.returncode != 0
    assert "USER_SHOP" in checked.stderr


def test_no_file_holds_a_password() -> None:
    for file in FILES.rglob("*.conf"):
        for line in file.read_text().splitlines():
            if "password:" in line:
                assert line.partition("password:")[2].strip().startswith("$CATGA_"), f"{file}: {line}"


def monitor(deployment: Deployment, file: str, path: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{deployment.monitors[file]}/{path}", timeout=5) as answer:
        read: dict[str, object] = json.load(answer)
    return read


def test_the_running_server_has_the_settings_that_the_readme_explains(
    server: NatsServer, deployment: Deployment
) -> None:
    facts = monitor(deployment, "single.conf", "varz")
    expected = {
        "ping_interval": 5_000_000_000,
        "ping_max": 2,
        "max_payload": 1_048_576,
        "max_pending": 67_108_864,
        "max_connections": 2_048,
        "max_subscriptions": 4_096,
        "max_control_line": 4_096,
        "write_deadline": 10_000_000_000,
        "auth_required": True,
        "http_host": "127.0.0.1",
    }
    assert {name: facts[name] for name in expected} == expected
    stored = facts["jetstream"]
    assert isinstance(stored, dict)
    assert stored["config"]["max_storage"] == 10 * 2**30
    assert stored["config"]["sync_always"] is True


# -- what works --------------------------------------------------------------------------------------------


async def test_a_caller_and_a_service_have_all_that_a_bus_does(server: NatsServer, deployment: Deployment) -> None:
    heard = Heard()
    async with shop(server.url, deployment, heard=heard) as service, web(server.url, deployment) as caller:
        assert await caller.send(Quote("a")) == Ok(f"a by {service.node_id}")
        assert await caller.send(Quote("b"), node=service.node_id) == Ok(f"b by {service.node_id}")
        assert (await caller.send(Quote("all"))).unwrap()
        await caller.publish(Sold("a"))
        await eventually(lambda: heard.sold == ["a"] and heard.price_changes == 1)
        assert refused(service) == refused(caller) == set()


async def test_a_bus_hears_of_ended_connections_and_asks_before_it_believes(
    server: NatsServer, deployment: Deployment
) -> None:
    """One connection of a node is cut: its end is heard, the node is asked, and lives; then it ends, and is gone."""
    events = "catga.sys.disconnect"
    async with Bus("web", url=server.url, disconnect_events=events, **deployment.account("web")) as caller:
        async with shop(server.url, deployment, disconnect_events=events) as service:
            await eventually(lambda: service.node_id in {node.id for node in caller.nodes()})
            probes = caller.statistics().nodes.probes
            async with deployment.client(server, "shop", f"catga/{service.node_id}"):
                pass
            await eventually(lambda: caller.statistics().nodes.probes > probes)
            assert (await caller.send(Quote("a"), node=service.node_id)).unwrap()
            assert caller.statistics().nodes.deaths == 0
            assert refused(service) == set()
        await eventually(lambda: [node.id for node in caller.nodes()] == [caller.node_id])
        assert refused(caller) == set()


async def test_a_batch_of_64_answered_late_comes_back_whole(server: NatsServer, deployment: Deployment) -> None:
    """Answers of a batch go to one inbox, many of them, long after the request: no permission counts or expires."""
    async with shop(server.url, deployment) as service, web(server.url, deployment) as caller:
        calls = [caller.send(Quote(str(number), seconds=2.5), timeout=30) for number in range(64)]
        results = await asyncio.gather(*calls)
        assert results == [Ok(f"{number} by {service.node_id}") for number in range(64)]
        assert caller.statistics().sent.batches == 1
        assert refused(service) == set()


async def test_with_allowed_responses_alone_no_batch_is_answered(another: Deployment) -> None:
    """Why a service may publish to the inboxes: a batch is answered on the inbox in its head, not on its reply subject.

    The same server keeps every reply subject for as long as the permission lasts, about 150 bytes each.
    """
    another.edit(
        "users/shop.conf",
        ('      "_INBOX.>" ', '      # "_INBOX.>" '),
        ("  permissions: {\n", '  permissions: {\n    allow_responses: { max: -1, expires: "1h" }\n'),
    )
    server = another.server()
    with another.started(server):
        async with shop(server.url, another) as service, web(server.url, another) as caller:
            result = await caller.send(Quote("a"), timeout=0.5)
            assert isinstance(result, Err)
            assert result.code == Code.TIMEOUT
            await eventually(lambda: any(subject.startswith("_INBOX.web.") for subject in refused(service)))


async def test_every_bus_hears_every_heartbeat_and_every_end(server: NatsServer, deployment: Deployment) -> None:
    users = ("shop", "web", "operator")
    async with AsyncExitStack() as stack:
        clients = {user: await stack.enter_async_context(deployment.client(server, user)) for user in users}
        beats = {user: Received() for user in users}
        ends = {user: Received() for user in users}
        for user, one in clients.items():
            await one.transport.subscribe("catga.nodes.*", beats[user])
            await one.transport.subscribe("catga.sys.disconnect", ends[user])
            assert await one.denied() == []
        for user, one in clients.items():
            one.transport.publish(f"catga.nodes.{user}-1", NOTHING)
        async with deployment.client(server, "shop", "catga/shop-7k2m9x4pqa"):
            pass
        for user in users:
            await beats[user].wait(3)
            await ends[user].wait(1)
            assert {message[0] for message in beats[user].messages} == {f"catga.nodes.{user}-1" for user in users}
            event = json.loads(ends[user].payloads[0])
            assert event["client"]["name"] == "catga/shop-7k2m9x4pqa"
            assert event["client"]["user"] == "shop"
            assert event["reason"] == "Client Closed"
            assert await clients[user].denied() == []


ASKERS = ("shop", "web", "operator")
HEARS = {"shop": ("ping", "status"), "web": ("ping",), "operator": ("ping",)}
# Which questions each is asked: of what became of a request only who handles some knows anything.


@pytest.mark.parametrize("asked", ASKERS)
@pytest.mark.parametrize("asker", ASKERS)
async def test_any_bus_may_ping_any_other_and_ask_it_for_its_status(
    server: NatsServer, deployment: Deployment, asker: str, asked: str
) -> None:
    async with deployment.client(server, asker) as one, deployment.client(server, asked) as node:
        questions, answers = Received(), Received()
        for verb in HEARS[asked]:
            await node.transport.subscribe(f"catga.to.{asked}.{asked}-1.{verb}", questions)
        inbox = one.transport.new_inbox()
        await one.transport.subscribe(f"{inbox}.*", answers)
        assert await one.denied() == await node.denied() == []
        for number, verb in enumerate(("ping", "status")):
            one.transport.publish(f"catga.to.{asked}.{asked}-1.{verb}", NOTHING, reply=f"{inbox}.{number}")
        await questions.wait(len(HEARS[asked]))
        for _, _, reply, _ in questions.messages:
            node.transport.publish(reply, b"here")
        await answers.wait(2)
        unheard = [headers["Status"] for _, _, _, headers in answers.messages if headers]
        assert unheard == ["503"] * (2 - len(HEARS[asked]))  # said at once, by the server
        assert await one.denied() == await node.denied() == []


async def test_a_caller_may_answer_where_a_bus_asks_whether_it_lives(
    server: NatsServer, deployment: Deployment
) -> None:
    """A real bus asks, on an inbox as it makes them; who answers is a client that sees what is refused."""
    events = "catga.sys.disconnect"
    async with (
        shop(server.url, deployment, disconnect_events=events) as service,
        deployment.client(server, "web") as one,
    ):
        pings = Received()
        await one.transport.subscribe("catga.to.web.web-1.ping", pings)
        await one.transport.flush()
        beat = BeatWriter(Identity("web", "web-1", "1", {}), (1, 1)).write(
            NodeStatus.ONLINE, Report(), is_ready=True, interval=0.25, stall=0.0, load=NodeLoad(), utc_ms=0
        )
        one.transport.publish("catga.nodes.web-1", beat)
        await eventually(lambda: "web-1" in {node.id for node in service.nodes()})
        async with deployment.client(server, "web", "catga/web-1"):
            pass
        await pings.wait(1)
        one.transport.publish(pings.messages[0][2], beat)
        assert await one.denied() == []


async def test_an_operator_sees_the_services_and_what_they_say(server: NatsServer, deployment: Deployment) -> None:
    async with (
        shop(server.url, deployment) as service,
        web(server.url, deployment) as caller,
        deployment.client(server, "operator") as operator,
    ):
        seen, told, streams = Received(), Received(), Received()
        for subject in ("catga.nodes.*", "catga.tick.*", "catga.all.*"):
            await operator.transport.subscribe(subject, seen)
        await operator.transport.subscribe("_INBOX.operator.info", told)
        await operator.transport.subscribe("_INBOX.operator.streams", streams)
        assert await operator.denied() == []
        operator.transport.publish("$SRV.INFO", b"", reply="_INBOX.operator.info")
        operator.transport.publish("$JS.API.STREAM.NAMES", b"", reply="_INBOX.operator.streams")
        await caller.send(Quote("all"))
        await caller.publish(Sold("a"))
        await told.wait(1)
        await streams.wait(1)
        expected = {"catga.all.PricesChanged", "catga.tick.Sold", f"catga.nodes.{service.node_id}"}
        await eventually(lambda: {subject for subject, _, _, _ in seen.messages} >= expected)
        assert json.loads(told.payloads[0])["metadata"]["catga.node"] == service.node_id
        assert not any(reply for _, _, reply, _ in seen.messages)  # nothing that could be answered
        assert "error" not in json.loads(streams.payloads[0])
        assert await operator.denied() == []


async def test_who_reads_everything_as_the_readme_says_may_write_nothing(another: Deployment) -> None:
    another.add_user("auditor", like="monitor")
    rules = re.search(r"permissions: \{ .*catga\.>.* \}", (FILES / "README.md").read_text())
    assert rules is not None
    text = (another.files / "users" / "auditor.conf").read_text()
    another.edit("users/auditor.conf", (text[text.index("permissions: {") : text.rindex("}")], rules[0] + "\n"))
    # Like the monitor, but in the account of the application.
    another.edit("accounts.conf", ("$USER_MONITOR, $USER_AUDITOR", "$USER_MONITOR"))
    another.edit("accounts.conf", ("$USER_OPERATOR]", "$USER_OPERATOR, $USER_AUDITOR]"))
    server = another.server()
    with another.started(server):
        async with (
            shop(server.url, another),
            web(server.url, another) as caller,
            another.client(server, "auditor") as auditor,
        ):
            seen = Received()
            await auditor.transport.subscribe("catga.>", seen)
            assert await auditor.denied() == []
            await caller.send(Quote("a"))
            await eventually(lambda: any(subject == "catga.rpc.Quote" for subject, _, _, _ in seen.messages))
            forbidden = ["catga.rpc.Quote", "_INBOX.web.abc.1.1", "_INBOX.web.abc.1.a", "catga.nodes.auditor-1"]
            for subject in forbidden:
                auditor.transport.publish(subject, b"abuse")
            await auditor.transport.subscribe("catga.rpc.Quote", seen, queue="rpc")
            assert set(await auditor.denied()) == set(forbidden)
            assert len(await auditor.denied()) == len(forbidden) + 1


async def test_an_operator_has_a_bus(server: NatsServer, deployment: Deployment) -> None:
    async with Bus("operator", url=server.url, **deployment.account("operator")) as bus:
        assert refused(bus) == set()


async def test_the_monitor_reads_the_settings_of_the_servers(server: NatsServer, deployment: Deployment) -> None:
    async with deployment.client(server, "monitor") as one:
        answers = Received()
        await one.transport.subscribe("_INBOX.monitor.>", answers)
        one.transport.publish("$SYS.REQ.SERVER.PING.VARZ", b"", reply="_INBOX.monitor.1")
        await answers.wait(1)
        assert json.loads(answers.payloads[0])["data"]["ping_interval"] == 5_000_000_000
        assert await one.denied() == []


async def test_a_service_is_added_as_the_readme_says(another: Deployment) -> None:
    another.add_user("billing", like="shop")
    another.edit("users/billing.conf", ("catga.rpc.Quote rpc", "catga.rpc.Secret rpc"))
    another.edit("users/web.conf", ('"catga.rpc.Quote" ', '"catga.rpc.Quote", "catga.rpc.Secret" '))
    server = another.server()
    with another.started(server):
        billing = Bus("billing", url=server.url, **another.account("billing"))

        @billing.handler
        async def secret(request: Secret) -> str:
            return "from billing"

        async with shop(server.url, another), billing, web(server.url, another) as caller:
            assert await caller.send(Secret()) == Ok("from billing")
            assert (await caller.send(Quote("a"))).unwrap()
        async with another.client(server, "billing") as one:
            await one.transport.subscribe("catga.to.shop.>", Received())
            await one.transport.subscribe("catga.rpc.Quote", Received(), queue="rpc")
            await one.transport.subscribe("_INBOX.shop.>", Received())
            assert await one.denied() == ["catga.to.shop.>", "catga.rpc.Quote", "_INBOX.shop.>"]


async def test_a_reload_takes_up_a_permission_without_a_reconnect(another: Deployment) -> None:
    server = another.server()
    with another.started(server):
        async with shop(server.url, another), web(server.url, another) as caller:
            with pytest.raises(PermissionDeniedError):
                await caller.send(Secret())
            another.edit("users/web.conf", ('"catga.rpc.Quote" ', '"catga.rpc.Quote", "catga.rpc.Secret" '))
            server.reload(server.config)
            result = await caller.send(Secret(), timeout=2)
            assert isinstance(result, Err)
            assert result.code == Code.NO_HANDLER  # permitted now, and nobody handles it
            assert (await caller.send(Quote("a"))).unwrap()
            assert caller.statistics().reconnects == 0


async def test_a_reload_cannot_take_up_a_new_password(another: Deployment) -> None:
    """The environment of a process does not change: a new user needs a restart, as the readme says."""
    server = another.server()
    with another.started(server):
        another.add_user("billing", like="shop")
        server.send(signal.SIGHUP)
        await eventually(lambda: "CATGA_BILLING_PASSWORD" in server.log)
        async with web(server.url, another):  # and goes on with what it has
            pass


# -- what is refused ---------------------------------------------------------------------------------------

SUBSCRIBE_ABUSES = [
    ("web", "_INBOX.>", "", "read everybody's answers"),
    ("web", "_INBOX.shop.>", "", "read another's answers"),
    ("web", "_INBOX.*.>", "", "read everybody's answers with another wildcard"),
    ("web", ">", "", "read everything"),
    ("web", "catga.>", "", "read the namespace"),
    ("web", "catga.rpc.>", "", "read all requests"),
    ("web", "catga.rpc.Quote", "", "read requests of a type"),
    ("web", "catga.rpc.Quote", "rpc", "take requests away from the service"),
    ("web", "catga.to.shop.>", "", "read what is meant for a service"),
    ("web", "catga.to.*.*.ping", "", "answer pings of others"),
    ("web", "catga.to.web.>", "", "be sent requests, having announced that it handles them"),
    ("web", "catga.to.web.*.rpc.Quote", "", "be sent requests of a type that it only asks"),
    ("web", "catga.to.web.web-1.status", "", "say what became of requests that it never had"),
    ("web", "catga.tick.Sold", "shop", "take events away from the service"),
    ("web", "$SRV.PING", "", "pretend to be a service"),
    ("web", "$SYS.>", "", "read system events"),
    ("web", "$JS.API.>", "", "pretend to be the store"),
    ("shop", "_INBOX.>", "", "read everybody's answers"),
    ("shop", "_INBOX.web.>", "", "read a caller's answers"),
    ("shop", "catga.to.billing.>", "", "read what is meant for another service"),
    ("shop", "catga.to.>", "", "read what is meant for every service"),
    ("shop", "catga.rpc.>", "rpc", "take requests of other services"),
    ("shop", "catga.rpc.Secret", "rpc", "handle a type that is not its own"),
    ("shop", "catga.rpc.Quote", "", "read along, instead of in the queue group"),
    ("shop", "catga.rpc.Quote", "mine", "have every request handled twice"),
    ("shop", "catga.tick.Sold", "", "read along, instead of in its queue group"),
    ("shop", "catga.tick.Sold", "billing", "take events away from another service"),
    ("shop", "$SRV.PING.billing", "", "pretend to be another service"),
    ("shop", "$SYS.>", "", "read system events"),
    ("shop", "$SYS.ACCOUNT.APP.DISCONNECT", "", "read system events past the import"),
    ("operator", "_INBOX.>", "", "read everybody's answers"),
    ("operator", "_INBOX.web.>", "", "read a caller's answers"),
    ("operator", "catga.>", "", "read the namespace, and with requests the inboxes to answer them on"),
    ("operator", "catga.rpc.Quote", "", "read requests, and answer them first"),
    ("operator", "catga.to.>", "", "read what is meant for every service"),
    ("operator", "catga.to.*.*.ping", "", "answer pings of others"),
    ("operator", "catga.to.*.*.rpc.>", "", "read requests to single nodes"),
    ("operator", "catga.nodes.*", "watchers", "share what each operator should hear"),
    ("operator", "catga.rpc.Quote", "rpc", "take requests away from the service"),
    ("operator", "catga.>", "rpc", "take requests away from all services"),
    ("operator", "catga.tick.Sold", "shop", "take events away from a service"),
    ("operator", "$SRV.PING", "", "pretend to be a service"),
    ("operator", "$SYS.>", "", "read system events"),
    ("monitor", "$SYS.>", "", "read all system events"),
    ("monitor", ">", "", "read everything of the system account"),
]

PUBLISH_ABUSES = [
    ("web", "_INBOX.shop.abc.1.a", "forge an answer to another"),
    ("web", "_INBOX.operator.abc.1.a", "forge an answer to an operator"),
    ("web", "catga.rpc.Secret", "ask what it may not"),
    ("web", "catga.to.shop.shop-1.rpc.Secret", "ask one node what it may not"),
    ("web", "catga.to.shop.shop-1.handover", "control a node"),
    ("web", "catga.all.PricesChanged", "broadcast what it may not"),
    ("web", "catga.nodes.a.b", "write beside the heartbeats"),
    ("web", "catga.sys.disconnect", "forge the end of a connection"),
    ("web", "$SYS.ACCOUNT.APP.DISCONNECT", "forge a system event"),
    ("web", "$SYS.REQ.SERVER.PING.CONNZ", "ask the server who is connected"),
    ("web", "$SRV.INFO", "ask all services what they are"),
    ("web", "$JS.API.STREAM.NAMES", "look at streams"),
    ("web", "$JS.API.STREAM.CREATE.S", "make a stream"),
    ("web", "$JS.ACK.S.C.1.1.1.1.0", "acknowledge what it never got"),
    ("shop", "catga.rpc.Quote", "ask what it does not ask"),
    ("shop", "catga.to.billing.b-1.rpc.Secret", "ask one node what it does not ask"),
    ("shop", "catga.tick.Sold", "publish an event of another"),
    ("shop", "catga.sys.disconnect", "forge the end of a connection"),
    ("shop", "$SYS.REQ.SERVER.PING", "ask the server"),
    ("shop", "$SYS.REQ.SERVER.ID.RELOAD", "reload the server"),
    ("shop", "$JS.API.STREAM.CREATE.S", "make a stream, which could capture requests"),
    ("shop", "$JS.API.STREAM.DELETE.S", "delete a stream"),
    ("shop", "$JS.API.STREAM.PURGE.S", "empty a stream"),
    ("shop", "$JS.API.CONSUMER.DELETE.S.C", "delete a consumer"),
    ("shop", "$JS.ACK.S.C.1.1.1.1.0", "acknowledge what it never got"),
    ("operator", "catga.rpc.Quote", "ask for work"),
    ("operator", "catga.to.shop.shop-1.rpc.Quote", "ask one node for work"),
    ("operator", "catga.to.shop.shop-1.cancel", "cancel somebody's work"),
    ("operator", "catga.tick.Sold", "publish an event"),
    ("operator", "catga.all.PricesChanged", "broadcast"),
    ("operator", "_INBOX.web.abc.1.a", "forge an answer"),
    ("operator", "$JS.API.STREAM.DELETE.S", "delete a stream"),
    ("operator", "$JS.API.CONSUMER.MSG.NEXT.S.C", "take messages out of a stream"),
    ("operator", "$JS.API.STREAM.MSG.DELETE.S", "delete a message"),
    ("operator", "$SYS.REQ.SERVER.PING.VARZ", "ask the system account"),
    ("monitor", "$SYS.REQ.SERVER.ID.RELOAD", "reload the server"),
    ("monitor", "$SYS.REQ.SERVER.ID.KICK", "throw a client out"),
    ("monitor", "$SYS.REQ.SERVER.ID.LDM", "send clients away"),
    ("monitor", "$SYS.REQ.ACCOUNT.APP.CONNZ", "ask about an account"),
    ("monitor", "catga.rpc.Quote", "ask for work from the system account"),
]


@pytest.mark.parametrize(("user", "subject", "queue", "why"), SUBSCRIBE_ABUSES)
async def test_a_subscription_that_nobody_needs_is_refused(
    server: NatsServer, deployment: Deployment, user: str, subject: str, queue: str, why: str
) -> None:
    async with deployment.client(server, user) as one:
        await one.transport.subscribe(subject, Received(), queue=queue)
        assert await one.denied() == [subject], why


@pytest.mark.parametrize(("user", "subject", "why"), PUBLISH_ABUSES)
async def test_a_message_that_nobody_should_send_is_refused(
    server: NatsServer, deployment: Deployment, user: str, subject: str, why: str
) -> None:
    async with deployment.client(server, user) as one:
        one.transport.publish(subject, b"abuse")
        assert await one.denied() == [subject], why


FORBIDDEN = {
    "asks what it may not": "catga.rpc.Secret",
    "asks one node what it may not": "catga.to.shop.shop-1.rpc.Secret",
    "forges the end of a connection": "catga.sys.disconnect",
    "makes a stream": "$JS.API.STREAM.CREATE.evil",
    "asks all services what they are": "$SRV.PING",
    "forges an answer": "_INBOX.billing.abc.1.a",
}
ITSELF = {
    "shop": ("catga.to.shop.shop-9.ping", "catga.to.shop.shop-9.ping"),
    "web": ("catga.to.web.web-9.ping", "catga.to.web.web-9.ping"),
    "operator": ("catga.to.operator.operator-9.ping", "catga.to.operator.operator-9.ping"),
    "monitor": ("$SYS.REQ.SERVER.PING", "_INBOX.monitor.>"),
}
# What each user may send, and where it hears of it: itself, or, of the monitor, the answer of the server.

GRANTS = [
    (user, what)
    for user in ITSELF
    for what in FORBIDDEN
    if (user, what) not in {("shop", "forges an answer"), ("operator", "asks all services what they are")}
]
# A service answers, and an operator asks services, without any such trick.


async def grant_oneself(sender: Client, hearer: Client, user: str, subject: str) -> None:
    """Ask oneself, with a forbidden subject to answer on, and write there: who may respond is then permitted to."""
    question, where = ITSELF[user]
    heard = Received()
    await hearer.transport.subscribe(where, heard)
    assert await hearer.denied() == []
    if user == "monitor":
        sender.transport.publish(question, NOTHING, reply="_INBOX.monitor.1")
    else:
        # The server of the one has to know first that the other listens.
        await eventually(lambda: sender.transport.publish(question, NOTHING) or heard.messages)
        sender.transport.publish(question, b"grant", reply=subject)
    await eventually(lambda: heard.payloads and heard.payloads[-1] != NOTHING)
    hearer.transport.publish(subject, b"abuse")


@pytest.mark.parametrize(("user", "what"), GRANTS)
async def test_nobody_grants_himself_a_subject_by_asking_himself(
    server: NatsServer, deployment: Deployment, user: str, what: str
) -> None:
    subject = FORBIDDEN[what]
    async with deployment.client(server, user) as one:
        await grant_oneself(one, one, user, subject)
        assert await one.denied() == [subject]


async def test_a_caller_that_pretends_to_handle_a_type_is_sent_nothing(another: Deployment) -> None:
    """It announces a node that handles Quote, and answers its pings; requests still go to who may handle them."""
    another.add_user("till", like="web")
    server = another.server()
    with another.started(server):
        async with (
            shop(server.url, another) as service,
            Bus("till", url=server.url, **another.account("till")) as till,
            another.client(server, "web") as liar,
        ):
            beats = BeatWriter(Identity("web", "web-1", "1", {}, types=("Quote",)), (1, 1))
            sent = Received()

            def beat(subject: str) -> None:
                payload = beats.write(
                    NodeStatus.ONLINE,
                    Report(is_ready=True),
                    is_ready=True,
                    interval=0.25,
                    stall=0.0,
                    load=NodeLoad(),
                    utc_ms=0,
                )
                liar.transport.publish(subject, payload)
                liar.transport.push()

            await liar.transport.subscribe("catga.to.web.web-1.ping", lambda _, __, reply, ___: beat(reply))
            for subject in ("catga.to.web.web-1.>", "catga.to.web.web-1.rpc.Quote", "catga.rpc.Quote"):
                await liar.transport.subscribe(subject, sent)
            await liar.transport.flush()

            def is_believed() -> bool:
                beat("catga.nodes.web-1")
                return any(node.id == "web-1" and node.types == ("Quote",) for node in till.nodes())

            await eventually(is_believed)
            for number in range(20):
                is_believed()  # it goes on beating
                result = await till.send(Quote(str(number)), where=lambda node: True)
                assert result == Ok(f"{number} by {service.node_id}")
            assert sent.messages == []


def test_no_user_may_respond_wherever_he_is_asked() -> None:
    """With `allow_responses` a user may publish wherever a message that he hears, his own included, wants an answer."""
    for file in FILES.rglob("*.conf"):
        assert "allow_responses" not in file.read_text(), file


async def test_a_forged_heartbeat_is_not_refused_here(server: NatsServer, deployment: Deployment) -> None:
    """What the server cannot do: the ids of nodes are drawn, and its wildcards stand for whole tokens only.

    Receivers believe nothing of weight in a heartbeat before they have asked the node on its own subject.
    """
    async with deployment.client(server, "web") as one:
        one.transport.publish("catga.nodes.shop-1", NOTHING)
        assert await one.denied() == []


async def test_an_answer_of_the_server_goes_wherever_it_is_wanted(server: NatsServer, deployment: Deployment) -> None:
    """What the server cannot do: it does not check where its own answers are sent. What they say nobody can choose."""
    heard = Heard()
    async with (
        shop(server.url, deployment, heard=heard),
        deployment.client(server, "web") as one,
        deployment.client(server, "operator") as reader,
    ):
        seen = Received()
        await reader.transport.subscribe("catga.all.PricesChanged", seen)
        await reader.transport.flush()
        one.transport.publish("$SYS.REQ.USER.INFO", b"chosen", reply="catga.all.PricesChanged")
        await seen.wait(1)
        await eventually(lambda: heard.price_changes == 1)  # an event without fields that have to be there
        assert list(json.loads(seen.payloads[0])) == ["server", "data"]
        assert b"chosen" not in seen.payloads[0]
        assert await one.denied() == []


async def test_with_fixed_ids_a_forged_heartbeat_is_refused(another: Deployment) -> None:
    another.edit(
        "users/web.conf", ('"catga.nodes.*"           # its heartbeats', '"catga.nodes.web-1"  # its heartbeats')
    )
    server = another.server()
    with another.started(server):
        async with another.client(server, "web") as one:
            one.transport.publish("catga.nodes.web-1", NOTHING)
            one.transport.publish("catga.nodes.shop-1", NOTHING)
            assert await one.denied() == ["catga.nodes.shop-1"]


@pytest.mark.parametrize(
    "account",
    [
        {},
        {"user": "web", "password": "wrong"},
        {"user": "web", "password": "change-me-shop"},
        {"user": "nobody", "password": "change-me-web"},
        {"token": "change-me-web"},
        {"user": "route", "password": "change-me-route"},
    ],
)
async def test_nobody_connects_without_the_password_of_a_user(server: NatsServer, account: dict[str, str]) -> None:
    stranger = Client(server.url, account, "catga/stranger")
    with pytest.raises(AuthenticationError):
        async with stranger:
            pass


async def test_with_the_tls_block_of_the_readme_a_bus_is_encrypted(
    another: Deployment, certificates: Certificates
) -> None:
    block = re.search(r"^ *tls \{.*\}$", (FILES / "README.md").read_text(), re.M)
    assert block is not None
    paths = zip(
        ("server.pem", "server-key.pem", "ca.pem"),
        (certificates.server_cert, certificates.server_key, certificates.ca),
        strict=True,
    )
    tls = block[0].strip()
    for name, path in paths:
        tls = tls.replace(f"/etc/nats/{name}", path)
    another.edit("single.conf", ('include "common.conf"', f'{tls}\ninclude "common.conf"'))
    server = another.server()
    with another.started(server):
        url = f"tls://localhost:{server.port}"
        account = another.account("web")
        async with (
            shop(url, another, tls_ca=certificates.ca),
            Bus("web", url=url, tls_ca=certificates.ca, **account) as caller,
        ):
            assert (await caller.send(Quote("a"))).unwrap()


# -- a frozen client ---------------------------------------------------------------------------------------


def frozen_node(server: NatsServer, deployment: Deployment) -> socket.socket:
    """Connect as a node of the shop that takes requests and never again says a word."""
    connect = {"user": "shop", "pass": deployment.password("shop"), "name": "catga/shop-frozen", "verbose": False}
    frozen = socket.create_connection(("127.0.0.1", server.port), 5)
    frozen.sendall(b"CONNECT %b\r\nSUB catga.rpc.Quote rpc 1\r\nPING\r\n" % json.dumps(connect).encode())
    said = b""
    while b"PONG" not in said:
        said += frozen.recv(65_536)
    return frozen


async def test_a_frozen_node_is_cut_off_and_everybody_told(another: Deployment) -> None:
    """A copy with pings 25 times as often: between `ping_max` and `ping_max` + 1 intervals later the node is out."""
    another.edit("common.conf", ('ping_interval: "5s"', 'ping_interval: "200ms"'))
    server = another.server()
    with another.started(server):
        async with another.client(server, "web") as watcher:
            ends = Received()
            await watcher.transport.subscribe("catga.sys.disconnect", ends)
            await watcher.transport.flush()
            with frozen_node(server, another):
                await ends.wait(1)
            event = json.loads(ends.payloads[0])
            assert event["client"]["name"] == "catga/shop-frozen"
            assert event["reason"] == "Stale Connection"
            answers = Received()
            await watcher.transport.subscribe("_INBOX.web.>", answers)
            watcher.transport.publish("catga.rpc.Quote", NOTHING, reply="_INBOX.web.1")
            await answers.wait(1)
            headers = answers.messages[0][3]
            assert headers is not None
            assert headers["Status"] == "503"  # nobody is left in the queue group


# -- three servers -----------------------------------------------------------------------------------------


async def is_whole(deployment: Deployment) -> None:
    """Wait until each of three servers knows the other two."""

    def known() -> list[int]:
        files = [f"cluster/n{number}.conf" for number in (1, 2, 3)]
        routes = [monitor(deployment, file, "routez")["routes"] for file in files]
        return [len({route["remote_id"] for route in some}) for some in routes if isinstance(some, list)]

    await eventually(lambda: known() == [2, 2, 2], timeout=20)


async def test_three_servers_carry_a_service_and_outlive_one_of_them(another: Deployment) -> None:
    servers = another.cluster()
    with another.started(*servers):
        await is_whole(another)
        urls = [server.url for server in servers]
        async with (
            shop(urls[1], another) as first,
            shop(urls[2], another) as second,
            web(urls[0], another) as caller,
            another.client(servers[2], "operator") as operator,
        ):
            nodes: set[str] = set()

            async def ask(count: int) -> list[Ok[str] | Err]:
                results = await asyncio.gather(*(caller.send(Quote("a"), timeout=15) for _ in range(count)))
                nodes.update(result.value.rpartition(" ")[2] for result in results if isinstance(result, Ok))
                return list(results)

            for _ in range(40):  # one batch each, and each to a node drawn by the server
                assert all(isinstance(result, Ok) for result in await ask(1))
            assert nodes == {first.node_id, second.node_id}
            ends = Received()
            await operator.transport.subscribe("catga.sys.disconnect", ends)
            await operator.transport.flush()
            servers[0].kill()  # the caller's own; it learnt of the others from it
            assert all(isinstance(result, Ok) for result in await ask(20))
            async with another.client(servers[1], "shop", "catga/shop-elsewhere"):
                pass
            await ends.wait(1)  # an event of one server reaches the clients of another
            assert "catga/shop-elsewhere" in {json.loads(one)["client"]["name"] for one in ends.payloads}
            assert refused(first) == refused(second) == refused(caller) == set()


@pytest.mark.parametrize("user", ["web", "operator"])
async def test_nobody_grants_himself_a_subject_through_another_server(another: Deployment, user: str) -> None:
    servers = another.cluster()
    with another.started(*servers):
        await is_whole(another)
        async with another.client(servers[0], user) as sender, another.client(servers[1], user) as hearer:
            await grant_oneself(sender, hearer, user, "catga.rpc.Secret")
            assert await hearer.denied() == ["catga.rpc.Secret"]


async def test_a_server_in_lame_duck_mode_loses_no_request(another: Deployment) -> None:
    servers = another.cluster()
    with another.started(*servers):
        await is_whole(another)
        first, second = servers[0].url, servers[1].url
        everywhere = f"{first},{second}"
        async with (
            shop(everywhere, another) as one,
            shop(second, another) as other,
            web(everywhere, another) as caller,
        ):
            results: list[Ok[str] | Err] = []
            done = asyncio.Event()

            async def ask_on() -> None:
                while not done.is_set():
                    results.append(await caller.send(Quote("a", seconds=0.01), timeout=10))

            asking = [asyncio.create_task(ask_on()) for _ in range(8)]
            leaving = next(server for server in servers[:2] if server.url == one._open().transport.url)
            leaving.lame_duck()
            await eventually(lambda: not leaving.is_running, timeout=30)
            answered = len(results)
            await eventually(lambda: len(results) > answered + 50)
            done.set()
            await asyncio.gather(*asking)
            assert one.statistics().reconnects >= 1
            assert [result for result in results if not isinstance(result, Ok)] == []
            assert {result.unwrap().rpartition(" ")[2] for result in results} == {one.node_id, other.node_id}


async def test_a_server_without_the_password_of_the_routes_stays_outside(another: Deployment) -> None:
    servers = another.cluster()
    with another.started(*servers[:2]):
        # The third has its file and all passwords but that one.
        another.environment["CATGA_NATS_ROUTES"] = another.environment["CATGA_NATS_ROUTES"].replace(
            "change-me-route", "wrong"
        )
        with another.started(servers[2]):
            await eventually(lambda: "authentication error" in servers[0].log + servers[1].log, timeout=20)
            routes = monitor(another, "cluster/n1.conf", "routez")["routes"]
            assert isinstance(routes, list)
            assert {route["remote_name"] for route in routes} <= {"catga-n2"}
