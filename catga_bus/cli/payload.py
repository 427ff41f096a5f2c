"""The JSON argument of a command: taken from the command line or stdin, checked, and left as it is."""

import json
import sys
from typing import BinaryIO, NoReturn

from catga_bus.errors import ConfigurationError

MAX_BYTES = 67_108_864
"""No server takes a larger message."""

_MAX_SHOWN = 60


def read_payload(argument: str, stdin: BinaryIO | None = None) -> bytes:
    """Return the JSON of an argument as UTF-8.

    Args:
        argument: The JSON itself, or `-` for stdin.
        stdin: What `-` reads; by default that of this process.

    Raises:
        ConfigurationError: It is not JSON; the text names line and column.
    """
    if argument != "-":
        # What the shell handed over in another encoding is in there as surrogates.
        raw = argument.encode("utf-8", "surrogateescape")
    else:
        source = sys.stdin.buffer if stdin is None else stdin
        if source.isatty():
            print("reading JSON from the terminal; Ctrl-D ends it", file=sys.stderr)
        raw = source.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigurationError(f"the JSON is longer than {MAX_BYTES:,} bytes")
    return _checked(raw).strip().encode()


def _checked(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the JSON is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise ConfigurationError("the JSON is empty; an empty message is {}")
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        # The line it happens in, cut around the place, says more than the name of the rule.
        line = error.doc.split("\n")[error.lineno - 1]
        start = max(error.colno - 1 - _MAX_SHOWN // 2, 0)
        shown = line[start : start + _MAX_SHOWN]
        raise ConfigurationError(
            f"bad JSON at line {error.lineno}, column {error.colno}: {error.msg}: {shown!r}"
        ) from None
    except RecursionError:
        raise ConfigurationError("the JSON is nested too deeply") from None
    except ValueError as error:
        # The interpreter refuses to read numbers of thousands of digits.
        raise ConfigurationError(f"bad JSON: {error}") from None
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON; use null")
