"""Exact judgement of bytes before they are decoded: depth, containers and steps, without recursion. Pure."""

import re
from functools import lru_cache
from itertools import islice


class GateError(Exception):
    """A payload is not let in. The text says why and repeats at most 40 bytes of it."""


_MAX_LARGE_EXPONENTS = 2_000
# JSON numbers with exponents of three digits: near the ends of the range msgspec 0.22 takes 8
# microseconds for each (measured), 1.3 s for a MiB of `1e308`.

_MIN_RUN = 32
# For fewer values to come, one by one is as fast as a pattern.

_RUN_STEPS = 8
# One use of a pattern takes about as long as this many single steps (measured).

_FIRST_STR = 0xA0
NEVER_USED = 0xC1
_OPENERS = bytes((*range(0x80, 0xA0), *range(0xDC, 0xE0)))
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_TWO_BYTE_COUNTS = (0xDC, 0xDE)
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


def count_openers(data: bytes) -> int:
    """Return how many bytes could open an array or a map; never too few."""
    return len(data) - len(data.translate(None, _OPENERS))


def walk(data: bytes, steps: int, max_depth: int, max_containers: int) -> tuple[int, str]:
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
    if lead == NEVER_USED:
        return len(data), len(data)  # more than there are, so it is refused
    if lead < _FIRST_STR:
        count, start = lead & 0x0F, at + 1
    else:
        start = at + (3 if lead in _TWO_BYTE_COUNTS else 5)
        count = int.from_bytes(data[at + 1 : start], "big")
    return (count * 2 if lead in _MAPS else count), start


def has_many_large_exponents(text: bytes) -> bool:
    """Whether a JSON text holds more numbers with exponents of three digits than may be decoded."""
    found = _JSON_LARGE_EXPONENT.finditer(text)
    return next(islice(found, _MAX_LARGE_EXPONENTS, None), None) is not None


def judge_json(text: bytes, max_depth: int, max_containers: int) -> None:
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
    if has_many_large_exponents(syntax):
        raise GateError(f"more than {_MAX_LARGE_EXPONENTS} numbers with exponents of three digits")
