"""The part of JetStream's contract that is about failures, delayed messages and buckets."""

# ruff: noqa: D102 - the name of a test is the sentence that it proves

import asyncio

import pytest

from catga_bus.clock import utc_now
from catga_bus.errors import ConfigurationError
from catga_bus.testing.carrier import Carrier
from catga_bus.testing.jetstream_scripts import QUEUE, Client, JetStreamScripts, found, refused, until
from catga_bus.testing.waiting import eventually
from catga_bus.transport.jetstream import ApiError, JetStream, JetStreamUnknownError, StreamConfig
from catga_bus.transport.key_value import Entry, KeyValue
from catga_bus.transport.schedules import SCHEDULE_HEADER, SCHEDULE_TARGET_HEADER, schedule_at

RECONNECT_TIMEOUT = 30.0
"""Seconds; see `catga_bus.testing.transport_contract`."""


class TrialScripts(JetStreamScripts):
    """Failures, delayed messages and buckets, one promise each."""

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
        message = await found(lambda: js.message("s", 1))
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
            StreamConfig(name="s", subjects=("s.*", "at.*"), retention="workqueue", allow_schedules=True)
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
        await until(bus.is_empty)

    async def test_a_delayed_message_can_be_taken_back(self, bus: Client, js: JetStream) -> None:
        if (await js.account())["api"]["level"] < 2:
            pytest.skip("needs nats-server 2.12")
        config = StreamConfig(name="s", subjects=("s.*", "at.*"), allow_schedules=True)
        assert (await js.create_stream(config)).config.allow_rollup
        await js.create_stream(config)
        due = utc_now().timestamp() + 0.5
        for place in ("at.1", "at.2"):
            headers = {SCHEDULE_HEADER: schedule_at(due), SCHEDULE_TARGET_HEADER: "s.0"}
            await js.publish(place, place.encode(), headers=headers)
        assert await js.purge("s", subject="at.1") == 1
        message = await found(lambda: js.last_message("s", "s.0"), 10.0)
        assert (message.payload, message.sequence) == (b"at.2", 3)

    async def test_a_bad_schedule_is_refused(self, js: JetStream) -> None:
        if (await js.account())["api"]["level"] < 2:
            pytest.skip("needs nats-server 2.12")
        await js.create_stream(StreamConfig(name="s", subjects=("s.*", "at.*"), allow_schedules=True))
        at = schedule_at(utc_now().timestamp() + 60.0)

        async def code(when: str, target: str) -> int:
            headers = {SCHEDULE_HEADER: when, SCHEDULE_TARGET_HEADER: target}
            return (await refused(js.publish("at.1", b"", headers=headers))).code

        assert await code("tomorrow", "s.0") == 10189
        assert await code(at, "elsewhere") == 10190
        assert await code(at, "at.1") == 10190
        await js.create_stream(StreamConfig(name="t", subjects=("t.*",)))
        headers = {SCHEDULE_HEADER: at, SCHEDULE_TARGET_HEADER: "t.0"}
        assert (await refused(js.publish("t.1", b"", headers=headers))).code == 10188
        refusing = StreamConfig(name="u", subjects=("u.*",), allow_schedules=True, discard="new")
        assert (await refused(js.create_stream(refusing))).code == ApiError.INVALID_CONFIG

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
            error = await refused(bucket.write("a.0", b"three", wrong))
            assert error.code == ApiError.WRONG_LAST_SEQUENCE
        assert await bucket.read("a.0") == Entry(b"two", 3)

    async def test_a_bucket_made_again_goes_on_rising(self, js: JetStream) -> None:
        bucket = KeyValue(js, "b")
        await bucket.open(1_000)
        assert await bucket.write("a", b"", 0) == 1_000
        await js.delete_stream(bucket.stream)
        assert (await refused(bucket.read("a"))).code == ApiError.STREAM_NOT_FOUND
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
        assert (await refused(bucket.write("a", b"two", 0))).code == ApiError.WRONG_LAST_SEQUENCE
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
