"""What the server does not permit is a typed error at once, not a time-out."""

from collections.abc import Callable

import pytest

from catga_bus import AuthenticationError, Bus, Event, Ok, PermissionDeniedError, Request
from catga_bus.testing import eventually
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

# One user may do all, one may only ask for `Allowed`, one may ask but not serve, one may serve but knows no other node.
USERS = """
authorization { users = [
  { user: all, password: secret }
  { user: asker, password: secret, permissions: {
      publish: ["catga.rpc.Allowed"], subscribe: ["_INBOX.>"] } }
  { user: asker_of_nodes, password: secret, permissions: {
      publish: ["catga.rpc.>", "$SRV.>"], subscribe: ["_INBOX.>"] } }
  { user: hermit, password: secret, permissions: {
      publish: ["_INBOX.>", "$JS.API.STREAM.NAMES"],
      subscribe: ["_INBOX.>", "catga.rpc.* rpc", "catga.to.shop.*.rpc.*", "catga.to.shop.*.status",
        "catga.to.shop.*.cancel"] } }
  { user: listener, password: secret, permissions: {
      publish: ["catga.nodes.*", "catga.rpc.Allowed"], subscribe: ["_INBOX.>", "catga.nodes.*"] } }
] }
"""


class Allowed(Request[int]):
    pass


class ForbiddenRequest(Request[int]):
    pass


class Forbidden(Event, durable=False):
    pass


@pytest.fixture
def server(start_server: Callable[..., NatsServer]) -> NatsServer:
    return start_server(USERS)


def service(server: NatsServer, user: str, **options: str) -> Bus:
    bus = Bus("shop", url=server.url, user=user, password="secret", **options)

    @bus.handler
    async def allowed(request: Allowed) -> int:
        return 1

    @bus.handler
    async def forbidden(request: ForbiddenRequest) -> int:
        return 2

    return bus


async def test_a_request_that_is_not_permitted_raises_at_once_and_the_rest_go_on(server: NatsServer) -> None:
    async with service(server, "all"), Bus("client", url=server.url, user="asker", password="secret") as client:
        assert await client.send(Allowed()) == Ok(1)
        with pytest.raises(PermissionDeniedError, match=r"catga\.rpc\.ForbiddenRequest") as caught:
            await client.send(ForbiddenRequest(), timeout=60)
        assert caught.value.subject == "catga.rpc.ForbiddenRequest"
        await client.publish(Forbidden())  # nobody answers an event: the denial is in the log
        assert await client.send(Allowed()) == Ok(1)
        assert client.statistics().calls.in_flight == 0


async def test_a_node_that_may_not_subscribe_does_not_start(server: NatsServer) -> None:
    bus = service(server, "asker_of_nodes")
    with pytest.raises(PermissionDeniedError, match=r"catga\.rpc\.Allowed"):
        await bus.start()


async def test_wrong_credentials_are_said_at_once(server: NatsServer) -> None:
    bus = Bus("client", url=server.url, user="all", password="hunter2", connect_timeout=30)
    with pytest.raises(AuthenticationError) as caught:
        await bus.start()
    assert "hunter2" not in str(caught.value)


async def test_a_denied_subject_is_seen_in_the_state_of_the_connection(server: NatsServer) -> None:
    async with Bus("client", url=server.url, user="asker", password="secret") as client:
        await client.publish(Forbidden())
        await eventually(lambda: "catga.tick.Forbidden" in client._connection.denied)


async def test_a_node_that_may_know_no_other_serves_all_the_same(server: NatsServer) -> None:
    """It may not beat, hear beats, ask nodes, answer them, be discovered, or hear of ended connections."""
    ends = "catga.sys.disconnect"
    async with (
        service(server, "hermit", disconnect_events=ends) as hermit,
        Bus("client", url=server.url, user="all", password="secret") as client,
    ):
        assert hermit._connection.denied >= {"catga.nodes.*", ends, "$SRV.PING"}
        assert [node.id for node in hermit.nodes()] == [hermit.node_id]
        assert await client.send(Allowed()) == Ok(1)
        assert [node.id for node in client.nodes()] == [client.node_id]


async def test_a_client_that_may_hear_of_nodes_and_not_ask_them_starts_among_them(server: NatsServer) -> None:
    """Whom it asks before its start is over depends on chance: refused questions must not fail it."""
    options = {"url": server.url, "user": "listener", "password": "secret"}
    async with service(server, "all") as shop, Bus("client", disconnect_events="some.events", **options) as client:
        assert {"some.events", f"catga.to.client.{client.node_id}.ping"} <= client._connection.denied
        assert {node.id for node in client.nodes()} == {shop.node_id, client.node_id}
        assert await client.send(Allowed()) == Ok(1)


async def test_a_node_is_ready_as_long_as_it_has_the_subscriptions_that_it_needs(server: NatsServer) -> None:
    """A reload takes a request from it; with the next connection it has it back."""
    async with service(server, "hermit") as hermit:
        assert hermit.health().ready  # though much is refused that it can do without
        server.reload(USERS.replace('"catga.rpc.* rpc"', '"catga.rpc.Allowed rpc"'))
        await eventually(lambda: not hermit.health().ready)
        failed = [check.name for check in hermit.health().checks if check.status == "fail"]
        assert failed == ["subscriptions"]
        assert hermit.health().live
        server.restart(USERS)
        await eventually(lambda: hermit.health().ready, 20.0)


async def test_a_reconnect_does_not_hide_a_subscription_that_is_refused(server: NatsServer) -> None:
    async with service(server, "hermit") as hermit:
        server.restart(USERS.replace('"catga.rpc.* rpc"', '"catga.rpc.Allowed rpc"'))
        await eventually(lambda: hermit.statistics().reconnects == 1, 20.0)
        await eventually(lambda: "catga.rpc.ForbiddenRequest" in hermit._connection.denied)
        assert not hermit.health().ready


async def test_a_node_that_was_refused_to_publish_is_ready(server: NatsServer) -> None:
    async with Bus("client", url=server.url, user="asker", password="secret") as client:
        await client.publish(Forbidden())
        with pytest.raises(PermissionDeniedError):
            await client.send(ForbiddenRequest(), timeout=60)
        await eventually(lambda: "catga.tick.Forbidden" in client._connection.denied)
        assert client.health().ready
