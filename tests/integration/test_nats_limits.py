"""What a server does not permit or cannot take: said in a typed way, and survived."""

import logging
from collections.abc import Callable

import pytest

from catga_bus.errors import ConfigurationError, Outcome, TooLargeError
from catga_bus.testing import Received, RecordedEvents, eventually
from catga_bus.transport.nats_core import NatsTransport
from tests.fake_nats import FakeNats
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

Make = Callable[..., tuple[NatsTransport, RecordedEvents]]
Start = Callable[..., NatsServer]

PERMISSIONS = """
authorization { users = [ { user: ada, password: secret, permissions: {
  publish: { allow: ["open.>", "_INBOX.>"], deny: ["open.Secret.>"] }
  subscribe: { allow: ["open.>", "grouped.> workers"] }
} } ] }
"""


@pytest.fixture
async def limited(make_transport: Make, start_server: Start) -> tuple[NatsTransport, RecordedEvents]:
    transport, events = make_transport(start_server(PERMISSIONS).url, user="ada", password="secret", name="limited")
    await transport.connect()
    return transport, events


Limited = tuple[NatsTransport, RecordedEvents]


@pytest.mark.parametrize(
    "subject",
    ["catga.rpc.Quote", "open.Secret.Plan", 'Odd"Subject\\With.Quotes', "Grüße.Ähre"],
    ids=["plain", "denied below an allowed one", "quotes", "umlauts"],
)
async def test_a_denied_publish_is_told_with_the_subject_as_it_was_written(limited: Limited, subject: str) -> None:
    transport, events = limited
    transport.publish(subject, b"")
    await transport.flush()
    ((told, text),) = events.denied
    assert told == subject
    assert "Publish" in text
    assert transport.is_connected
    assert (events.errors, events.disconnected) == ([], [])


@pytest.mark.parametrize(("subject", "queue"), [("catga.rpc.Quote", ""), ("grouped.a", "Idlers"), ("catga.*.>", "")])
async def test_a_denied_subscription_is_told_and_the_others_live(limited: Limited, subject: str, queue: str) -> None:
    transport, events = limited
    came: list[bytes] = []
    denied = await transport.subscribe(subject, lambda *message: came.append(message[1]), queue=queue)
    await transport.subscribe("open.a", lambda *message: came.append(message[1]))
    await transport.flush()
    ((told, text),) = events.denied
    assert told == subject
    assert "Subscription" in text
    transport.publish("open.a", b"1")
    await transport.flush()
    await denied.close()
    transport.publish("open.a", b"2")
    await transport.flush()
    assert came == [b"1", b"2"]
    assert events.disconnected == []


@pytest.mark.parametrize(
    "text",
    [
        b'Permissions Violation for Publish to "A.b"',
        b'Permissions Violation for Publish with Reply of "A.b"',
        b'Permissions Violation for Subscription to "A.b" using queue "Q"',
        b'permissions violation for publish to "A.b"',
    ],
)
async def test_every_wording_of_a_denial_is_understood(make_transport: Make, text: bytes) -> None:
    async with FakeNats() as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        server.say(b"-ERR '" + text + b"'\r\n")
        await transport.flush()
        assert events.denied == [("A.b", text.decode())]
        assert events.errors == []


async def test_another_error_is_told_and_is_the_reason_if_the_server_hangs_up(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, events = make_transport(server.url)
        await transport.connect()
        server.say(b"-ERR 'Maximum Subscriptions Exceeded'\r\n")
        await transport.flush()
        assert len(events.errors) == 1
        assert "Maximum Subscriptions Exceeded" in events.errors[0]
        assert transport.is_connected
        server.say(b"-ERR 'Slow Consumer'\r\n")
        server.connections[-1].close()
        await eventually(lambda: events.reconnected)
        assert "Slow Consumer" in events.disconnected[0]


async def test_every_denial_is_told_but_few_are_logged(limited: Limited, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "catga_bus.transport")
    transport, events = limited
    for _ in range(100):
        transport.publish("catga.rpc.Quote", b"")
    await transport.flush()
    assert [subject for subject, _ in events.denied] == ["catga.rpc.Quote"] * 100
    lines = [record.getMessage() for record in caplog.records if "catga.rpc.Quote" in record.getMessage()]
    assert 1 <= len(lines) <= 10
    assert transport.url in lines[0]
    assert lines[0].startswith("limited: ")


async def test_a_permission_that_is_granted_later_counts_after_the_reconnect(
    make_transport: Make, start_server: Start
) -> None:
    server = start_server(PERMISSIONS)
    transport, events = make_transport(server.url, user="ada", password="secret")
    await transport.connect()
    came: list[bytes] = []
    await transport.subscribe("catga.a", lambda *message: came.append(message[1]))
    await transport.flush()
    assert events.denied
    server.restart(PERMISSIONS.replace('"open.>"', '"open.>", "catga.>"'))
    await eventually(lambda: events.reconnected)
    transport.publish("catga.a", b"now")
    await eventually(lambda: came == [b"now"])


# Sizes.


async def test_the_limit_of_the_server_counts_headers_and_payload(make_transport: Make, start_server: Start) -> None:
    server = start_server("max_payload: 65536\n")
    transport, events = make_transport(server.url)
    await transport.connect()
    came: list[int] = []
    await transport.subscribe("a", lambda *message: came.append(len(message[1])))
    assert transport.max_payload == 65_536
    transport.publish("a", bytes(65_536))
    headers = {"Key": "value"}
    block = len("NATS/1.0\r\nKey: value\r\n\r\n")
    transport.publish("a", bytes(65_536 - block), headers=headers)
    for size, given in ((65_537, None), (65_536 - block + 1, headers)):
        with pytest.raises(TooLargeError, match=r"65537 bytes.*65536") as caught:
            transport.publish("a", bytes(size), headers=given)
        assert caught.value.outcome is Outcome.NOT_RUN
    await transport.flush()
    assert came == [65_536, 65_536 - block]
    assert (events.errors, events.disconnected) == ([], [])


async def test_the_limit_follows_the_server_over_a_reconnect(make_transport: Make, start_server: Start) -> None:
    server = start_server("max_payload: 65536\n")
    transport, events = make_transport(server.url)
    await transport.connect()
    server.restart("max_payload: 1000\n")
    await eventually(lambda: events.reconnected)
    assert transport.max_payload == 1_000
    with pytest.raises(TooLargeError):
        transport.publish("a", bytes(1_001))


async def test_messages_larger_than_any_buffer_arrive_whole(make_transport: Make, start_server: Start) -> None:
    server = start_server("max_payload: 8388608\n")
    transport, _ = make_transport(server.url)
    await transport.connect()
    came: list[bytes] = []
    await transport.subscribe("a", lambda *message: came.append(message[1]))
    large = bytes(range(256)) * (8_388_608 // 256)
    for payload in (large, b"\r\n", large[:-1], b""):
        transport.publish("a", payload)
    await eventually(lambda: len(came) == 4, 20)
    assert came == [large, b"\r\n", large[:-1], b""]


async def test_text_is_refused_as_a_payload_and_spoils_nothing_else(
    make_transport: Make, nats_server: NatsServer
) -> None:
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    came: list[bytes] = []
    await transport.subscribe("a", lambda *message: came.append(message[1]))
    transport.publish("a", b"before")
    with pytest.raises(TypeError):
        transport.publish("a", "text")
    changing = bytearray(b"a copy is taken")
    transport.publish("a", changing)
    changing[:] = b"!" * len(changing)
    transport.publish("a", memoryview(b"a view"))
    await transport.flush()
    assert came == [b"before", b"a copy is taken", b"a view"]
    assert events.disconnected == []


# Subjects.


@pytest.mark.parametrize(
    "subject",
    ["", "a..b", ".a", "a.", "a b", "a\tb", "a\r\nPUB b 0\r\n", "a\x00b", "a.*", "a.>", "x" * 1_025, "\ud800"],
)
async def test_a_bad_subject_is_refused_before_the_wire(
    make_transport: Make, nats_server: NatsServer, subject: str
) -> None:
    transport, events = make_transport(nats_server.url)
    await transport.connect()
    with pytest.raises(ConfigurationError):
        transport.publish(subject, b"")
    if subject:
        with pytest.raises(ConfigurationError):
            transport.publish("a", b"", reply=subject)
    await transport.flush()
    assert (events.errors, events.disconnected) == ([], [])


async def test_more_subjects_than_are_remembered_all_work(make_transport: Make, nats_server: NatsServer) -> None:
    transport, _ = make_transport(nats_server.url)
    await transport.connect()
    came: list[str] = []
    await transport.subscribe("many.*", lambda *message: came.append(message[0]))
    subjects = [f"many.{number}" for number in range(5_000)] * 2
    for subject in subjects:
        transport.publish(subject, b"")
    await eventually(lambda: len(came) == len(subjects), 20)
    assert came == subjects
    assert len(transport._head.__self__._prefixes) <= 4_096


# The order of what leaves.


async def test_interest_pings_and_messages_leave_in_the_order_they_were_made(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, _ = make_transport(server.url)
        await transport.connect()
        server.lines.clear()
        transport.publish("a", b"1")
        subscription = await transport.subscribe("s", lambda *_: None, queue="q")
        transport.publish("a", b"2", reply="r", headers={"K": "v"})
        await subscription.close()
        transport.publish("a", b"3")
        await transport.flush()
        assert server.lines == [
            b"PUB a 1", b"1",
            b"SUB s q 1",
            b"HPUB a r 18 19", b"NATS/1.0", b"K: v", b"", b"2",
            b"UNSUB 1",
            b"PUB a 1", b"3",
            b"PING",
        ]  # fmt: skip


async def test_what_a_turn_publishes_leaves_at_its_end_or_with_a_push(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, _ = make_transport(server.url)
        await transport.connect()
        wire = transport._connection._socket
        writes: list[bytes] = []
        write = wire.write
        wire.write = lambda data: (writes.append(data), write(data))
        transport.publish("a", b"1")
        transport.publish("a", b"2")
        assert writes == []
        transport.push()
        assert writes == [b"PUB a 1\r\n1\r\nPUB a 1\r\n2\r\n"]
        transport.push()
        transport.publish("a", b"3")
        await eventually(lambda: len(writes) > 1)
        assert writes[1:] == [b"PUB a 1\r\n3\r\n"]
        transport.publish("a", bytes(300_000))
        assert len(writes) == 3, "a turn that publishes much does not gather it all"


async def test_what_the_server_sent_before_it_read_the_unsubscribe_still_arrives(make_transport: Make) -> None:
    async with FakeNats() as server:
        transport, _ = make_transport(server.url)
        await transport.connect()
        leaving, closed = Received(), Received()
        first = await transport.subscribe("a.leaving", leaving)
        second = await transport.subscribe("a.closed", closed)
        await transport.flush()
        await first.unsubscribe()
        await second.close()
        server.say(b"MSG a.leaving 1 1\r\nx\r\nMSG a.closed 2 1\r\ny\r\n")
        await transport.flush()
        assert (leaving.payloads, len(closed)) == ([b"x"], 0)
        assert server.lines.count(b"UNSUB 1") == 1
        await first.close()
        assert server.lines.count(b"UNSUB 1") == 1
        server.say(b"MSG a.leaving 1 1\r\nz\r\n")
        await transport.flush()
        assert leaving.payloads == [b"x"]
