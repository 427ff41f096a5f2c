"""What became of a handler that did not return a value, in words and as an `Err`."""

from typing import Any

from catga_bus.errors import RESERVED_CODES, Code, Outcome
from catga_bus.result import Err

_MAX_TEXT = 500
# Chosen: enough for the text of any usual exception; some repeat what they were given, which can be megabytes.


def describe(error: BaseException) -> str:
    """Return an exception as `ValueError: text`, whatever it is.

    The result has at most 500 characters and can be encoded as UTF-8. An exception whose text cannot be had is
    named by its class alone.
    """
    kind = type(error).__name__
    try:
        text = str(error)
    except BaseException:
        text = "(its text cannot be shown)"
    whole = f"{kind}: {text}" if text else kind
    if len(whole) > _MAX_TEXT:
        whole = whole[: _MAX_TEXT - 3] + "..."
    return whole.encode("utf-8", "replace").decode()


def refused(name: str, code: Any, message: Any, details: Any, *, retryable: bool) -> Err:
    """Return what a handler's own refusal stands for: it is always `refused`, unless it takes what is not its own.

    Args:
        name: The handler's name.
        code: Its code; one of the bus's own, or none that can be sent, makes the refusal a `HANDLER_ERROR`.
        message: For people.
        details: What the handler added.
        retryable: Its advice to the caller.
    """
    if not isinstance(code, str) or not isinstance(message, str):
        text = f"{name} refused with code {_short(code)} and message {_short(message)}; both must be str"
    elif code in RESERVED_CODES:
        text = f"{name} refused with the reserved code {code}: {message}"
    else:
        return Err(code, message, details, Outcome.REFUSED, retryable)
    return Err(str(Code.HANDLER_ERROR), text, None, Outcome.FAILED)


def _short(value: Any) -> str:
    return f"{value!r:.80}" if isinstance(value, str | int | None) else f"a {type(value).__name__}"
