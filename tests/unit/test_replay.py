"""Replays of the event log to one service: what is read, what is put on its queue, and how it goes on."""

import random
from typing import Any

import msgspec
import pytest

from catga_bus.codec import Gate
from catga_bus.durability.letters import log_reader, work_queue
from catga_bus.durability.letters.log_reader import Range
from catga_bus.durability.letters.replay import ReplayPlan, ReplayProgress, replay
from catga_bus.durability.letters.work_queue import WorkQueue
from catga_bus.errors import CatgaError, ConfigurationError
from catga_bus.partition.hashing import partition_of
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.wire import Kind, MessageFrame, Names, join_batch
from tests.model_jetstream import ModelJetStream

P, LOG_P = 8, 4
NAMES = Names()
LOG, QUEUE = NAMES.event_stream(), NAMES.command_stream("shop")
START = 1_764_072_000.0


@pytest.fixture
async def jetstream() -> ModelJetStream:
    made = ModelJetStream(START)
    await made.create_stream(StreamConfig(name=LOG, subjects=(NAMES.events(),)))
    await made.create_stream(StreamConfig(name=QUEUE, subjects=(NAMES.commands("shop"),), retention="workqueue"))
    return made


@pytest.fixture
def queue(jetstream: ModelJetStream) -> WorkQueue:
    return WorkQueue(jetstream, NAMES, "shop", P, rng=random.Random(1))


def plan(**changes: Any) -> ReplayPlan:
    facts: dict[str, Any] = {"name": "r1", "types": ("Debited",), "start_utc": 0.0, "until_utc": START + 1e9}
    return ReplayPlan(**(facts | changes))


async def store(jetstream: ModelJetStream, *ids: str, type_name: str = "Debited", key: str | None = "a-1") -> None:
    """Store one record of the log; a second later it is."""
    frames = [msgspec.msgpack.encode((one, type_name, key, 700, 3, "00-t", {"id": one})) for one in ids]
    place = partition_of(key or ids[0], LOG_P)
    payload = join_batch(Kind.MESSAGES, ("web-1", None, 7), frames)
    await jetstream.publish(NAMES.event(type_name, place), payload)
    jetstream.now += 1.0


def queued(jetstream: ModelJetStream) -> list[tuple[str, MessageFrame]]:
    gate = Gate()
    return [(one.subject, frame) for one in jetstream.stored(QUEUE) for frame in gate.messages(one.payload).frames]


def ids(jetstream: ModelJetStream) -> list[str]:
    return [frame.id for _, frame in queued(jetstream)]


async def test_events_keep_their_ids_and_go_by_their_key(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    await store(jetstream, "e1", "e2")
    await store(jetstream, "e3", key=None)
    progress = await replay(jetstream, NAMES, queue, plan())
    assert (progress.events, progress.records, progress.unreadable, progress.sequence) == (3, 2, 0, 2)
    a, own = NAMES.command("shop", partition_of("a-1", P)), NAMES.command("shop", partition_of("e3", P))
    assert [(subject, frame.id) for subject, frame in queued(jetstream)] == [(a, "e1"), (a, "e2"), (own, "e3")]
    [_, frame] = queued(jetstream)[0]
    assert (frame.remaining_ms, frame.attempt, frame.trace) == (None, 1, "00-t")
    assert msgspec.msgpack.decode(frame.body) == {"id": "e1"}
    head = Gate().messages(jetstream.stored(QUEUE)[0].payload).head
    assert (head.sender, head.reply) == ("web-1", None)


async def test_events_that_run_again_have_new_ids(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    await store(jetstream, "e1", "x" * 256, "y" * 256)
    await replay(jetstream, NAMES, queue, plan(again=True))
    first, second, third = ids(jetstream)
    assert first == "e1~r1"
    assert second != third
    for one in (second, third):
        assert len(one) == 32 + 3
        assert one.endswith("~r1")


async def test_a_record_of_several_keys_is_parted_and_no_key_loses_its_order(
    jetstream: ModelJetStream, queue: WorkQueue
) -> None:
    rng = random.Random(5)
    sent: dict[str, list[str]] = {}
    for record in range(200):
        frames = []
        for place in range(rng.randrange(1, 6)):
            key, one = f"k{rng.randrange(12)}", f"{record}.{place}"
            frames.append(msgspec.msgpack.encode((one, "Debited", key, None, 1, None, 0)))
            sent.setdefault(key, []).append(one)
        await jetstream.publish(NAMES.event("Debited", 0), join_batch(Kind.MESSAGES, ("s", None, 0), frames))
    jetstream.fail("publish", *[JetStreamUnknownError("no answer")] * 3)
    jetstream.lose_answers("publish", 3)
    await replay(jetstream, NAMES, queue, plan())
    got: dict[str, list[str]] = {}
    for subject, frame in queued(jetstream):
        assert subject == NAMES.command("shop", partition_of(str(frame.key), P))
        got.setdefault(str(frame.key), []).append(frame.id)
    assert got == sent


async def test_only_the_range_is_replayed(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    for number in range(10):
        await store(jetstream, f"e{number}")
    progress = await replay(jetstream, NAMES, queue, plan(start_utc=START + 3.0, until_utc=START + 6.5))
    assert ids(jetstream) == ["e3", "e4", "e5", "e6"]
    assert (progress.sequence, progress.utc) == (7, START + 6.0)
    assert jetstream.model.consumer_names(jetstream.now, LOG) == []


async def test_only_the_types_that_are_asked_for_are_replayed(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    for number in range(6):
        await store(jetstream, f"e{number}", type_name=("Debited", "Credited", "Closed")[number % 3])
    await replay(jetstream, NAMES, queue, plan(types=("Credited", "Closed", "Closed")))
    assert sorted(ids(jetstream)) == ["e1", "e2", "e4", "e5"]


async def test_a_frame_of_another_type_than_its_subject_says_is_left_out(
    jetstream: ModelJetStream, queue: WorkQueue
) -> None:
    frames = [
        msgspec.msgpack.encode((one, name, "a", None, 1, None, 0)) for one, name in (("x", "Other"), ("y", "Debited"))
    ]
    await jetstream.publish(NAMES.event("Debited", 0), join_batch(Kind.MESSAGES, ("s", None, 0), frames))
    progress = await replay(jetstream, NAMES, queue, plan())
    assert (progress.events, ids(jetstream)) == (1, ["y"])


async def test_what_cannot_be_replayed_is_counted(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    subject = NAMES.event("Debited", 0)
    await jetstream.publish(subject, b"rubbish")
    await jetstream.publish(subject, join_batch(Kind.CANCEL, ("s",), [b"\xa1x"]))
    await store(jetstream, "e1", key="")
    await store(jetstream, "e2")
    progress = await replay(jetstream, NAMES, queue, plan())
    assert (progress.events, progress.records, progress.unreadable) == (1, 4, 3)
    assert ids(jetstream) == ["e2"]


async def test_a_replay_goes_on_where_it_was_cut_off_and_stores_nothing_twice(
    jetstream: ModelJetStream, queue: WorkQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catga_bus.durability.letters.replay.BATCH_RECORDS", 4)
    for number in range(20):
        await store(jetstream, f"e{number}", key=f"k{number}")
    told: list[ReplayProgress] = []

    def stop(progress: ReplayProgress) -> None:
        told.append(progress)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await replay(jetstream, NAMES, queue, plan(), stop)
    assert (told[-1].sequence, len(ids(jetstream))) == (12, 12)
    assert jetstream.model.consumer_names(jetstream.now, LOG) == []
    progress = await replay(jetstream, NAMES, queue, plan(start_sequence=told[-2].sequence + 1))
    assert sorted(ids(jetstream)) == sorted(f"e{number}" for number in range(20))
    assert progress.events == 12


async def test_it_ends_with_the_events_there_were_when_it_began(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    await store(jetstream, "e1")
    await store(jetstream, "e2")

    def store_another(call: str) -> None:
        if call == "create_consumer":
            frames = [msgspec.msgpack.encode(("late", "Debited", "a", None, 1, None, 0))]
            jetstream.model.publish(
                jetstream.now, NAMES.event("Debited", 0), join_batch(Kind.MESSAGES, ("s", None, 0), frames)
            )

    jetstream.on_call = store_another
    await replay(jetstream, NAMES, queue, plan())
    assert sorted(ids(jetstream)) == ["e1", "e2"]


async def test_an_empty_log_and_an_empty_range_are_soon_read(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    assert (await replay(jetstream, NAMES, queue, plan())).events == 0
    await store(jetstream, "e1")
    assert (await replay(jetstream, NAMES, queue, plan(types=("Other",)))).records == 0
    assert (await replay(jetstream, NAMES, queue, plan(start_utc=START + 50.0))).records == 0


async def test_what_is_missing_is_an_error(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    await store(jetstream, "e1")
    await jetstream.delete_stream(QUEUE)
    with pytest.raises(CatgaError, match="service shop has no work queue: stream catga-cmd-shop does not exist"):
        await replay(jetstream, NAMES, queue, plan())
    await jetstream.delete_stream(LOG)
    with pytest.raises(CatgaError, match="there is no event log"):
        await replay(jetstream, NAMES, queue, plan())
    with pytest.raises(ConfigurationError, match="at least 1 partition, got 0"):
        WorkQueue(jetstream, NAMES, "shop", 0)


async def test_half_of_the_queue_is_left_to_what_comes_for_the_first_time(
    jetstream: ModelJetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_queue, "_ROOM_SECONDS", 0.0)
    monkeypatch.setattr("catga_bus.durability.letters.replay.BATCH_RECORDS", 4)
    await jetstream.update_stream(
        StreamConfig(
            name=QUEUE, subjects=(NAMES.commands("shop"),), retention="workqueue", max_bytes=8_000, discard="new"
        )
    )
    for number in range(100):
        await store(jetstream, f"e{number}")
    most = 0

    def handle(call: str) -> None:
        nonlocal most
        info = jetstream.model.stream(jetstream.now, QUEUE)
        assert info is not None
        most = max(most, info.bytes)
        if call == "stream" and info.bytes > 4_000:
            jetstream.model.delete_message(jetstream.now, QUEUE, info.first_sequence)
            handled.append(info.first_sequence)

    handled: list[int] = []
    jetstream.on_call = handle
    progress = await replay(jetstream, NAMES, WorkQueue(jetstream, NAMES, "shop", P), plan())
    assert progress.events == 100
    assert handled
    assert most < 5_000


# -- reading a range --------------------------------------------------------------------------------------


async def read(jetstream: ModelJetStream, **options: Any) -> list[int]:
    reading = Range(jetstream, LOG, (NAMES.events(),), **options)
    return [message.sequence async for message in reading.read()]


@pytest.fixture
async def filled(jetstream: ModelJetStream) -> ModelJetStream:
    for number in range(200):
        await store(jetstream, f"e{number}")
    return jetstream


@pytest.mark.parametrize(("start", "through"), [(1, 200), (5, 5), (60, 70), (200, 500), (201, 500), (9, 8)])
async def test_a_range_is_read_once_and_in_order(filled: ModelJetStream, start: int, through: int) -> None:
    assert await read(filled, start_sequence=start, through=through) == list(range(start, min(through, 200) + 1))
    assert filled.model.consumer_names(filled.now, LOG) == []


async def test_a_lost_delivery_is_read_after_all(filled: ModelJetStream, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {3, 4, 90, 200}

    def drops(message: Any) -> bool:
        if message.sequence in lost:
            lost.remove(message.sequence)
            return True
        return False

    filled.drops = drops
    monkeypatch.setattr(log_reader, "_SILENCE", 0.05)
    assert await read(filled, through=200) == list(range(1, 201))
    assert filled.calls["create_consumer"] >= 4


async def test_a_consumer_that_was_deleted_is_replaced_at_once(
    filled: ModelJetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "_SILENCE", 60.0)
    seen: list[int] = []
    async for message in Range(filled, LOG, (NAMES.events(),), through=200).read():
        seen.append(message.sequence)
        if message.sequence in (10, 64, 128):
            for name in filled.model.consumer_names(filled.now, LOG):
                filled.model.delete_consumer(filled.now, LOG, name)
                filled.run()
    assert seen == list(range(1, 201))


async def test_unknown_outcomes_are_tried_again_and_refusals_are_not(filled: ModelJetStream) -> None:
    filled.fail("create_consumer", JetStreamUnknownError("no answer"))
    filled.lose_answers("create_consumer")
    assert await read(filled, through=200) == list(range(1, 201))
    filled.fail("create_consumer", JetStreamRefusedError(ApiError.INSUFFICIENT_RESOURCES, "insufficient resources"))
    with pytest.raises(JetStreamRefusedError):
        await read(filled, through=200)


async def test_a_server_that_stays_silent_is_given_up(filled: ModelJetStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "PATIENCE", 0.3)
    filled.fail("create_consumer", *[JetStreamUnknownError("no answer")] * 100)
    with pytest.raises(JetStreamUnknownError):
        await read(filled, through=200)
    assert 2 <= filled.calls["create_consumer"] < 10
