"""The model of JetStream: that it is pure, and what the contract (which runs it, too) does not look at."""

import copy
import math

import pytest

from catga_bus.transport.consumer_model import PullStatus
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    DeliveredMessage,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.jetstream_model import JetStreamModel

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
