"""A clock that goes only while this node is proven able to hear: what silence is measured on."""

import math

RESUME_AFTER = 1.0
"""Seconds for which own beats must flow again before silence counts: one `heartbeat_timeout`, in which every live node
has been heard several times."""

_LATE = 2.0
# Own intervals after which an own beat is late. A loop that is late by less than an interval hears well enough: what
# it adds to the silence of others is half a time-out. At half of this every busy moment would stop the clock, and the
# dead would stay undiscovered on a busy node.


class ProvenClock:
    """Seconds during which beats of others would have been heard, because this node's own beats were.

    It begins with the first own beat. It stands still from the moment when an own beat is late, or the connection is
    lost, until own beats have flowed for `RESUME_AFTER`. A loop that was blocked, a server that was restarted and a cut
    link so count against nobody.
    """

    __slots__ = ("_at", "_is_new", "_last_own", "_late_after", "_resume_at", "_value")

    def __init__(self, now: float) -> None:
        self._value = 0.0
        self._at = now
        self._last_own = -math.inf
        self._late_after = 0.0
        self._resume_at = math.inf
        self._is_new = True

    def read(self, now: float) -> float:
        """Return the seconds so far; never goes back."""
        until = min(now, self._last_own + self._late_after)
        begin = max(self._at, self._resume_at)
        if until > begin:
            self._value += until - begin
            self._at = until
        return self._value

    def is_proven(self, now: float) -> bool:
        """Whether the clock goes."""
        return self._resume_at <= now <= self._last_own + self._late_after

    def own_beat(self, now: float, interval: float) -> None:
        """This node heard itself; its next beat is due after `interval` seconds."""
        self.read(now)
        if self._is_new:
            self._is_new = False
            self._resume_at = now
        elif now > self._last_own + self._late_after or self._resume_at == math.inf:
            self._resume_at = now + RESUME_AFTER
        self._at = now
        self._last_own = now
        self._late_after = _LATE * interval

    def stop(self, now: float) -> None:
        """The connection is lost: nothing is heard."""
        self.read(now)
        self._is_new = False
        self._resume_at = math.inf
        self._last_own = -math.inf
