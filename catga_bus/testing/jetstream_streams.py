"""The part of JetStream's contract that is about streams and what they store."""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

from contextlib import AsyncExitStack

import pytest

from catga_bus.clock import utc_now
from catga_bus.errors import TooLargeError
from catga_bus.testing.carrier import Carrier
from catga_bus.testing.jetstream_scripts import LOG, QUEUE, Client, JetStreamScripts, consumer_of, found, refused, until
from catga_bus.testing.waiting import eventually
from catga_bus.transport.jetstream import ApiError, JetStream, JetStreamUnknownError, StreamConfig


class StreamScripts(JetStreamScripts):
    """Streams, storing and reading, one promise each."""

    # The account

    async def test_an_account_tells_its_limits(self, js: JetStream) -> None:
        account = await js.account()
        assert account["limits"]["max_streams"] == -1
        assert account["api"]["level"] >= 0

    async def test_without_jetstream_the_account_is_refused_and_a_publish_unknown(
        self, no_jetstream: Carrier, clients: AsyncExitStack
    ) -> None:
        js = (await self.client(no_jetstream, clients)).jetstream
        assert (await refused(js.account())).code in (ApiError.NOT_ENABLED, ApiError.NOT_ENABLED_FOR_ACCOUNT)
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
        error = await refused(js.create_stream(StreamConfig(name="s", subjects=("s.*",), max_bytes=10)))
        assert error.code == ApiError.STREAM_NAME_IN_USE

    async def test_what_cannot_be_made_is_refused(self, js: JetStream) -> None:
        subjects = ("s.*",)
        for config, code in (
            (StreamConfig(name="s", subjects=subjects, replicas=3), 10074),
            (StreamConfig(name="s", subjects=subjects, max_age=10.0, duplicate_window=11.0), ApiError.INVALID_CONFIG),
        ):
            assert (await refused(js.create_stream(config))).code == code
        assert await js.stream_names() == []

    async def test_two_streams_share_no_subject(self, js: JetStream) -> None:
        await js.create_stream(QUEUE)
        error = await refused(js.create_stream(StreamConfig(name="t", subjects=("s.7",))))
        assert error.code == ApiError.SUBJECTS_OVERLAP

    async def test_a_stream_can_be_changed_but_not_in_everything(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        changed = StreamConfig(name="s", subjects=("s.*", "t.*"), max_bytes=1_000)
        assert (await js.update_stream(changed)).config.max_bytes == 1_000
        await js.publish("t.0", b"")
        assert (await refused(js.update_stream(QUEUE))).code == ApiError.INVALID_CONFIG
        missing = StreamConfig(name="none", subjects=("none",))
        assert (await refused(js.update_stream(missing))).code == ApiError.STREAM_NOT_FOUND

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
        assert (await refused(js.last_message("s", "s.0"))).code == ApiError.STREAM_NOT_FOUND
        assert (await refused(js.create_consumer("s", consumer_of("c")))).code == ApiError.STREAM_NOT_FOUND
        assert (await refused(js.consumer("s", "c"))).code == ApiError.STREAM_NOT_FOUND

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

        async def next_of(subject: str, sequence: int) -> int | None:
            message = await js.next_message("s", subject, sequence)
            return message.sequence if message is not None else None

        assert [await next_of("s.0", place) for place in (1, 2, 4)] == [1, 3, None]
        assert [await next_of("s.*", place) for place in (2, 5)] == [2, None]

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

        await until(is_stored)

    async def test_a_compare_and_set_looks_at_the_last_of_its_subject(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        assert (await js.publish("s.0", b"", expected_last=0)).sequence == 1
        assert (await js.publish("s.1", b"", expected_last=0)).sequence == 2
        assert (await js.publish("s.0", b"", expected_last=1)).sequence == 3
        for wrong in (0, 1, 2, 4):
            error = await refused(js.publish("s.0", b"", expected_last=wrong))
            assert (error.code, error.text) == (ApiError.WRONG_LAST_SEQUENCE, "wrong last sequence: 3")
        assert await js.message("s", 4) is None

    async def test_a_wrong_last_sequence_is_said_before_a_duplicate(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        await js.publish("s.0", b"", message_id="x", expected_last=0)
        error = await refused(js.publish("s.0", b"", message_id="x", expected_last=0))
        assert error.code == ApiError.WRONG_LAST_SEQUENCE
        assert (await js.publish("s.0", b"", message_id="x", expected_last=1)).duplicate

    async def test_a_full_queue_refuses_and_takes_again_what_finds_room(self, js: JetStream) -> None:
        room = StreamConfig(
            name="s", subjects=("s.*",), retention="workqueue", discard="new", max_bytes=3 * (30 + 3 + 100)
        )
        await js.create_stream(room)
        for _ in range(3):
            await js.publish("s.0", bytes(100))
        error = await refused(js.publish("s.0", b""))
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
        await until(bus.is_empty)
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
        assert (await refused(js.purge("none"))).code == ApiError.STREAM_NOT_FOUND

    async def test_one_message_can_be_deleted_where_that_is_allowed(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.fill("s.0", "s.0")
        assert await js.delete_message("s", 1)
        assert not await js.delete_message("s", 1)
        assert not await js.delete_message("s", 9)
        assert (await refused(js.delete_message("none", 1))).code == ApiError.STREAM_NOT_FOUND
        await js.create_stream(StreamConfig(name="t", subjects=("t",), deny_delete=True))
        await bus.fill("t")
        assert (await refused(js.delete_message("t", 1))).code == ApiError.MESSAGE_DELETE_FAILED

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
        message = await found(lambda: js.message("s", 1))
        assert message.payload == b"a"
