"""Delayed messages as nats-server 2.12 keeps them: what their headers mean, and the message that comes of them."""

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from catga_bus.transport.jetstream import MSG_ID_HEADER, JetStreamRefusedError
from catga_bus.transport.jetstream_json import to_rfc3339

SCHEDULE_HEADER: Final = "Nats-Schedule"
"""When: `@at ` and an instant as RFC 3339 writes it. The server's other patterns (cron, intervals) are not ours."""

SCHEDULE_TARGET_HEADER: Final = "Nats-Schedule-Target"
"""The subject on which the message is stored when its time has come; of the same stream."""

ROLLUP_HEADER: Final = "Nats-Rollup"

_AT: Final = "@at "
_PATTERN_INVALID: Final = 10189
_TARGET_INVALID: Final = 10190
_DROPPED: Final = (SCHEDULE_HEADER, "Nats-Expected-", MSG_ID_HEADER, ROLLUP_HEADER)
# Headers that begin so belong to the waiting message alone.


def schedule_at(instant: float) -> str:
    """Return the value of `SCHEDULE_HEADER` for an instant in seconds since 1970.

    Example:
        >>> schedule_at(0.25)
        '@at 1970-01-01T00:00:00.250000Z'
    """
    return _AT + to_rfc3339(instant)


def due_at(headers: Mapping[str, str], subject: str) -> float:
    """Return the instant at which a waiting message is due, in seconds since 1970.

    Raises:
        JetStreamRefusedError: Its headers do not say when, or not where to. The caller checks the target.
    """
    pattern = headers[SCHEDULE_HEADER]
    if not pattern.startswith(_AT):
        raise JetStreamRefusedError(_PATTERN_INVALID, "message schedules pattern is invalid")
    try:
        instant = datetime.fromisoformat(pattern.removeprefix(_AT))
    except ValueError:
        raise JetStreamRefusedError(_PATTERN_INVALID, "message schedules pattern is invalid") from None
    if headers.get(SCHEDULE_TARGET_HEADER, subject) == subject:
        raise bad_target()
    return instant.timestamp()


def bad_target() -> JetStreamRefusedError:
    """Return the error for a target that the stream does not store."""
    return JetStreamRefusedError(_TARGET_INVALID, "message schedules target is invalid")


def fired_headers(headers: Mapping[str, str], subject: str) -> dict[str, str]:
    """Return the headers of the message that is stored when the time of a waiting one has come.

    Args:
        headers: Of the waiting message.
        subject: Where it waits.
    """
    kept = {name: value for name, value in headers.items() if not name.startswith(_DROPPED)}
    return {**kept, "Nats-Scheduler": subject, "Nats-Schedule-Next": "purge"}
