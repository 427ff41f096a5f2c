"""What an examination finds: one line each, with the reason and the fix."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    UNKNOWN = "unknown"
    """It could not be checked; `fix` says what is missing."""

    WARNING = "warning"
    FAILED = "failed"


class Finding(msgspec.Struct, frozen=True):
    """The end of one check."""

    check: str
    """What was looked at, in one word or two."""

    level: Level
    what: str
    """What was found, with the values."""

    why: str = ""
    """What follows from it; empty if nothing does."""

    fix: str = ""
    """What to do about it; empty if nothing need be done."""


def count_levels(findings: Iterable[Finding]) -> dict[Level, int]:
    """Return how many findings there are of each level, those without any included."""
    counts = dict.fromkeys(Level, 0)
    for finding in findings:
        counts[finding.level] += 1
    return counts
