"""The model of JetStream: that it is pure, and what the contract (which runs it, too) does not look at."""

import copy
import math

import pytest

from catga_bus.transport.consumer_model import MAX_WAITING, PullStatus
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    DeliveredMessage,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.jetstream_model import JetStreamModel
from catga_bus.transport.schedules import SCHEDULE_HEADER, SCHEDULE_TARGET_HEADER, schedule_at

NOW = 1_000_000.0


def a_queue(**options: object) -> JetStreamModel:
    model = JetStreamModel()
    model.create_stream(NOW, StreamConfig(name="s", subjects=("s.*",), retention="workqueue", **options))  # type: ignore[arg-type]
    return model


def delivered(model: JetStreamModel, now: float = NOW) -> list[DeliveredMessage]:
    return [content for _, content in model.run(now) if isinstance(content, DeliveredMessage)]


def test_a_queue_delivers_and_forgets_what_is_acknowledged() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",)))
    for number in range(3):
        model.publish(NOW, f"s.{number % 2}", b"%d" % number)
    assert model.pull(NOW, "s", "c", "me", 10)
    got = delivered(model)
    assert [(message.payload, message.sequence, message.consumer_sequence) for message in got] == [
        (b"0", 1, 1),
        (b"2", 3, 2),
    ]
    assert model.acknowledge(NOW, got[1].reply) is True
    info = model.consumer(NOW, "s", "c")
    assert info is not None
    assert (info.ack_floor, info.ack_pending) == (0, 1)
    assert model.acknowledge(NOW, got[0].reply) is True
    info = model.consumer(NOW, "s", "c")
    assert info is not None
    assert (info.ack_floor, info.ack_pending) == (3, 0)
    stream = model.stream(NOW, "s")
    assert stream is not None
    assert (stream.messages, stream.first_sequence, stream.last_sequence) == (1, 2, 3)


def test_two_consumers_of_a_queue_share_no_subject() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",)))
    with pytest.raises(JetStreamRefusedError) as caught:
        model.create_consumer(NOW, "s", ConsumerConfig(name="d", filters=("s.*",)))
    assert caught.value.code == ApiError.CONSUMER_FILTER_NOT_UNIQUE


def test_nobody_answers_for_a_subject_that_is_not_stored() -> None:
    with pytest.raises(JetStreamUnknownError):
        a_queue().publish(NOW, "t", b"")


def test_time_passes_only_by_what_is_handed_in() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",), ack_wait=5.0))
    model.publish(NOW, "s.0", b"")
    model.pull(NOW, "s", "c", "me", 2, expires=30.0)
    assert [message.deliveries for message in delivered(model)] == [1]
    assert model.next_timer() == NOW + 5.0
    assert delivered(model, NOW + 4.9) == []
    assert [message.deliveries for message in delivered(model, NOW + 5.0)] == [2]


def test_a_pull_ends_with_what_is_left_of_it() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",)))
    model.publish(NOW, "s.0", b"")
    model.pull(NOW, "s", "c", "me", 3, expires=1.0)
    model.run(NOW)
    assert model.run(NOW + 1.0) == [("me", PullStatus(408, "Request Timeout", 2))]
    assert model.next_timer() == NOW + 3_600.0


def test_a_copy_lives_a_life_of_its_own() -> None:
    model = a_queue()
    model.publish(NOW, "s.0", b"")
    twin = copy.deepcopy(model)
    twin.publish(NOW, "s.0", b"")
    twin.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",)))
    twin.pull(NOW, "s", "c", "me", 10)
    assert len(delivered(twin)) == 2
    assert delivered(model) == []
    assert model.consumer_names(NOW, "s") == []
    assert model.next_timer() == math.inf


def sequences(model: JetStreamModel, now: float = NOW) -> list[int]:
    return [message.sequence for message in delivered(model, now)]


def test_what_has_left_a_stream_leaves_no_trace_that_grows() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0", "s.1"), max_ack_pending=10_000))
    model.publish(NOW, "s.0", b"never acknowledged")
    model.pull(NOW, "s", "c", "me", 100_000)
    (stuck,) = delivered(model)
    for _ in range(5_000):
        model.publish(NOW, "s.0", b"")
        model.publish(NOW, "s.1", b"")
        for message in delivered(model):
            assert model.acknowledge(NOW, message.reply)
    stream = model._streams["s"].model
    assert stream.info(1).messages == 1
    assert len(stream._order._all) < 200
    assert len(stream._subjects["s.0"].sequences._all) < 200
    assert set(stream._subjects) == {"s.0"}
    assert model.acknowledge(NOW, stuck.reply)
    assert stream.bytes == 0


def test_timers_of_what_is_gone_leave_no_trace_that_grows() -> None:
    model = a_queue()
    for number in range(1_000):
        model.create_consumer(NOW, "s", ConsumerConfig(name=f"c{number}", filters=("s.0",)))
        model.pull(NOW, "s", f"c{number}", "me", 1)
        model.run(NOW)
        assert model.next_timer() == NOW + 30.0
        model.delete_consumer(NOW, "s", f"c{number}")
    assert len(model._timers._heap) < 200
    assert model.next_timer() == math.inf


def test_the_last_of_each_subject_comes_first_and_then_what_is_new() -> None:
    model = JetStreamModel()
    model.create_stream(NOW, StreamConfig(name="s", subjects=("s.*",)))
    for subject in ("s.0", "s.1", "s.0", "s.2", "s.1"):
        model.publish(NOW, subject, b"")
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.*",), deliver="last_per_subject"))
    for sequence in (4, 5):
        model.delete_message(NOW, "s", sequence)
    model.publish(NOW, "s.0", b"")
    info = model.consumer(NOW, "s", "c")
    assert info is not None
    assert info.pending == 2
    model.pull(NOW, "s", "c", "me", 10)
    assert sequences(model) == [3, 6]


def test_when_nothing_is_left_of_the_last_ones_what_is_new_comes_at_once() -> None:
    model = JetStreamModel()
    model.create_stream(NOW, StreamConfig(name="s", subjects=("s.*",)))
    model.publish(NOW, "s.0", b"")
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.*",), deliver="last_per_subject"))
    model.delete_message(NOW, "s", 1)
    model.publish(NOW, "s.1", b"")
    model.pull(NOW, "s", "c", "me", 10)
    assert sequences(model) == [2]


def test_a_pull_too_many_is_dropped_without_a_word_where_heartbeats_will_tell() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",)))
    for _ in range(MAX_WAITING):
        model.pull(NOW, "s", "c", "me", 1)
    model.pull(NOW, "s", "c", "late", 7)
    model.pull(NOW, "s", "c", "later", 7, idle=5.0)
    assert model.run(NOW) == [("late", PullStatus(409, "Exceeded MaxWaiting", 7))]


def test_a_server_that_ends_forgets_who_pulls_and_nothing_else() -> None:
    model = a_queue()
    model.create_consumer(NOW, "s", ConsumerConfig(name="c", filters=("s.0",), ack_wait=60.0))
    model.pull(NOW, "s", "c", "me", 10)
    model.publish(NOW, "s.0", b"")
    assert sequences(model) == [1]
    model.restart()
    model.publish(NOW, "s.0", b"")
    assert delivered(model) == []
    model.pull(NOW, "s", "c", "me", 10)
    assert sequences(model) == [2]
    assert sequences(model, NOW + 60.0) == []  # the pull has ended by then
    model.pull(NOW + 60.0, "s", "c", "me", 10)
    assert sequences(model, NOW + 60.0) == [1, 2]


def test_a_replicated_consumer_reports_no_floor_before_its_first_acknowledgement() -> None:
    # As clusters do, so that whoever takes over from it has to look at its start, too.
    model = JetStreamModel(servers=3)
    model.create_stream(NOW, StreamConfig(name="s", subjects=("s.*",), replicas=3))
    for _ in range(5):
        model.publish(NOW, "s.0", b"")
    config = ConsumerConfig(name="c", filters=("s.0",), deliver="by_start_sequence", start_sequence=4)
    assert model.create_consumer(NOW, "s", config).ack_floor == 0
    model.pull(NOW, "s", "c", "me", 1)
    (message,) = delivered(model)
    model.acknowledge(NOW, message.reply)
    info = model.consumer(NOW, "s", "c")
    assert info is not None
    assert info.ack_floor == 4


def test_ids_are_forgotten_in_time_and_not_before() -> None:
    model = JetStreamModel()
    model.create_stream(NOW, StreamConfig(name="s", subjects=("s.*",), duplicate_window=10.0))
    model.publish(NOW, "s.0", b"", message_id="a")
    model.publish(NOW + 5.0, "s.0", b"", message_id="b")
    assert model.publish(NOW + 9.9, "s.0", b"", message_id="a").duplicate
    assert not model.publish(NOW + 10.0, "s.0", b"", message_id="a").duplicate
    assert model.publish(NOW + 14.9, "s.0", b"", message_id="b").duplicate


def test_a_delayed_message_is_due_at_its_instant_to_the_microsecond() -> None:
    model = JetStreamModel()
    model.create_stream(NOW, StreamConfig(name="s", subjects=("s.*", "at.*"), allow_schedules=True))
    headers = {SCHEDULE_HEADER: schedule_at(NOW + 3.5), SCHEDULE_TARGET_HEADER: "s.0"}
    model.publish(NOW, "at.1", b"later", headers=headers)
    assert model.next_timer() == NOW + 3.5
    model.run(NOW + 3.499)
    assert model.last_message(NOW + 3.499, "s", "s.0") is None
    model.run(NOW + 3.5)
    message = model.last_message(NOW + 3.5, "s", "s.0")
    assert message is not None
    assert (message.payload, message.sequence) == (b"later", 2)
    assert model.last_message(NOW + 3.5, "s", "at.1") is None
