"""Losing a server in every way there is, and coming back with everything in place."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from catga_bus.errors import DisconnectedError, Outcome
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.nats_core import NatsTransport
from tests.fake_nats import FakeNats
from tests.servers import Certificates, NatsServer, free_port, start_cluster

pytestmark = pytest.mark.nats

Make = Callable[..., tuple[NatsTransport, RecordedEvents]]
Start = Callable[..., NatsServer]

CREDENTIALS = "authorization { user: ada, password: secret }"


async def subscribed(transport: NatsTransport, subject: str = "a.b", queue: str = "") -> list[bytes]:
    came: list[bytes] = []
    await transport.subscribe(subject, lambda *message: came.append(message[1]), queue=queue)
    await transport.flush()
    return came


async def test_subscriptions_live_through_a_kill_and_a_restart(
    make_transport: Make, nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "catga_bus.transport")
    transport, events = make_transport(nats_server.url, name="survivor")
    await transport.connect()
    plain = await subscribed(transport)
    grouped = await subscribed(transport, "a.*", "workers")
    for round_ in range(1, 3):
        nats_server.kill()
        await eventually(lambda: not transport.is_connected)
        nats_server.start()
        await eventually(lambda count=round_: len(events.reconnected) == count)
        transport.publish("a.b", b"%d" % round_)
        await transport.flush()
        await eventually(lambda count=round_: len(plain) == len(grouped) == count)
    assert plain == grouped == [b"1", b"2"]
    assert events.reconnected == [nats_server.url] * 2
    assert len(events.disconnected) == 2
    lines = [record.getMessage() for record in caplog.records]
    for words in ("connected to", "lost the connection to", "back at"):
        assert any(words in line and "survivor" in line and nats_server.url in line for line in lines), words


async def test_nothing_crosses_a_reconnect(make_transport: Make, nats_server: NatsServer) -> None:
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    came = await subscribed(transport)
    nats_server.freeze()
    for number in range(10):
        transport.publish("a.b", b"lost %d" % number)
    nats_server.kill()
    await eventually(lambda: not transport.is_connected)
    with pytest.raises(DisconnectedError) as caught:
        transport.publish("a.b", b"refused")
    assert caught.value.outcome is Outcome.NOT_RUN
    nats_server.start()
    await eventually(lambda: events.reconnected)
    transport.publish("a.b", b"new")
    await transport.flush()
    assert came == [b"new"]


async def test_what_is_published_in_the_turn_of_the_loss_does_not_appear_later(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        transport.publish("a.b", b"pending")
        server.connections[0].transport.abort()
        transport._connection.lose("for the test")
        await eventually(lambda: events.reconnected)
        await transport.flush()
        assert not any(line.startswith(b"PUB") for line in server.lines)


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "with unsent data"])
async def test_a_frozen_server_is_left_for_another(make_transport: Make, start_server: Start, is_busy: bool) -> None:
    servers = [start_server(), start_server()]
    transport, events = make_transport(*(server.url for server in servers), ping_interval=0.1)
    await transport.connect()
    came = await subscribed(transport)
    frozen, other = sorted(servers, key=lambda server: server.url != transport.url)
    frozen.freeze()
    if is_busy:
        while not transport.is_behind:
            transport.publish("z", bytes(100_000))
            transport.push()
    await eventually(lambda: events.reconnected, 10)
    assert transport.url == other.url
    assert "pings were not answered" in events.disconnected[0]
    transport.publish("a.b", b"here")
    await eventually(lambda: came == [b"here"])


async def test_a_short_freeze_breaks_nothing(make_transport: Make, nats_server: NatsServer) -> None:
    transport, events = make_transport(nats_server.url, ping_interval=60)
    await transport.connect()
    came = await subscribed(transport)
    nats_server.freeze()
    transport.publish("a.b", b"patient")
    with pytest.raises(DisconnectedError):
        await transport.flush(0.05)
    assert transport.is_connected
    nats_server.thaw()
    await transport.flush()
    assert came == [b"patient"]
    assert events.disconnected == []


async def test_a_flush_ends_with_the_connection_that_it_waits_for(
    make_transport: Make, nats_server: NatsServer
) -> None:
    transport, _ = make_transport(nats_server.url)
    await transport.connect()
    nats_server.freeze()
    waiting = asyncio.ensure_future(transport.flush(60))
    await asyncio.sleep(0)
    nats_server.kill()
    with pytest.raises(DisconnectedError, match="lost"):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(DisconnectedError, match="not connected"):
        await transport.flush()


async def test_servers_that_the_cluster_names_are_found_with_the_credentials_of_the_seed(
    make_transport: Make, start_server: Start
) -> None:
    seed, other = start_cluster(start_server, 2, CREDENTIALS)
    transport, events = make_transport(f"nats://ada:secret@{seed.address}")
    await transport.connect()
    pool = transport._connection._dialer.pool
    await eventually(lambda: other.url in {server.url for server in pool.round()})
    came = await subscribed(transport)
    seed.kill()
    await eventually(lambda: events.reconnected == [other.url])
    transport.publish("a.b", b"there")
    await eventually(lambda: came == [b"there"])


async def test_several_seeds_share_a_cluster(make_transport: Make, start_server: Start) -> None:
    servers = start_cluster(start_server, 2)
    dead = f"nats://127.0.0.1:{free_port()}"
    receiver, _ = make_transport(dead, servers[0].url)
    sender, _ = make_transport(servers[1].url, dead)
    await receiver.connect()
    await sender.connect()
    assert (receiver.url, sender.url) == (servers[0].url, servers[1].url)
    came = await subscribed(receiver)

    def arrives() -> bool:
        # Interest takes a moment to reach the other server, and there is no asking when it has.
        sender.publish("a.b", b"across")
        return bool(came)

    await eventually(arrives, 20)


async def test_a_server_in_lame_duck_mode_is_left_when_it_ends(
    make_transport: Make, start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    lame = start_server('lame_duck_duration: "30s"\nlame_duck_grace_period: "1ms"\n')
    transport, events = make_transport(lame.url)
    await transport.connect()
    lame.lame_duck()
    await eventually(lambda: "lame duck" in caplog.text)
    assert lame.url in caplog.text
    await eventually(lambda: events.disconnected, 20)


async def test_credentials_that_are_refused_later_are_tried_again_for_ever(
    make_transport: Make, start_server: Start
) -> None:
    server = start_server(CREDENTIALS)
    transport, events = make_transport(server.url, user="ada", password="secret")
    await transport.connect()
    server.restart("authorization { user: ada, password: another }")
    await eventually(lambda: events.disconnected)
    refusals = server.log.count("authentication error")
    await eventually(lambda: server.log.count("authentication error") >= refusals + 3, 10)
    server.restart(CREDENTIALS)
    await eventually(lambda: events.reconnected, 20)


async def test_a_user_that_is_taken_away_and_given_back_is_let_in_again(
    make_transport: Make, start_server: Start
) -> None:
    server = start_server(CREDENTIALS)
    transport, events = make_transport(server.url, user="ada", password="secret")
    await transport.connect()
    came = await subscribed(transport)
    server.reload(CREDENTIALS.replace("ada", "bob"))
    await eventually(lambda: events.disconnected)
    server.reload(CREDENTIALS)
    await eventually(lambda: events.reconnected, 10)
    transport.publish("a.b", b"again")
    await eventually(lambda: came == [b"again"])


async def test_a_server_that_hangs_up_for_what_was_sent_is_come_back_to(
    make_transport: Make, start_server: Start
) -> None:
    server = start_server("max_control_line: 600\n")
    transport, events = make_transport(server.url)
    await transport.connect()
    came = await subscribed(transport)
    transport.publish("x" * 1_000, b"")
    await eventually(lambda: events.reconnected)
    assert "control line" in events.disconnected[0].lower()
    transport.publish("a.b", b"again")
    await eventually(lambda: came == [b"again"])


async def test_a_larger_pause_follows_each_loss_of_a_connection_that_did_not_last(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        loop = asyncio.get_running_loop()
        pauses = []
        for count in range(1, 5):
            await transport.flush()
            lost_at = loop.time()
            server.connections[-1].transport.abort()
            await eventually(lambda count=count: len(events.reconnected) == count)
            pauses.append(loop.time() - lost_at)
        # The fourth pause is drawn from 80 to 160 ms, the first from 10 to 20.
        assert pauses[3] > 0.08


async def test_a_loss_is_told_once_before_the_way_back(make_transport: Make, nats_server: NatsServer) -> None:
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    order: list[str] = []
    events.on_disconnected = lambda _: order.append(f"lost {transport.is_connected}")
    events.on_reconnected = lambda _: order.append(f"back {transport.is_connected}")
    nats_server.restart()
    await eventually(lambda: len(order) == 2)
    assert order == ["lost False", "back True"]


async def test_an_owner_that_raises_does_not_keep_the_connection_from_coming_back(
    make_transport: Make, nats_server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    transport, events = make_transport(nats_server.url)
    await transport.connect()

    def fail(_: str) -> None:
        raise ValueError("the owner's mistake")

    events.on_disconnected = fail
    came = await subscribed(transport)
    nats_server.restart()
    await eventually(lambda: events.reconnected)
    transport.publish("a.b", b"still")
    await eventually(lambda: came == [b"still"])
    assert "the owner's mistake" in caplog.text


# Closing in every state.


async def closes_in_time(transport: NatsTransport) -> None:
    before = asyncio.all_tasks()
    await asyncio.wait_for(transport.close(), 4)  # promised are 2 seconds; the machine may be busy
    assert asyncio.all_tasks() <= before
    assert not transport.is_connected
    with pytest.raises(DisconnectedError):
        transport.publish("a.b", b"")


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
async def test_closing_gives_up_on_a_frozen_server(
    make_transport: Make, start_server: Start, certificates: Certificates, with_tls: bool
) -> None:
    server = start_server(certificates.config() if with_tls else "")
    transport, events = make_transport(
        server.url, ping_interval=60, **({"tls_ca": certificates.ca} if with_tls else {})
    )
    await transport.connect()
    server.freeze()
    while not transport.is_behind:
        transport.publish("z", bytes(100_000))
        transport.push()
    await closes_in_time(transport)
    assert events.disconnected == []


async def test_closing_while_the_server_is_gone(make_transport: Make, nats_server: NatsServer) -> None:
    transport, _ = make_transport(nats_server.url)
    await transport.connect()
    nats_server.kill()
    await eventually(lambda: not transport.is_connected)
    await closes_in_time(transport)


async def test_closing_while_a_mute_server_is_asked_to_take_us_back(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        server.is_mute = True
        server.connections[-1].transport.abort()
        await eventually(lambda: len(server.connections) == 2)
        await closes_in_time(transport)
        assert events.reconnected == []


async def test_a_connection_that_breaks_while_it_is_closed_is_not_told_of(
    make_transport: Make, nats_server: NatsServer
) -> None:
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    nats_server.freeze()
    closing = asyncio.ensure_future(transport.close())
    await asyncio.sleep(0)
    nats_server.kill()
    await asyncio.wait_for(closing, 4)
    assert (events.disconnected, events.reconnected) == ([], [])


async def test_two_may_close_at_once(make_transport: Make, nats_server: NatsServer) -> None:
    transport, _ = make_transport(nats_server.url)
    await transport.connect()
    await asyncio.gather(transport.close(), transport.close())
    await closes_in_time(transport)
