"""The contract of `catga_bus.transport.base` as tests: every carrier inherits and passes them.

A carrier of your own is proven in three steps: fill `Carrier`, inherit `TransportContract`, give it
the fixture `carrier`. pytest and pytest-asyncio must be installed; the rest is pytest as usual.

Example:
    In `conftest.py`, so that failed assertions show their values::

        pytest.register_assert_rewrite("catga_bus.testing.transport_contract")

    In `test_my_transport.py`::

        class MyCarrier(Carrier):
            def __init__(self, server):
                super().__init__()
                self._server = server

            def make(self, events, **options):
                return MyTransport(ConnectionOptions(urls=(self._server.url,), **options), events)

            async def cut(self):
                await self._server.kill()

            async def heal(self):
                await self._server.start()

        class TestMyTransport(TransportContract):
            @pytest_asyncio.fixture
            async def carrier(self, server):
                async with MyCarrier(server) as carrier:
                    yield carrier
"""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

import asyncio
import secrets
import threading
from collections import Counter
from collections.abc import Sized
from typing import ClassVar

import pytest

from catga_bus.errors import ConfigurationError, DisconnectedError, Outcome, TooLargeError
from catga_bus.testing.carrier import Carrier, Received, RecordedEvents
from catga_bus.testing.waiting import eventually
from catga_bus.transport.base import Subscription, Transport

RECONNECT_TIMEOUT = 30.0
"""Seconds that a carrier gets to notice that its server is gone or back: reconnect delays reach 2 s
(`ConnectionOptions.reconnect_delay`), and a server has to start in between."""

_CHUNK = bytes(262_144)
_CHUNKS = 192
# 48 MiB: more than the kernel keeps between two sockets (36 MiB with the largest defaults of Linux,
# for a reader that has been fast), and less than the 64 MiB at which nats-server gives up a slow
# receiver once it has to deliver them.


async def _listen(transport: Transport, subject: str, queue: str = "") -> Received:
    """Return what a new subscription gets; it is in force."""
    received = Received()
    await transport.subscribe(subject, received, queue=queue)
    await transport.flush()
    return received


async def _grown(things: Sized, count: int = 1) -> None:
    """Wait until something that the connection reports has happened `count` times."""
    await eventually(lambda: len(things) >= count, RECONNECT_TIMEOUT, what=f"{count} reports")


async def _settle(*transports: Transport) -> None:
    """Wait until what was published has arrived, so that a test may count.

    The server has routed everything once each publisher's flush returned; what it routed lies
    before the message that each transport then sends to itself.
    """
    for transport in transports:
        await transport.flush()
    for transport in transports:
        inbox = transport.new_inbox()
        received = Received()
        fence = await transport.subscribe(inbox, received)
        await transport.flush()
        transport.publish(inbox, b"")
        await received.wait(1)
        await fence.close()


def _numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


BAD_TOKENS = ("", ".", ".a", "a.", "a..b", "a b", "a\tb", "a\r\nb", "a\x00b", "a\ud800b", "x" * 1_025)
"""Never allowed in a subject, with wildcards or without."""

WILDCARDS = ("*", ">", "a.*", "a.>", "*.b")
"""Allowed in a subscription only."""

BAD_WILDCARDS = ("a*", "a.b*.c", "**", ">>", "a.>.b", ">.a")
"""Allowed nowhere."""


class TransportContract:
    """The promises of `Transport`, one test each. Inherit it and give it the fixture `carrier`."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    @pytest.fixture
    def carrier(self) -> Carrier:
        """The carrier under test; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `carrier`")

    @pytest.fixture
    def root(self) -> str:
        """The first tokens of the test's subjects, so that tests can share a server."""
        return f"contract.{secrets.token_hex(6)}"

    # Connecting and closing

    async def test_a_transport_is_connected_from_connect_to_close(self, carrier: Carrier) -> None:
        transport, _ = carrier.build()
        assert not transport.is_connected
        await transport.connect()
        assert transport.is_connected
        await transport.close()
        assert not transport.is_connected

    async def test_the_url_names_the_server_before_and_after_connecting(self, carrier: Carrier) -> None:
        transport, _ = carrier.build()
        assert "://" in transport.url
        await transport.connect()
        assert "://" in transport.url

    async def test_connecting_where_nobody_answers_fails_in_time_and_names_the_address(self, carrier: Carrier) -> None:
        await carrier.connect()
        await carrier.cut()
        transport, events = carrier.build(connect_timeout=0.5)
        async with asyncio.timeout(5.0):
            with pytest.raises(DisconnectedError) as caught:
                await transport.connect()
        assert transport.url.partition("://")[2] in str(caught.value)
        assert not transport.is_connected
        assert events.disconnected == []

    async def test_closing_twice_or_before_connecting_is_fine(self, carrier: Carrier) -> None:
        unused, _ = carrier.build()
        await unused.close()
        await unused.close()
        transport, events = await carrier.connect()
        await transport.close()
        await transport.close()
        assert events.disconnected == []

    async def test_close_leaves_no_tasks(self, carrier: Carrier, root: str) -> None:
        before = asyncio.all_tasks()
        transport, _ = await carrier.connect()
        received = await _listen(transport, root)
        transport.publish(root, b"1")
        await received.wait(1)
        await transport.close()
        await eventually(lambda: asyncio.all_tasks() == before, what="no tasks left")

    async def test_close_leaves_no_tasks_while_the_server_is_gone(self, carrier: Carrier) -> None:
        before = asyncio.all_tasks()
        transport, events = await carrier.connect()
        await carrier.cut()
        await _grown(events.disconnected)
        await transport.close()
        await eventually(lambda: asyncio.all_tasks() == before, what="no tasks left")
        assert events.reconnected == []

    async def test_close_sends_what_was_published(self, carrier: Carrier, root: str) -> None:
        sender, _ = await carrier.connect()
        receiver, _ = await carrier.connect()
        received = await _listen(receiver, root)
        for payload in _numbers(100):
            sender.publish(root, payload)
        await sender.close()
        await received.wait(100)
        assert received.payloads == _numbers(100)

    async def test_close_ends_the_subscriptions_and_other_transports_go_on(self, carrier: Carrier, root: str) -> None:
        leaver, _ = await carrier.connect()
        stayer, _ = await carrier.connect()
        left, stayed = await _listen(leaver, root), await _listen(stayer, root)
        await leaver.close()
        before = len(left)
        stayer.publish(root, b"1")
        await stayed.wait(1)
        await _settle(stayer)
        assert len(left) == before

    # Publishing and subscribing

    async def test_a_message_arrives_once_with_all_its_parts(self, carrier: Carrier, root: str) -> None:
        sender, _ = await carrier.connect()
        receiver, _ = await carrier.connect()
        received = await _listen(receiver, root)
        sender.publish(root, b"\x00\r\n\xff", reply=f"{root}.answers", headers={"A": "1"})
        sender.publish(root, b"bare")
        await received.wait(2)
        await _settle(sender, receiver)
        assert received.messages == [
            (root, b"\x00\r\n\xff", f"{root}.answers", {"A": "1"}),
            (root, b"bare", "", None),
        ]

    async def test_an_empty_payload_arrives_empty(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, root)
        transport.publish(root, b"")
        transport.publish(root, b"", headers={"A": "1"})
        await received.wait(2)
        assert received.messages == [(root, b"", "", None), (root, b"", "", {"A": "1"})]

    async def test_publish_returns_before_anything_is_delivered(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, root)
        for payload in _numbers(1_000):
            transport.publish(root, payload)
        transport.push()
        assert len(received) == 0
        await received.wait(1_000)

    async def test_sinks_run_on_the_event_loop(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, root)
        transport.publish(root, b"")
        await received.wait(1)
        assert received.threads == {threading.get_ident()}

    async def test_a_sink_may_publish(self, carrier: Carrier, root: str) -> None:
        asker, _ = await carrier.connect()
        answerer, _ = await carrier.connect()

        def answer(_: str, payload: bytes, reply: str, __: object) -> None:
            answerer.publish(reply, payload.upper())

        await answerer.subscribe(root, answer)
        await answerer.flush()
        inbox = asker.new_inbox()
        received = await _listen(asker, inbox)
        asker.publish(root, b"hello", reply=inbox)
        await received.wait(1)
        assert received.messages == [(inbox, b"HELLO", "", None)]

    async def test_order_is_kept_per_publisher_and_subject(self, carrier: Carrier, root: str) -> None:
        one, _ = await carrier.connect()
        two, _ = await carrier.connect()
        receiver, _ = await carrier.connect()
        received = await _listen(receiver, f"{root}.*")
        for number in range(500):
            for subject in ("a", "b"):
                one.publish(f"{root}.{subject}", b"one %d" % number)
                two.publish(f"{root}.{subject}", b"two %d" % number)
            if number % 50 == 0:
                await asyncio.sleep(0)
        await received.wait(2_000)
        for subject in ("a", "b"):
            for sender in (b"one", b"two"):
                numbers = [
                    int(payload.split()[1])
                    for at, payload, _, _ in received.messages
                    if at == f"{root}.{subject}" and payload.startswith(sender)
                ]
                assert numbers == list(range(500))

    async def test_every_subscriber_gets_every_message_the_sender_too(self, carrier: Carrier, root: str) -> None:
        transports = [(await carrier.connect())[0] for _ in range(3)]
        everyone = [await _listen(transport, root) for transport in transports]
        for payload in _numbers(50):
            transports[0].publish(root, payload)
        for received in everyone:
            await received.wait(50)
        await _settle(*transports)
        assert [received.payloads for received in everyone] == [_numbers(50)] * 3

    async def test_many_subscriptions_to_one_subject_in_one_transport_get_a_copy_each(
        self, carrier: Carrier, root: str
    ) -> None:
        transport, _ = await carrier.connect()
        everyone = [Received() for _ in range(200)]
        for received in everyone:
            await transport.subscribe(root, received)
        await transport.flush()
        for payload in _numbers(5):
            transport.publish(root, payload)
        for received in everyone:
            await received.wait(5)
        await _settle(transport)
        assert all(received.payloads == _numbers(5) for received in everyone)

    async def test_flush_proves_a_subscription(self, carrier: Carrier, root: str) -> None:
        sender, _ = await carrier.connect()
        receiver, _ = await carrier.connect()
        for number in range(50):
            subject = f"{root}.{number}"
            received = Received()
            await receiver.subscribe(subject, received)
            await receiver.flush()
            sender.publish(subject, b"")
            await received.wait(1)

    async def test_who_subscribes_later_gets_what_comes_later(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        subject = f"{root}.a"
        first = await _listen(transport, subject)
        transport.publish(subject, b"1")
        await first.wait(1)
        late = [await _listen(transport, subject), await _listen(transport, f"{root}.*")]
        late.append(await _listen(transport, subject, queue="workers"))
        transport.publish(subject, b"2")
        for received in late:
            await received.wait(1)
        await _settle(transport)
        assert first.payloads == [b"1", b"2"]
        assert [received.payloads for received in late] == [[b"2"]] * 3

    async def test_nothing_is_delivered_after_a_subscription_was_closed(self, carrier: Carrier, root: str) -> None:
        sender, _ = await carrier.connect()
        receiver, _ = await carrier.connect()
        received = Received()
        subscription = await receiver.subscribe(root, received)
        stays = await _listen(receiver, root)
        for payload in _numbers(200):
            sender.publish(root, payload)
        sender.push()
        await received.wait(1)
        await subscription.close()
        at_close = len(received)
        sender.publish(root, b"last")
        await eventually(lambda: stays.payloads[-1] == b"last", what="the last message")
        await _settle(sender, receiver)
        assert len(received) == at_close
        assert len(stays) == 201

    async def test_what_was_sent_to_a_subscription_that_leaves_still_arrives(self, carrier: Carrier, root: str) -> None:
        sender, _ = await carrier.connect()
        leaver, _ = await carrier.connect()
        stayer, _ = await carrier.connect()
        left, stayed = Received(), Received()
        leaving = await leaver.subscribe(root, left, queue="workers")
        await stayer.subscribe(root, stayed, queue="workers")
        await _settle(leaver, stayer)
        for payload in _numbers(500):
            sender.publish(root, payload)
        sender.push()
        await leaving.unsubscribe()  # no turn of the loop in between: none has been read here
        await leaving.unsubscribe()
        await leaver.flush()
        at_flush = len(left)
        for payload in _numbers(50):
            sender.publish(root, payload)
        await _settle(sender, stayer, leaver)
        await eventually(lambda: len(left) + len(stayed) == 550, what="every message at one of the two")
        assert len(left) == at_flush
        await leaving.close()
        await leaving.close()

    async def test_a_subscription_that_is_unsubscribed_can_be_closed_at_once(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        received = Received()
        subscription = await transport.subscribe(root, received)
        await transport.flush()
        transport.publish(root, b"1")
        await subscription.unsubscribe()
        await subscription.close()
        await _settle(transport)
        assert len(received) == 0

    async def test_a_subscription_knows_its_subject_and_closes_twice(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        subscription = await transport.subscribe(f"{root}.>", Received())
        assert isinstance(subscription, Subscription)
        assert subscription.subject == f"{root}.>"
        await subscription.close()
        await subscription.close()

    async def test_closing_a_subscription_after_its_transport_is_fine(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        subscription = await transport.subscribe(root, Received())
        await transport.close()
        await subscription.close()

    async def test_a_sink_that_raises_stops_neither_itself_nor_others(
        self, carrier: Carrier, root: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        transport, _ = await carrier.connect()
        calls: list[bytes] = []

        def failing(_: str, payload: bytes, __: str, ___: object) -> None:
            calls.append(payload)
            raise ValueError(f"no {payload!r} here")

        await transport.subscribe(root, failing)
        other = await _listen(transport, root)
        for payload in _numbers(10):
            transport.publish(root, payload)
        await other.wait(10)
        await eventually(lambda: len(calls) == 10, what="ten calls of the sink that raises")
        assert other.payloads == calls == _numbers(10)
        assert transport.is_connected
        logged = [record for record in caplog.records if record.name == "catga_bus.transport"]
        assert logged, "what a sink raises is logged on catga_bus.transport"

    # Wildcards, queue groups, no responders

    @pytest.mark.parametrize(
        ("pattern", "subject", "is_match"),
        [
            ("*", "a", True),
            ("a.*", "a.b", True),
            ("a.*", "a", False),
            ("a.*", "a.b.c", False),
            ("*.b", "a.b", True),
            ("a.*.c", "a.b.c", True),
            ("a.*.c", "a.b.d", False),
            (">", "a", True),
            ("a.>", "a.b", True),
            ("a.>", "a.b.c.d", True),
            ("a.>", "a", False),
            ("a.>", "b.a", False),
            ("*.b.>", "a.b.c", True),
            ("*.b.>", "a.b", False),
            ("a.b", "a.B", False),
            ("a.b", "a.bb", False),
        ],
    )
    async def test_wildcards_stand_for_one_token_or_for_the_rest(
        self, carrier: Carrier, root: str, pattern: str, subject: str, *, is_match: bool
    ) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, f"{root}.{pattern}")
        transport.publish(f"{root}.{subject}", b"")
        await _settle(transport)
        assert [at for at, _, _, _ in received.messages] == [f"{root}.{subject}"] * is_match

    async def test_overlapping_subscriptions_get_a_copy_each(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        patterns = ("a.b", "a.*", "*.b", "a.>", ">")
        everyone = [await _listen(transport, f"{root}.{pattern}") for pattern in patterns]
        transport.publish(f"{root}.a.b", b"1")
        for received in everyone:
            await received.wait(1)
        await _settle(transport)
        assert [received.payloads for received in everyone] == [[b"1"]] * len(patterns)

    async def test_each_message_goes_to_one_member_of_a_queue_group_and_all_get_a_share(
        self, carrier: Carrier, root: str
    ) -> None:
        sender, _ = await carrier.connect()
        transports = [(await carrier.connect())[0] for _ in range(3)]
        members = [await _listen(transport, root, queue="workers") for transport in transports]
        for payload in _numbers(600):
            sender.publish(root, payload)
        await eventually(lambda: sum(map(len, members)) >= 600, what="600 messages in all")
        await _settle(sender, *transports)
        together = [payload for member in members for payload in member.payloads]
        assert Counter(together) == Counter(_numbers(600))
        # A fair draw leaves a member under 100 of 600 once in 10**18 runs.
        assert all(len(member) >= 100 for member in members)
        assert all(member.payloads == sorted(member.payloads, key=int) for member in members)

    async def test_every_group_and_every_plain_subscriber_gets_the_message(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        subject = f"{root}.a"
        groups = {
            name: [await _listen(transport, pattern, queue=name) for _ in range(2)]
            for name, pattern in (("one", subject), ("two", subject), ("wild", f"{root}.*"))
        }
        plain = await _listen(transport, subject)
        for payload in _numbers(50):
            transport.publish(subject, payload)
        await plain.wait(50)
        await _settle(transport)
        assert plain.payloads == _numbers(50)
        for members in groups.values():
            together = [payload for member in members for payload in member.payloads]
            assert Counter(together) == Counter(_numbers(50))

    async def test_a_member_that_left_gets_nothing_and_the_others_everything(self, carrier: Carrier, root: str) -> None:
        sender, _ = await carrier.connect()
        worker, _ = await carrier.connect()
        left = Received()
        leaving = await worker.subscribe(root, left, queue="workers")
        stays = await _listen(worker, root, queue="workers")
        await leaving.close()
        await worker.flush()
        for payload in _numbers(100):
            sender.publish(root, payload)
        await stays.wait(100)
        await _settle(sender, worker)
        assert len(left) == 0
        assert stays.payloads == _numbers(100)

    async def test_a_request_to_nobody_comes_back_with_status_503(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        inbox = transport.new_inbox()
        received = await _listen(transport, inbox)
        transport.publish(root, b"anyone?", reply=inbox, headers={"A": "1"})
        await received.wait(1)
        await _settle(transport)
        assert len(received) == 1
        subject, payload, reply, headers = received.messages[0]
        assert (subject, payload, reply) == (inbox, b"", "")
        assert headers is not None
        assert headers["Status"] == "503"
        assert "A" not in headers

    @pytest.mark.parametrize("queue", ["", "workers"])
    async def test_nothing_comes_back_while_someone_listens(self, carrier: Carrier, root: str, queue: str) -> None:
        asker, _ = await carrier.connect()
        listener, _ = await carrier.connect()
        heard = Received()
        interest = await listener.subscribe(root, heard, queue=queue)
        await listener.flush()
        inbox = asker.new_inbox()
        received = await _listen(asker, inbox)
        asker.publish(root, b"anyone?", reply=inbox)
        await heard.wait(1)
        await _settle(asker, listener)
        assert len(received) == 0
        await interest.close()
        await listener.flush()
        asker.publish(root, b"still anyone?", reply=inbox)
        await received.wait(1)
        assert len(heard) == 1

    async def test_a_message_without_reply_to_nobody_vanishes(self, carrier: Carrier, root: str) -> None:
        transport, events = await carrier.connect()
        everything = await _listen(transport, f"{root}.known.>")
        transport.publish(f"{root}.unknown", b"1")
        await _settle(transport)
        assert len(everything) == 0
        assert transport.is_connected
        assert events.errors == []

    async def test_inboxes_are_unique_and_lie_under_the_prefix(self, carrier: Carrier) -> None:
        one, _ = await carrier.connect()
        two, _ = await carrier.connect(inbox_prefix="_INBOX_mine.here")
        inboxes = [transport.new_inbox() for transport in (one, two) for _ in range(1_000)]
        assert len(set(inboxes)) == 2_000
        assert all(inbox.startswith("_INBOX.") for inbox in inboxes[:1_000])
        assert all(inbox.startswith("_INBOX_mine.here.") for inbox in inboxes[1_000:])
        received = await _listen(two, inboxes[-1])
        one.publish(inboxes[-1], b"1")
        await received.wait(1)

    # What is taken and what is refused

    async def test_headers_arrive_as_they_were_given(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, root)
        headers = {
            "Plain": "value",
            "Case": "upper",
            "case": "lower",
            "Colons": "a: b: c",
            "Spaces": "a b",
            "Empty": "",
            "Unicode": "Grüße, 世界",
            "Long": "x" * 4_096,
            "!#$%&'*+-.^_`|~09": "odd but legal",
        }
        transport.publish(root, b"1", headers=headers)
        headers["Plain"] = "changed after publish"
        await received.wait(1)
        assert received.messages[0][3] == {**headers, "Plain": "value"}

    @pytest.mark.parametrize(
        "headers",
        [
            {"": "value"},
            {"two words": "value"},
            {"colon:": "value"},
            {"line\r\nbreak": "value"},
            {"ümlaut": "value"},
            {"Key": "line\r\nInjected: yes"},
            {"Key": "line\nbreak"},
            {"Key": "half a pair \ud800"},
        ],
    )
    async def test_headers_that_cannot_be_sent_are_refused(
        self, carrier: Carrier, root: str, headers: dict[str, str]
    ) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, root)
        with pytest.raises(ConfigurationError):
            transport.publish(root, b"bad", headers=headers)
        transport.publish(root, b"good")
        await received.wait(1)
        await _settle(transport)
        assert received.payloads == [b"good"]

    async def test_a_message_of_max_payload_arrives_and_a_larger_one_is_refused(
        self, carrier: Carrier, root: str
    ) -> None:
        transport, events = await carrier.connect()
        received = await _listen(transport, root)
        largest = bytes(transport.max_payload)
        transport.publish(root, largest)
        with pytest.raises(TooLargeError) as caught:
            transport.publish(root, largest + b"x")
        assert caught.value.outcome is Outcome.NOT_RUN
        assert str(transport.max_payload) in str(caught.value)
        transport.publish(root, b"after")
        await received.wait(2)
        assert received.payloads == [largest, b"after"]
        assert transport.is_connected
        assert events.disconnected == []

    async def test_headers_count_towards_max_payload(self, carrier: Carrier, root: str) -> None:
        transport, events = await carrier.connect()
        received = await _listen(transport, root)
        headers = {"Long": "x" * 1_000}
        fits = bytes(transport.max_payload - 2_000)
        transport.publish(root, fits, headers=headers)
        for payload in (bytes(transport.max_payload - 500), bytes(transport.max_payload)):
            with pytest.raises(TooLargeError):
                transport.publish(root, payload, headers=headers)
        transport.publish(root, b"after")
        await received.wait(2)
        assert received.messages == [(root, fits, "", headers), (root, b"after", "", None)]
        assert transport.is_connected
        assert events.disconnected == []

    async def test_subjects_that_cannot_be_sent_are_refused_by_publish(self, carrier: Carrier, root: str) -> None:
        transport, events = await carrier.connect()
        received = await _listen(transport, f"{root}.>")
        for subject in (*BAD_TOKENS, *WILDCARDS, *BAD_WILDCARDS):
            with pytest.raises(ConfigurationError):
                transport.publish(subject, b"bad")
            if subject:
                with pytest.raises(ConfigurationError):
                    transport.publish(f"{root}.good", b"bad", reply=subject)
        transport.publish(f"{root}.good", b"good")
        await received.wait(1)
        await _settle(transport)
        assert received.payloads == [b"good"]
        assert transport.is_connected
        assert (events.disconnected, events.errors) == ([], [])

    async def test_subjects_that_cannot_be_sent_are_refused_by_subscribe(self, carrier: Carrier, root: str) -> None:
        transport, events = await carrier.connect()
        for subject in (*BAD_TOKENS, *BAD_WILDCARDS):
            with pytest.raises(ConfigurationError):
                await transport.subscribe(subject, Received())
        for queue in ("two words", "line\r\nbreak"):
            with pytest.raises(ConfigurationError):
                await transport.subscribe(root, Received(), queue=queue)
        for subject in WILDCARDS:
            await (await transport.subscribe(f"{root}.{subject}", Received())).close()
        await transport.flush()
        assert transport.is_connected
        assert (events.disconnected, events.errors) == ([], [])

    async def test_the_longest_subjects_are_carried(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        received = await _listen(transport, f"{root}.>")
        longest = f"{root}." + "x" * (1_023 - len(root))
        transport.publish(longest, b"1", reply=longest)
        await received.wait(1)
        assert received.messages == [(longest, b"1", longest, None)]

    # Losing the connection and coming back

    async def test_what_needs_a_connection_is_refused_before_connect_and_after_close(
        self, carrier: Carrier, root: str
    ) -> None:
        transport, _ = carrier.build()
        await self._check_refused(transport, root)
        await transport.connect()
        await transport.close()
        await self._check_refused(transport, root)

    async def test_what_needs_a_connection_is_refused_while_there_is_none(self, carrier: Carrier, root: str) -> None:
        transport, events = await carrier.connect()
        received = await _listen(transport, root)
        await carrier.cut()
        await _grown(events.disconnected)
        await self._check_refused(transport, root)
        await asyncio.wait_for(transport.wait_writable(), 5.0)
        await carrier.heal()
        await _grown(events.reconnected)
        transport.publish(root, b"after")
        await received.wait(1)
        await _settle(transport)
        assert received.payloads == [b"after"], "what was refused is not sent later"

    async def _check_refused(self, transport: Transport, subject: str) -> None:
        assert not transport.is_connected
        with pytest.raises(DisconnectedError) as caught:
            transport.publish(subject, b"refused")
        assert caught.value.outcome is Outcome.NOT_RUN
        with pytest.raises(DisconnectedError):
            await transport.flush(1.0)

    async def test_a_reconnect_brings_every_subscription_back_once_and_tells_once(
        self, carrier: Carrier, root: str
    ) -> None:
        sender, sender_events = await carrier.connect()
        receiver, receiver_events = await carrier.connect()
        plain = await _listen(receiver, f"{root}.a")
        wild = await _listen(receiver, f"{root}.*")
        members = [await _listen(receiver, f"{root}.a", queue="workers") for _ in range(2)]
        closed = Received()
        await (await receiver.subscribe(f"{root}.a", closed)).close()
        # A member that came back would take messages that nobody then gets.
        await (await receiver.subscribe(f"{root}.a", closed, queue="workers")).close()
        for rounds in (1, 2):
            await carrier.cut()
            for events in (sender_events, receiver_events):
                await _grown(events.disconnected, rounds)
            await carrier.heal()
            for events in (sender_events, receiver_events):
                await _grown(events.reconnected, rounds)
            assert sender.is_connected
            assert receiver.is_connected
            # Two connections: what one publishes may overtake what the other has just subscribed.
            await receiver.flush()
            for payload in _numbers(20):
                sender.publish(f"{root}.a", payload)
            await plain.wait(20 * rounds)
            await _settle(sender, receiver)
            assert plain.payloads == wild.payloads == _numbers(20) * rounds
            assert sum(map(len, members)) == 20 * rounds
            assert len(closed) == 0
        for events in (sender_events, receiver_events):
            assert (len(events.disconnected), len(events.reconnected)) == (2, 2)
            assert all(events.disconnected), "the reason has words"
            assert all("://" in url for url in events.reconnected)
            assert events.threads == {threading.get_ident()}

    async def test_interest_that_changes_while_there_is_no_connection_is_right_afterwards(
        self, carrier: Carrier, root: str
    ) -> None:
        transport, events = await carrier.connect()
        ended, begun = Received(), Received()
        subscription = await transport.subscribe(root, ended)
        await transport.flush()
        await carrier.cut()
        await _grown(events.disconnected)
        await subscription.close()
        await transport.subscribe(root, begun)
        await carrier.heal()
        await _grown(events.reconnected)
        await transport.flush()
        transport.publish(root, b"1")
        await begun.wait(1)
        await _settle(transport)
        assert (ended.payloads, begun.payloads) == ([], [b"1"])

    # Being behind

    async def test_a_transport_at_rest_is_not_behind(self, carrier: Carrier, root: str) -> None:
        transport, _ = await carrier.connect()
        assert not transport.is_behind
        await asyncio.wait_for(transport.wait_writable(), 5.0)
        transport.publish(root, b"1")
        assert not transport.is_behind

    async def test_a_transport_is_behind_while_the_server_reads_nothing_and_catches_up(
        self, carrier: Carrier, root: str
    ) -> None:
        sender, events = await self._stallable(carrier)
        receiver, _ = await carrier.connect()
        received = await _listen(receiver, root)
        await carrier.stall()
        await self._get_behind(sender, root)
        waiting = asyncio.ensure_future(sender.wait_writable())
        with pytest.raises(DisconnectedError):
            await sender.flush(0.2)
        assert not waiting.done()
        await carrier.resume()
        await asyncio.wait_for(waiting, RECONNECT_TIMEOUT)
        assert not sender.is_behind
        await eventually(lambda: len(received) == _CHUNKS, RECONNECT_TIMEOUT, what="all messages")
        assert [payload[:4] for payload in received.payloads] == [
            number.to_bytes(4, "big") for number in range(_CHUNKS)
        ]
        await _settle(sender, receiver)
        assert (len(received), events.disconnected) == (_CHUNKS, [])

    async def test_waiting_to_write_ends_when_the_connection_is_gone(self, carrier: Carrier, root: str) -> None:
        sender, _ = await self._stallable(carrier)
        await carrier.stall()
        await self._get_behind(sender, root)
        waiting = asyncio.ensure_future(sender.wait_writable())
        await asyncio.sleep(0)
        assert not waiting.done()
        await carrier.cut()
        await asyncio.wait_for(waiting, RECONNECT_TIMEOUT)

    async def test_close_gives_up_on_a_server_that_reads_nothing(self, carrier: Carrier, root: str) -> None:
        sender, _ = await self._stallable(carrier)
        await carrier.stall()
        await self._get_behind(sender, root)
        # 2 seconds are promised; the bound leaves room for a busy machine.
        await asyncio.wait_for(sender.close(), 10.0)
        assert not sender.is_connected

    async def _stallable(self, carrier: Carrier) -> tuple[Transport, RecordedEvents]:
        if not carrier.can_stall:
            pytest.skip("this carrier cannot be stalled")
        # A long ping interval, or the frozen server is given up while the test still needs it.
        return await carrier.connect(write_limit_bytes=65_536, ping_interval=60.0)

    async def _get_behind(self, transport: Transport, subject: str) -> None:
        """Publish more than fits in between; the first four bytes number the messages."""
        for number in range(_CHUNKS):
            transport.publish(subject, number.to_bytes(4, "big") + _CHUNK)
            transport.push()
            await asyncio.sleep(0)
        assert transport.is_behind
