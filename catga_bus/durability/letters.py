"""What a dead letter holds. `dead_letters` stores them; `catga dlq` shows them."""

from enum import StrEnum

import msgspec


class Reason(StrEnum):
    """Why a message was given up."""

    ATTEMPTS = "attempts"
    """Its handler failed `max_attempts` times."""

    INVALID = "invalid"
    """Its bytes are no message of its type."""

    UNDECODABLE = "undecodable"
    """The record that it came in could not be read."""

    UNROUTABLE = "unroutable"
    """No node of the service handled its type within `unroutable_after`."""

    KILLER = "killer"
    """It killed its process, twice at least."""

    EXPIRED = "expired"
    """It is older than the inbox remembers."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not be handled, with all that is needed to look at it and to try again."""

    id: str
    """Of the message; of an undecodable record `<stream>.<sequence>`."""

    type: str
    """Empty if not known."""

    key: str | None
    service: str
    """That gave up."""

    reason: Reason
    error: str
    """The last one, for people."""

    attempts: int
    first_utc: float
    """When it was first stored: seconds since 1970."""

    last_utc: float
    """When it was given up."""

    node: str
    subject: str
    """Where it lay."""

    stream: str
    sequence: int
    index: int
    """Of its frame in the record."""

    sender: str
    trace: str | None
    body: bytes
    """The message as it came: the MessagePack of its body, or the whole record if that could not be read."""
