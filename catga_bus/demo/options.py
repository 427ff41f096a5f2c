"""What all buses of the demo have in common."""

from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

PARTITIONS: Final = 16
"""Of the desk's commands and of the log of events: enough for a map that moves, few enough for one line."""

BUS_OPTIONS: Final[dict[str, Any]] = {
    "partitions": PARTITIONS,
    "command_max_bytes": 67_108_864,
    "event_max_bytes": 67_108_864,
    "dead_letter_max_bytes": 16_777_216,
    "drain_timeout": 5.0,
}
"""A server reserves the bytes of its streams: these fit on any, see `replay.MAX_BACKLOG`. A node whose server has gone
waits for it until its drain is over: it must not outlive a run that was killed by much."""


def inbox_at(path: Path) -> str:
    """Return the address of an inbox in a file, given its absolute path."""
    return f"sqlite://{quote(str(path))}"
