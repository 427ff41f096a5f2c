"""What a fault did to the calls around it, from the times of all calls. Pure."""

from array import array
from bisect import bisect_left, bisect_right
from itertools import pairwise

import msgspec


class CallTimes:
    """When each answered call was sent and answered; 16 bytes a call."""

    def __init__(self) -> None:
        self.sent = array("d")
        self.answered = array("d")

    def add(self, sent: float, answered: float) -> None:
        """Note one call, in the order in which calls are answered.

        Args:
            sent: Seconds since the replay began.
            answered: Seconds since the replay began; not before that of the last call noted.
        """
        self.sent.append(sent)
        self.answered.append(answered)


class Disturbance(msgspec.Struct, frozen=True):
    """How the calls of a stretch of time fared."""

    calls: int
    """Calls that were sent before its end and answered after its beginning."""

    slowest: float | None
    """Seconds that the slowest of them took; None if there were none."""

    longest_gap: float | None
    """Most seconds between two answers that follow each other, the ones around the stretch included."""


def disturbance(times: CallTimes, begin: float, end: float) -> Disturbance:
    """Return how the calls around a fault fared.

    Args:
        times: All answered calls.
        begin: When the fault began, in seconds since the replay did.
        end: When it was mended.
    """
    touched = range(bisect_right(times.answered, begin), len(times.answered))
    took = [times.answered[call] - times.sent[call] for call in touched if times.sent[call] < end]
    around = slice(max(touched.start - 1, 0), bisect_left(times.answered, end) + 1)
    gaps = [after - before for before, after in pairwise(times.answered[around])]
    return Disturbance(calls=len(took), slowest=max(took, default=None), longest_gap=max(gaps, default=None))
