"""The contract of `catga_bus.transport.jetstream` as tests: what serves JetStream passes them, be it model or server.

Fill `Carrier` (its server has JetStream), inherit `JetStreamContract`, give it the fixtures `carrier` and
`no_jetstream`; see `catga_bus.testing.transport_contract` for the rest. Each test is a script with exact outcomes, so
that whoever passes behaves as nats-server 2.15 does, its surprises included.
"""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

import pytest

from catga_bus.clock import monotonic, utc_now
from catga_bus.errors import ConfigurationError, TooLargeError
from catga_bus.testing.carrier import Carrier, RecordedEvents
from catga_bus.testing.waiting import eventually
from catga_bus.transport.base import Transport
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    Consumption,
    DeliveredMessage,
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.jetstream_json import to_rfc3339
from catga_bus.transport.key_value import Entry, KeyValue
from catga_bus.transport.schedules import SCHEDULE_HEADER, SCHEDULE_TARGET_HEADER, schedule_at

QUEUE = StreamConfig(name="s", subjects=("s.*",), retention="workqueue")
LOG = StreamConfig(name="s", subjects=("s.*",))
RECONNECT_TIMEOUT = 30.0
"""Seconds; see `catga_bus.testing.transport_contract`."""

T = TypeVar("T")


class Puller:
    """A consumer at work, and what it got."""

    def __init__(self) -> None:
        self.messages: list[DeliveredMessage] = []
        self.statuses: list[tuple[int, str]] = []
        self.consumption: Consumption

    def on_status(self, code: int, text: str) -> None:
        """Keep one status."""
        self.statuses.append((code, text))

    @property
    def payloads(self) -> list[bytes]:
        """What came, in order."""
        return [message.payload for message in self.messages]

    @property
    def sequences(self) -> list[int]:
        """Which, in order."""
        return [message.sequence for message in self.messages]

    async def wait(self, count: int) -> list[DeliveredMessage]:
        """Wait for so many messages."""
        await eventually(lambda: len(self.messages) >= count, what=f"{count} messages, got {self.payloads}")
        return self.messages

    async def status(self, code: int) -> str:
        """Wait for a status of this code; return its words."""

        def words() -> list[str]:
            return [text for each, text in self.statuses if each == code]

        return (await eventually(words, what=f"status {code}"))[0]


class Client:
    """A connection with JetStream on it."""

    def __init__(self, transport: Transport, jetstream: JetStream, events: RecordedEvents) -> None:
        self.events = events
        self.transport = transport
        self.jetstream = jetstream

    async def pull(self, consumer: str, batch: int, *, stream: str = "s", idle: float = 5.0) -> Puller:
        """Start a consumer at work."""
        puller = Puller()
        puller.consumption = await self.jetstream.consume(
            stream, consumer, puller.messages.append, puller.on_status, idle=idle
        )
        puller.consumption.pull(batch)
        return puller

    async def fill(self, *messages: str) -> None:
        """Store messages given as `subject` or `subject=payload`."""
        for message in messages:
            subject, _, payload = message.partition("=")
            await self.jetstream.publish(subject, payload.encode())

    async def queue(self, *filters: str, name: str = "c", **options: Any) -> None:
        """Make a consumer."""
        await self.jetstream.create_consumer("s", _consumer(name, *filters, **options))

    async def is_empty(self) -> bool:
        """Return whether the stream holds nothing."""
        there = await self.jetstream.stream("s")
        return there is not None and there.messages == 0

    async def wait_floor(self, floor: int, pending: int) -> None:
        """Wait until a consumer's floor is this, and so much pending above it."""

        async def is_there() -> bool:
            return await self.floor() == (floor, pending)

        await _until(is_there)

    async def floor(self, name: str = "c") -> tuple[int, int]:
        """Return the acknowledgement floor of a consumer, and what is pending above it."""
        info = await self.jetstream.consumer("s", name)
        assert info is not None
        return info.ack_floor, info.ack_pending


def _consumer(name: str, *filters: str, **options: Any) -> ConsumerConfig:
    return ConsumerConfig(name=name, filters=filters or ("s.0",), **options)


async def _refused(call: Awaitable[object]) -> JetStreamRefusedError:
    with pytest.raises(JetStreamRefusedError) as caught:
        await call
    return caught.value


async def _until(condition: Callable[[], Awaitable[bool]], timeout: float = 10.0) -> None:
    """Ask again and again until the answer is yes."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - it is the server that is asked
            await asyncio.sleep(0.02)


async def _some(call: Callable[[], Awaitable[T | None]], timeout: float = 5.0) -> T:
    """Ask again and again until the answer is not None."""
    async with asyncio.timeout(timeout):
        while (found := await call()) is None:  # noqa: ASYNC110 - it is the server that is asked
            await asyncio.sleep(0.02)
    return found


class JetStreamContract:
    """The promises of `JetStream`, one test each. Inherit it and give it the fixtures `carrier` and `no_jetstream`."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    @pytest.fixture
    def carrier(self) -> Carrier:
        """A server of the test's own, empty, with JetStream; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `carrier`")

    @pytest.fixture
    def no_jetstream(self) -> Carrier:
        """A server without JetStream; to be replaced by the class that inherits."""
        raise NotImplementedError(f"{type(self).__name__} has to define the fixture `no_jetstream`")

    @pytest.fixture
    async def clients(self) -> AsyncIterator[AsyncExitStack]:
        """What has to be closed at the end."""
        async with AsyncExitStack() as stack:
            yield stack

    async def client(self, carrier: Carrier, clients: AsyncExitStack) -> Client:
        """Return a new connection."""
        transport, events = await carrier.connect()
        jetstream = make_jetstream(transport, monotonic)

        def lost(reason: str) -> None:
            events.disconnected.append(reason)
            jetstream.disconnected()

        events.on_disconnected = lost  # type: ignore[method-assign]
        clients.push_async_callback(jetstream.close)
        return Client(transport, jetstream, events)

    @pytest.fixture
    async def bus(self, carrier: Carrier, clients: AsyncExitStack) -> Client:
        return await self.client(carrier, clients)

    @pytest.fixture
    def js(self, bus: Client) -> JetStream:
        return bus.jetstream

    # The account

    async def test_an_account_tells_its_limits(self, js: JetStream) -> None:
        account = await js.account()
        assert account["limits"]["max_streams"] == -1
        assert account["api"]["level"] >= 0

    async def test_without_jetstream_the_account_is_refused_and_a_publish_unknown(
        self, no_jetstream: Carrier, clients: AsyncExitStack
    ) -> None:
        js = (await self.client(no_jetstream, clients)).jetstream
        assert (await _refused(js.account())).code in (ApiError.NOT_ENABLED, ApiError.NOT_ENABLED_FOR_ACCOUNT)
        with pytest.raises(JetStreamUnknownError):
            await js.publish("s.0", b"")

    # Streams

    async def test_a_stream_is_as_it_was_asked_for(self, js: JetStream) -> None:
        config = StreamConfig(
            name="s",
            subjects=("s.*", "t.>"),
            retention="workqueue",
            storage="memory",
            max_bytes=1_000_000,
            max_age=3_600.0,
            max_messages_per_subject=7,
            discard="new",
            duplicate_window=30.0,
            deny_delete=True,
            allow_rollup=True,
            first_sequence=1_000,
            metadata={"partitions": "16"},
        )
        info = await js.create_stream(config)
        assert info.config.metadata["partitions"] == "16"
        there = await js.stream("s")
        assert there is not None
        for each in (info, there):
            for field in config.__struct_fields__:
                if field != "metadata":
                    assert getattr(each.config, field) == getattr(config, field), field
            assert (each.messages, each.bytes, each.last_sequence, each.consumers) == (0, 0, 999, 0)

    async def test_making_a_stream_again_is_fine_if_it_is_the_same(self, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await js.publish("s.0", b"kept")
        again = await js.create_stream(QUEUE)
        assert again.messages == 1
        error = await _refused(js.create_stream(StreamConfig(name="s", subjects=("s.*",), max_bytes=10)))
        assert error.code == ApiError.STREAM_NAME_IN_USE

    async def test_two_streams_share_no_subject(self, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        error = await _refused(js.create_stream(StreamConfig(name="t", subjects=("s.7",))))
        assert error.code == ApiError.SUBJECTS_OVERLAP

    async def test_a_stream_can_be_changed_but_not_in_everything(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        changed = StreamConfig(name="s", subjects=("s.*", "t.*"), max_bytes=1_000)
        assert (await js.update_stream(changed)).config.max_bytes == 1_000
        await js.publish("t.0", b"")
        assert (await _refused(js.update_stream(QUEUE))).code == ApiError.INVALID_CONFIG
        missing = StreamConfig(name="none", subjects=("none",))
        assert (await _refused(js.update_stream(missing))).code == ApiError.STREAM_NOT_FOUND

    async def test_streams_are_found_by_name_and_by_subject(self, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await js.create_stream(StreamConfig(name="t", subjects=("t.a.*", "u")))
        assert await js.stream_names() == ["s", "t"]
        assert await js.stream_names("t.a.b") == ["t"]
        assert await js.stream_names("s.*") == ["s"]
        assert await js.stream_names("x") == []
        assert await js.stream("none") is None

    async def test_a_deleted_stream_is_gone(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        assert await js.delete_stream("s")
        assert not await js.delete_stream("s")
        with pytest.raises(JetStreamUnknownError):
            await js.publish("s.0", b"", timeout=1.0)
        assert (await _refused(js.last_message("s", "s.0"))).code == ApiError.STREAM_NOT_FOUND
        assert (await _refused(js.create_consumer("s", _consumer("c")))).code == ApiError.STREAM_NOT_FOUND
        assert (await _refused(js.consumer("s", "c"))).code == ApiError.STREAM_NOT_FOUND

    # Storing

    async def test_what_is_stored_can_be_read_again(self, js: JetStream) -> None:
        before = utc_now().timestamp()
        await js.create_stream(LOG)
        ack = await js.publish("s.0", b"\x00\xff", headers={"A": "1", "B": "two words"})
        assert (ack.stream, ack.sequence, ack.duplicate) == ("s", 1, False)
        message = await js.message("s", 1)
        assert message is not None
        assert (message.subject, message.sequence, message.payload) == ("s.0", 1, b"\x00\xff")
        assert message.headers == {"A": "1", "B": "two words"}
        assert before - 1.0 < message.time < utc_now().timestamp() + 1.0
        assert await js.last_message("s", "s.0") == message
        assert await js.message("s", 2) is None
        assert await js.last_message("s", "s.1") is None

    async def test_the_next_message_is_found_from_any_place(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.fill("s.0", "s.1", "s.0", "s.2")

        async def found(subject: str, sequence: int) -> int | None:
            message = await js.next_message("s", subject, sequence)
            return message.sequence if message is not None else None

        assert [await found("s.0", place) for place in (1, 2, 4)] == [1, 3, None]
        assert [await found("s.*", place) for place in (2, 5)] == [2, None]

    async def test_the_same_id_is_stored_once_whatever_its_subject(self, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        first = await js.publish("s.0", b"", message_id="x")
        again = await js.publish("s.1", b"", message_id="x")
        other = await js.publish("s.1", b"", message_id="y")
        assert [(ack.sequence, ack.duplicate) for ack in (first, again, other)] == [(1, False), (1, True), (2, False)]

    async def test_an_id_is_forgotten_after_the_window_and_not_with_its_message(self, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="s", subjects=("s.*",), duplicate_window=0.3))
        await js.publish("s.0", b"", message_id="x")
        assert await js.purge("s") == 1
        assert (await js.publish("s.0", b"", message_id="x")).duplicate

        async def is_stored() -> bool:
            return not (await js.publish("s.0", b"", message_id="x")).duplicate

        await _until(is_stored)

    async def test_a_compare_and_set_looks_at_the_last_of_its_subject(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        assert (await js.publish("s.0", b"", expected_last=0)).sequence == 1
        assert (await js.publish("s.1", b"", expected_last=0)).sequence == 2
        assert (await js.publish("s.0", b"", expected_last=1)).sequence == 3
        for wrong in (0, 1, 2, 4):
            error = await _refused(js.publish("s.0", b"", expected_last=wrong))
            assert (error.code, error.text) == (ApiError.WRONG_LAST_SEQUENCE, "wrong last sequence: 3")
        assert await js.message("s", 4) is None

    async def test_a_wrong_last_sequence_is_said_before_a_duplicate(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        await js.publish("s.0", b"", message_id="x", expected_last=0)
        error = await _refused(js.publish("s.0", b"", message_id="x", expected_last=0))
        assert error.code == ApiError.WRONG_LAST_SEQUENCE
        assert (await js.publish("s.0", b"", message_id="x", expected_last=1)).duplicate

    async def test_a_full_queue_refuses_and_takes_again_what_finds_room(self, js: JetStream) -> None:
        room = StreamConfig(
            name="s", subjects=("s.*",), retention="workqueue", discard="new", max_bytes=3 * (30 + 3 + 100)
        )
        await js.create_stream(room)
        for _ in range(3):
            await js.publish("s.0", bytes(100))
        error = await _refused(js.publish("s.0", b""))
        assert (error.code, error.text) == (ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded")
        there = await js.stream("s")
        assert there is not None
        assert (there.messages, there.bytes) == (3, 399)
        assert await js.delete_message("s", 2)
        assert (await js.publish("s.0", bytes(100))).sequence == 4

    @pytest.mark.parametrize(("storage", "size"), [("file", 30 + 3 + 100), ("memory", 16 + 3 + 100)])
    async def test_a_full_log_forgets_the_oldest(self, js: JetStream, storage: str, size: int) -> None:
        await js.create_stream(
            StreamConfig(name="s", subjects=("s.*",), storage=storage, max_bytes=2 * size)  # type: ignore[arg-type]
        )
        for _ in range(5):
            await js.publish("s.0", bytes(100))
        there = await js.stream("s")
        assert there is not None
        assert (there.messages, there.first_sequence, there.last_sequence, there.bytes) == (2, 4, 5, 2 * size)

    async def test_headers_count_towards_the_size(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        await js.publish("s.0", b"abc", headers={"Name": "value"})
        there = await js.stream("s")
        assert there is not None
        assert there.bytes == 30 + 4 + len("s.0") + len("NATS/1.0\r\nName: value\r\n\r\n") + 3

    async def test_a_message_larger_than_the_server_takes_is_refused_here(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        with pytest.raises(TooLargeError):
            await js.publish("s.0", bytes(bus.transport.max_payload + 1))

    async def test_only_so_many_messages_are_kept_of_a_subject(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="s", subjects=("s.*",), max_messages_per_subject=2))
        await bus.fill("s.0=a", "s.0=b", "s.1=c", "s.0=d", "s.0=e")
        there = await js.stream("s")
        assert there is not None
        assert (there.messages, there.first_sequence, there.last_sequence) == (3, 3, 5)
        assert await js.message("s", 2) is None

    async def test_old_messages_expire(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="s", subjects=("s.*",), max_age=0.3, duplicate_window=0.3))
        await js.publish("s.0", b"")
        await _until(bus.is_empty)
        there = await js.stream("s")
        assert there is not None
        assert (there.messages, there.first_sequence, there.last_sequence) == (0, 2, 1)

    async def test_purging_takes_all_or_one_subject(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="s", subjects=("s.>",)))
        await bus.fill("s.0", "s.1", "s.0", "s.a.b", "s.a.c")
        assert await js.purge("s", subject="s.0") == 2
        assert await js.purge("s", subject="s.a.*") == 2
        assert await js.purge("s", subject="s.9") == 0
        assert await js.purge("s") == 1
        there = await js.stream("s")
        assert there is not None
        assert (there.messages, there.first_sequence, there.last_sequence) == (0, 6, 5)
        assert (await _refused(js.purge("none"))).code == ApiError.STREAM_NOT_FOUND

    async def test_one_message_can_be_deleted_where_that_is_allowed(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.fill("s.0", "s.0")
        assert await js.delete_message("s", 1)
        assert not await js.delete_message("s", 1)
        assert not await js.delete_message("s", 9)
        assert (await _refused(js.delete_message("none", 1))).code == ApiError.STREAM_NOT_FOUND
        await js.create_stream(StreamConfig(name="t", subjects=("t",), deny_delete=True))
        await bus.fill("t")
        assert (await _refused(js.delete_message("t", 1))).code == ApiError.MESSAGE_DELETE_FAILED

    async def test_plain_subscribers_get_what_is_stored_too(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        heard: list[bytes] = []
        await bus.transport.subscribe("s.0", lambda _, payload, __, ___: heard.append(payload))
        await bus.fill("s.0=a")
        await eventually(lambda: heard == [b"a"])

    async def test_what_is_published_without_a_reply_is_stored_too(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        bus.transport.publish("s.0", b"a")
        await bus.transport.flush()
        message = await _some(lambda: js.message("s", 1))
        assert message.payload == b"a"

    # Consumers

    async def test_a_consumer_is_as_it_was_asked_for(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        config = ConsumerConfig(
            name="c",
            filters=("s.0", "s.1"),
            ack_wait=12.5,
            max_ack_pending=7,
            deliver="by_start_sequence",
            start_sequence=5,
            in_memory=True,
            replicas=1,
            inactive_threshold=60.0,
            metadata={"owner": "me"},
        )
        made = await js.create_consumer("s", config)
        there = await js.consumer("s", "c")
        assert there is not None
        for each in (made, there):
            assert each.name == "c"
            for field in config.__struct_fields__:
                if field != "metadata":
                    assert getattr(each.config, field) == getattr(config, field), field
            assert each.config.metadata["owner"] == "me"
        assert await js.consumer_names("s") == ["c"]
        assert await js.consumer("s", "none") is None

    async def test_a_consumer_that_is_there_is_fine_if_it_is_the_same(self, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await js.create_consumer("s", _consumer("c"))
        assert (await js.create_consumer("s", _consumer("c"))).name == "c"
        error = await _refused(js.create_consumer("s", _consumer("c", ack_wait=1.0)))
        assert error.code == ApiError.CONSUMER_NAME_IN_USE

    @pytest.mark.parametrize("filters", [("s.0",), ("s.*",), ("s.1", "s.0")])
    async def test_two_consumers_of_a_queue_share_no_subject(self, js: JetStream, filters: tuple[str, ...]) -> None:
        await js.create_stream(QUEUE)
        await js.create_consumer("s", _consumer("c"))
        error = await _refused(js.create_consumer("s", _consumer("d", *filters)))
        assert error.code == ApiError.CONSUMER_FILTER_NOT_UNIQUE
        await js.create_consumer("s", _consumer("d", "s.1", "s.2"))
        assert await js.consumer_names("s") == ["c", "d"]
        assert await js.delete_consumer("s", "c")
        assert not await js.delete_consumer("s", "c")
        await js.create_consumer("s", _consumer("e", "s.0"))

    @pytest.mark.parametrize(
        ("options", "code"), [({"acks": "none"}, 10084), ({"deliver": "new"}, 10101)], ids=["acks", "deliver"]
    )
    async def test_a_queue_wants_all_of_it_acknowledged(
        self, js: JetStream, options: dict[str, Any], code: int
    ) -> None:
        await js.create_stream(QUEUE)
        assert (await _refused(js.create_consumer("s", _consumer("c", **options)))).code == code

    async def test_the_subjects_of_a_consumer_do_not_overlap(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        assert (await _refused(js.create_consumer("s", _consumer("c", "s.*", "s.1")))).code == 10138

    async def test_an_abandoned_consumer_is_deleted_by_the_server(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.queue(name="c", inactive_threshold=0.3)
        await bus.queue(name="d", inactive_threshold=0.3)
        await bus.pull("d", 1)

        async def is_alone() -> bool:
            return await js.consumer_names("s") == ["d"]

        await _until(is_alone, 20.0)

    # Delivery

    async def test_a_consumer_delivers_its_subjects_in_order(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue("s.0")
        await bus.fill("s.0=a", "s.1=b")
        await js.publish("s.0", b"c", headers={"A": "1"})
        puller = await bus.pull("c", 10)
        first, second = await puller.wait(2)
        assert (first.subject, first.payload, first.headers) == ("s.0", b"a", None)
        assert (first.sequence, first.consumer_sequence, first.deliveries, first.pending) == (1, 1, 1, 1)
        assert (second.payload, second.headers) == (b"c", {"A": "1"})
        assert (second.sequence, second.consumer_sequence, second.deliveries, second.pending) == (3, 2, 1, 0)
        assert abs(second.time - utc_now().timestamp()) < 5.0
        await bus.fill("s.0=d")
        await puller.wait(3)
        assert puller.payloads == [b"a", b"c", b"d"]
        info = await js.consumer("s", "c")
        assert info is not None
        assert (info.delivered, info.ack_floor, info.ack_pending, info.pending) == (4, 0, 3, 0)

    async def test_no_more_come_than_were_asked_for(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue("s.0")
        await bus.fill("s.0=a", "s.0=b", "s.0=c")
        puller = await bus.pull("c", 2)
        await puller.wait(2)
        assert puller.consumption.credit == 0
        assert await bus.floor() == (0, 2)
        assert puller.payloads == [b"a", b"b"]
        puller.consumption.pull(5)
        await puller.wait(3)
        assert puller.consumption.credit == 4

    async def test_asking_for_nothing_is_an_error(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        puller = await bus.pull("c", 1)
        for batch in (0, -1):
            with pytest.raises(ValueError, match="1 message or more"):
                puller.consumption.pull(batch)

    async def test_asking_one_by_one_never_runs_dry(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue("s.0", max_ack_pending=1_000)
        puller = Puller()

        def take(message: DeliveredMessage) -> None:
            puller.messages.append(message)
            js.acknowledge(message.reply)
            puller.consumption.pull(1)

        puller.consumption = await js.consume("s", "c", take, puller.on_status)
        puller.consumption.pull(16)
        for start in range(0, 400, 100):
            await asyncio.gather(*(js.publish("s.0", b"%d" % number) for number in range(start, start + 100)))
        await puller.wait(400)
        assert puller.sequences == list(range(1, 401))
        assert puller.consumption.credit == 16

    async def test_no_more_are_out_than_may_be_unacknowledged(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue("s.0", max_ack_pending=2)
        await bus.fill("s.0=a", "s.0=b", "s.0=c", "s.0=d")
        puller = await bus.pull("c", 10)
        messages = await puller.wait(2)
        assert await bus.floor() == (0, 2)
        assert puller.payloads == [b"a", b"b"]
        assert await js.acknowledge_confirmed(messages[1].reply)
        await puller.wait(3)
        assert puller.payloads == [b"a", b"b", b"c"]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"deliver": "all"}, [1, 2, 3, 4]),
            ({"deliver": "new"}, []),
            ({"deliver": "by_start_sequence", "start_sequence": 3}, [3, 4]),
            ({"deliver": "by_start_sequence", "start_sequence": 9}, []),
            ({"deliver": "last_per_subject"}, [3, 4]),
        ],
        ids=["all", "new", "from a sequence", "from a sequence to come", "last of each"],
    )
    async def test_a_new_consumer_starts_where_it_is_told(
        self, bus: Client, js: JetStream, options: dict[str, Any], expected: list[int]
    ) -> None:
        await js.create_stream(LOG)
        await bus.fill("s.0", "s.1", "s.0", "s.1")
        await bus.queue("s.*", **options)
        info = await js.consumer("s", "c")
        assert info is not None
        assert info.pending == len(expected)
        puller = await bus.pull("c", 10)
        await bus.fill("s.0", "s.1")
        if options.get("start_sequence") != 9:
            expected = [*expected, 5, 6]
            await puller.wait(len(expected))
        else:
            await bus.fill("s.0", "s.1", "s.0")
            expected = [9]
            await puller.wait(1)
        assert puller.sequences == expected

    async def test_a_new_consumer_starts_at_an_instant(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.fill("s.0", "s.0")
        third = await js.publish("s.0", b"")
        message = await js.message("s", third.sequence)
        assert message is not None
        await bus.queue("s.*", deliver="by_start_time", start_time=message.time)
        await bus.fill("s.0")
        puller = await bus.pull("c", 10)
        await puller.wait(2)
        assert puller.sequences == [3, 4]

    async def test_a_consumer_without_acknowledgements_delivers_once(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.queue("s.*", acks="none")
        await bus.fill("s.0", "s.1")
        puller = await bus.pull("c", 10)
        await puller.wait(2)
        assert await bus.floor() == (2, 0)

    async def test_a_start_before_the_oldest_message_is_moved_to_it(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="s", subjects=("s.*",), max_messages_per_subject=2))
        await bus.fill("s.0", "s.0", "s.0", "s.0")
        await bus.queue("s.0", deliver="by_start_sequence", start_sequence=1)
        assert await bus.floor() == (2, 0)
        puller = await bus.pull("c", 10)
        await puller.wait(2)
        assert puller.sequences == [3, 4]

    async def test_what_is_deleted_before_it_is_delivered_is_skipped(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.queue("s.0")
        await bus.fill("s.0", "s.0", "s.0")
        await js.delete_message("s", 2)
        info = await js.consumer("s", "c")
        assert info is not None
        assert info.pending == 2
        puller = await bus.pull("c", 10)
        await puller.wait(2)
        assert puller.sequences == [1, 3]
        assert [message.consumer_sequence for message in puller.messages] == [1, 2]

    async def test_what_is_deleted_while_it_is_out_counts_as_acknowledged(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.queue("s.0")
        await bus.fill("s.0", "s.0")
        puller = await bus.pull("c", 10)
        await puller.wait(2)
        await js.delete_message("s", 1)
        await bus.wait_floor(1, 1)

    async def test_two_who_pull_share_the_messages(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue("s.0")
        one, other = await bus.pull("c", 5), await bus.pull("c", 5)
        await bus.fill(*(f"s.0={number}" for number in range(10)))
        await eventually(lambda: len(one.messages) + len(other.messages) == 10)
        assert sorted(one.sequences + other.sequences) == list(range(1, 11))
        assert (len(one.messages), len(other.messages)) == (5, 5)

    # Acknowledging

    async def test_an_acknowledged_message_leaves_the_queue(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        await bus.fill("s.0", "s.0")
        first, second = await (await bus.pull("c", 10)).wait(2)
        assert await js.acknowledge_confirmed(first.reply)
        there = await js.stream("s")
        assert there is not None
        assert (there.messages, there.first_sequence) == (1, 2)
        js.acknowledge(second.reply)
        await bus.wait_floor(2, 0)

    async def test_a_plain_publish_acknowledges_too(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        await bus.fill("s.0")
        (message,) = await (await bus.pull("c", 10)).wait(1)
        bus.transport.publish(message.reply, b"+ACK")
        await bus.wait_floor(1, 0)

    async def test_the_floor_follows_acknowledgements_in_any_order(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue("s.0")
        await bus.fill("s.0", "s.1", "s.0", "s.0", "s.1", "s.0")
        messages = await (await bus.pull("c", 10)).wait(4)
        floors = [await bus.floor()]
        for place in (2, 0, 1, 3):
            assert await js.acknowledge_confirmed(messages[place].reply)
            floors.append(await bus.floor())
        # Sequences 1, 3, 4 and 6 were delivered; 4, 1, 3 and 6 acknowledged.
        assert floors == [(0, 4), (0, 3), (2, 2), (5, 1), (6, 0)]

    async def test_a_second_acknowledgement_is_answered_as_the_first(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        await bus.fill("s.0")
        (message,) = await (await bus.pull("c", 10)).wait(1)
        assert await js.acknowledge_confirmed(message.reply)
        assert await js.acknowledge_confirmed(message.reply)

    async def test_the_acknowledgement_of_a_deleted_consumer_reaches_nobody(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue(name="c1")
        await bus.fill("s.0", "s.0")
        stale, _ = await (await bus.pull("c1", 10)).wait(2)
        await js.delete_consumer("s", "c1")
        await bus.queue(name="c2")
        assert not await js.acknowledge_confirmed(stale.reply)
        js.acknowledge(stale.reply)
        fresh = await (await bus.pull("c2", 10)).wait(2)
        assert [message.sequence for message in fresh] == [1, 2]
        assert await bus.floor("c2") == (0, 2)

    async def test_a_new_consumer_of_a_queue_starts_at_the_first_unacknowledged(
        self, bus: Client, js: JetStream
    ) -> None:
        await js.create_stream(QUEUE)
        await bus.queue(name="c1")
        await bus.fill(*(f"s.0={number}" for number in range(6)))
        messages = await (await bus.pull("c1", 5)).wait(5)
        for place in (0, 2, 4):
            assert await js.acknowledge_confirmed(messages[place].reply)
        await js.delete_consumer("s", "c1")
        await bus.queue(name="c2")
        puller = await bus.pull("c2", 10)
        await puller.wait(3)
        assert puller.payloads == [b"1", b"3", b"5"]
        assert [message.deliveries for message in puller.messages] == [1, 1, 1]
        assert await bus.floor("c2") == (1, 3)

    async def test_what_is_not_acknowledged_in_time_comes_again(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue(ack_wait=0.3)
        await bus.fill("s.0=a", "s.0=b")
        puller = await bus.pull("c", 10)
        await puller.wait(4)
        again = puller.messages[2:4]
        assert [(message.payload, message.deliveries) for message in again] == [(b"a", 2), (b"b", 2)]
        assert [message.consumer_sequence for message in again] == [3, 4]
        assert await js.acknowledge_confirmed(again[0].reply)

    async def test_an_older_delivery_acknowledges_what_another_was_given(self, bus: Client, js: JetStream) -> None:
        # The trap: the one who is at work on the second delivery is not asked.
        await js.create_stream(QUEUE)
        await bus.queue(ack_wait=0.3, max_ack_pending=1)
        await bus.fill("s.0=a", "s.0=b")
        slow, other = await bus.pull("c", 1), await bus.pull("c", 2)
        await eventually(lambda: slow.messages and other.messages)
        stale, current = sorted((slow.messages[0], other.messages[0]), key=lambda message: message.deliveries)
        assert (stale.payload, current.payload) == (b"a", b"a")
        assert await js.acknowledge_confirmed(stale.reply)
        await eventually(lambda: b"b" in slow.payloads + other.payloads)
        assert (await bus.floor())[0] == 1

    async def test_an_acknowledgement_of_what_was_never_delivered_is_not_answered(
        self, bus: Client, js: JetStream
    ) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        await bus.fill("s.0", "s.0")
        (message,) = await (await bus.pull("c", 1)).wait(1)
        forged = f"$JS.ACK.s.c.1.2.2.{round(message.time * 1e9)}.0"
        with pytest.raises(JetStreamUnknownError):
            await js.acknowledge_confirmed(forged, timeout=0.3)
        there = await js.stream("s")
        assert there is not None
        assert there.messages == 2

    # What the server says about a pull

    async def test_a_consumer_deleted_under_its_puller_says_so(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        await bus.fill("s.0")
        puller = await bus.pull("c", 10)
        await puller.wait(1)
        await js.delete_consumer("s", "c")
        assert await puller.status(409) == "Consumer Deleted"
        assert puller.consumption.credit == 0

    async def test_a_stream_deleted_under_its_puller_is_noticed_with_the_next_pull(
        self, bus: Client, js: JetStream
    ) -> None:
        # The server may say "Consumer Deleted", or nothing at all: then its heartbeats are missed.
        await js.create_stream(QUEUE)
        await bus.queue()
        puller = await bus.pull("c", 10, idle=0.2)
        await puller.status(100)
        await js.delete_stream("s")
        async with asyncio.timeout(5.0):
            while all(code != 503 for code, _ in puller.statuses):
                puller.consumption.pull(100)
                await asyncio.sleep(0.1)

    async def test_pulling_from_nobody_says_so_after_a_second(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        puller = await bus.pull("none", 10)
        assert puller.statuses == []
        await puller.status(503)
        assert puller.consumption.credit == 0

    async def test_a_consumer_that_comes_within_a_second_is_served(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.fill("s.0")
        puller = await bus.pull("c", 10)
        await bus.transport.flush()
        await bus.queue()
        await puller.wait(1)
        assert puller.statuses == []
        assert puller.consumption.credit == 9

    async def test_a_silent_consumer_says_that_it_lives(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        puller = await bus.pull("c", 10, idle=0.2)
        before = puller.consumption.heard_at
        await puller.status(100)
        assert puller.consumption.heard_at > before
        assert puller.consumption.credit == 10

    async def test_nothing_comes_after_closing(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        puller = await bus.pull("c", 10)
        await puller.consumption.close()
        await puller.consumption.close()
        puller.consumption.pull(5)
        assert puller.consumption.credit == 0
        other = await bus.pull("c", 10)
        await bus.fill("s.0=a")
        await other.wait(1)
        assert puller.messages == []

    # Failing

    async def test_a_lost_connection_makes_what_waits_unknown_at_once(
        self, carrier: Carrier, bus: Client, js: JetStream
    ) -> None:
        if not carrier.can_stall:
            pytest.skip("the server cannot be stalled")
        await js.create_stream(QUEUE)
        await bus.queue()
        puller = await bus.pull("c", 10)
        await bus.transport.flush()
        await carrier.stall()
        waiting = asyncio.ensure_future(js.publish("s.0", b"", timeout=60.0))
        await asyncio.sleep(0)
        await carrier.cut()
        with pytest.raises(JetStreamUnknownError):
            await asyncio.wait_for(waiting, 10.0)
        await eventually(lambda: puller.consumption.credit == 0)
        puller.consumption.pull(1)
        assert puller.consumption.credit == 0
        with pytest.raises(JetStreamUnknownError):
            await js.publish("s.0", b"")

    async def test_after_a_reconnect_everything_works_again(self, carrier: Carrier, bus: Client, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        await bus.queue()
        await bus.fill("s.0=a")
        puller = await bus.pull("c", 10)
        (before,) = await puller.wait(1)
        await carrier.cut()
        await eventually(lambda: bus.events.disconnected, RECONNECT_TIMEOUT)
        js.acknowledge(before.reply)
        await carrier.heal()
        await eventually(lambda: bus.events.reconnected, RECONNECT_TIMEOUT)
        await bus.fill("s.0=b")
        puller.consumption.pull(10)
        await puller.wait(2)
        assert puller.payloads == [b"a", b"b"]
        assert await bus.floor() == (0, 2)
        assert await js.acknowledge_confirmed(before.reply)

    async def test_silence_is_unknown_after_the_timeout(self, carrier: Carrier, bus: Client, js: JetStream) -> None:
        if not carrier.can_stall:
            pytest.skip("the server cannot be stalled")
        await js.create_stream(QUEUE)
        await carrier.stall()
        try:
            with pytest.raises(JetStreamUnknownError):
                await js.publish("s.0", b"", timeout=0.05)
        finally:
            await carrier.resume()
        # It was never refused, and so it came to be.
        message = await _some(lambda: js.message("s", 1))
        assert message.subject == "s.0"

    async def test_closing_ends_what_waits(self, carrier: Carrier, bus: Client, js: JetStream) -> None:
        if not carrier.can_stall:
            pytest.skip("the server cannot be stalled")
        await js.create_stream(QUEUE)
        await carrier.stall()
        try:
            waiting = asyncio.ensure_future(js.publish("s.0", b"", timeout=60.0))
            await asyncio.sleep(0)
            await js.close()
            with pytest.raises(JetStreamUnknownError):
                await asyncio.wait_for(waiting, 5.0)
        finally:
            await carrier.resume()
        with pytest.raises(JetStreamUnknownError):
            await js.publish("s.0", b"")

    # Delayed messages

    async def test_a_delayed_message_is_stored_when_its_time_has_come(self, bus: Client, js: JetStream) -> None:
        if (await js.account())["api"]["level"] < 2:
            pytest.skip("needs nats-server 2.12")
        await js.create_stream(
            StreamConfig(
                name="s", subjects=("s.*", "at.*"), retention="workqueue", allow_schedules=True, allow_rollup=True
            )
        )
        await bus.queue("s.0")
        puller = await bus.pull("c", 10)
        due = utc_now().timestamp() + 1.0
        headers = {SCHEDULE_HEADER: schedule_at(due), SCHEDULE_TARGET_HEADER: "s.0", "A": "1"}
        await js.publish("at.1", b"later", headers=headers, message_id="x")
        assert puller.messages == []
        (message,) = await puller.wait(1)
        assert (message.subject, message.payload) == ("s.0", b"later")
        assert message.time >= due - 0.05
        assert message.headers == {"A": "1", "Nats-Scheduler": "at.1", "Nats-Schedule-Next": "purge"}
        assert await js.acknowledge_confirmed(message.reply)
        await _until(bus.is_empty)

    async def test_a_delayed_message_can_be_taken_back(self, bus: Client, js: JetStream) -> None:
        if (await js.account())["api"]["level"] < 2:
            pytest.skip("needs nats-server 2.12")
        await js.create_stream(
            StreamConfig(name="s", subjects=("s.*", "at.*"), allow_schedules=True, allow_rollup=True)
        )
        due = utc_now().timestamp() + 0.5
        for place in ("at.1", "at.2"):
            headers = {SCHEDULE_HEADER: schedule_at(due), SCHEDULE_TARGET_HEADER: "s.0"}
            await js.publish(place, place.encode(), headers=headers)
        assert await js.purge("s", subject="at.1") == 1
        message = await _some(lambda: js.last_message("s", "s.0"), 10.0)
        assert (message.payload, message.sequence) == (b"at.2", 3)

    async def test_a_bad_schedule_is_refused(self, js: JetStream) -> None:
        if (await js.account())["api"]["level"] < 2:
            pytest.skip("needs nats-server 2.12")
        await js.create_stream(
            StreamConfig(name="s", subjects=("s.*", "at.*"), allow_schedules=True, allow_rollup=True)
        )
        at = schedule_at(utc_now().timestamp() + 60.0)

        async def code(when: str, target: str) -> int:
            headers = {SCHEDULE_HEADER: when, SCHEDULE_TARGET_HEADER: target}
            return (await _refused(js.publish("at.1", b"", headers=headers))).code

        assert await code("tomorrow", "s.0") == 10189
        assert await code(at, "elsewhere") == 10190
        assert await code(at, "at.1") == 10190
        await js.create_stream(StreamConfig(name="t", subjects=("t.*",)))
        headers = {SCHEDULE_HEADER: at, SCHEDULE_TARGET_HEADER: "t.0"}
        assert (await _refused(js.publish("t.1", b"", headers=headers))).code == 10188
        assert to_rfc3339(0.0) in schedule_at(0.0)

    # Buckets

    async def test_a_bucket_is_read_and_written_by_compare_and_set(self, js: JetStream) -> None:
        bucket = KeyValue(js, "b")
        await bucket.open()
        assert await bucket.read("a.0") == Entry(None, 0)
        assert await bucket.write("a.0", b"one", 0) == 1
        assert await bucket.write("a.1", b"other", 0) == 2
        assert await bucket.write("a.0", b"two", 1) == 3
        assert await bucket.read("a.0") == Entry(b"two", 3)
        for wrong in (0, 1, 2):
            error = await _refused(bucket.write("a.0", b"three", wrong))
            assert error.code == ApiError.WRONG_LAST_SEQUENCE
        assert await bucket.read("a.0") == Entry(b"two", 3)

    async def test_a_bucket_made_again_goes_on_rising(self, js: JetStream) -> None:
        bucket = KeyValue(js, "b")
        await bucket.open(1_000)
        assert await bucket.write("a", b"", 0) == 1_000
        await js.delete_stream(bucket.stream)
        assert (await _refused(bucket.read("a"))).code == ApiError.STREAM_NOT_FOUND
        await bucket.open(5_000)
        assert await bucket.read("a") == Entry(None, 0)
        assert await bucket.write("a", b"", 0) == 5_000
        await KeyValue(js, "b").open(9_000)
        assert await bucket.write("a", b"", 5_000) == 5_001

    @pytest.mark.parametrize("header", [{"KV-Operation": "DEL"}, {"Nats-Marker-Reason": "MaxAge"}])
    async def test_a_deleted_key_has_no_value_and_a_revision(self, js: JetStream, header: dict[str, str]) -> None:
        bucket = KeyValue(js, "b")
        await bucket.open()
        await bucket.write("a", b"one", 0)
        await js.publish("$KV.b.a", b"", headers=header)
        assert await bucket.read("a") == Entry(None, 2)
        assert (await _refused(bucket.write("a", b"two", 0))).code == ApiError.WRONG_LAST_SEQUENCE
        assert await bucket.keys() == []
        assert await bucket.write("a", b"two", 2) == 3

    async def test_a_bucket_lists_a_thousand_keys(self, js: JetStream) -> None:
        bucket = KeyValue(js, "b")
        await bucket.open()
        assert await bucket.entries() == {}
        await asyncio.gather(*(bucket.write(f"k.{number}", b"%d" % number, 0) for number in range(1_500)))
        await bucket.write("k.7", b"seven", (await bucket.read("k.7")).revision)
        entries = await bucket.entries()
        assert len(entries) == 1_500
        assert entries["k.7"] == Entry(b"seven", 1_501)
        assert {key: entry.value for key, entry in entries.items() if key != "k.7"} == {
            f"k.{number}": b"%d" % number for number in range(1_500) if number != 7
        }
        assert len(await bucket.keys()) == 1_500
        assert await js.consumer_names(bucket.stream) == []

    async def test_a_stream_that_would_lose_keys_is_no_bucket(self, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="KV_b", subjects=("$KV.b.>",), max_age=3_600.0))
        with pytest.raises(ConfigurationError, match=r"expire after 3600\.0 s"):
            await KeyValue(js, "b").open()

    async def test_a_bucket_with_other_limits_is_used_as_it_is(self, js: JetStream) -> None:
        await js.create_stream(StreamConfig(name="KV_b", subjects=("$KV.b.>",), max_bytes=100_000, discard="new"))
        assert (await KeyValue(js, "b").open()).config.max_bytes == 100_000

    @pytest.mark.parametrize("key", ["", "a..b", "a.*", ">", "a b"])
    async def test_a_key_that_is_no_subject_is_refused_here(self, js: JetStream, key: str) -> None:
        bucket = KeyValue(js, "b")
        await bucket.open()
        with pytest.raises(ConfigurationError):
            await bucket.read(key)
        with pytest.raises(ConfigurationError):
            await bucket.write(key, b"", 0)
