"""The gate: judges every payload before it is decoded, and takes apart what it lets in.

Decided: bytes are judged before they are decoded, because the decoder recurses once per level and
allocates about 70 bytes per container: one MiB of nested arrays could end the process, one MiB of
empty ones take 70 MiB. What the gate lets through needs at most 4 MB of stack (400 bytes per level,
measured with msgspec 0.22 on x86-64), so threads that decode need a stack of 8 MiB.

Counting the bytes that could open a container is one pass in C and never counts too few; payloads
too short to hold too many are not even counted. Only above the bound does an exact walk decide, and
the walk is bounded itself: any payload is judged within milliseconds.

Bodies are judged one by one. A body that is refused is replaced in its frame by a byte that no type
accepts, so that it fails alone when it is decoded and its batch mates go on.
"""

import sys
from typing import TypeVar

import msgspec

from catga_bus import wire
from catga_bus.codec.body import DECODE_ERRORS, explain
from catga_bus.codec.walks import (
    NEVER_USED,
    GateError,
    count_openers,
    has_many_large_exponents,
    judge_json,
    walk,
)
from catga_bus.errors import ConfigurationError

F = TypeVar("F", wire.MessageFrame, wire.AnswerFrame)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a payload may be before it is decoded."""

    max_bytes: int = 1_048_576
    """Largest payload, in bytes. The `max_payload` of a nats-server with default settings; the time
    that decoding can take grows with it. At least 4."""

    max_openers: int = 10_000
    """Bytes that could open a container up to which a body is decoded without a walk; such bytes
    inside texts count too (10,000 of them are about 50 KB of Cyrillic). Twice as many could take
    8 MB of stack, all that a thread has; half as many would only walk more harmless bodies. 1 to
    16,000."""

    max_depth: int = 32
    """Levels of nesting up to which a walked body is let in, the body itself being the first. Chosen:
    several times what people write. At least 1."""

    max_containers: int = 10_000
    """Arrays and maps up to which a walked body is let in: 0.7 MB once decoded (72 bytes each,
    measured). At least 1."""

    def __post_init__(self) -> None:
        """Refuse what would make the gate useless or close it for good."""
        for name, least in (("max_bytes", 4), ("max_openers", 1), ("max_depth", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_containers < 1:
            raise ConfigurationError(f"max_containers must be at least 1, got {self.max_containers}")
        if self.max_openers > _MOST_OPENERS:
            raise ConfigurationError(
                f"max_openers must be at most {_MOST_OPENERS}, got {self.max_openers}: "
                "decoding could then need more stack than a thread has"
            )


_MOST_OPENERS = 16_000
# 400 bytes of stack per level leave 1.9 MB of 8 MiB to the frames above the decoder.

_MAX_WALK_STEPS = 200_000
# 15 to 30 ms on a 2-core cloud machine (measured). Runs of values of one size are a few steps
# however long they are, so only walked bodies of very many small mixed values come near.

_SAFE_SKIP_LEVELS = 100_000
# Skipping a raw body takes 50 bytes of stack per level (measured, msgspec 0.22), and Python's
# recursion limit bounds the levels. Programs that set that limit higher have their batches walked
# as a whole.

_FRAME_LEVELS = 3
# A body lies in a frame, in the array of frames, in the payload.

_FRAMED = (wire.Kind.MESSAGES, wire.Kind.ANSWERS)
_REFUSED_BODY = msgspec.Raw(bytes((NEVER_USED,)))

_JSON_BLANKS = b" \t\r\n"
_JSON_STARTS = frozenset(b'{["-0123456789tfn')
_JSON_OPENERS = b"[{"


class Gate:
    """Judges payloads, and takes apart those that it lets in; one per bus, and nothing in it changes.

    Args:
        limits: What is let in.
    """

    __slots__ = (
        "_decode_answers", "_decode_beats", "_decode_ids", "_decode_messages", "_decode_notices", "limits",
    )  # fmt: skip

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self.limits = limits
        self._decode_messages = msgspec.msgpack.Decoder(wire.MessageBatch).decode
        self._decode_answers = msgspec.msgpack.Decoder(wire.AnswerBatch).decode
        self._decode_ids = msgspec.msgpack.Decoder(wire.IdBatch).decode
        self._decode_beats = msgspec.msgpack.Decoder(wire.BeatBatch).decode
        self._decode_notices = msgspec.msgpack.Decoder(wire.NoticeBatch).decode

    def is_json(self, payload: bytes) -> bool:
        """Whether a payload starts like JSON: after blanks `{ [ " -`, a digit, `t`, `f` or `n`."""
        first = payload[0] if payload else 0
        if first in _JSON_STARTS:
            return True
        if first not in _JSON_BLANKS:
            return False
        rest = payload.lstrip(_JSON_BLANKS)
        return rest != b"" and rest[0] in _JSON_STARTS

    def kind(self, payload: bytes) -> int:
        """Return the kind of a payload, which may be one that this version does not know.

        Judges everything that can be judged before decoding, except the bodies of messages and
        answers: those are judged by `messages` and `answers`.

        Raises:
            GateError: Too large, of another wire version, not shaped like a payload, nested too
                deeply, or too many arrays and maps.
        """
        size = len(payload)
        if size > self.limits.max_bytes:
            raise GateError(f"{size} bytes; the limit is {self.limits.max_bytes}")
        if payload[:2] != wire.PREFIX:
            raise GateError(_wrong_prefix(payload))
        if size < 4 or not 0x93 <= payload[2] <= 0x9F or payload[3] > 0x7F:
            raise GateError(f"no [kind, head, frames] after the version but {payload[2:8].hex(' ')!r}")
        kind = payload[3]
        if size > self.limits.max_openers and kind not in _FRAMED:
            self._judge_whole(payload, self.limits.max_depth)
        return kind

    def messages(self, payload: bytes) -> wire.MessageBatch:
        """Take apart a payload for which `kind` returned MESSAGES. Bodies stay raw.

        A body that is nested too deeply or too rich is replaced by one that no `Body` decodes.

        Raises:
            GateError: It is not a batch of well-formed frames within their bounds.
        """
        large = len(payload) > self.limits.max_openers
        if large and sys.getrecursionlimit() > _SAFE_SKIP_LEVELS:
            self._judge_whole(payload, self.limits.max_depth + _FRAME_LEVELS)
        try:
            batch = self._decode_messages(memoryview(payload)[2:])
        except DECODE_ERRORS as error:
            raise GateError(f"not a batch of messages: {explain(error)}") from None
        if large:
            self._refuse_rich_bodies(payload, batch.frames)
        return batch

    def answers(self, payload: bytes) -> wire.AnswerBatch:
        """Take apart a payload for which `kind` returned ANSWERS; otherwise as `messages`.

        Raises:
            GateError: It is not a batch of well-formed frames within their bounds.
        """
        large = len(payload) > self.limits.max_openers
        if large and sys.getrecursionlimit() > _SAFE_SKIP_LEVELS:
            self._judge_whole(payload, self.limits.max_depth + _FRAME_LEVELS)
        try:
            batch = self._decode_answers(memoryview(payload)[2:])
        except DECODE_ERRORS as error:
            raise GateError(f"not a batch of answers: {explain(error)}") from None
        if large:
            self._refuse_rich_bodies(payload, batch.frames)
        return batch

    def ids(self, payload: bytes) -> wire.IdBatch:
        """Take apart a payload for which `kind` returned ACCEPTED, CANCEL or STATUS.

        Raises:
            GateError: It is not a list of ids within its bounds.
        """
        try:
            return self._decode_ids(memoryview(payload)[2:])
        except DECODE_ERRORS as error:
            raise GateError(f"not a list of ids: {explain(error)}") from None

    def beats(self, payload: bytes) -> wire.BeatBatch:
        """Take apart a payload for which `kind` returned HEARTBEAT.

        Raises:
            GateError: It is longer than `MAX_BEAT_BYTES`, or no well-formed heartbeat within its bounds.
        """
        if len(payload) > wire.MAX_BEAT_BYTES:
            raise GateError(f"a heartbeat of {len(payload)} bytes; the limit is {wire.MAX_BEAT_BYTES}")
        try:
            return self._decode_beats(memoryview(payload)[2:])
        except DECODE_ERRORS as error:
            raise GateError(f"not a heartbeat: {explain(error)}") from None

    def notices(self, payload: bytes) -> wire.NoticeBatch:
        """Take apart a payload for which `kind` returned NOTICES.

        Raises:
            GateError: It is not a list of notices within its bounds.
        """
        try:
            return self._decode_notices(memoryview(payload)[2:])
        except DECODE_ERRORS as error:
            raise GateError(f"not a list of notices: {explain(error)}") from None

    def json(self, payload: bytes) -> None:
        """Judge a JSON text before it is decoded. What is not JSON may pass: its decoder refuses it.

        Raises:
            GateError: Too large, nested too deeply, too many arrays and objects, or too many
                numbers with exponents of three digits.
        """
        limits = self.limits
        size = len(payload)
        if size > limits.max_bytes:
            raise GateError(f"{size} bytes; the limit is {limits.max_bytes}")
        if size <= limits.max_openers:
            return
        openers = size - len(payload.translate(None, _JSON_OPENERS))
        if openers > limits.max_openers or has_many_large_exponents(payload):
            judge_json(payload, limits.max_depth, limits.max_containers)

    def _judge_whole(self, payload: bytes, max_depth: int) -> None:
        if count_openers(payload) > self.limits.max_openers:
            _, fault = walk(payload[2:], _MAX_WALK_STEPS, max_depth, self.limits.max_containers)
            if fault:
                raise GateError(fault)

    def _refuse_rich_bodies(self, payload: bytes, frames: list[F]) -> None:
        limits = self.limits
        if count_openers(payload) <= limits.max_openers:
            return
        # The steps are shared: many rich bodies take no longer than one.
        steps = _MAX_WALK_STEPS
        for place, frame in enumerate(frames):
            body = bytes(frame.body)
            if len(body) > limits.max_openers and count_openers(body) > limits.max_openers:
                steps, fault = walk(body, steps, limits.max_depth, limits.max_containers)
                if fault:
                    frames[place] = msgspec.structs.replace(frame, body=_REFUSED_BODY)


def _wrong_prefix(payload: bytes) -> str:
    if payload[:1] == wire.PREFIX[:1] and len(payload) > 1:
        return f"wire version {payload[1]}; this node reads version {wire.VERSION}"
    return f"starts with {payload[:8].hex(' ')!r}, not with {wire.PREFIX.hex(' ')!r} nor like JSON"
