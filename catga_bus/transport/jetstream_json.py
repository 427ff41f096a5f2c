"""The JSON of the JetStream API, both ways: what a client asks and a server answers.

Pure. Names, units (nanoseconds) and defaults are the server's (nats-server, server/{stream,consumer,jetstream_api}.go).
A field that only newer servers know is written only where it is used: a strict server refuses what it does not know.
"""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from catga_bus.transport.jetstream import (
    ConsumerConfig,
    ConsumerInfo,
    StoredMessage,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.nats_protocol import encode_headers, parse_headers

Json: TypeAlias = Mapping[str, Any]

_NANOSECONDS: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NO_ACKS: Final = ConsumerConfig(name="", filters=())
# Where a consumer takes no acknowledgements, the server has no ack wait; ours is the default.


def stream_to_json(config: StreamConfig) -> dict[str, Any]:
    """Return a stream's configuration as the server reads and writes it."""
    fields: dict[str, Any] = {
        "name": config.name,
        "subjects": list(config.subjects),
        "retention": config.retention,
        "storage": config.storage,
        "num_replicas": config.replicas,
        "max_consumers": -1,
        "max_msgs": -1,
        "max_msg_size": -1,
        "max_bytes": config.max_bytes,
        "max_age": _to_ns(config.max_age),
        "max_msgs_per_subject": config.max_messages_per_subject,
        "discard": config.discard,
        "duplicate_window": _to_ns(config.duplicate_window),
        "allow_direct": config.allow_direct,
        "deny_delete": config.deny_delete,
        "allow_rollup_hdrs": config.allow_rollup,
    }
    if config.allow_schedules:
        fields["allow_msg_schedules"] = True
    if config.first_sequence > 1:
        fields["first_seq"] = config.first_sequence
    if config.metadata:
        fields["metadata"] = dict(config.metadata)
    return fields


def stream_from_json(fields: Json) -> StreamConfig:
    """Return a stream's configuration from what the server has written; what it left out is its default."""
    return StreamConfig(
        name=fields["name"],
        subjects=tuple(fields.get("subjects") or ()),
        retention=fields.get("retention", "limits"),
        storage=fields.get("storage", "file"),
        replicas=fields.get("num_replicas", 1),
        max_bytes=fields.get("max_bytes", -1) or -1,
        max_age=_from_ns(fields.get("max_age", 0)),
        max_messages_per_subject=fields.get("max_msgs_per_subject", -1) or -1,
        discard=fields.get("discard", "old"),
        duplicate_window=_from_ns(fields.get("duplicate_window", 0)),
        allow_direct=fields.get("allow_direct", False),
        deny_delete=fields.get("deny_delete", False),
        allow_rollup=fields.get("allow_rollup_hdrs", False),
        allow_schedules=fields.get("allow_msg_schedules", False),
        first_sequence=fields.get("first_seq", 0),
        metadata=fields.get("metadata") or {},
    )


def stream_info_to_json(info: StreamInfo) -> dict[str, Any]:
    """Return what the server says of a stream."""
    return {
        "config": stream_to_json(info.config),
        "state": {
            "messages": info.messages,
            "bytes": info.bytes,
            "first_seq": info.first_sequence,
            "last_seq": info.last_sequence,
            "consumer_count": info.consumers,
        },
    }


def stream_info_from_json(answer: Json) -> StreamInfo:
    """Return a stream from the server's answer."""
    state = answer["state"]
    return StreamInfo(
        stream_from_json(answer["config"]),
        state["messages"],
        state["bytes"],
        state["first_seq"],
        state["last_seq"],
        state["consumer_count"],
        answer,
    )


def consumer_to_json(config: ConsumerConfig) -> dict[str, Any]:
    """Return a consumer's configuration as the server reads and writes it."""
    fields: dict[str, Any] = {
        "name": config.name,
        "durable_name": config.name,
        "deliver_policy": config.deliver,
        "ack_policy": config.acks,
        "replay_policy": "instant",
        "max_deliver": -1,
        "num_replicas": config.replicas,
        "mem_storage": config.in_memory,
        "inactive_threshold": _to_ns(config.inactive_threshold),
    }
    if len(config.filters) == 1:
        fields["filter_subject"] = config.filters[0]
    elif config.filters:
        fields["filter_subjects"] = list(config.filters)
    if config.acks == "explicit":
        fields["ack_wait"] = _to_ns(config.ack_wait)
        fields["max_ack_pending"] = config.max_ack_pending
    if config.deliver == "by_start_sequence":
        fields["opt_start_seq"] = config.start_sequence
    if config.deliver == "by_start_time":
        fields["opt_start_time"] = to_rfc3339(config.start_time)
    if config.metadata:
        fields["metadata"] = dict(config.metadata)
    return fields


def consumer_from_json(fields: Json) -> ConsumerConfig:
    """Return a consumer's configuration from what the server has written; what it left out is its default."""
    has_acks = fields.get("ack_policy") == "explicit"
    single = fields.get("filter_subject")
    started = fields.get("opt_start_time")
    return ConsumerConfig(
        name=fields["name"],
        filters=(single,) if single else tuple(fields.get("filter_subjects") or ()),
        acks="explicit" if has_acks else "none",
        ack_wait=_from_ns(fields["ack_wait"]) if has_acks else _NO_ACKS.ack_wait,
        max_ack_pending=fields["max_ack_pending"] if has_acks else _NO_ACKS.max_ack_pending,
        deliver=fields.get("deliver_policy", "all"),
        start_sequence=fields.get("opt_start_seq", 0),
        start_time=from_rfc3339(started) if started else 0.0,
        in_memory=fields.get("mem_storage", False),
        replicas=fields.get("num_replicas", 0),
        inactive_threshold=_from_ns(fields.get("inactive_threshold", 0)),
        metadata=fields.get("metadata") or {},
    )


def consumer_info_to_json(stream: str, info: ConsumerInfo) -> dict[str, Any]:
    """Return what the server says of a consumer."""
    return {
        "stream_name": stream,
        "name": info.name,
        "config": consumer_to_json(info.config),
        "ack_floor": {"stream_seq": info.ack_floor},
        "delivered": {"stream_seq": info.delivered},
        "num_ack_pending": info.ack_pending,
        "num_pending": info.pending,
    }


def consumer_info_from_json(answer: Json) -> ConsumerInfo:
    """Return a consumer from the server's answer."""
    return ConsumerInfo(
        answer["name"],
        consumer_from_json(answer["config"]),
        answer["ack_floor"]["stream_seq"],
        answer["delivered"]["stream_seq"],
        answer["num_ack_pending"],
        answer["num_pending"],
        _has_leader(answer.get("cluster")),
    )


def _has_leader(cluster: Json | None) -> bool:
    """Tell by what is said of a cluster, if there is one; a single replica has neither other replicas nor elections."""
    return not cluster or not cluster.get("replicas") or bool(cluster.get("leader"))


def message_to_json(message: StoredMessage) -> dict[str, Any]:
    """Return a stored message as the server writes it."""
    fields: dict[str, Any] = {
        "subject": message.subject,
        "seq": message.sequence,
        "time": to_rfc3339(message.time),
    }
    if message.payload:
        fields["data"] = base64.b64encode(message.payload).decode()
    if message.headers:
        fields["hdrs"] = base64.b64encode(encode_headers(message.headers)).decode()
    return fields


def message_from_json(fields: Json) -> StoredMessage:
    """Return a stored message from what the server has written."""
    block = fields.get("hdrs")
    return StoredMessage(
        fields["subject"],
        fields["seq"],
        base64.b64decode(fields.get("data") or ""),
        (parse_headers(base64.b64decode(block)) if block else None) or {},
        from_rfc3339(fields["time"]),
    )


def to_rfc3339(instant: float) -> str:
    """Return an instant (seconds since 1970) as the API writes it, cut to the microsecond: never later than it was.

    Example:
        >>> to_rfc3339(0.25)
        '1970-01-01T00:00:00.250000Z'
    """
    moment = _EPOCH + timedelta(microseconds=int(instant * 1_000_000))
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_rfc3339(text: str) -> float:
    """Return the instant (seconds since 1970) of a time as the API writes it; nanoseconds are cut off.

    Example:
        >>> from_rfc3339("1970-01-01T00:00:00.250000999Z"), from_rfc3339("1970-01-01T01:00:00+01:00")
        (0.25, 0.0)
    """
    return datetime.fromisoformat(text).timestamp()


def _to_ns(seconds: float) -> int:
    return round(seconds * _NANOSECONDS)


def _from_ns(nanoseconds: int) -> float:
    return nanoseconds / _NANOSECONDS
