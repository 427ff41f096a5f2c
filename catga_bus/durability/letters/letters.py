"""What a dead letter holds, and its bytes. `dead_letters` stores them; `catga dlq` shows them."""

from enum import StrEnum
from hashlib import blake2b
from typing import Annotated, Final

import msgspec

from catga_bus.codec import DECODE_ERRORS, GateError, explain
from catga_bus.wire import PREFIX, Head, Kind, join_batch

MAX_ERROR: Final = 4_096
"""Characters of the error that are kept: a text for people, and some are as long as what failed."""


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

    missing: int = 0
    """Bytes that the server would not have taken and that are left out, at the end of the body and of the key. Above 0
    the letter can be looked at, and not be tried again."""

    @property
    def mark(self) -> str:
        """What no other letter has: the place where the message lay, and what lay there.

        A stream that was deleted and made again counts from 1 again; so the place alone would not do. The id alone
        would not either: a message that was retried and fails again is a second letter.
        """
        place = f"{self.stream}\n{self.sequence}\n{self.index}\n{self.id}\n".encode("utf-8", "surrogatepass")
        return blake2b(place + self.body, digest_size=16).hexdigest()

    @property
    def lane(self) -> str:
        """What it stands in line with: its key, or its id, which nothing else has."""
        return self.id if self.key is None else self.key


class _Letters(msgspec.Struct, array_like=True, frozen=True):
    kind: int
    head: Head
    frames: Annotated[list[DeadLetter], msgspec.Meta(min_length=1, max_length=1)]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Letters).decode


def encode_letter(letter: DeadLetter) -> bytes:
    """Return what is stored: a payload of kind LETTER; a longer error is cut to `MAX_ERROR` characters."""
    if len(letter.error) > MAX_ERROR:
        letter = msgspec.structs.replace(letter, error=f"{letter.error[: MAX_ERROR - 1]}…")
    return join_batch(Kind.LETTER, (letter.node,), (_encode(letter),))


def decode_letter(payload: bytes) -> DeadLetter:
    """Return what is stored.

    Raises:
        GateError: It is no letter: whoever may publish there can store anything.
    """
    if payload[:2] != PREFIX or payload[3:4] != bytes((Kind.LETTER,)):
        raise GateError(f"starts with {payload[:4].hex(' ')!r}, as no dead letter does")
    try:
        return _decode(memoryview(payload)[2:]).frames[0]
    except DECODE_ERRORS as error:
        raise GateError(f"not a dead letter: {explain(error)}") from None


def shorten(letter: DeadLetter) -> DeadLetter | None:
    """Return a letter of about half the size, which says how many bytes it lacks; None if nothing is left to leave out.

    The body goes first, then the key.
    """
    if letter.body:
        kept = len(letter.body) // 2
        return msgspec.structs.replace(
            letter, body=letter.body[:kept], missing=letter.missing + len(letter.body) - kept
        )
    key = letter.key or ""
    if len(key) <= 1:
        return None
    kept = len(key) // 2
    lost = len(key[kept:].encode("utf-8", "surrogatepass"))
    return msgspec.structs.replace(letter, key=key[:kept], missing=letter.missing + lost)
