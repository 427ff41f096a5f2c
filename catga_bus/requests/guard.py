"""Guard: the circuit breakers of a caller, for each request type and for each node."""

import logging
import math
from collections.abc import Collection
from weakref import WeakSet

import msgspec

from catga_bus.clock import Clock
from catga_bus.errors import CircuitOpenError, Code, Outcome
from catga_bus.requests.attempts import MAX_ASKED, Phase
from catga_bus.requests.calls import Call
from catga_bus.requests.peers import Address, Choice, Peers
from catga_bus.resilience.breakers import Breakers
from catga_bus.resilience.circuit_breaker import (
    ORDINARY,
    BreakerChange,
    BreakerKey,
    BreakerOptions,
    BreakerState,
    BreakerStatistics,
    Probes,
)
from catga_bus.result import Err
from catga_bus.watching import Watcher

log = logging.getLogger("catga_bus.requests")

_QUIET_SECONDS = 5.0  # between two looks for breakers that have nothing left to remember

_NO_FAILURES = (Code.DISCONNECTED, Code.OVERLOADED, Code.INVALID_MESSAGE, Code.TOO_LARGE)


class Admission(msgspec.Struct, frozen=True):
    """How a call may go while a breaker is open."""

    target: Address | None
    """The node that it should go to first; None for whichever the queue group gives."""

    probes: Probes
    """The half-open breakers that it is a probe of."""


class Guard:
    """Holds back calls to what fails, and lets a few through to see whether it works again.

    What counts as failure is that a node was silent about a call, forgot it, or died with it, although there was a
    connection. Whatever a node answered is none, a handler's own time-out included; nor is it one that a node was too
    busy, or that the deadline of a call passed while a live node had it. A trip drops nothing that is on its way.

    Args:
        options: Of each breaker; None for no breakers.
        peers: What is known of the nodes.
        clock: Monotonic seconds.

    Attributes:
        is_on: Whether there are breakers, so that answers are to be counted.
        held: What is held back or being probed; while it is empty every call may go. All that the hot path looks at.
        held_back: Calls that were refused because a breaker was open.
    """

    def __init__(self, options: BreakerOptions | None, peers: Peers, clock: Clock) -> None:
        self.is_on = options is not None
        self._breakers = Breakers(options or BreakerOptions(), on_change=self._changed)
        self._peers = peers
        self._clock = clock
        self._quiet_at = -math.inf
        self._watchers: WeakSet[Watcher[BreakerChange]] = WeakSet()
        self.held_back = 0
        self.held: Collection[BreakerKey] = self._breakers.open_keys

    @property
    def trips(self) -> int:
        """How often a breaker has opened."""
        return self._breakers.trips

    def watch(self, max_pending: int) -> Watcher[BreakerChange]:
        """Return an iterator of changes that begins with the last one of each breaker that is not closed."""
        watcher = Watcher(self._breakers.last_changes, self._missed, max_pending)
        self._watchers.add(watcher)
        return watcher

    def close(self) -> None:
        """Let those who watch come to their end."""
        for watcher in list(self._watchers):
            watcher.end()

    def _missed(self, count: int) -> BreakerChange:
        closed = BreakerState.CLOSED
        return BreakerChange(None, None, closed, closed, self._clock(), 0, 0, 0.0, count)

    def _changed(self, change: BreakerChange) -> None:
        _log_change(change)
        for watcher in list(self._watchers):
            watcher.push(change)

    def statistics(self) -> tuple[BreakerStatistics, ...]:
        """Return a snapshot of each breaker that has something to remember."""
        return tuple(self._breakers.statistics(self._clock()))

    def held_nodes(self) -> tuple[str, ...]:
        """Return the ids of the nodes that calls are kept from."""
        return tuple(node for _, node in self.held if node is not None)

    def held_names(self) -> tuple[str, ...]:
        """Return the types and nodes whose breaker is not closed."""
        return tuple(sorted(type_name or node or "" for type_name, node in self.held))

    def admit(self, type_name: str, target: Address | None, choice: Choice | None = None) -> Admission:
        """Decide how a call may go.

        Args:
            type_name: The request type.
            target: The node that the caller named; None for any.
            choice: Which nodes may take it; None for all.

        Raises:
            CircuitOpenError: Not at all for now.
        """
        now = self._clock()
        probes: list[tuple[BreakerKey, int]] = []
        self._enter((type_name, None), f"calls of {type_name}", now, probes)
        if target is not None:
            self._enter_node(target, now, probes)
            return Admission(target, tuple(probes))
        held = self.held_nodes()
        tried = self._peers.pick(type_name, (), lambda node: node.id in held and (choice is None or choice(node)))
        if tried is not None:
            probe = self._breakers.allow((None, tried[1]), now)
            if probe:
                return Admission(tried, (*probes, ((None, tried[1]), probe)))
        fit = self._peers.pick(type_name, held, choice)
        if fit is None and choice is not None and tried is not None:
            self._enter_node(tried, now, probes)  # there is no other
        return Admission(fit, tuple(probes))

    def _enter_node(self, target: Address, now: float, probes: list[tuple[BreakerKey, int]]) -> None:
        try:
            self._enter((None, target[1]), f"calls to node {target[1]}", now, probes)
        except CircuitOpenError:
            self._drop(tuple(probes), now)
            raise

    def _enter(self, key: BreakerKey, what: str, now: float, probes: list[tuple[BreakerKey, int]]) -> None:
        if key not in self.held:
            return
        probe = self._breakers.allow(key, now)
        if probe is None:
            self.held_back += 1
            text = f"{what} are held back, because too many have failed lately"
            raise CircuitOpenError(text, outcome=Outcome.NOT_RUN, retryable=True)
        if probe != ORDINARY:
            probes.append((key, probe))

    def answered(self, type_name: str, node: str, count: int) -> None:
        """Count answers, of a batch at a time; call it while `is_on`."""
        now = self._clock()
        self._breakers.succeeded((type_name, None), now, count)
        self._breakers.succeeded((None, node), now, count)
        if now >= self._quiet_at:
            self._quiet_at = now + _QUIET_SECONDS
            self._breakers.forget_quiet(now)

    def node_failed(self, call: Call, node: str) -> None:
        """A node was silent about a call, forgot it, or died with it: counts once, however often it is said."""
        if call.failed_at == node:
            return
        call.failed_at = node
        key: BreakerKey = (None, node)
        now = self._clock()
        mine = call.take_probes(key)
        for _, probe in mine:
            self._breakers.end_probe(key, probe, now, succeeded=False)
        if self.is_on and not mine:
            self._breakers.failed(key, now, admitted=call.began)

    def replied(self, call: Call, node: str | None) -> None:
        """A node has answered a call, whatever it said: what it was a probe of works, unless that is another node."""
        now = self._clock()
        for key, probe in call.take_probes():
            works = key[1] is None or key[1] == node
            self._breakers.end_probe(key, probe, now, succeeded=works or None)

    def ended(self, call: Call, result: Err, *, is_answer: bool) -> None:
        """Count the end of a call that got no OK.

        Args:
            call: The call.
            result: What its caller is told.
            is_answer: Whether that is what a node answered; else nobody did, and it was given up.
        """
        if is_answer:
            self.replied(call, result.node)
            return
        if _is_silence(call, result) and call.node is not None:
            self.node_failed(call, call.node)
        now, key = self._clock(), (call.route.type_name, None)
        is_failure = _is_failure(call, result)
        probes = call.take_probes()
        for one, probe in probes:
            self._breakers.end_probe(one, probe, now, succeeded=False if is_failure and one == key else None)
        if is_failure and self.is_on and all(one != key for one, _ in probes):
            self._breakers.failed(key, now, admitted=call.began)

    def dropped(self, call: Call) -> None:
        """Nobody waits for a call any more: as a probe it says nothing."""
        self._drop(call.take_probes(), self._clock())

    def _drop(self, probes: Probes, now: float) -> None:
        for key, probe in probes:
            self._breakers.end_probe(key, probe, now, succeeded=None)


def _is_silence(call: Call, result: Err) -> bool:
    """Whether the node of the last attempt says nothing: not that it has the call, or not what became of it."""
    if result.code != Code.TIMEOUT or result.outcome is not Outcome.UNKNOWN or result.node is not None:
        return False
    progress = call.trouble()
    return progress.phase is Phase.SENT or (progress.phase is Phase.ACCEPTED and progress.asked >= MAX_ASKED)


def _is_failure(call: Call, result: Err) -> bool:
    """Whether a call without an answer was lost: its node was silent about it, forgot it, or died with it.

    That the time was too short for a live node that has it is no failure, nor that nodes were too busy; and what
    a lost connection leaves open is none of theirs.
    """
    if result.outcome is not Outcome.UNKNOWN or result.code in _NO_FAILURES:
        return False
    if _is_silence(call, result):
        return True
    progress = call.trouble()
    if progress.phase is Phase.ACCEPTED:
        return call.failed_at == progress.node
    return call.failed_at is not None or progress.silences > 0


def _log_change(change: BreakerChange) -> None:
    what = f"calls of {change.type_name}" if change.node is None else f"calls to node {change.node}"
    level = logging.WARNING if change.open_seconds > 0.0 else logging.INFO
    log.log(level, "breaker of %s: %s, was %s", what, change.after, change.before)
