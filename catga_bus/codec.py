"""Bytes to messages and back: the gate that every payload passes first, and each type's codec.

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

import re
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any, Final, Generic, TypeVar

import msgspec

from catga_bus import wire
from catga_bus.errors import ConfigurationError

T = TypeVar("T")
F = TypeVar("F", wire.MessageFrame, wire.AnswerFrame)

DECODE_ERRORS: Final[tuple[type[BaseException], ...]] = (Exception,)
"""What decoding a body can raise.

msgspec itself raises `MsgspecError`, `RecursionError`, `UnicodeDecodeError` and `MemoryError`. But a
`__post_init__` of a user's class runs while its bytes are decoded and can raise anything, so nothing
less than every exception keeps hostile bytes from passing through.
"""


class GateError(Exception):
    """A payload is not let in. The text says why and repeats at most 40 bytes of it."""


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

_MAX_LARGE_EXPONENTS = 2_000
# JSON numbers with exponents of three digits: near the ends of the range msgspec 0.22 takes 8
# microseconds for each (measured), 1.3 s for a MiB of `1e308`.

_SAFE_SKIP_LEVELS = 100_000
# Skipping a raw body takes 50 bytes of stack per level (measured, msgspec 0.22), and Python's
# recursion limit bounds the levels. Programs that set that limit higher have their batches walked
# as a whole.

_FRAME_LEVELS = 3
# A body lies in a frame, in the array of frames, in the payload.

_MIN_RUN = 32
# For fewer values to come, one by one is as fast as a pattern.

_RUN_STEPS = 8
# One use of a pattern takes about as long as this many single steps (measured).

_FRAMED = (wire.Kind.MESSAGES, wire.Kind.ANSWERS)
_FIRST_STR = 0xA0
_NEVER_USED = 0xC1
_OPENERS = bytes((*range(0x80, 0xA0), *range(0xDC, 0xE0)))
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_TWO_BYTE_COUNTS = (0xDC, 0xDE)
_REFUSED_BODY = msgspec.Raw(bytes((_NEVER_USED,)))

_JSON_BLANKS = b" \t\r\n"
_JSON_STARTS = frozenset(b'{["-0123456789tfn')
_JSON_OPENERS = b"[{"
_JSON_LARGE_EXPONENT = re.compile(rb"[eE][+-]?0*+[1-9][0-9]{2}")
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_OPEN_BRACKET = ord("[")


def _value_sizes() -> bytes:
    sizes = bytearray(256)
    for lead in (*range(0x80), 0xC0, 0xC2, 0xC3, *range(0xE0, 0x100)):
        sizes[lead] = 1
    for lead in range(0xA0, 0xC0):
        sizes[lead] = 1 + (lead & 0x1F)
    sizes[0xCA:0xD4] = bytes((5, 9, 2, 3, 5, 9, 2, 3, 5, 9))  # floats, unsigned and signed integers
    sizes[0xD4:0xD9] = bytes((3, 4, 6, 10, 18))  # fixext: lead, type, data
    return bytes(sizes)


# Bytes of a MessagePack value by its first byte; 0 where the first byte does not tell.
_SIZES = _value_sizes()
# By first byte: how long the length is, and how many bytes follow that it does not count (ext types).
_COUNTED = {
    0xC4: (1, 0),
    0xC5: (2, 0),
    0xC6: (4, 0),
    0xC7: (1, 1),
    0xC8: (2, 1),
    0xC9: (4, 1),
    0xD9: (1, 0),
    0xDA: (2, 0),
    0xDB: (4, 0),
}


class Gate:
    """Judges payloads, and takes apart those that it lets in; one per bus, and nothing in it changes.

    Args:
        limits: What is let in.
    """

    __slots__ = ("_decode_answers", "_decode_messages", "limits")

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        self.limits = limits
        self._decode_messages = msgspec.msgpack.Decoder(wire.MessageBatch).decode
        self._decode_answers = msgspec.msgpack.Decoder(wire.AnswerBatch).decode

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
        if openers > limits.max_openers or _has_many_large_exponents(payload):
            _judge_json(payload, limits.max_depth, limits.max_containers)

    def _judge_whole(self, payload: bytes, max_depth: int) -> None:
        if _count_openers(payload) > self.limits.max_openers:
            _, fault = _walk(payload[2:], _MAX_WALK_STEPS, max_depth, self.limits.max_containers)
            if fault:
                raise GateError(fault)

    def _refuse_rich_bodies(self, payload: bytes, frames: list[F]) -> None:
        limits = self.limits
        if _count_openers(payload) <= limits.max_openers:
            return
        # The steps are shared: many rich bodies take no longer than one.
        steps = _MAX_WALK_STEPS
        for place, frame in enumerate(frames):
            body = bytes(frame.body)
            if len(body) > limits.max_openers and _count_openers(body) > limits.max_openers:
                steps, fault = _walk(body, steps, limits.max_depth, limits.max_containers)
                if fault:
                    frames[place] = msgspec.structs.replace(frame, body=_REFUSED_BODY)


def _wrong_prefix(payload: bytes) -> str:
    if payload[:1] == wire.PREFIX[:1] and len(payload) > 1:
        return f"wire version {payload[1]}; this node reads version {wire.VERSION}"
    return f"starts with {payload[:8].hex(' ')!r}, not with {wire.PREFIX.hex(' ')!r} nor like JSON"


def _count_openers(data: bytes) -> int:
    return len(data) - len(data.translate(None, _OPENERS))


def _walk(data: bytes, steps: int, max_depth: int, max_containers: int) -> tuple[int, str]:
    """Decide exactly, and without recursion, whether one MessagePack value is within the bounds.

    Args:
        data: The value and nothing else.
        steps: How many steps may be taken; one takes about 0.1 microseconds.
        max_depth: Levels of nesting, the value itself being the first.
        max_containers: Arrays and maps in all.

    Returns:
        The steps that are left, and why it is refused ("" if it is not).
    """
    end, at, left, containers = len(data), 0, 1, 0
    outer: list[int] = []  # values still to come in each open container but the innermost
    while left or outer:
        if not left:
            left = outer.pop()
            continue
        if at >= end or steps <= 0:
            return steps, f"ends inside a value or holds too many small values (byte {at})"
        lead = data[at]
        size = _SIZES[lead]
        if size:
            following = at + size
            if left > _MIN_RUN and following < end and _SIZES[data[following]] == size:
                steps -= _RUN_STEPS
                count = _length_of_run(data, at, min(end, at + left * size), size)
                at += count * size
                left -= count
            else:
                steps -= 1
                at = following
                left -= 1
        elif lead in _COUNTED:
            steps -= 2
            left -= 1
            at = _end_of_counted(data, at)
        else:
            steps -= 3
            containers += 1
            outer.append(left - 1)
            left, at = _open_container(data, at)
            if len(outer) > max_depth:
                return steps, f"nested deeper than {max_depth} levels (byte {at})"
            if containers > max_containers or left > end - at:
                return steps, f"more than {max_containers} arrays and maps, or cut off (byte {at})"
    return steps, "" if at == end else f"{end} bytes where the value takes {at}"


@lru_cache(maxsize=32)
def _run_of(size: int) -> re.Pattern[bytes]:
    """Return the pattern of as many values of one size as follow each other."""
    leads = b"".join(re.escape(bytes((lead,))) for lead in range(256) if _SIZES[lead] == size)
    return re.compile(b"(?:[%b].{%d})++" % (leads, size - 1), re.DOTALL)


def _length_of_run(data: bytes, at: int, end: int, size: int) -> int:
    run = _run_of(size).match(data, at, end)
    return (run.end() - at) // size if run else 1


def _end_of_counted(data: bytes, at: int) -> int:
    header, extra = _COUNTED[data[at]]
    start = at + 1 + header
    return start + extra + int.from_bytes(data[at + 1 : start], "big")


def _open_container(data: bytes, at: int) -> tuple[int, int]:
    """Return how many values the container at `at` says it holds, and where the first one is."""
    lead = data[at]
    if lead == _NEVER_USED:
        return len(data), len(data)  # more than there are, so it is refused
    if lead < _FIRST_STR:
        count, start = lead & 0x0F, at + 1
    else:
        start = at + (3 if lead in _TWO_BYTE_COUNTS else 5)
        count = int.from_bytes(data[at + 1 : start], "big")
    return (count * 2 if lead in _MAPS else count), start


def _has_many_large_exponents(text: bytes) -> bool:
    found = _JSON_LARGE_EXPONENT.finditer(text)
    return next(islice(found, _MAX_LARGE_EXPONENTS, None), None) is not None


def _judge_json(text: bytes, max_depth: int, max_containers: int) -> None:
    """Decide exactly, and without recursion, whether a JSON text is within the bounds.

    A text that is not JSON may be misread from its first fault on. That is harmless: the decoder
    does not get past the fault.

    Raises:
        GateError: It is not.
    """
    # Backslashes occur in strings only, so what is left after these three is what the decoder sees.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"").replace(b'""', b"")
    syntax = b" ".join(plain.split(b'"')[::2])
    brackets = syntax.translate(_BRACES_TO_BRACKETS, _ALL_BUT_BRACKETS)
    containers = brackets.count(b"[")
    if containers > max_containers:
        raise GateError(f"{containers} arrays and objects; the limit is {max_containers}")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket == _OPEN_BRACKET else -1
        if depth > max_depth:
            raise GateError(f"nested deeper than {max_depth} levels")
        if depth < 0:
            return  # not JSON: the decoder stops here
    if _has_many_large_exponents(syntax):
        raise GateError(f"more than {_MAX_LARGE_EXPONENTS} numbers with exponents of three digits")


_PATH = re.compile(r" - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`$")
_MAX_EXPLANATION = 200
# Some texts of msgspec repeat the value, which can be as long as the payload.


def explain(error: BaseException) -> str:
    """Return one line for people that says which field is wrong and what was expected.

    It has at most 200 characters, all printable; a short value that is wrong may be in it.

    Example:
        >>> class Debit(msgspec.Struct):
        ...     cents: int
        >>> try:
        ...     msgspec.json.decode('{"cents": "5"}', type=Debit)
        ... except msgspec.ValidationError as error:
        ...     explain(error)
        'field `cents`: expected `int`, got `str`'
    """
    if isinstance(error, UnicodeDecodeError):
        text = f"a text is not UTF-8: {error.reason} at its byte {error.start}"
    elif isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, MemoryError):
        text = "too large for the memory there is"
    elif isinstance(error, msgspec.MsgspecError):
        text = _explain_msgspec(str(error))
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    line = "".join(c if c.isprintable() else "?" for c in text[: _MAX_EXPLANATION + 1])
    return line if len(line) <= _MAX_EXPLANATION else line[: _MAX_EXPLANATION - 3] + "..."


def _explain_msgspec(text: str) -> str:
    if text.endswith(r"invalid opcode '\xc1' (byte 0)"):
        return "malformed, or nested deeper or richer than this node takes"
    found = _PATH.search(text)
    what = text[: found.start()] if found else text
    if what.startswith(("Expected", "Object", "Invalid")):
        what = what[:1].lower() + what[1:]
    if found is None:
        return what
    field = found["path"].removeprefix(".")
    if not field:
        return f"a key: {what}"
    return f"{'a key of ' if found['key'] else ''}field `{field}`: {what}"


class Body(Generic[T]):
    """The codec of one body type; made once, at registration.

    Its four functions are bound methods of msgspec's own encoders and decoders, so a call costs no
    Python frame. What they raise for bytes is in `DECODE_ERRORS`; `explain` puts it in words.

    Args:
        type_: A message class or the type of a reply.

    Raises:
        ConfigurationError: msgspec cannot encode and decode the type; the text names it.
    """

    __slots__ = ("decode", "decode_json", "encode", "encode_json", "type")

    decode: Callable[[bytes | msgspec.Raw], T]
    """MessagePack to a checked value."""

    decode_json: Callable[[bytes | msgspec.Raw], T]
    """JSON to a checked value; of a key that occurs twice the last one counts."""

    encode: Callable[[T], bytes]
    """Value to MessagePack. Types are not checked; an integer beyond 64 bits is an `OverflowError`."""

    encode_json: Callable[[T], bytes]
    """Value to JSON. Types are not checked; NaN and the infinities become null."""

    def __init__(self, type_: Any) -> None:
        _refuse_foreign_types(type_)
        self.type = type_
        self.decode = msgspec.msgpack.Decoder(type_).decode
        self.decode_json = msgspec.json.Decoder(type_).decode
        self.encode = msgspec.msgpack.Encoder().encode
        self.encode_json = msgspec.json.Encoder().encode


def _name(type_: Any) -> str:
    return type_.__qualname__ if isinstance(type_, type) else str(type_)


def _refuse_foreign_types(type_: Any) -> None:
    """Fail at registration: msgspec takes any class and would fail at the first message."""
    try:
        waiting: list[Any] = [msgspec.inspect.type_info(type_)]
        msgspec.msgpack.Decoder(type_)
        msgspec.json.Decoder(type_)
    except Exception as error:
        raise ConfigurationError(f"{_name(type_)} cannot be sent: {error}") from error
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, msgspec.inspect.CustomType):
            raise ConfigurationError(
                f"{_name(type_)} cannot be sent: it holds {_name(part.cls)}, which has no encoding; "
                "use a msgspec struct, a dataclass, an attrs class or a plain type"
            )
        for name in part.__struct_fields__:
            value = getattr(part, name)
            parts = value if isinstance(value, tuple) else (value,)
            waiting += [each for each in parts if isinstance(each, _INSPECTED)]


_INSPECTED = (msgspec.inspect.Type, msgspec.inspect.Field)
