"""The JSON of the JetStream API: what goes out comes back the same."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from catga_bus.transport.jetstream import ConsumerConfig, ConsumerInfo, StoredMessage, StreamConfig, StreamInfo
from catga_bus.transport.jetstream_json import (
    consumer_from_json,
    consumer_info_from_json,
    consumer_info_to_json,
    consumer_to_json,
    from_rfc3339,
    message_from_json,
    message_to_json,
    stream_from_json,
    stream_info_from_json,
    stream_info_to_json,
    stream_to_json,
    to_rfc3339,
)

NAMES = st.text("abcXYZ019_-", min_size=1, max_size=20)
SECONDS = st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1_000)
LIMITS = st.one_of(st.just(-1), st.integers(1, 2**40))
SEQUENCES = st.integers(0, 2**62)
METADATA = st.dictionaries(NAMES, st.text(max_size=10), max_size=3)
MICROSECONDS = st.integers(0, 4_000_000_000_000_000).map(lambda count: count / 1_000_000)

STREAMS = st.builds(
    StreamConfig,
    name=NAMES,
    subjects=st.lists(NAMES, min_size=1, max_size=3).map(tuple),
    retention=st.sampled_from(["limits", "workqueue"]),
    storage=st.sampled_from(["file", "memory"]),
    replicas=st.integers(1, 5),
    max_bytes=LIMITS,
    max_age=SECONDS,
    max_messages_per_subject=LIMITS,
    discard=st.sampled_from(["old", "new"]),
    duplicate_window=SECONDS,
    allow_direct=st.booleans(),
    deny_delete=st.booleans(),
    allow_rollup=st.booleans(),
    allow_schedules=st.booleans(),
    first_sequence=st.one_of(st.just(0), st.integers(2, 2**62)),
    metadata=METADATA,
)


def a_consumer(start: tuple[str, int, float], options: dict[str, Any]) -> ConsumerConfig:
    """Return a consumer that starts in one way."""
    deliver, sequence, instant = start
    if deliver == "by_start_sequence":
        options["start_sequence"] = sequence
    elif deliver == "by_start_time":
        options["start_time"] = instant
    return ConsumerConfig(deliver=deliver, **options)  # type: ignore[arg-type]


CONSUMERS = st.builds(
    a_consumer,
    st.tuples(
        st.sampled_from(["all", "new", "by_start_sequence", "by_start_time", "last_per_subject"]),
        st.integers(1, 2**62),
        st.integers(1, 4_000_000_000).map(float),
    ),
    st.fixed_dictionaries(
        {
            "name": NAMES,
            "filters": st.lists(NAMES, max_size=3).map(tuple),
            "ack_wait": SECONDS,
            "max_ack_pending": st.integers(1, 10_000),
            "in_memory": st.booleans(),
            "replicas": st.integers(0, 5),
            "inactive_threshold": SECONDS,
            "metadata": METADATA,
        }
    ),
)


@given(STREAMS)
def test_a_stream_comes_back_the_same(config: StreamConfig) -> None:
    assert stream_from_json(stream_to_json(config)) == config


@given(CONSUMERS)
def test_a_consumer_comes_back_the_same(config: ConsumerConfig) -> None:
    assert consumer_from_json(consumer_to_json(config)) == config


def test_a_consumer_without_acknowledgements_has_no_limits_of_them() -> None:
    config = ConsumerConfig(name="c", filters=(), acks="none")
    fields = consumer_to_json(config)
    assert not {"ack_wait", "max_ack_pending"} & fields.keys()
    assert consumer_from_json(fields) == config


@given(STREAMS, st.tuples(SEQUENCES, SEQUENCES, SEQUENCES, SEQUENCES, SEQUENCES))
def test_a_streams_state_comes_back_the_same(config: StreamConfig, state: tuple[int, int, int, int, int]) -> None:
    info = StreamInfo(config, *state)
    answer = stream_info_to_json(info)
    assert stream_info_from_json(answer) == StreamInfo(config, *state, answer)


@given(CONSUMERS, st.tuples(SEQUENCES, SEQUENCES, SEQUENCES, SEQUENCES))
def test_a_consumers_state_comes_back_the_same(config: ConsumerConfig, state: tuple[int, int, int, int]) -> None:
    info = ConsumerInfo(config.name, config, *state)
    assert consumer_info_from_json(consumer_info_to_json("s", info)) == info


@given(st.binary(max_size=50), st.dictionaries(NAMES, NAMES, max_size=3), SEQUENCES)
def test_a_message_comes_back_the_same(payload: bytes, headers: dict[str, str], sequence: int) -> None:
    message = StoredMessage("s.0", sequence, payload, headers, 1_700_000_000.25)
    assert message_from_json(message_to_json(message)) == message


@given(MICROSECONDS)
def test_an_instant_comes_back_not_later_than_it_was(instant: float) -> None:
    back = from_rfc3339(to_rfc3339(instant))
    assert instant - 2e-6 <= back <= instant
