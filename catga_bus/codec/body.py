"""The codec of each body type, and what its errors mean to people."""

import re
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import msgspec

from catga_bus.errors import ConfigurationError

T = TypeVar("T")

DECODE_ERRORS: Final[tuple[type[BaseException], ...]] = (Exception,)
"""What decoding a body can raise.

msgspec itself raises `MsgspecError`, `RecursionError`, `UnicodeDecodeError` and `MemoryError`. But a
`__post_init__` of a user's class runs while its bytes are decoded and can raise anything, so nothing
less than every exception keeps hostile bytes from passing through.
"""


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
        try:
            said = str(error)
        except Exception:
            said = ""  # the error of a user's class may be broken itself
        text = f"{type(error).__name__}: {said}" if said else type(error).__name__
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
