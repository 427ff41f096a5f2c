"""What to do when a request was not answered: the decisions, as functions of values. Pure.

One call is in one of four states: sent (a node may have it), waiting (to be sent again at `due`), unsent (no connection
yet), ended. The shell, `caller`, holds the facts in `Progress` and asks here what follows from an event.
"""

import math
import random
from enum import Enum, auto

import msgspec

from catga_bus.errors import Code, Outcome

MAX_RETRIES = 2
"""Retries of a call that nodes refused as busy."""

RETRY_DELAY = 0.1
"""Seconds between attempts, on average; drawn between half and one and a half of it."""

NO_HANDLER_PATIENCE = 1.0
"""Seconds for which a subject without listeners is tried again: a deploy or a restart may leave such a gap."""

RECONNECT_PATIENCE = 3.0
"""The same after the caller's own reconnect: others come back with up to 2 s of back-off, plus their subscriptions."""


class Phase(Enum):
    """Where a call stands."""

    UNSENT = auto()
    SENT = auto()
    WAITING = auto()


class Progress(msgspec.Struct):
    """The facts of one call that decisions rest on. Instants are seconds of a monotonic clock."""

    idempotent: bool = True
    phase: Phase = Phase.UNSENT
    attempt: int = 0
    """Attempts written to the connection so far."""

    retries: int = 0
    """Retries charged to the budget: those after `busy`."""

    maybe_ran: bool = False
    """Whether a connection was lost after an attempt was written: it may have run."""

    unheard_since: float = math.inf
    """Since when nobody has been listening; infinite when somebody was."""

    due: float = math.inf
    """When a waiting call is to be sent again."""


class Verdict(msgspec.Struct, frozen=True):
    """The end of a call that got no answer."""

    code: Code
    outcome: Outcome
    message: str


class RetryBudget:
    """Bounds retries to a share of all calls, so that an overload is not multiplied by those it refuses.

    A token bucket: every call adds `share` of a token, every second adds `per_second`, a retry takes one; it holds at
    most what ten seconds of the floor give.

    Args:
        now: The present instant.
        share: Retries per call.
        per_second: Retries that are always allowed.

    Source:
        The retry budget of Finagle (Twitter): 20 % of calls over 10 s and a floor of 10 per second.
    """

    __slots__ = ("_at", "_cap", "_per_second", "_share", "_tokens")

    def __init__(self, now: float, *, share: float = 0.2, per_second: float = 10.0) -> None:
        self._share = share
        self._per_second = per_second
        self._cap = per_second * 10
        self._tokens = self._cap
        self._at = now

    def calls(self, count: int) -> None:
        """Count calls made."""
        self._tokens = min(self._cap + count * self._share, self._tokens + count * self._share)

    def take(self, now: float) -> bool:
        """Take one retry; False if there is none."""
        self._tokens = max(self._tokens, min(self._cap, self._tokens + (now - self._at) * self._per_second))
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def retry_at(now: float, rng: random.Random) -> float:
    """Return when the next attempt is due: `RETRY_DELAY` later, give or take half of it."""
    return now + RETRY_DELAY * rng.uniform(0.5, 1.5)


def after_no_responders(call: Progress, now: float, reconnected_at: float, rng: random.Random) -> Verdict | None:
    """Nobody listens: wait and try again for a while, then give up. It provably did not run this time.

    Args:
        call: The call; its phase and times are brought up to date.
        now: The present instant.
        reconnected_at: When the connection last came back; minus infinity if it never broke.
        rng: Where the jitter comes from.

    Returns:
        None while it is worth waiting, else how the call ends.
    """
    call.unheard_since = min(call.unheard_since, now)
    patience_ends = max(call.unheard_since + NO_HANDLER_PATIENCE, reconnected_at + RECONNECT_PATIENCE)
    if now >= patience_ends:
        return Verdict(Code.NO_HANDLER, _unless_it_ran(call), "nobody handles it")
    call.phase = Phase.WAITING
    call.due = retry_at(now, rng)
    return None


def after_busy(call: Progress, now: float, budget: RetryBudget, rng: random.Random) -> Verdict | None:
    """A node refused it as over its bounds: try again within the bounds and the budget, then give up."""
    call.unheard_since = math.inf
    if call.retries >= MAX_RETRIES or not budget.take(now):
        return Verdict(Code.OVERLOADED, _unless_it_ran(call), "every node asked was too busy to take it")
    call.retries += 1
    call.phase = Phase.WAITING
    call.due = retry_at(now, rng)
    return None


def after_held(call: Progress) -> None:
    """What was to be written never left this process: it is as good as unsent."""
    call.attempt -= 1
    call.phase = Phase.UNSENT


def after_disconnect(call: Progress) -> None:
    """The connection was lost: what was written may have run, or may be lost.

    A call that may run twice is to be written again when the connection is back. One that must not is left to wait
    for the answer that may still come.
    """
    if call.phase is Phase.SENT:
        call.maybe_ran = True
    if call.phase is Phase.WAITING or call.idempotent:
        call.phase = Phase.UNSENT
        call.due = math.inf


def after_deadline(call: Progress, *, connected: bool) -> Verdict:
    """The time is up: say honestly what is known."""
    sent = call.phase is Phase.SENT or call.maybe_ran
    if connected and call.phase is Phase.UNSENT:
        outcome = Outcome.UNKNOWN if sent else Outcome.NOT_RUN
        return Verdict(Code.TIMEOUT, outcome, "the connection was behind until the deadline")
    if not connected:
        outcome = Outcome.UNKNOWN if sent else Outcome.NOT_RUN
        return Verdict(Code.DISCONNECTED, outcome, "there was no connection to a server when the deadline passed")
    if call.phase is Phase.WAITING and not sent:
        if call.unheard_since < math.inf:
            return Verdict(Code.NO_HANDLER, Outcome.NOT_RUN, "nobody handled it before the deadline")
        return Verdict(Code.OVERLOADED, Outcome.NOT_RUN, "every node was too busy until the deadline")
    return Verdict(Code.TIMEOUT, Outcome.UNKNOWN, "no answer before the deadline")


def after_invalid(call: Progress) -> Outcome:
    """A node could not read it: it did not run this time."""
    return _unless_it_ran(call)


def after_expired(call: Progress) -> Verdict:
    """The node says that the deadline had passed before it could start."""
    return Verdict(Code.TIMEOUT, _unless_it_ran(call), "the deadline passed before a node could start it")


def _unless_it_ran(call: Progress) -> Outcome:
    return Outcome.UNKNOWN if call.maybe_ran else Outcome.NOT_RUN
