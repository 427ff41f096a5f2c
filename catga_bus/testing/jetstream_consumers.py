"""The part of JetStream's contract that is about consumers: delivery, acknowledgement, and what the server says."""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

import asyncio
from typing import Any

import pytest

from catga_bus.clock import utc_now
from catga_bus.testing.jetstream_scripts import (
    LOG,
    QUEUE,
    Client,
    JetStreamScripts,
    Puller,
    consumer_of,
    refused,
    until,
)
from catga_bus.testing.waiting import eventually
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    DeliveredMessage,
    JetStream,
    JetStreamUnknownError,
    StreamConfig,
)


class ConsumerScripts(JetStreamScripts):
    """Consumers, one promise each."""

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
        await js.create_consumer("s", consumer_of("c"))
        assert (await js.create_consumer("s", consumer_of("c"))).name == "c"
        error = await refused(js.create_consumer("s", consumer_of("c", ack_wait=1.0)))
        assert error.code == ApiError.CONSUMER_NAME_IN_USE

    @pytest.mark.parametrize("filters", [("s.0",), ("s.*",), ("s.1", "s.0")])
    async def test_two_consumers_of_a_queue_share_no_subject(self, js: JetStream, filters: tuple[str, ...]) -> None:
        await js.create_stream(QUEUE)
        await js.create_consumer("s", consumer_of("c"))
        error = await refused(js.create_consumer("s", consumer_of("d", *filters)))
        assert error.code == ApiError.CONSUMER_FILTER_NOT_UNIQUE
        await js.create_consumer("s", consumer_of("d", "s.1", "s.2"))
        assert await js.consumer_names("s") == ["c", "d"]
        assert await js.delete_consumer("s", "c")
        assert not await js.delete_consumer("s", "c")
        await js.create_consumer("s", consumer_of("e", "s.0"))

    @pytest.mark.parametrize(
        ("options", "code"), [({"acks": "none"}, 10084), ({"deliver": "new"}, 10101)], ids=["acks", "deliver"]
    )
    async def test_a_queue_wants_all_of_it_acknowledged(
        self, js: JetStream, options: dict[str, Any], code: int
    ) -> None:
        await js.create_stream(QUEUE)
        assert (await refused(js.create_consumer("s", consumer_of("c", **options)))).code == code

    async def test_the_subjects_of_a_consumer_do_not_overlap(self, js: JetStream) -> None:
        await js.create_stream(LOG)
        assert (await refused(js.create_consumer("s", consumer_of("c", "s.*", "s.1")))).code == 10138

    async def test_an_abandoned_consumer_is_deleted_by_the_server(self, bus: Client, js: JetStream) -> None:
        await js.create_stream(LOG)
        await bus.queue(name="c", inactive_threshold=0.3)
        await bus.queue(name="d", inactive_threshold=0.3)
        await bus.pull("d", 1)

        async def is_alone() -> bool:
            return await js.consumer_names("s") == ["d"]

        await until(is_alone, 20.0)

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
