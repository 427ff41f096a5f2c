"""Failover: what the asking side does when a call falls silent, its time is up, or a node dies with it."""

from collections import deque
from collections.abc import Callable, Iterable

from catga_bus.requests import attempts
from catga_bus.requests.attempts import Phase, Step, Verdict
from catga_bus.requests.budget import RetryBudget
from catga_bus.requests.calls import Call
from catga_bus.requests.guard import Guard
from catga_bus.requests.peers import Address, Peers
from catga_bus.requests.queries import Queries

_MAX_DEATHS_KNOWN = 64  # of nodes that handled something: only those in the life of a call matter


class Failover:
    """Asks `attempts` what follows from time and from deaths, and does it.

    Args:
        peers: What is known of the other nodes.
        guard: Told which node a call failed at.
        queries: Asks nodes, and tells them what they need not start.
        budget: What retries are charged to.
        write: Writes a call again and returns the node it was addressed to.
        end: Ends a call.

    Attributes:
        count: Attempts made after the silence or the death of a node.
    """

    def __init__(
        self,
        peers: Peers,
        guard: Guard,
        queries: Queries,
        budget: RetryBudget,
        *,
        write: Callable[[Call, float], Address | None],
        end: Callable[[Call, Verdict], None],
    ) -> None:
        self._peers = peers
        self._guard = guard
        self._queries = queries
        self._budget = budget
        self._write = write
        self._end = end
        self._deaths: deque[tuple[float, str, frozenset[str]]] = deque(maxlen=_MAX_DEATHS_KNOWN)
        self.count = 0

    def look_at(self, calls: Iterable[Call], now: float) -> None:
        """Do what time asks for, with a connection: write calls again, or ask nodes about them."""
        ask: dict[Address, list[str]] = {}
        cancel: dict[Address, list[str]] = {}
        for call in calls:
            progress = call.trouble()
            is_silent, node = progress.phase in (Phase.SENT, Phase.ACCEPTED), progress.node
            deaths = self._deaths_of(call.route.type_name, progress.since)
            is_stalled = node is not None and self._peers.is_stalled(node)
            step = attempts.after_silence(progress, now, self._budget, deaths, stalled=is_stalled)
            call.wake()
            if step is Step.ASK:
                self._add_to(ask, node, call)
            elif step is Step.GIVE_UP:
                self._end(call, attempts.after_deaths(progress))
            elif step is Step.WRITE:
                target = self._write(call, now)
                if is_silent and node is not None:
                    self._guard.node_failed(call, node)
                if is_silent and progress.phase is Phase.SENT:
                    self.count += 1
                    self._cancel_elsewhere(cancel, call, node, target)
        self._queries.ask(ask)
        self._queries.cancel(cancel)

    def node_died(
        self, calls: Iterable[Call], node_id: str, types: Iterable[str], now: float, *, connected: bool
    ) -> None:
        """Move what a dead node has elsewhere at once.

        Args:
            calls: Those that the node has or was sent.
            node_id: The node.
            types: What it handled.
            now: The present instant.
            connected: Whether there is a connection.
        """
        handled = frozenset(types)
        if handled:
            self._deaths.append((now, node_id, handled))
        cancel: dict[Address, list[str]] = {}
        for call in calls:
            progress = call.trouble()
            if progress.phase not in (Phase.SENT, Phase.ACCEPTED):
                continue
            self._guard.node_failed(call, node_id)
            verdict = attempts.after_death(progress, now, node_id)
            call.wake()
            self._add_to(cancel, node_id, call)  # it may be frozen, and go on
            if verdict is not None:
                self._end(call, verdict)
            elif progress.idempotent:
                self.count += 1
        if connected:
            self._queries.cancel(cancel)

    def ask_after(self, calls: Iterable[Call]) -> None:
        """Ask the nodes that have accepted these calls what became of them."""
        ask: dict[Address, list[str]] = {}
        for call in calls:
            self._add_to(ask, call.node, call)
        self._queries.ask(ask)

    def _add_to(self, ids_of: dict[Address, list[str]], node: str | None, call: Call) -> None:
        address = None if node is None else self._peers.address(node)
        if address is not None:
            ids_of.setdefault(address, []).append(call.id)

    def _cancel_elsewhere(
        self, cancel: dict[Address, list[str]], call: Call, node: str | None, target: Address | None
    ) -> None:
        """Note that whoever may hold a silent call, and is not asked again, need not start it."""
        if node is not None:
            if target is None or target[1] != node:
                self._add_to(cancel, node, call)
            return
        for address in self._peers.doubtful(call.route.type_name):
            if address != target:
                cancel.setdefault(address, []).append(call.id)

    def _deaths_of(self, type_name: str, since: float) -> int:
        """Return how many nodes have died since an instant that handled a type; one that died twice counts once."""
        return len({node for died, node, types in self._deaths if died >= since and type_name in types})
