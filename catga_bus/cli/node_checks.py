"""Decides from facts about nodes what is wrong with them. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import msgspec

from catga_bus.cli.findings import Finding, Level
from catga_bus.cli.permissions import pings_of
from catga_bus.cluster.records import NodeStatus
from catga_bus.wire import Names, token

_LONG_STALL: Final = 0.25
# Seconds: requests wait as long, and a node with a longer gap has to make sure that it still takes part.

_CLOCK_TOLERANCE: Final = 1.0
# Seconds. Nothing in the bus decides by the time of day; a second is where logs and traces of several nodes become
# hard to read together. NTP keeps hosts within a few hundredths.

_MAX_CLOCKS: Final = 5  # named in one line

_UNWELL: Final = {NodeStatus.SUSPECT: Level.WARNING, NodeStatus.FAULTED: Level.FAILED}


class ClockReading(msgspec.Struct, frozen=True):
    """How far the clock of a node is from the clock here."""

    offset: float
    """Seconds; above 0 the node's is ahead."""

    error: float
    """Seconds by which `offset` may be wrong: half of the round trip."""


def read_clock(sent: float, at_node: float, received: float) -> ClockReading:
    """Compare clocks by one question and its answer, as NTP does.

    Args:
        sent: When the question left, in seconds by the clock here.
        at_node: When the node answered, in seconds by its own.
        received: When the answer came, in seconds by the clock here.
    """
    return ClockReading(at_node - (sent + received) / 2, max(0.0, (received - sent) / 2))


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one node; None where nobody has said."""

    node_id: str
    service: str
    version: str
    types: tuple[str, ...] = ()
    """Request types that it handles."""

    is_heard: bool = True
    """Whether its heartbeats are."""

    status: str | None = None
    """A `NodeStatus`."""

    is_ready: bool | None = None
    """Whether it says that it takes work."""

    answers: bool | None = None
    """Whether it answered a question on its own subject."""

    breakers: tuple[str, ...] = ()
    """Request types and nodes that it keeps its calls from."""

    wire_versions: tuple[int, ...] | None = None
    """Those that it reads."""

    stall: float | None = None
    """Seconds that its event loop was late, at most."""

    clock: ClockReading | None = None


def check_nodes(nodes: Sequence[NodeFacts] | None, names: Names) -> list[Finding]:
    """Judge the nodes of a namespace, each by itself and all together; None if nothing of them is heard."""
    if nodes is None:
        why = "no heartbeat was heard, not even of one's own"
        fix = f"allow subscribe and publish {names.heartbeats()!r} to the user, or examine as an operator"
        return [Finding("nodes", Level.UNKNOWN, "the nodes are not known", why, fix)]
    if not nodes:
        what = "no node is heard of"
        why = "nobody would handle a request"
        return [Finding("nodes", Level.WARNING, what, why, "start one: catga run MODULE:BUS")]
    services = {node.service for node in nodes}
    findings = [Finding("nodes", Level.OK, f"{_count(len(nodes), 'node')} of {_count(len(services), 'service')}")]
    findings += _check_ids(nodes)
    findings += _check_types(nodes)
    findings += _check_versions(nodes)
    findings += _check_wire(nodes)
    findings += _check_reach(nodes, names)
    findings += _check_health(nodes)
    findings += _check_clocks(nodes)
    return findings


def _check_ids(nodes: Sequence[NodeFacts]) -> list[Finding]:
    counts: dict[str, int] = defaultdict(int)
    for node in nodes:
        counts[node.node_id] += 1
    why = "answers, heartbeats and what is sent to this id reach both"
    fix = "give each process an id of its own, or none: then it is drawn"
    return [
        Finding("node id", Level.FAILED, f"{count} nodes have the id {node_id!r}", why, fix)
        for node_id, count in counts.items()
        if count > 1
    ]


def _check_types(nodes: Sequence[NodeFacts]) -> list[Finding]:
    services: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        for name in node.types:
            services[name].add(node.service)
    why = "each gets a part of the requests that were meant for the other"
    return [
        Finding(
            "types",
            Level.FAILED,
            f"{name} is handled by the services {' and '.join(sorted(several))}",
            why,
            "name one of the two differently: class X(Request[R], type_name=...)",
        )
        for name, several in sorted(services.items())
        if len(several) > 1
    ]


def _check_versions(nodes: Sequence[NodeFacts]) -> list[Finding]:
    versions: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        versions[node.service].add(node.version)
    why = "right while nodes are being replaced; after that some were forgotten"
    return [
        Finding(
            "versions", Level.WARNING, f"service {service} runs {', '.join(sorted(several))}", why, "finish the roll"
        )
        for service, several in sorted(versions.items())
        if len(several) > 1
    ]


def _check_wire(nodes: Sequence[NodeFacts]) -> list[Finding]:
    known = [set(node.wire_versions) for node in nodes if node.wire_versions is not None]
    if not known:
        return []
    shared = set.intersection(*known)
    every = set.union(*known)
    if not shared:
        what = f"no wire version is read by all nodes; together they read {_numbers(every)}"
        why = "some nodes cannot read what others send"
        return [Finding("wire", Level.FAILED, what, why, "bring all nodes to releases that share a version")]
    if max(every) > max(shared):
        what = f"wire {max(shared)} is spoken, because not all nodes read {max(every)}"
        return [Finding("wire", Level.WARNING, what, "what is new in it waits for them", "update the older nodes")]
    return [Finding("wire", Level.OK, f"all nodes read wire {max(shared)}")]


def _check_reach(nodes: Sequence[NodeFacts], names: Names) -> list[Finding]:
    """Find nodes that the others do not know, or cannot ask."""
    findings = []
    for node in nodes:
        whose = f"node {node.node_id} of {node.service}"
        if not node.is_heard:
            why = "callers do not know that it lives, and do not learn when it dies"
            fix = f"allow publish {names.heartbeats()!r} to its user; its log says what the server refuses"
            findings.append(Finding("heartbeats", Level.FAILED, f"no heartbeat of {whose} is heard", why, fix))
        if node.answers is False and node.status in (NodeStatus.ONLINE, NodeStatus.SUSPECT):
            own = _own_subjects(node, names)
            why = "others believe only who answers: it is not known to them, or dead when one heartbeat comes late"
            fix = f"allow subscribe {own!r} to its user, and to answer, as deploy/nats/users does"
            what = f"{whose} does not answer the question whether it lives"
            findings.append(Finding("answers", Level.WARNING, what, why, fix))
    return findings


def _own_subjects(node: NodeFacts, names: Names) -> str:
    if not node.types:
        return pings_of(node.service, node.node_id, names)
    return names.node(node.service, node.node_id).replace(f".{token(node.node_id)}.", ".")


def _check_health(nodes: Sequence[NodeFacts]) -> list[Finding]:
    return [finding for node in nodes for finding in _health_of(node, f"node {node.node_id} of {node.service}")]


def _health_of(node: NodeFacts, whose: str) -> list[Finding]:
    findings = []
    if node.status in _UNWELL:
        fix = "look at its process and its log; restart it if it does not come back"
        level = _UNWELL[NodeStatus(node.status)]
        findings.append(Finding("status", level, f"{whose} is {node.status}", "callers avoid it", fix))
    elif node.status == NodeStatus.DRAINING:
        findings.append(Finding("status", Level.OK, f"{whose} is draining: it ends within its drain_timeout"))
    elif node.is_ready is False:
        fix = "wait if it has just started; else look for what blocks its event loop or its connection"
        findings.append(Finding("status", Level.WARNING, f"{whose} is not ready", "callers avoid it", fix))
    if node.stall is not None and node.stall > _LONG_STALL:
        what = f"the event loop of {whose} has been blocked for {node.stall:.1f} s"
        why = "it answers nothing meanwhile, and callers go elsewhere"
        fix = "make the handler that blocks a `def`, which runs in a thread, or await what it waits for"
        findings.append(Finding("stall", Level.WARNING, what, why, fix))
    if node.breakers:
        what = f"{whose} keeps its calls from {', '.join(node.breakers)}: circuit breakers are open"
        why = "what it asked there has failed lately; but for a few trials its calls fail at once, or go elsewhere"
        findings.append(Finding("breakers", Level.WARNING, what, why, "look at the log of what it calls"))
    return findings


def _check_clocks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    told = [(f"node {node.node_id} of {node.service}", node.clock) for node in nodes if node.clock is not None]
    if not told:
        what = "the clocks of the nodes were not compared"
        fix = "allow publish 'catga.to.*.*.ping' to the user, or examine as an operator"
        return [Finding("clocks", Level.UNKNOWN, what, "no node has answered what time it is", fix)]
    # The clock here is one of them, and may be the one that is wrong.
    readings = [*told, ("this machine", ClockReading(0.0, max(clock.error for _, clock in told)))]
    middle = statistics.median_low([clock.offset for _, clock in readings])
    wrong = _apart(readings, middle)
    if not wrong:
        widest = max(abs(clock.offset - middle) for _, clock in told)
        return [Finding("clocks", Level.OK, f"{_count(len(told), 'clock')} differ by at most {widest:.2f} s")]
    rivals = len(wrong) - len(_apart(wrong, statistics.median_low([clock.offset for _, clock in wrong])))
    if len(readings) - len(wrong) <= rivals:
        return [_different_clocks(readings)]
    return [_wrong_clock(whose, clock.offset - middle) for whose, clock in wrong]


_Reading: TypeAlias = tuple[str, ClockReading]  # and whose clock it is


def _apart(readings: Sequence[_Reading], middle: float) -> list[_Reading]:
    """Return the clocks that do not show what most show, as far as that can be told."""
    return [one for one in readings if abs(one[1].offset - middle) - one[1].error > _CLOCK_TOLERANCE]


def _different_clocks(readings: Sequence[_Reading]) -> Finding:
    in_order = sorted(readings, key=lambda one: one[1].offset)
    shown = [f"{whose} {clock.offset:+,.1f} s" for whose, clock in in_order[:_MAX_CLOCKS]]
    if more := len(readings) - len(shown):
        shown[-1] += f" and {more} more"
    what = f"clocks differ by {in_order[-1][1].offset - in_order[0][1].offset:,.1f} s: {', '.join(shown)}"
    why = "which of them is right is not known; logs and traces cannot be put in order"
    return Finding("clocks", Level.WARNING, what, why, "run an NTP client on each machine, such as chrony")


def _wrong_clock(whose: str, offset: float) -> Finding:
    way = "ahead of" if offset > 0 else "behind"
    what = f"the clock of {whose} is {abs(offset):,.1f} s {way} the others"
    why = "logs and traces cannot be put in order; deadlines and failover use no clock of the day"
    return Finding("clocks", Level.WARNING, what, why, "run an NTP client there, such as chrony")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))
