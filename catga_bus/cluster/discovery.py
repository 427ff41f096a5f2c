"""Discovery: how nodes hear of each other. A seam, filled for NATS and, in this process, for `memory://`."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from catga_bus.clock import Clock, utc_now
from catga_bus.cluster.beats import Identity, Report
from catga_bus.cluster.detector import Probe
from catga_bus.cluster.heartbeat import Beacon, Gauge, Heart, HeartThread
from catga_bus.cluster.records import Incarnation, NodeInfo, NodeStatus, info_of
from catga_bus.codec import DECODE_ERRORS, Gate, GateError, explain
from catga_bus.errors import CatgaError
from catga_bus.rarely import RareLog
from catga_bus.transport.base import Subscription, Transport, TransportEvents
from catga_bus.transport.memory import MemoryTransport
from catga_bus.wire import NO_RESPONDERS, STATUS_HEADER, Beat, Kind, Names, ping_payload


class NodeSink(Protocol):
    """What a discovery tells; every method is called on the event loop of the node and returns at once."""

    def on_beat(self, info: NodeInfo, seq: int) -> None:
        """A node said that it lives. A hint: anybody may have said it."""

    def on_answer(self, info: NodeInfo, seq: int, number: int) -> None:
        """A node answered the probe with this number."""

    def on_no_responders(self, node_id: str, number: int) -> None:
        """It is certain that nobody is there to answer the probe with this number."""

    def on_hint(self, node_id: str) -> None:
        """A node may be gone."""

    def on_rejected(self, reason: str) -> None:
        """Something was heard that is no beat, or not of the node whose place it came from."""


class NodeDiscovery(Protocol):
    """How a node hears of the others and is heard of. `start`, `settle`, `announce`, `close`, in this order.

    - Beats of one node arrive in order; they may be lost, and anybody may forge one.
    - A probe reaches only who listens on that node's own subject. It ends with one answer or more, or with
      `on_no_responders`, or with nothing; who asks waits for as long as it likes.
    - A node that announced hears its own beats like those of others.
    - It beats on while the event loop of the node is blocked, if it can, and says so.
    - Cancelling any of the calls leaves something that `close` ends.
    """

    answer_seconds: float
    """How long the answer to a probe takes, with plenty to spare."""

    @property
    def sent(self) -> int:
        """Beats sent so far."""
        ...

    async def start(self, sink: NodeSink) -> None:
        """Listen; certain to hear what is said after this returns."""

    async def settle(self) -> None:
        """Wait until every live node has been heard, however rarely it beats: all were asked to at the start."""

    async def announce(self, identity: Identity, incarnation: Incarnation) -> None:
        """Say that this node lives, again and again, and answer probes.

        Raises:
            CatgaError: There is no way to say it.
        """

    def tell(self, status: NodeStatus) -> None:
        """Say a new status at once."""

    def report(self, report: Report) -> None:
        """Take what the next beats say of how the node is."""

    def set_interval(self, interval: float) -> None:
        """Beat every `interval` seconds from now on."""

    def probe(self, probe: Probe) -> None:
        """Ask a node whether it lives."""

    async def withdraw(self) -> None:
        """Say that this node leaves, and answer no more probes, within a second; it still hears of the others."""

    async def close(self) -> None:
        """Say that this node leaves, and listen no more; within a second. Closing twice is fine."""


class BeatDiscovery:
    """Beats over a transport: what the two discoveries share.

    Args:
        transport: The node's connection: it hears the beats and asks.
        names: The subjects.
        gate: Lets beats in.
        clock: Monotonic seconds.
        node_id: Who asks.
        interval: Seconds between beats.
        inbox_prefix: What answers to questions begin with.
        hints: Subject on which the server tells of closed connections, or None.
    """

    answer_seconds = 0.05

    def __init__(
        self,
        transport: Transport,
        names: Names,
        gate: Gate,
        clock: Clock,
        *,
        node_id: str,
        interval: float,
        inbox_prefix: str = "_INBOX",
        hints: str | None = None,
    ) -> None:
        self._transport = transport
        self._names = names
        self._gate = gate
        self._clock = clock
        self._interval = interval
        self._hints = hints
        self._ping = ping_payload(node_id)
        self._roll_call = names.roll_call()
        self._log = RareLog(logging.getLogger("catga_bus.cluster"), clock)
        # Whoever is asked learns where the answer goes. So it says nothing about the inbox in which answers to requests
        # arrive, and each probe has a random word of its own: who has been asked cannot answer for another one.
        self._inbox = f"{inbox_prefix}.{secrets.token_hex(11)}.ping"
        self._roll_inbox = f"{inbox_prefix}.{secrets.token_hex(11)}.roll.call"
        self._asked: dict[str, Probe] = {}  # the probes that have not ended, by that word
        self._subscriptions: list[Subscription] = []
        self._heart: Heart | None = None
        self._sent_before = 0  # by the heart that has stopped
        self._sink: NodeSink
        self._started_at = 0.0

    @property
    def sent(self) -> int:
        """Beats sent so far."""
        return self._sent_before + (self._heart.sent if self._heart is not None else 0)

    async def start(self, sink: NodeSink) -> None:
        """Listen; see `NodeDiscovery`."""
        self._sink = sink
        subscribe = self._transport.subscribe
        self._subscriptions.append(await subscribe(f"{self._inbox}.*", self._on_answer))
        self._subscriptions.append(await subscribe(self._roll_inbox, self._on_roll))
        self._subscriptions.append(await subscribe(self._names.heartbeats(), self._on_beat))
        if self._hints is not None:
            self._subscriptions.append(await subscribe(self._hints, self._on_disconnect_event))
        with contextlib.suppress(CatgaError):  # then they are heard when they beat
            self._transport.publish(self._roll_call, self._ping, reply=self._roll_inbox)
        await self._transport.flush()
        self._started_at = self._clock()

    async def settle(self) -> None:
        """Wait until one interval has passed since the start."""
        await asyncio.sleep(self._started_at + self._interval - self._clock())

    async def announce(self, identity: Identity, incarnation: Incarnation) -> None:
        """Beat; see `NodeDiscovery`."""
        self._heart = heart = self._make_heart()
        await heart.start(identity, incarnation)

    def _make_heart(self) -> Heart:
        raise NotImplementedError

    def tell(self, status: NodeStatus) -> None:
        """Say a new status at once."""
        if self._heart is not None:
            self._heart.tell(status)

    def report(self, report: Report) -> None:
        """Take what the next beats say of how the node is."""
        if self._heart is not None:
            self._heart.report = report

    def set_interval(self, interval: float) -> None:
        """Beat every `interval` seconds from now on."""
        self._interval = interval
        if self._heart is not None:
            self._heart.interval = interval

    def probe(self, probe: Probe) -> None:
        """Ask a node whether it lives."""
        if len(self._asked) >= _MAX_ASKED:
            del self._asked[next(iter(self._asked))]
        word = secrets.token_hex(8)
        self._asked[word] = probe
        subject = self._names.node_ping(probe.service, probe.node_id)
        try:
            self._transport.publish(subject, self._ping, reply=f"{self._inbox}.{word}")
        except CatgaError:
            return  # without a connection there is no answer, which is what is known
        self._transport.push()

    async def withdraw(self) -> None:
        """Leave; see `NodeDiscovery`."""
        heart = self._heart
        if heart is None:
            return
        await heart.stop()
        if self._heart is heart:
            self._heart = None
            self._sent_before += heart.sent

    async def close(self) -> None:
        """Leave, and listen no more."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        await self.withdraw()

    # -- what is heard -------------------------------------------------------------------------------------

    def _on_beat(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        del reply, headers
        if subject == self._roll_call:
            return  # the heart answers
        beat = self._decode(payload)
        if beat is None:
            return
        if self._names.heartbeat(beat.id) != subject:
            self._sink.on_rejected("forged")
            self._log.warn("forged", "a heartbeat on %s says that it is of node %r: ignored", subject, beat.id)
            return
        self._sink.on_beat(self._info(beat), beat.seq)

    def _on_roll(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        """A node answers the roll call; it counts as a beat, and proves as little."""
        del subject, reply, headers
        beat = self._decode(payload) if payload else None  # empty: nobody was there
        if beat is not None:
            self._sink.on_beat(self._info(beat), beat.seq)

    def _on_answer(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        del reply
        word = subject.rpartition(".")[2]
        probe = self._asked.get(word)
        if probe is None:
            return  # it came too late, or was never asked
        if headers is not None and headers.get(STATUS_HEADER) == NO_RESPONDERS and not payload:
            del self._asked[word]
            self._sink.on_no_responders(probe.node_id, probe.number)
            return
        beat = self._decode(payload)
        if beat is not None and beat.id == probe.node_id:
            self._sink.on_answer(self._info(beat), beat.seq, probe.number)
        elif beat is not None:
            self._sink.on_rejected("forged")

    def _decode(self, payload: bytes) -> Beat | None:
        """Return the beat of a payload; None, counted, if it is none."""
        try:
            kind = self._gate.kind(payload)
            beats = self._gate.beats(payload).frames if kind == Kind.HEARTBEAT else ()
        except GateError as error:
            self._sink.on_rejected("malformed")
            self._log.warn("gate", "a heartbeat was not let in: %s", error)
            return None
        if not beats:
            self._sink.on_rejected("malformed")
            return None
        return beats[0]

    def _info(self, beat: Beat) -> NodeInfo:
        return info_of(beat, self._clock(), int(utc_now().timestamp() * 1000))

    def _on_disconnect_event(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        """The server says that a client is gone; connections are named `catga/<id>` and `catga/<id>/beats`."""
        del subject, reply, headers
        try:
            self._gate.json(payload)
            name = msgspec.json.decode(payload, type=_DisconnectEvent).client.name
        except DECODE_ERRORS as error:  # the gate's refusal among them
            self._sink.on_rejected("malformed")
            self._log.warn("hint", "an event of the server was not understood: %s", explain(error))
            return
        if name.startswith(_CLIENT):
            self._sink.on_hint(name.removeprefix(_CLIENT).removesuffix(_BEATS))


class NatsDiscovery(BeatDiscovery):
    """Beats over a NATS server, from a thread.

    Args:
        transport: The node's connection.
        names: The subjects.
        gate: Lets beats in.
        clock: Monotonic seconds.
        gauge: How the node is.
        allow: Whether an answer may go to a subject.
        connect: Makes the transport of the thread.
        node_id: Who asks.
        interval: Seconds between beats.
        inbox_prefix: What answers to questions begin with.
        hints: Subject on which the server tells of closed connections, or None.
    """

    def __init__(
        self,
        transport: Transport,
        names: Names,
        gate: Gate,
        clock: Clock,
        *,
        gauge: Gauge,
        allow: Callable[[str], bool],
        connect: Callable[[TransportEvents], Transport],
        node_id: str,
        interval: float,
        inbox_prefix: str = "_INBOX",
        hints: str | None = None,
    ) -> None:
        super().__init__(
            transport,
            names,
            gate,
            clock,
            node_id=node_id,
            interval=interval,
            inbox_prefix=inbox_prefix,
            hints=hints,
        )
        self._gauge = gauge
        self._allow = allow
        self._connect = connect

    def _make_heart(self) -> Heart:
        def make(transport: Transport) -> Beacon:
            return Beacon(transport, self._names, self._gauge, self._allow, self._interval)

        return HeartThread(self._connect, make, self._interval)


class MemoryDiscovery(BeatDiscovery):
    """Beats over the broker of a `memory://` address, from the node's own event loop: no thread.

    Its view is complete within a few turns of the event loop, because the broker knows who is there.

    Args:
        transport: The node's connection.
        names: The subjects.
        gate: Lets beats in.
        clock: Monotonic seconds.
        gauge: How the node is.
        allow: Whether an answer may go to a subject.
        node_id: Who asks.
        interval: Seconds between beats.
        inbox_prefix: What answers to questions begin with.
    """

    answer_seconds = 0.0

    def __init__(
        self,
        transport: MemoryTransport,
        names: Names,
        gate: Gate,
        clock: Clock,
        *,
        gauge: Gauge,
        allow: Callable[[str], bool],
        node_id: str,
        interval: float,
        inbox_prefix: str = "_INBOX",
    ) -> None:
        super().__init__(transport, names, gate, clock, node_id=node_id, interval=interval, inbox_prefix=inbox_prefix)
        self._broker = transport
        self._gauge = gauge
        self._allow = allow
        self._heard: set[str] = set()

    async def settle(self) -> None:
        """Wait until all have been heard that the broker knows of; for an interval at most."""
        until = self._clock() + self._interval
        turns = 0
        while not self._heard.issuperset(self._present()) and self._clock() < until:
            turns += 1
            await asyncio.sleep(0.0 if turns < _EAGER_TURNS else _PAUSE)

    def _present(self) -> list[str]:
        """The subjects on which nodes can be asked, without this node's own."""
        begin, end = self._names.node_ping("", "").split(".=.=.")
        return [one for one in self._broker.subjects if one.startswith(f"{begin}.") and one.endswith(f".{end}")]

    def _info(self, beat: Beat) -> NodeInfo:
        if len(self._heard) < _MAX_ASKED:
            self._heard.add(self._names.node_ping(beat.service, beat.id))
        return super()._info(beat)

    def _make_heart(self) -> Heart:
        return Beacon(self._broker, self._names, self._gauge, self._allow, self._interval)


class _DisconnectedClient(msgspec.Struct):
    name: str = ""


class _DisconnectEvent(msgspec.Struct):
    client: _DisconnectedClient


_CLIENT = "catga/"
_BEATS = "/beats"
_MAX_ASKED = 20_000  # twice the nodes of a view; an entry is 100 bytes
_EAGER_TURNS = 50
_PAUSE = 0.001
