"""What to do with a request that has no answer yet: the decisions, as functions of values. Pure.

One call is in one of these states:

    unsent ----> sent ----> accepted     unsent: no connection yet, or it was behind
      ^           |  ^         |         sent: written, and a node may have it
      |           v  |         |         accepted: a node has said that it has it
      `-------- waiting <------'         waiting: to be written again at `due`

The shell, `caller`, holds the facts in `Progress`, asks here what follows from an event, and does it. `Progress.due` is
the instant at which time itself is the next event, so one sweep over all calls drives them.
"""

import math
import random
from enum import Enum, auto

import msgspec

from catga_bus.errors import Code, Outcome
from catga_bus.requests.budget import RetryBudget

MAX_RETRIES = 2
"""Retries of a call that nodes refused, or that fell silent."""

MAX_DEATHS = 2
"""Nodes that may die while they hold a call; a request that kills processes costs no more than these."""

DEATHS_SETTLE = 0.4
"""Seconds that a call waits before its third attempt when the first was lost in silence and the second with its node:
by then it is known whether the first one's node died, too. Two probes 0.2 s apart prove a death."""

RETRY_DELAY = 0.1
"""Seconds between attempts, on average; drawn between half and one and a half of it."""

MAX_ASKED = 2
"""Status queries that a node may leave unanswered; then what it has accepted is given up like what it was silent
about. A node whose event loop stands still is asked for as long as it says so."""

STATUS_INTERVAL = 1.0
"""Seconds after which the node that accepted a call is asked what became of it."""

NO_HANDLER_PATIENCE = 1.0
"""Seconds for which a subject without listeners is tried again: a deploy or a restart may leave such a gap."""

RECONNECT_PATIENCE = 3.0
"""The same after the caller's own reconnect: others come back with up to 0.8 s of back-off, and subscribe."""


class Phase(Enum):
    """Where a call stands."""

    UNSENT = auto()
    SENT = auto()
    ACCEPTED = auto()
    WAITING = auto()


class Step(Enum):
    """What the shell is to do next."""

    STAY = auto()
    """Nothing: wait on."""

    WRITE = auto()
    """Write it again now."""

    ASK = auto()
    """Ask the node that holds it what became of it."""

    GIVE_UP = auto()
    """End it: it has cost enough nodes."""


class Progress(msgspec.Struct, gc=False):
    """The facts of one call that decisions rest on. Instants are seconds of a monotonic clock."""

    deadline: float = math.inf
    idempotent: bool = True
    is_bound: bool = False
    """Whether the caller named the node: it goes to no other."""

    phase: Phase = Phase.UNSENT
    attempt: int = 0
    """Attempts written to the connection so far."""

    since: float = -math.inf
    """No node that died before this died of the call."""

    retries: int = 0
    """Retries that count towards `MAX_RETRIES`."""

    silences: int = 0
    """Attempts that were given up because nothing was heard."""

    deaths: int = 0
    """Nodes that died while they held it, as far as is known."""

    asked: int = 0
    """Times that the node which has accepted it was asked about it since it last said something."""

    maybe_ran: bool = False
    """Whether an earlier attempt may have run: its connection was lost, or its node died or fell silent."""

    node: str | None = None
    """The node that has accepted it, or that the last attempt was addressed to; None if that may be any."""

    avoid: tuple[str, ...] = ()
    """Nodes that it has been taken from: they get it no more, and what they say about not running it is old."""

    unheard_since: float = math.inf
    """Since when nobody has been listening; infinite when somebody was."""

    due: float = math.inf
    """When time itself is the next event."""


class Verdict(msgspec.Struct, frozen=True):
    """The end of a call that got no answer."""

    code: Code
    outcome: Outcome
    message: str


def retry_at(now: float, rng: random.Random) -> float:
    """Return when the next attempt is due: `RETRY_DELAY` later, give or take half of it."""
    return now + RETRY_DELAY * rng.uniform(0.5, 1.5)


# -- what the call itself does -------------------------------------------------------------------------------


def after_write(call: Progress, now: float, patience: float, node: str | None) -> None:
    """It was written again.

    Args:
        call: The call; brought up to date, here and in the other functions.
        now: The present instant.
        patience: Seconds until silence counts as trouble.
        node: The node that it was addressed to; None for whichever of the queue group gets it.
    """
    call.attempt += 1
    call.phase = Phase.SENT
    call.node = node
    call.due = now + patience
    call.asked = 0
    # Whoever gets it now may have refused it before, and is heard again.
    call.avoid = () if node is None else tuple(one for one in call.avoid if one != node)


def after_held(call: Progress) -> None:
    """What was to be written never left this process: it is as good as unsent."""
    call.attempt -= 1
    call.phase = Phase.UNSENT
    call.due = math.inf


# -- what nodes say ------------------------------------------------------------------------------------------


def after_accepted(call: Progress, now: float, node: str) -> None:
    """A node says that it has the call: from now on the wait is for that node.

    What a node says that the call has been taken from is old: a frozen one that goes on, for instance, says it before
    it reads that it was left.
    """
    if is_old(call, node) or call.phase not in (Phase.SENT, Phase.ACCEPTED):
        return
    call.phase = Phase.ACCEPTED
    call.node = node
    call.unheard_since = math.inf
    call.asked = 0
    call.due = now + STATUS_INTERVAL


def is_old(call: Progress, node: str) -> bool:
    """Whether what a node says, short of an answer, concerns an attempt that was given up."""
    return node in call.avoid or (call.attempt > 1 and call.node is not None and node != call.node)


def after_busy(call: Progress, now: float, node: str, budget: RetryBudget, rng: random.Random) -> Verdict | None:
    """A node refused it as over its bounds: try another within the bounds and the budget, then give up."""
    call.unheard_since = math.inf
    if call.retries >= MAX_RETRIES or not budget.take(now):
        return Verdict(Code.OVERLOADED, _unless_it_ran(call), "every node asked was too busy to take it")
    _leave(call, node)
    _wait(call, retry_at(now, rng))
    return None


def after_expired(call: Progress, now: float, node: str) -> Verdict | None:
    """The node says that the deadline had passed before it could start.

    A node that was frozen takes the time of its freeze off all that it finds, so it may say so of a call that came at
    the end of the freeze and has time left. It provably did not run, so another attempt is free.
    """
    if now < call.deadline and call.retries < MAX_RETRIES and not call.is_bound:
        _leave(call, node)
        _wait(call, now)
        return None
    return Verdict(Code.TIMEOUT, _unless_it_ran(call), "the deadline passed before a node could start it")


def after_invalid(call: Progress) -> Outcome:
    """A node could not read it: it did not run this time."""
    return _unless_it_ran(call)


def after_lost(call: Progress, now: float, node: str, budget: RetryBudget) -> Verdict | None:
    """The node that had accepted it does not know it: its answer was lost, or the node is a new one."""
    call.maybe_ran = True
    if not _may_retry(call) or not budget.take(now):
        text = f"node {node} accepted it and no longer knows it: the answer was lost"
        return Verdict(Code.TIMEOUT, Outcome.UNKNOWN, text)
    _leave(call, node)
    _wait(call, now)
    return None


def after_no_responders(call: Progress, now: float, reconnected_at: float, rng: random.Random) -> Verdict | None:
    """Nobody listens: wait and try again for a while, then give up. It provably did not run this time.

    Args:
        call: The call.
        now: The present instant.
        reconnected_at: When the connection last came back; minus infinity if it never broke.
        rng: Where the jitter comes from.

    Returns:
        None while it is worth waiting, else how the call ends.
    """
    if call.node is not None and not call.is_bound:  # that node is gone; others may be there
        _avoid(call, call.node)
        _wait(call, now)
        return None
    call.unheard_since = min(call.unheard_since, now)
    patience_ends = max(call.unheard_since + NO_HANDLER_PATIENCE, reconnected_at + RECONNECT_PATIENCE)
    if now >= patience_ends:
        return Verdict(Code.NO_HANDLER, _unless_it_ran(call), "nobody handles it")
    _wait(call, retry_at(now, rng))
    return None


def after_not_permitted(call: Progress, now: float) -> None:
    """This user may not address single nodes: the queue group gets it. It did not run this time."""
    _wait(call, now)


def after_no_choice(call: Progress, now: float, rng: random.Random) -> Verdict | None:
    """No live node is left now of those that the caller would have: wait for one, but not for ever.

    One that was silent, and is not known to be dead, may still answer: then the deadline is the end.
    """
    call.unheard_since = min(call.unheard_since, now)
    may_be_answered = call.silences > 0 and not call.deaths
    if not may_be_answered and now >= call.unheard_since + NO_HANDLER_PATIENCE:
        return Verdict(Code.NO_HANDLER, _unless_it_ran(call), "no live node that handles it fits `where`")
    _wait(call, retry_at(now, rng))
    return None


# -- what becomes known of nodes -----------------------------------------------------------------------------


def after_death(call: Progress, now: float, node: str) -> Verdict | None:
    """The node that has the call died: try once more elsewhere, at no charge; never a third time."""
    call.maybe_ran = True
    call.deaths += 1
    if call.is_bound:
        return Verdict(Code.NO_HANDLER, Outcome.UNKNOWN, f"node {node} died while it had it")
    _avoid(call, node)
    if call.deaths >= MAX_DEATHS:
        return after_deaths(call)
    if call.idempotent:
        _wait(call, now + DEATHS_SETTLE if call.silences else now)
    else:
        call.due = math.inf  # a node that is only frozen may still answer
    return None


def after_deaths(call: Progress) -> Verdict:
    """It has cost as many nodes as a call may."""
    text = f"{MAX_DEATHS} nodes died while they had it, the last of them {call.node}"
    return Verdict(Code.HANDLER_ERROR, Outcome.UNKNOWN, text)


# -- time ----------------------------------------------------------------------------------------------------


def after_silence(call: Progress, now: float, budget: RetryBudget, deaths: int, *, stalled: bool = False) -> Step:
    """The time that `due` had set is over and the deadline is not.

    Args:
        call: The call.
        now: The present instant.
        budget: What a time-out is charged to.
        deaths: Nodes that handle the type and have died since `since`, whether they had the call or not.
        stalled: Whether the node that has it says that its event loop stands still.

    Returns:
        WRITE for a call whose next attempt is due, which stays as it is until `after_write`; ASK for one that a node
        has accepted; STAY for one that can only wait, until its deadline if need be; GIVE_UP for `after_deaths`.
    """
    if call.phase is Phase.WAITING:
        return Step.GIVE_UP if call.silences and call.deaths and deaths >= MAX_DEATHS else Step.WRITE
    if call.phase is Phase.ACCEPTED and (stalled or call.asked < MAX_ASKED or not _may_retry(call)):
        call.asked += not stalled
        call.due = now + STATUS_INTERVAL
        return Step.ASK
    if call.phase is Phase.UNSENT or not _may_retry(call):
        call.due = math.inf
        return Step.STAY
    if not budget.take(now):
        call.due = now + RETRY_DELAY  # there may be some by then
        return Step.STAY
    call.maybe_ran = True
    call.retries += 1
    call.silences += 1
    if call.node is not None:
        _avoid(call, call.node)
    return Step.WRITE


def after_deadline(call: Progress, *, connected: bool) -> Verdict:
    """The time is up: say honestly what is known."""
    sent = call.phase in (Phase.SENT, Phase.ACCEPTED) or call.maybe_ran
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
    if call.phase is Phase.ACCEPTED:
        return Verdict(Code.TIMEOUT, Outcome.UNKNOWN, f"node {call.node} has it and had not answered at the deadline")
    return Verdict(Code.TIMEOUT, Outcome.UNKNOWN, "no answer before the deadline")


# -- the connection ------------------------------------------------------------------------------------------


def after_disconnect(call: Progress) -> None:
    """The connection was lost: what was written may have run, or may be lost.

    Time without a connection is nobody's silence. A call that a node has accepted stays with it, and the node is asked
    when the connection is back. Another one that may run twice is to be written again then; one that must not is left
    to wait for the answer that may still come.
    """
    if call.phase is Phase.SENT:
        call.maybe_ran = True
    call.due = math.inf
    if call.phase is Phase.WAITING or (call.phase is Phase.SENT and call.idempotent):
        call.phase = Phase.UNSENT


def after_reconnect(call: Progress, now: float, patience: float) -> Step:
    """The connection is back.

    Returns:
        WRITE for what is unsent, ASK for what a node has accepted, STAY for what can only wait.
    """
    if call.phase is Phase.UNSENT:
        return Step.WRITE
    if call.phase is Phase.ACCEPTED:
        call.due = now + patience  # the node may be on its way back, too
        return Step.ASK
    return Step.STAY


def _may_retry(call: Progress) -> bool:
    return call.idempotent and not call.is_bound and call.retries < MAX_RETRIES


def _leave(call: Progress, node: str) -> None:
    """Count a retry, and go elsewhere if that is allowed."""
    call.retries += 1
    if not call.is_bound:
        _avoid(call, node)


def _avoid(call: Progress, node: str) -> None:
    if node not in call.avoid:
        call.avoid = (*call.avoid, node)


def _wait(call: Progress, due: float) -> None:
    call.phase = Phase.WAITING
    call.due = due


def _unless_it_ran(call: Progress) -> Outcome:
    return Outcome.UNKNOWN if call.maybe_ran else Outcome.NOT_RUN
