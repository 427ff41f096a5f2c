"""From a message to its frame: the key as text, the encoding, and the bound of the server."""

from enum import Enum
from typing import Any
from uuid import UUID

import msgspec

from catga_bus.errors import InvalidMessageError, Outcome, TooLargeError
from catga_bus.wire import BATCH_OVERHEAD

_encode = msgspec.msgpack.Encoder().encode


def key_text(message: Any, field: str) -> str | None:
    """Return the key of a message as text: what is hashed, and what travels.

    Args:
        message: The message.
        field: The field named by `partition_by`; holds a str, int, UUID, Enum or None.
    """
    value = getattr(message, field)
    if value is None:
        return None
    return str(getattr(value, "value", value))


def key_as_text(value: Any) -> str:
    """Return a key given at a call as text.

    Raises:
        InvalidMessageError: It is no str, int, UUID or Enum.
    """
    if not isinstance(value, str | int | UUID | Enum):
        raise InvalidMessageError(
            f"a key must be a str, int, UUID or Enum, got {repr(value)[:60]}", outcome=Outcome.NOT_RUN
        )
    return str(value.value if isinstance(value, Enum) else value)


def encode_frame(
    message: Any,
    type_name: str,
    message_id: str,
    key_field: str | None,
    remaining_ms: int | None,
    trace: str | None,
    max_payload: int,
) -> bytes:
    """Return the frame of a message's first attempt.

    Args:
        message: The message.
        type_name: Its type on the wire.
        message_id: Its id.
        key_field: The field that holds its key, or None.
        remaining_ms: Time until the caller's deadline; None for events.
        trace: W3C `traceparent`.
        max_payload: What the server takes, in bytes.

    Raises:
        InvalidMessageError: A field holds what MessagePack cannot carry.
        TooLargeError: The frame and its envelope exceed `max_payload`.
    """
    key = None if key_field is None else key_text(message, key_field)
    return encode_keyed(message, type_name, message_id, key, remaining_ms, trace, max_payload)


def encode_keyed(
    message: Any,
    type_name: str,
    message_id: str,
    key: str | None,
    remaining_ms: int | None,
    trace: str | None,
    max_payload: int,
) -> bytes:
    """Return the frame of a message's first attempt, with a key that need not be in the message; as `encode_frame`."""
    try:
        frame = _encode((message_id, type_name, key, remaining_ms, 1, trace, message))
    except (TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise InvalidMessageError(f"{type_name} cannot be encoded: {error}", outcome=Outcome.NOT_RUN) from error
    if len(frame) + BATCH_OVERHEAD > max_payload:
        raise TooLargeError(
            f"{type_name} is {len(frame):,} bytes; the server takes {max_payload:,}, {BATCH_OVERHEAD} of them envelope",
            outcome=Outcome.NOT_RUN,
        )
    return frame
