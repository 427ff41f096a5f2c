"""Hearing: whether the connection that work comes by still brings anything, told by the node's own heartbeats."""

from catga_bus.pulse import GAP

DEAF_AFTER = 2 * GAP
"""Seconds beyond an interval in which nothing sent was heard, and a node says that it is not ready. The way back takes
milliseconds; a thread and an event loop may each be late by a `GAP` without having lost anything."""

_LONGEST_TICKS = 2.0
# Ticks that one may count for: a loop that stood still finds what it has missed in the next turn.


class Hearing:
    """Own beats that should have come back; the heart has a connection of its own, and beats on when this one is dead.

    Who has never heard itself, because its user may not, is not deaf; neither is one whose heart does not send.
    """

    __slots__ = ("_has_heard", "_overdue", "_sent")

    def __init__(self) -> None:
        self._has_heard = False
        self._sent = 0
        self._overdue = 0.0

    def heard(self, sent: int) -> None:
        """An own beat has come back.

        Args:
            sent: Beats sent so far.
        """
        self._has_heard = True
        self.start_over(sent)

    def start_over(self, sent: int) -> None:
        """Miss only what is sent from now on: there is a new connection, or none."""
        self._sent = sent
        self._overdue = 0.0

    def tick(self, elapsed: float, pause: float, sent: int) -> None:
        """Time has passed.

        Args:
            elapsed: Seconds since the last tick.
            pause: Seconds that there should have been.
            sent: Beats sent so far.
        """
        self._overdue = self._overdue + min(elapsed, _LONGEST_TICKS * pause) if sent > self._sent else 0.0

    def is_deaf(self, interval: float) -> bool:
        """Whether own beats are overdue.

        Args:
            interval: Seconds between them.
        """
        return self._has_heard and self._overdue > interval + DEAF_AFTER
