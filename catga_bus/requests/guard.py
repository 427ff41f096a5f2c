"""Guard: the circuit breakers of a caller, for each request type and for each node."""

import logging
import math
from collections.abc import Collection

import msgspec

from catga_bus.clock import Clock
from catga_bus.errors import CircuitOpenError, Code, Outcome
from catga_bus.requests.calls import Call
from catga_bus.requests.peers import Address, Choice, Peers
from catga_bus.resilience.breakers import Breakers
from catga_bus.resilience.circuit_breaker import (
    ORDINARY,
    BreakerChange,
    BreakerKey,
    BreakerOptions,
    BreakerStatistics,
    Probes,
)
from catga_bus.result import Err

log = logging.getLogger("catga_bus.requests")

_QUIET_SECONDS = 5.0  # between two looks for breakers that have nothing left to remember


class Admission(msgspec.Struct, frozen=True):
    """How a call may go while a breaker is open."""

    target: Address | None
    """The node that it should go to first; None for whichever the queue group gives."""

    probes: Probes
    """The half-open breakers that it is a probe of."""


class Guard:
    """Holds back calls to what fails, and lets a few through to see whether it works again.

    What counts as failure is that nobody knows what became of a call although there was a connection: no answer, or a
    node that died or forgot it. What a handler answered, or that a node was too busy, is none. A trip drops nothing
    that is on its way.

    Args:
        options: Of each breaker; None for no breakers.
        peers: What is known of the nodes.
        clock: Monotonic seconds.

    Attributes:
        held: What is held back or being probed; while it is empty every call may go. All that the hot path looks at.
    """

    def __init__(self, options: BreakerOptions | None, peers: Peers, clock: Clock) -> None:
        self._is_on = options is not None
        self._breakers = Breakers(options or BreakerOptions(), on_change=_log_change)
        self._peers = peers
        self._clock = clock
        self._quiet_at = -math.inf
        self.held: Collection[BreakerKey] = self._breakers.open_keys

    @property
    def is_watching(self) -> bool:
        """Whether something has failed lately, so that successes count, too."""
        return bool(self._breakers.by_key)

    @property
    def trips(self) -> int:
        """How often a breaker has opened."""
        return self._breakers.trips

    def statistics(self) -> tuple[BreakerStatistics, ...]:
        """Return a snapshot of each breaker that has something to remember."""
        return tuple(self._breakers.statistics(self._clock()))

    def held_nodes(self) -> tuple[str, ...]:
        """Return the ids of the nodes that calls are kept from."""
        return tuple(node for type_name, node in self.held if type_name is None and node is not None)

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
            self._end(tuple(probes), now, succeeded=None)
            raise

    def _enter(self, key: BreakerKey, what: str, now: float, probes: list[tuple[BreakerKey, int]]) -> None:
        if key not in self.held:
            return
        probe = self._breakers.allow(key, now)
        if probe is None:
            text = f"{what} are held back, because too many have failed lately"
            raise CircuitOpenError(text, outcome=Outcome.NOT_RUN, retryable=True)
        if probe != ORDINARY:
            probes.append((key, probe))

    def answered(self, type_name: str, node: str, count: int) -> None:
        """Count answers; call it while `is_watching`."""
        now = self._clock()
        self._breakers.succeeded((type_name, None), now, count)
        self._breakers.succeeded((None, node), now, count)
        if now >= self._quiet_at:
            self._quiet_at = now + _QUIET_SECONDS
            self._breakers.forget_quiet(now)

    def node_failed(self, call: Call, node: str) -> None:
        """A node was silent about a call, forgot it, or died with it."""
        key: BreakerKey = (None, node)
        now = self._clock()
        mine = call.take_probes(key)
        if mine:
            self._end(mine, now, succeeded=False)
        elif self._is_on:
            self._breakers.failed(key, now, admitted=call.began)

    def ended(self, call: Call, result: Err) -> None:
        """Count the end of a call that got no OK."""
        is_failure = result.outcome is Outcome.UNKNOWN and result.code != Code.DISCONNECTED
        now = self._clock()
        if is_failure and call.node is not None:
            self.node_failed(call, call.node)
        key: BreakerKey = (call.route.type_name, None)
        if is_failure and self._is_on and all(probe[0] != key for probe in call.probes):
            self._breakers.failed(key, now, admitted=call.began)
        if call.probes:
            self.end_probes(call, succeeded=None if result.outcome is Outcome.NOT_RUN else not is_failure)

    def end_probes(self, call: Call, *, succeeded: bool | None) -> None:
        """Say how a probe ended: True if it was answered, None if that says nothing."""
        self._end(call.take_probes(), self._clock(), succeeded=succeeded)

    def _end(self, probes: Probes, now: float, *, succeeded: bool | None) -> None:
        for key, probe in probes:
            self._breakers.end_probe(key, probe, now, succeeded=succeeded)


def _log_change(change: BreakerChange) -> None:
    what = f"calls of {change.type_name}" if change.node is None else f"calls to node {change.node}"
    level = logging.WARNING if change.open_seconds > 0.0 else logging.INFO
    log.log(level, "breaker of %s: %s, was %s", what, change.after, change.before)
