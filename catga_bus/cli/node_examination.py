"""Gathers what `catga doctor` judges of nodes: what they say of themselves, and whether they answer.

Decided: nodes are asked, because their heartbeats alone do not tell three things. How far a clock is off is known
within half of a round trip only where a question is answered; a node that nobody can ask is taken for dead when one of
its heartbeats comes late; and of two nodes with one id a view has one, while both answer. The discovery of services is
asked as well: it finds nodes whose heartbeats nobody hears.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from catga_bus.bus import Bus
from catga_bus.cli.connection import COMMAND_KEY
from catga_bus.cli.examination import Refusals, gather
from catga_bus.cli.node_checks import ClockReading, NodeFacts, read_clock
from catga_bus.clock import Clock, monotonic, utc_now
from catga_bus.cluster.records import NodeInfo
from catga_bus.codec import DECODE_ERRORS, Gate, GateError
from catga_bus.errors import CatgaError
from catga_bus.requests.service_api import NAMESPACE_KEY, NODE_KEY, SERVICE_KEY
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.wire import SERVICE_API, Beat, Kind, Names, ping_payload

_LOOK_SECONDS: Final = 1.0
# How long heartbeats are watched: four of a node with default settings.

_ANSWER_SECONDS: Final = 0.5
# A node answers in milliseconds, from a thread that a blocked event loop does not block.

_POLL_SECONDS: Final = 0.1
_SENDER: Final = "catga-doctor"


class Answer(msgspec.Struct, frozen=True):
    """How a node answered a question."""

    beat: Beat
    clock: ClockReading


class _Endpoint(msgspec.Struct):
    name: str


class _ServiceInfo(msgspec.Struct):
    version: str
    metadata: dict[str, str]
    endpoints: list[_Endpoint] = []


async def examine_nodes(
    bus: Bus, transport: NatsTransport, refusals: Refusals, names: Names, *, clock: Clock = monotonic
) -> list[NodeFacts] | None:
    """Return what is known of all nodes that are no commands.

    Args:
        bus: Hears them; not started yet, and closed in the end. None of its handlers is needed.
        transport: Asks them.
        refusals: What the server refuses to `transport`.
        names: The subjects.
        clock: Monotonic seconds.

    Returns:
        None if nothing is heard, not even the bus' own heartbeats.
    """
    try:
        async with bus:
            until = clock() + _LOOK_SECONDS
            asked = [node for node in bus.nodes() if COMMAND_KEY not in node.metadata]
            answers, discovered = await asyncio.gather(
                ask_nodes(transport, refusals, names, asked), nodes_by_discovery(transport, refusals, names)
            )
            stalls: dict[str, float] = {}
            while True:
                nodes = bus.nodes()
                for node in nodes:
                    stalls[node.id] = max(stalls.get(node.id, 0.0), node.stall)
                if clock() >= until:
                    break
                await asyncio.sleep(_POLL_SECONDS)
            if not bus.statistics().nodes.beats_heard:
                return None
    except CatgaError:
        return None
    seen = [msgspec.structs.replace(node, stall=stalls[node.id]) for node in nodes if COMMAND_KEY not in node.metadata]
    asked_ids = None if answers is None else {node.id for node in asked}
    return facts_of(seen, asked_ids, answers or {}, discovered or ())


def facts_of(
    seen: Iterable[NodeInfo],
    asked: set[str] | None,
    answers: Mapping[str, Sequence[Answer]],
    discovered: Iterable[NodeFacts],
) -> list[NodeFacts]:
    """Put together what is known of each node from three sides. Pure.

    Args:
        seen: What the heartbeats say.
        asked: Ids of the nodes that were asked; None if this user may ask none.
        answers: What they answered, by id.
        discovered: Who answered to the discovery of services.

    Returns:
        One for each node; where several nodes have one id, one for each of them.
    """
    facts = []
    for node in seen:
        told = answers.get(node.id, ())
        facts.append(
            NodeFacts(
                node_id=node.id,
                service=node.service,
                version=node.version,
                types=node.types,
                status=str(node.status),
                is_ready=node.is_ready,
                wire_versions=node.wire_versions,
                stall=node.stall,
                breakers=node.breakers,
                answers=bool(told) if asked is not None and node.id in asked else None,
                clock=min((one.clock for one in told), key=lambda clock: clock.error, default=None),
            )
        )
        lives = {one.beat.incarnation: one.beat for one in told}
        lives.pop(node.incarnation, None)
        facts += [
            NodeFacts(node_id=node.id, service=other.service, version=other.version, types=tuple(other.types))
            for other in lives.values()
        ]
    known = {one.node_id for one in facts}
    return facts + [one for one in discovered if one.node_id not in known]


async def ask_nodes(
    transport: NatsTransport, refusals: Refusals, names: Names, nodes: Sequence[NodeInfo]
) -> dict[str, list[Answer]] | None:
    """Ask nodes whether they live, all at once; return the answers of each id that come within half a second.

    Returns:
        None if this user may not ask.
    """
    gate = Gate()
    answers: dict[str, list[Answer]] = {node.id: [] for node in nodes}
    sent: dict[str, tuple[NodeInfo, float]] = {}

    def take(subject: str, payload: bytes, _: str, __: Mapping[str, str] | None) -> None:
        received = utc_now().timestamp()
        node, asked_at = sent.get(subject, (None, 0.0))
        if node is None or (beat := _beat_of(gate, payload)) is None or beat.id != node.id:
            return
        told = answers[node.id]
        if len(told) < _MAX_ANSWERS:
            told.append(Answer(beat, read_clock(asked_at, beat.utc_ms / 1000, received)))

    refused = len(refusals.subjects)
    inbox = transport.new_inbox()
    subscription = await transport.subscribe(f"{inbox}.*", take)
    try:
        await transport.flush()
        for place, node in enumerate(nodes):
            reply = f"{inbox}.{place}"
            sent[reply] = node, utc_now().timestamp()
            transport.publish(names.node_ping(node.service, node.id), ping_payload(_SENDER), reply=reply)
            transport.push()
        await asyncio.sleep(_ANSWER_SECONDS if nodes else 0.0)
        return None if any(map(names.is_ping, refusals.subjects[refused:])) else answers
    finally:
        await subscription.close()


_MAX_ANSWERS: Final = 16  # to one question: two are one too many already


def _beat_of(gate: Gate, payload: bytes) -> Beat | None:
    try:
        beats = gate.beats(payload).frames if gate.kind(payload) == Kind.HEARTBEAT else ()
    except GateError:
        return None
    return beats[0] if beats else None


async def nodes_by_discovery(transport: NatsTransport, refusals: Refusals, names: Names) -> list[NodeFacts] | None:
    """Ask all nodes of a namespace who they are, as `nats micro` does; an entry for each answer.

    Returns:
        None if this user may not ask. One that may only PING does not learn the types.
    """
    for verb in ("INFO", "PING"):
        answers = await gather(transport, refusals, f"{SERVICE_API}.{verb}")
        if answers is not None:
            return [facts for facts in (_node_of(payload, names) for payload in answers) if facts is not None]
    return None


def _node_of(payload: bytes, names: Names) -> NodeFacts | None:
    try:
        Gate().json(payload)
        info = msgspec.json.decode(payload, type=_ServiceInfo)
    except DECODE_ERRORS:  # the gate's refusal among them
        return None
    node_id, service = info.metadata.get(NODE_KEY), info.metadata.get(SERVICE_KEY)
    if info.metadata.get(NAMESPACE_KEY) != names.namespace or not node_id or not service:
        return None  # a service that is not of this bus
    types = tuple(endpoint.name for endpoint in info.endpoints)
    return NodeFacts(node_id=node_id, service=service, version=info.version, types=types, is_heard=False)
