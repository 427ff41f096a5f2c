"""The only room that reads the time; everything else is handed a clock."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]
"""Returns seconds since an arbitrary instant; never goes back, unmoved by changes of the wall clock."""

monotonic: Clock = time.monotonic
# time.monotonic and the event loops of asyncio and uvloop all read CLOCK_MONOTONIC, so instants
# taken here may be handed to loop.call_at.

cpu_seconds: Clock = time.process_time
"""Seconds that the processors have worked for this process, all threads together, in user and in system mode."""


def utc_now() -> datetime:
    """Return the wall-clock time: for people to read, never for deciding anything."""
    return datetime.now(UTC)
