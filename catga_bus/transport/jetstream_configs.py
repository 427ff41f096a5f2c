"""When two configurations mean the same, and the headers of a publish: shared by JetStream and its twin."""

from collections.abc import Mapping

import msgspec

from catga_bus.transport.jetstream import (
    EXPECTED_LAST_HEADER,
    MSG_ID_HEADER,
    ConsumerConfig,
    StreamConfig,
)

SERVER_METADATA = "_nats."
"""How the names begin that a server adds to the metadata."""

DEFAULT_DUPLICATE_WINDOW = 120.0
"""Seconds; what a server takes for 0."""


def normal_stream(config: StreamConfig) -> StreamConfig:
    """Return the configuration as a server would write it, without what it adds to the metadata."""
    return msgspec.structs.replace(
        config,
        first_sequence=max(config.first_sequence, 1),
        # A delayed message replaces the one before it on its subject, so the server turns this on by itself.
        allow_rollup=config.allow_rollup or config.allow_schedules,
        duplicate_window=config.duplicate_window or DEFAULT_DUPLICATE_WINDOW,
        metadata=_own(config.metadata),
    )


def same_stream(one: StreamConfig, other: StreamConfig) -> bool:
    """Return whether two configurations mean the same."""
    return normal_stream(one) == normal_stream(other)


def same_consumer(one: ConsumerConfig, other: ConsumerConfig) -> bool:
    """Return whether two configurations mean the same."""
    return _normal_consumer(one) == _normal_consumer(other)


def publish_headers(
    message_id: str, expected_last: int | None, headers: Mapping[str, str] | None
) -> dict[str, str] | None:
    """Return all headers of a message to store, or None if it has none."""
    joined = dict(headers) if headers else {}
    if message_id:
        joined[MSG_ID_HEADER] = message_id
    if expected_last is not None:
        joined[EXPECTED_LAST_HEADER] = str(expected_last)
    return joined or None


def _normal_consumer(config: ConsumerConfig) -> ConsumerConfig:
    return msgspec.structs.replace(config, metadata=_own(config.metadata))


def _own(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if not name.startswith(SERVER_METADATA)}
