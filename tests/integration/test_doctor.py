"""`catga doctor` on the servers that we ship, and on a server that does nearly everything wrong."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from catga_bus import Bus, Ok, Request
from catga_bus.cli import examination, main
from catga_bus.clock import utc_now
from catga_bus.cluster.beats import BeatWriter, Identity, Report
from catga_bus.cluster.records import NodeLoad, NodeStatus
from catga_bus.codec import Gate
from catga_bus.embedded import EmbeddedServer
from catga_bus.testing import eventually
from catga_bus.transport.asking import ask
from catga_bus.wire import PREFIX, Kind, Names
from tests.deployment import Client, Deployment
from tests.servers import NatsServer, free_port, server_binary

pytestmark = pytest.mark.nats

NAMES = Names()

BAD = """
server_name: bad
max_payload: 100KB
ping_interval: "1h"
http: "127.0.0.1:%d"
accounts {
  APP {
    jetstream: enabled
    users: [
      { user: all, password: secret }
      { user: poor, password: secret, permissions: {
          publish: ["$SYS.REQ.USER.INFO"], subscribe: ["_INBOX.>"] } }
      { user: silent, password: secret, permissions: { publish: { deny: ["catga.nodes.*"] } } }
      { user: mute, password: secret, permissions: { publish: ["nothing"], subscribe: ["_INBOX.mute.>"] } }
    ]
  }
  SYS { users: [{ user: system, password: secret }] }
}
system_account: SYS
no_auth_user: all
"""

SHOP = """
from catga_bus import Bus, Event, Request

bus = Bus("shop", url={url!r}, **{account!r})


class Quote(Request[str]):
    sku: str


class Sold(Event, durable=False):
    sku: str


{more}


@bus.handler
async def quote(request: Quote) -> str:
    return request.sku


@bus.handler
async def sold(event: Sold) -> None:
    pass
"""


class Quote(Request[str]):
    sku: str


class Doctor:
    """The last words of `catga doctor --json`."""

    def __init__(self, code: int, said: dict[str, Any]) -> None:
        self.code = code
        self.counts: dict[str, int] = said["counts"]
        self.is_ok: bool = said["ok"]
        self.findings: list[dict[str, str]] = said["findings"]

    def of(self, check: str) -> list[dict[str, str]]:
        return [finding for finding in self.findings if finding["check"] == check]

    def levels(self, check: str) -> list[str]:
        return [finding["level"] for finding in self.of(check)]


Examine = Callable[..., Any]


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run `catga doctor --json` in a thread, beside the nodes of the test; returns what it said."""

    async def examine(*arguments: str) -> Doctor:
        code = await asyncio.to_thread(main, ["doctor", "--json", *arguments])
        return Doctor(code, json.loads(capsys.readouterr().out))

    return examine


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    server_binary()
    return Deployment(tmp_path_factory.mktemp("doctor"))


@pytest.fixture(scope="module")
def server(deployment: Deployment) -> Iterator[NatsServer]:
    server = deployment.server()
    with deployment.started(server):
        yield server


@pytest.fixture
def bad(start_server: Callable[..., NatsServer]) -> NatsServer:
    return start_server(BAD % free_port(), jetstream=True)


def url_of(server: NatsServer, user: str, password: str) -> str:
    return f"nats://{user}:{password}@{server.address}"


def known(deployment: Deployment, server: NatsServer, user: str) -> str:
    return url_of(server, user, deployment.password(user))


class Played:
    """A node played by hand on a plain connection: it says what it is told to, and answers or does not.

    Args:
        client: Its connection.
        node_id: Its id; its service is `shop`.
        version: Of its service.
        life: Its incarnation.
        wire_versions: Those that it reads.
        ahead: Seconds by which its clock is ahead.
        beats: Whether it beats.
        answers: Whether it answers pings; 0 for no, 1 until the doctor has asked, after which it is dead, 2 for yes.
        says: What else its beats say.
    """

    def __init__(
        self,
        client: Client,
        node_id: str,
        *,
        version: str = "1.0",
        life: tuple[int, int] = (7, 7),
        wire_versions: tuple[int, ...] = (1,),
        ahead: float = 0.0,
        beats: bool = True,
        answers: int = 2,
        **says: Any,
    ) -> None:
        identity = Identity("shop", node_id, version, {}, types=("Quote",), wire_versions=wire_versions)
        self._writer = BeatWriter(identity, life)
        self._transport = client.transport
        self._id = node_id
        self._ahead = ahead
        self._beats = beats
        self._answers = answers
        self._says: dict[str, Any] = {
            "status": NodeStatus.ONLINE, "report": Report(), "is_ready": True, "stall": 0.0,
        } | says  # fmt: skip
        self._task: asyncio.Task[None] | None = None

    def _beat(self) -> bytes:
        utc_ms = int((utc_now().timestamp() + self._ahead) * 1000)
        return self._writer.write(**self._says, interval=0.25, load=NodeLoad(), utc_ms=utc_ms)

    async def __aenter__(self) -> "Played":
        if self._answers:
            self._subscription = await self._transport.subscribe(NAMES.node_ping("shop", self._id), self._on_ping)
        self._task = asyncio.create_task(self._beat_on())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _beat_on(self) -> None:
        while self._beats or self._answers:
            if self._beats:
                self._transport.publish(NAMES.heartbeat(self._id), self._beat())
                self._transport.push()
            await asyncio.sleep(0.25)
        await self._subscription.close()

    def _on_ping(self, _: str, payload: bytes, reply: str, ___: object) -> None:
        if reply:
            self._transport.publish(reply, self._beat())
            self._transport.push()
            if self._answers == 1 and b"catga-doctor" in payload:  # others ask to know it at all
                self._beats, self._answers = False, 0


def node(server: NatsServer, service: str = "shop", **options: Any) -> Bus:
    bus = Bus(service, url=server.url, **options)

    @bus.handler
    async def quote(request: Quote) -> str:
        return request.sku

    return bus


async def test_an_operator_finds_nothing_wrong_with_what_we_ship(
    server: NatsServer, deployment: Deployment, examine: Examine
) -> None:
    async with node(server, **deployment.account("shop")):
        said = await examine(
            *("--url", known(deployment, server, "operator")),
            *("--system-url", known(deployment, server, "monitor")),
        )
    assert said.code == 0
    assert said.is_ok
    assert said.counts["warning"] == said.counts["failed"] == 0
    assert [one["what"] for one in said.of("pings")] == ["server catga cuts a frozen client off after 10 to 15 s"]
    assert said.levels("permissions") == said.levels("streams") == said.levels("version") == ["ok"]
    assert said.of("nodes")[0]["what"] == "1 node of 1 service"


async def test_a_service_finds_that_all_it_handles_is_permitted(
    server: NatsServer,
    deployment: Deployment,
    examine: Examine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    account = deployment.account("shop")
    options = account | {"node_id": "shop-1", "disconnect_events": "catga.sys.disconnect"}
    (tmp_path / "good_shop.py").write_text(SHOP.format(url=server.url, account=options, more=""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("good_shop:bus", "--broadcasts", "PricesChanged", "--monitor", deployment.monitors["single.conf"])
    said = await examine(*arguments)
    assert said.levels("permissions") == ["ok"]
    assert said.levels("pings") == ["ok"]
    assert "no node is heard of" in said.of("nodes")[0]["what"]
    async with node(server, **options) as running:  # with the id of the module: it is no rival to itself
        said = await examine(*arguments)
        assert said.counts["failed"] == said.counts["warning"] == 0
        assert said.of("nodes")[0]["what"] == "1 node of 1 service"
        assert "ermissions" not in "".join(running._connection.denied)
        assert running.node.is_ready


async def test_a_service_finds_which_type_is_not_permitted(
    server: NatsServer,
    deployment: Deployment,
    examine: Examine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = "class Secret(Request[str]): ...\n\n@bus.handler\nasync def secret(request: Secret) -> str: ...\n"
    (tmp_path / "more_shop.py").write_text(SHOP.format(url=server.url, account=deployment.account("shop"), more=more))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = await examine("more_shop:bus", "--asks", "Refund", "--publishes", "Paid")
    assert said.code == 1
    assert not said.is_ok
    fixes = {one["fix"].partition(" to the user")[0] for one in said.of("permissions")}
    assert fixes == {
        "allow subscribe 'catga.rpc.Secret rpc'",
        "allow publish 'catga.rpc.Refund'",
        "allow publish 'catga.to.*.*.rpc.Refund'",
        "allow publish 'catga.tick.Paid'",
    }


async def test_the_examination_disturbs_nobody(server: NatsServer, deployment: Deployment, examine: Examine) -> None:
    """Requests go on without a loss while it tries what it may do, and no node runs anything for it."""
    deployment_url = known(deployment, server, "web")
    async with (
        node(server, **deployment.account("shop")) as service,
        Bus("web", url=server.url, **deployment.account("web")) as caller,
    ):
        done = asyncio.Event()
        results = []

        async def ask_on() -> None:
            while not done.is_set():
                results.append(await caller.send(Quote("a")))

        asking = asyncio.create_task(ask_on())
        await eventually(lambda: len(results) > 10)
        said = await examine("--url", deployment_url, "--asks", "Quote", "--publishes", "Sold")
        done.set()
        await asking
        assert said.levels("permissions") == ["ok"]
        assert set(results) == {Ok("a")}
        statistics = caller.statistics().calls
        assert statistics.retries == statistics.failed == 0
        assert service.statistics().requests.requests == len(results)


async def test_everything_wrong_with_a_bad_server_is_said(bad: NatsServer, examine: Examine) -> None:
    async with Client(bad.url, {"user": "all", "password": "secret"}, "catga/test") as client:
        stream = {"name": "EVERYTHING", "subjects": ["catga.>"], "no_ack": True}
        made = await ask(client.transport, "$JS.API.STREAM.CREATE.EVERYTHING", json.dumps(stream).encode(), 5.0)
        assert made is not None
        assert b"stream_create_response" in made.payload
        assert b"error" not in made.payload
        async with (
            node(bad, node_id="shop-1", version="1.0"),
            Played(client, "shop-1", version="1.1", beats=False),
            node(bad, "store"),
        ):
            said = await examine(
                *("--url", url_of(bad, "poor", "secret"), "--asks", "Quote"),
                *("--system-url", url_of(bad, "system", "secret")),
            )
            assert said.code == 1
            assert said.levels("max_payload") == ["warning"]
            assert said.levels("pings") == ["warning"]
            assert "7200 to 10800 s" in said.of("pings")[0]["what"]
            assert said.levels("streams") == ["unknown"]
            assert "may not ask" in said.of("streams")[0]["why"]
            assert set(said.levels("permissions")) == {"failed"}
            # All but its inbox: to be asked and answer, to hear and be heard, to ask nodes three things, Quote twice.
            assert len(said.of("permissions")) == 9
            assert said.levels("nodes") == ["unknown"]
            assert "not even of one's own" in said.of("nodes")[0]["why"]

            said = await examine("--url", url_of(bad, "all", "secret"))
            assert said.code == 1
            assert said.levels("settings") == ["unknown"]
            assert "--monitor" in said.of("settings")[0]["fix"]
            assert said.levels("permissions") == ["ok"]
            assert "stream EVERYTHING captures requests" in said.of("streams")[0]["what"]
            assert said.of("node id")[0]["what"] == "2 nodes have the id 'shop-1'"
            assert said.of("types")[0]["what"] == "Quote is handled by the services shop and store"
            assert said.of("versions")[0]["what"] == "service shop runs 1.0, 1.1"


async def test_what_is_wrong_with_nodes_is_said(bad: NatsServer, examine: Examine) -> None:
    """Real nodes, one of which may not beat, and some played by hand: no real clock is touched."""
    async with (
        Client(bad.url, {"user": "all", "password": "secret"}, "catga/played") as client,
        node(bad, node_id="shop-1", version="1.0"),
        node(bad, node_id="shop-2", version="1.0"),
        node(bad, node_id="shop-3", version="1.0", user="silent", password="secret"),
        Played(client, "shop-4", ahead=3_600.0),
        Played(client, "shop-5", answers=0),
        Played(client, "shop-6", stall=7.0, is_ready=False, report=Report(breakers=("Pay", "bank-1"))),
        Played(client, "shop-7", answers=1),
        Played(client, "shop-8", status=NodeStatus.DRAINING, is_ready=False),
        Played(client, "shop-9", wire_versions=(1, 2)),
        Bus("web", url=bad.url),
    ):
        said = await examine("--url", url_of(bad, "all", "secret"))
    assert said.code == 1
    assert said.of("nodes")[0]["what"] == "10 nodes of 2 services"
    assert [one["what"] for one in said.of("heartbeats")] == ["no heartbeat of node shop-3 of shop is heard"]
    (clock,) = said.of("clocks")
    ahead = re.fullmatch(r"the clock of node shop-4 of shop is ([\d,.]+) s ahead of the others", clock["what"])
    assert ahead is not None
    assert 3_599.0 < float(ahead[1].replace(",", "")) < 3_601.0
    assert [one["what"] for one in said.of("answers")] == [
        "node shop-5 of shop does not answer the question whether it lives"
    ]
    assert "7.0 s" in said.of("stall")[0]["what"]
    assert "node shop-6 of shop keeps its calls from Pay, bank-1" in said.of("breakers")[0]["what"]
    status = {one["what"].split()[1]: one for one in said.of("status")}
    assert status.keys() == {"shop-5", "shop-6", "shop-7", "shop-8"}
    assert status["shop-6"]["what"] == "node shop-6 of shop is not ready"
    assert re.search("is (suspect|faulted)$", status["shop-7"]["what"])
    assert (status["shop-8"]["level"], status["shop-8"]["what"].split()[5]) == ("ok", "draining:")
    assert said.of("wire")[0]["what"] == "wire 1 is spoken, because not all nodes read 2"


async def test_nodes_of_another_namespace_are_not_looked_at(bad: NatsServer, examine: Examine) -> None:
    async with node(bad, namespace="other"):
        said = await examine("--url", url_of(bad, "all", "secret"))
        assert "no node is heard of" in said.of("nodes")[0]["what"]
        said = await examine("--url", url_of(bad, "all", "secret"), "--namespace", "other")
        assert said.of("nodes")[0]["what"] == "1 node of 1 service"


async def test_a_user_that_may_ask_for_nothing_is_tried_out(bad: NatsServer, examine: Examine) -> None:
    said = await examine("--url", url_of(bad, "mute", "secret"), "--asks", "Quote")
    assert said.code == 1
    refused = {one["what"].partition("'")[2].rstrip("'") for one in said.of("permissions")}
    assert refused == {
        "catga.nodes.*",
        "catga.nodes.catga-doctor",
        "catga.to.mute.catga-doctor.ping",
        "catga.to.mute.catga-doctor.status",
        "catga.to.mute.catga-doctor.cancel",
        "catga.to.mute.catga-doctor.rpc.Quote",
        "catga.rpc.Quote",
    }


async def test_warnings_fail_only_if_asked_to(examine: Examine) -> None:
    async with EmbeddedServer() as server:  # no nodes, no credentials
        assert (await examine("--url", server.url)).code == 0
        assert (await examine("--url", server.url, "--strict")).code == 1


async def test_a_cluster_is_asked_server_by_server(tmp_path: Path, examine: Examine) -> None:
    deployment = Deployment(tmp_path)
    deployment.edit("cluster/n2.conf", ('server_name: "catga-n2"', 'server_name: "catga-n2"\nmax_connections: 100'))
    deployment.edit("common.conf", ("max_connections: 2048\n", ""), ('ping_interval: "5s"\n', ""))
    for number, interval in ((1, "5s"), (2, "6s"), (3, "5s")):
        name = f'server_name: "catga-n{number}"'
        deployment.edit(f"cluster/n{number}.conf", (name, f'{name}\nping_interval: "{interval}"'))
    servers = deployment.cluster()
    with deployment.started(*servers):
        system = known(deployment, servers[0], "monitor")
        operator = known(deployment, servers[0], "operator")
        for _ in range(20):  # until the three have found each other
            said = await examine("--url", operator, "--system-url", system)
            if len(said.of("pings")) == 3:
                break
        assert sorted(one["what"].split()[1] for one in said.of("pings")) == ["catga-n1", "catga-n2", "catga-n3"]
        assert [one["what"] for one in said.of("settings")] == [
            "servers differ in their ping settings: 5 s x 2, 6 s x 2"
        ]
        assert sum("of 100 connections" in one["what"] for one in said.of("connections")) == 1


async def test_without_a_server_it_ends_with_3_and_shows_no_password(examine: Examine) -> None:
    said = await examine("--url", f"nats://web:hunter2@127.0.0.1:{free_port()}")
    assert said.code == 3
    assert said.levels("server") == ["failed"]
    assert "hunter2" not in json.dumps(said.findings)


async def test_wrong_credentials_end_with_3(server: NatsServer, examine: Examine) -> None:
    said = await examine("--url", url_of(server, "web", "hunter2"))
    assert said.code == 3
    assert "refuses the credentials" in said.of("server")[0]["why"]
    assert "hunter2" not in json.dumps(said.findings)


async def test_monitoring_that_cannot_be_read_fails(
    server: NatsServer, deployment: Deployment, examine: Examine
) -> None:
    url = known(deployment, server, "web")
    said = await examine("--url", url, "--monitor", f"127.0.0.1:{free_port()}")
    assert said.code == 1
    assert said.levels("settings") == ["failed"]
    said = await examine("--url", url, "--system-url", url_of(server, "monitor", "hunter2"))
    assert said.levels("settings") == ["failed"]
    assert said.levels("server") == ["ok"]
    assert "hunter2" not in json.dumps(said.findings)
    said = await examine("--url", url, "--monitor", "ftp://127.0.0.1")
    assert "http:// or https://" in said.of("settings")[0]["what"]
    said = await examine("--url", url, "--monitor", f"{deployment.monitors['single.conf']}/")
    assert said.levels("pings") == ["ok"]


@pytest.mark.parametrize("url", ["memory://x", "embedded://"])
async def test_a_private_server_is_not_examined(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["doctor", "--url", url]) == 2
    assert "nobody else's server" in capsys.readouterr().err


async def test_a_token_in_the_address_is_taken_for_no_name(
    start_server: Callable[..., NatsServer], examine: Examine
) -> None:
    server = start_server("authorization { token: s3cret }")
    async with Client(server.url, {"token": "s3cret"}, "catga/test") as client:
        seen: list[str] = []
        await client.transport.subscribe(">", lambda subject, *_: seen.append(subject))
        await client.transport.flush()
        said = await examine("--url", f"nats://s3cret@{server.address}", "--asks", "Quote")
        await client.transport.flush()
    assert said.levels("permissions") == ["ok"]
    assert seen
    assert "s3cret" not in "".join(seen) + json.dumps(said.findings)


async def test_people_get_a_table(
    server: NatsServer, deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    url = known(deployment, server, "web")
    assert await asyncio.to_thread(main, ["doctor", "--url", url, "--asks", "Secret"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok       server ")
    place = next(place for place, line in enumerate(lines) if line.startswith("failed   permissions"))
    assert lines[place].endswith("this user may not publish on 'catga.rpc.Secret'")
    assert lines[place + 1].split()[:2] == ["why", "with"]
    assert lines[place + 2].split()[:2] == ["fix", "allow"]
    assert lines[-1].endswith("2 failed")


def test_the_trial_payload_is_one_that_nodes_leave() -> None:
    assert examination._NOTHING.startswith(PREFIX)
    assert Gate().kind(examination._NOTHING) not in set(Kind)
