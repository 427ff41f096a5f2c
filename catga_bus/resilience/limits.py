"""What the limits of this room share: which messages they are for, and the answer to one over the limit."""

import math
from collections.abc import Iterable
from typing import Any

from catga_bus.errors import Code, ConfigurationError, Outcome
from catga_bus.messages import MessageMeta
from catga_bus.result import Err


def checked_types(limit: str, only: Iterable[type] | None) -> frozenset[type] | None:
    """Return the message classes that a limit is for; None means all.

    Args:
        limit: Its name, for errors.
        only: What its user has given.

    Raises:
        ConfigurationError: It is no tuple of message classes, or an empty one.
    """
    if only is None:
        return None
    given: Any = only
    types = given if isinstance(given, tuple | list | set | frozenset) else None
    if not types or not all(isinstance(one, MessageMeta) for one in types):
        raise ConfigurationError(f"{limit}: only must be a tuple of message classes, such as (Quote,), got {only!r}")
    return frozenset(types)


def over_limit(text: str, retry_after: float | None) -> Err:
    """Return the answer to a message that a limit has turned away: it has not run, and may be sent again.

    Args:
        text: Which limit it is, in words.
        retry_after: Seconds until it would be let in, or None if nobody knows.
    """
    details = None
    if retry_after is not None:
        milliseconds = max(1, math.ceil(retry_after * 1000.0))
        text = f"{text}; try again in {milliseconds:,} ms"
        details = {"retry_after_ms": milliseconds}
    return Err(str(Code.OVERLOADED), text, details, Outcome.NOT_RUN, retryable=True)
