"""What a consumer's deliveries and pulls look like on the wire. Pure."""

from collections.abc import Mapping
from typing import Final

from catga_bus.transport.jetstream import DeliveredMessage

ACK_ROOT: Final = "$JS.ACK."
ACK: Final = b"+ACK"
PENDING_HEADER: Final = "Nats-Pending-Messages"

_NANOSECONDS: Final = 1_000_000_000


def delivered_message(subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> DeliveredMessage:
    """Return a delivery, read from its reply subject.

    Version 1 has nine tokens: `$JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>.<consumer sequence>.<ns>.<pending>`;
    version 2 has domain and account hash before the stream, and may have one more at the end (ADR-15).

    Raises:
        ValueError: The reply subject is neither.
    """
    tokens = reply.split(".")
    count = len(tokens)
    if count == 9:
        _, _, _, _, deliveries, sequence, consumer_sequence, stored_ns, pending = tokens
    elif count in (11, 12):
        _, _, _, _, _, _, deliveries, sequence, consumer_sequence, stored_ns, pending, *_ = tokens
    else:
        raise ValueError(f"no reply subject of a JetStream delivery: {reply!r}")
    return DeliveredMessage(
        subject,
        payload,
        headers,
        reply,
        int(sequence),
        int(consumer_sequence),
        int(deliveries),
        int(pending),
        int(stored_ns) / _NANOSECONDS,
    )


def pull_request(batch: int, expires: float, idle: float) -> bytes:
    """Return the body of a request for more messages.

    Args:
        batch: How many.
        expires: Seconds until the server ends it with a 408.
        idle: Seconds between its heartbeats; at most half of `expires`.
    """
    return b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (
        batch,
        round(expires * _NANOSECONDS),
        round(idle * _NANOSECONDS),
    )
