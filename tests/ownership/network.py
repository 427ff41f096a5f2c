"""The server and its connections, with the bad habits of the real one.

The server is the product's model of JetStream behind its own API, so that what talks to it is the product's client. On
the way messages are lost, late, or answered to nobody; during an outage nothing is answered, and what was asked may
have been done, or is done when it is over; reads may be old; acknowledgements are taken from anybody.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from catga_bus.errors import DisconnectedError
from catga_bus.transport.base import Sink
from catga_bus.transport.consumer_model import ConsumerModel
from catga_bus.transport.jetstream import StoredMessage
from catga_bus.transport.jetstream_deliveries import ACK_ROOT
from catga_bus.transport.jetstream_json import message_to_json
from catga_bus.transport.memory_jetstream import MemoryJetStream
from catga_bus.transport.nats_protocol import DESCRIPTION_HEADER
from catga_bus.transport.subjects import covers
from catga_bus.wire import NO_RESPONDERS, STATUS_HEADER
from tests.ownership.process import Process

EPOCH = 1_764_000_000.0
"""Seconds since 1970 at which virtual time begins."""


class Weather(msgspec.Struct):
    """How bad things are at present: probabilities, and seconds."""

    latency: tuple[float, float] = (0.0002, 0.002)
    lost_requests: float = 0.0
    """Never executed, never answered."""

    lost_answers: float = 0.0
    """Executed, never answered."""

    late_requests: float = 0.0
    """Executed up to three seconds later, when whoever asked may have given up; never answered."""

    lost_acks: float = 0.0
    lost_deliveries: float = 0.0
    stale_reads: float = 0.0
    """Answered as they would have been a moment (up to a second) ago."""

    lost_words: float = 0.0
    """Heartbeats and notices between nodes."""

    late_words: float = 0.0
    """Those that are up to 0.7 s late."""

    ack_wait: float = 0.0
    """Instead of the hour that consumers ask for, so that the server delivers again what is at work; 0.0: the hour."""


class World:
    """What the network needs from the world: its time, and to let something happen later."""

    now: float
    rng: random.Random

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Let something happen."""


class Watcher:
    """What the server tells whoever checks it."""

    def wrote(self, key: str, value: bytes, revision: int) -> None:
        """A record in the bucket of owners was written."""

    def made(self, stream: str, consumer: ConsumerModel) -> None:
        """A consumer was made."""

    def acknowledged(self, reply: str) -> None:
        """An acknowledgement was taken."""

    def stored(self, subject: str, payload: bytes, sequence: int) -> None:
        """A message was stored."""


class Server(MemoryJetStream):
    """The server.

    Args:
        world: Time and chance.
        bucket: The stream with the owners.
        send: Sends what it answers and delivers.
        hears: Tells whether somebody listens to a subject.
    """

    def __init__(
        self,
        world: World,
        bucket: str,
        send: Callable[[str, str, bytes, str, Mapping[str, str] | None], None],
        hears: Callable[[str], bool],
    ) -> None:
        super().__init__(send, hears)
        self.world = world
        self.weather = Weather()
        self.watcher = Watcher()
        self.bucket = bucket
        self._past: dict[str, list[tuple[float, StoredMessage]]] = {}
        self._past_names: list[tuple[float, list[str]]] = []

    def now(self) -> float:
        """The instant on its clock."""
        return EPOCH + self.world.now

    def _now(self) -> float:
        return self.now()

    def _publish(self, now: float, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> bool:
        before = self._last_sequence(subject)
        heard = super()._publish(now, subject, payload, reply, headers)
        after = self._last_sequence(subject)
        if after != before:
            if subject.startswith("$KV."):
                message = self.model.message(now, self.bucket, after)
                assert message is not None
                self._past.setdefault(subject, []).append((now, message))
                self.watcher.wrote(subject.split(".", 2)[2], payload, after)
            else:
                self.watcher.stored(subject, payload, after)
        return heard

    def _last_sequence(self, subject: str) -> int:
        stream = next((each for each in self.model._streams.values() if each.model.takes(subject)), None)
        return 0 if stream is None else stream.model.last_sequence

    def _acknowledge(self, now: float, subject: str, payload: bytes, reply: str) -> bool:
        _, _, stream, consumer, *_ = subject.split(".")
        is_there = consumer in self._consumers(stream)
        heard = super()._acknowledge(now, subject, payload, reply)
        if is_there:
            self.watcher.acknowledged(subject)
        return heard

    def _consumers(self, stream: str) -> dict[str, ConsumerModel]:
        home = self.model._streams.get(stream)
        return {} if home is None else home.consumers

    def _create_consumer(self, now: float, names: list[str], body: dict[str, Any]) -> dict[str, Any]:
        stream, name = names[:2]
        before = name in self._consumers(stream)
        if self.weather.ack_wait and body["config"].get("ack_wait"):
            body = {**body, "config": {**body["config"], "ack_wait": int(self.weather.ack_wait * 1e9)}}
        self._remember_names(now, stream)
        answer = super()._create_consumer(now, names, body)
        if stream != self.bucket and not before:
            self.watcher.made(stream, self._consumers(stream)[name])
        return answer

    def _delete_consumer(self, now: float, names: list[str], body: dict[str, Any]) -> dict[str, Any]:
        self._remember_names(now, names[0])
        return super()._delete_consumer(now, names, body)

    def _remember_names(self, now: float, stream: str) -> None:
        if stream != self.bucket:
            self._past_names.append((now, sorted(self._consumers(stream))))

    # Old answers.

    def _age(self) -> float:
        rng = self.world.rng
        return rng.uniform(0.0, 1.0) if rng.random() < self.weather.stale_reads else 0.0

    def _message(self, now: float, names: list[str], body: dict[str, Any]) -> dict[str, Any]:
        if names[0] == self.bucket and (age := self._age()) and self.model.stream(now, self.bucket) is not None:
            past = [message for at, message in self._past.get(body["last_by_subj"], ()) if at <= now - age]
            if past:
                return {"message": message_to_json(past[-1])}
        return super()._message(now, names, body)

    def _consumer_names(self, now: float, names: list[str], body: dict[str, Any]) -> dict[str, Any]:
        if names[0] != self.bucket and (age := self._age()):
            # As they were before the first change since then.
            past = next((was for at, was in self._past_names if at > now - age), None)
            if past is not None:
                return {"total": len(past), "offset": 0, "consumers": past}
        return super()._consumer_names(now, names, body)

    def forget_bucket(self) -> None:
        """Somebody deletes the bucket of owners."""
        self.model.delete_stream(self.now(), self.bucket)
        self._past.clear()

    def lose_leader(self) -> list[tuple[str, int]]:
        """Forget all pulls; return those who had pulled, and for how many messages each."""
        pulls = [
            (str(pull.puller), pull.remaining)
            for home in self.model._streams.values()
            for consumer in home.consumers.values()
            for pull in consumer._pulls
        ]
        self.model.restart()
        return pulls


class Subscribed:
    """Interest in a subject; `catga_bus.transport.base.Subscription` is its contract."""

    def __init__(self, network: "Network", link: "Link", subject: str, sink: Sink) -> None:
        self._network = network
        self.link = link
        self.subject = subject
        self.pattern = subject.split(".")
        self.sink = sink
        self.is_open = True

    async def unsubscribe(self) -> None:
        """Ask for no more."""
        self._network.forget(self)

    async def close(self) -> None:
        """End the interest."""
        self.is_open = False
        self._network.forget(self)


class Link:
    """The connection of one process; `catga_bus.transport.base.Transport` is its contract.

    Args:
        network: To what.
        process: Whose.
    """

    is_behind = False
    max_payload = 1_048_576
    url = "sim://"

    def __init__(self, network: "Network", process: Process) -> None:
        self._network = network
        self.process = process
        self.is_connected = True
        self.generation = 0
        self.up_at = self.down_at = 0.0  # nothing overtakes what was sent before
        self._inboxes = 0

    async def connect(self) -> None:
        """It is."""

    async def close(self) -> None:
        """It goes with its process."""

    async def flush(self, timeout: float = 5.0) -> None:
        """Nothing waits."""

    def push(self) -> None:
        """Nothing waits."""

    async def wait_writable(self) -> None:
        """It is."""

    def new_inbox(self) -> str:
        """Return a new subject."""
        self._inboxes += 1
        return f"_INBOX.{self.process.name}.{self._inboxes}"

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "") -> Subscribed:
        """Express interest."""
        return self._network.subscribe(self, subject, sink)

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send one message."""
        if not self.process.is_alive:
            return
        if not self.is_connected:
            raise DisconnectedError("the connection is lost")
        self.process.reach(f"before {_kind(subject)}")
        self._network.carry(self, subject, payload, reply, headers)
        self.process.reach(f"after {_kind(subject)}")


class Network:
    """All connections to one server.

    Args:
        world: Time and chance.
        bucket: The stream with the owners.
    """

    def __init__(self, world: World, bucket: str) -> None:
        self.world = world
        self.server = Server(world, bucket, self._send, self._hears)
        self.outage_ends = 0.0
        self._subscriptions: list[Subscribed] = []
        self._mutes = ""  # the reply subject whose answer is lost
        self._timer_at = 0.0

    @property
    def weather(self) -> Weather:
        """How bad things are."""
        return self.server.weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self.server.weather = weather

    @property
    def is_out(self) -> bool:
        """Whether the leader is missing."""
        return self.world.now < self.outage_ends

    # -- faults ----------------------------------------------------------------------------------------------

    def begin_outage(self, seconds: float) -> None:
        """Kill the leader: nothing is answered, and pulls are forgotten; some are told."""
        self.outage_ends = max(self.outage_ends, self.world.now + seconds)
        for puller, remaining in self.server.lose_leader():
            if self.world.rng.random() < 0.6:
                headers = {STATUS_HEADER: "409", DESCRIPTION_HEADER: "Leadership Change"}
                headers["Nats-Pending-Messages"] = str(remaining)
                self._send(puller, puller, b"", "", headers)

    def cut(self, link: Link) -> None:
        """Break a connection."""
        link.is_connected = False
        link.generation += 1

    def mend(self, link: Link) -> None:
        """Bring a connection back."""
        link.is_connected = True

    # -- up --------------------------------------------------------------------------------------------------

    def carry(self, link: Link, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        """Take a message from a process to the server, or not."""
        world, rng, weather = self.world, self.world.rng, self.weather
        kind = _kind(subject)
        arrival = link.up_at = max(link.up_at, world.now + rng.uniform(*weather.latency))
        is_muted = is_unreached = False
        if kind == "ack":
            if rng.random() < (0.9 if self.is_out else weather.lost_acks):
                return
        elif kind == "pull":
            if self.is_out and rng.random() < 0.5:
                return
            is_unreached = self.is_out
        elif self.is_out:
            fate = rng.random()
            if fate < 0.4:
                return
            if fate < 0.5:  # its answer is lost with the leader
                is_muted = True
            elif fate < 0.6:  # the next leader does it
                arrival, is_muted = self.outage_ends + rng.uniform(0.0, 1.0), True
            elif kind == "store":
                is_unreached = True
            else:
                return
        elif kind in ("api", "store"):
            fate = rng.random()
            if fate < weather.lost_requests:
                return
            fate -= weather.lost_requests
            if fate < weather.lost_answers:
                is_muted = True
            elif fate < weather.lost_answers + weather.late_requests:
                arrival, is_muted = arrival + rng.uniform(0.0, 3.0), True
            else:
                arrival += rng.uniform(*weather.latency)  # calls are done side by side
        world.at(
            arrival,
            lambda: self._arrive(link, link.generation, subject, payload, reply, headers, is_muted, is_unreached),
        )

    def _arrive(
        self,
        link: Link,
        generation: int,
        subject: str,
        payload: bytes,
        reply: str,
        headers: Mapping[str, str] | None,
        is_muted: bool,
        is_unreached: bool,
    ) -> None:
        if generation != link.generation and self.world.rng.random() < 0.5:
            return
        self._mutes = reply if is_muted else ""
        is_heard = False if is_unreached else self.server.accept(subject, payload, reply, headers)
        if not is_heard and reply:
            self._send(reply, reply, b"", "", {STATUS_HEADER: NO_RESPONDERS})
        self._mutes = ""
        self.run()

    def run(self) -> None:
        """Let the server do what is due, and see to it that it does what comes next."""
        self.server.run()
        due = self.server.model.next_timer() - EPOCH
        if self.world.now < due < 1e12 and not self.world.now < self._timer_at <= due:
            self._timer_at = due
            self.world.at(due, self._tick)

    def _tick(self) -> None:
        self._timer_at = 0.0
        self.run()

    # -- down ------------------------------------------------------------------------------------------------

    def subscribe(self, link: Link, subject: str, sink: Sink) -> Subscribed:
        """Express interest; what a process sends afterwards comes after it."""
        subscription = Subscribed(self, link, subject, sink)
        self._subscriptions.append(subscription)
        return subscription

    def forget(self, subscription: Subscribed) -> None:
        """End interest."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def _hears(self, subject: str) -> bool:
        return any(
            each.link.is_connected and each.link.process.is_alive for each in self._subscribed(subject.split("."))
        )

    def _subscribed(self, subject: list[str]) -> list[Subscribed]:
        return [each for each in self._subscriptions if covers(each.pattern, subject)]

    def _send(self, to: str, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        if to == self._mutes:
            return
        world, rng = self.world, self.world.rng
        if reply.startswith(ACK_ROOT) and rng.random() < self.weather.lost_deliveries:
            return
        for each in self._subscribed(to.split(".")):
            link = each.link
            if link.is_connected and link.process.is_alive:
                link.down_at = max(link.down_at, world.now + rng.uniform(*self.weather.latency))
                world.at(link.down_at, _delivery(each, link.generation, (subject, payload, reply, headers)))


def _delivery(subscription: Subscribed, generation: int, message: tuple[Any, ...]) -> Callable[[], None]:
    def arrive() -> None:
        link = subscription.link
        if generation == link.generation and link.process.is_alive:
            link.process.loop.call_soon(take)

    def take() -> None:
        if subscription.is_open:
            subscription.sink(*message)

    return arrive


def _kind(subject: str) -> str:
    if subject.startswith(ACK_ROOT):
        return "ack"
    if subject.startswith("$JS.API.CONSUMER.MSG.NEXT."):
        return "pull"
    return "api" if subject.startswith("$JS.API.") else "store"
