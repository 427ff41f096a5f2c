"""JetStream as a pure model: every call is a function of an instant and values, with the server's outcomes.

No clock, event loop or randomness is inside, so a simulation may drive it in virtual time and a test may copy it. What
it answers was compared with nats-server 2.15 call by call (`catga_bus.testing.jetstream_contract`). What a cluster
adds (outages, stale reads, unknown outcomes) is the business of whoever drives it: do a call and hide its answer, or
do not do it.

    model = JetStreamModel()
    model.create_stream(now, StreamConfig(name="s", subjects=("s.*",), retention="workqueue"))
    model.create_consumer(now, "s", ConsumerConfig(name="c", filters=("s.0",)))
    model.pull(now, "s", "c", puller="me", batch=10)
    model.publish(now, "s.0", b"work")
    for puller, content in model.run(now): ...    # DeliveredMessage, or PullStatus
    ... and again at model.next_timer()
"""

import math
from collections.abc import Hashable, Mapping
from typing import Final

from catga_bus.transport.consumer_model import ConsumerModel, Hears, Outbox
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    ConsumerInfo,
    JetStreamRefusedError,
    JetStreamUnknownError,
    PubAck,
    StoredMessage,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.jetstream_configs import normal_stream, publish_headers, same_consumer, same_stream
from catga_bus.transport.model_timers import Timers
from catga_bus.transport.schedules import (
    ROLLUP_HEADER,
    SCHEDULE_HEADER,
    SCHEDULE_TARGET_HEADER,
    bad_target,
    due_at,
    fired_headers,
)
from catga_bus.transport.stream_model import StreamModel
from catga_bus.transport.subjects import collide, is_within

PULL_EXPIRES: Final = 30.0
"""Seconds until a pull ends, unless it says otherwise."""


class _Stream:
    """A stream with its consumers."""

    def __init__(self, config: StreamConfig, awake: dict[ConsumerModel, None]) -> None:
        self.model = StreamModel(config, self._on_removed)
        self.consumers: dict[str, ConsumerModel] = {}
        self.awake = awake

    def info(self) -> StreamInfo:
        return self.model.info(len(self.consumers))

    def purge(self, pattern: list[str]) -> int:
        model = self.model
        count = model.purge([pattern])
        # A consumer that reads more than what was purged is told of each message, and moves on at once; the server lets
        # it find out little by little, when it has messages out.
        for consumer in self.consumers.values():
            if all(is_within(own, pattern) for own in consumer.patterns):
                consumer.on_purged(model.last_sequence + 1)
        return count

    def next_timer(self) -> float:
        return min(self.model.next_expiry(), *self.model.schedules.values(), math.inf)

    def _on_removed(self, message: StoredMessage) -> None:
        tokens = message.subject.split(".")
        for consumer in self.consumers.values():
            if consumer.matches(tokens):
                consumer.on_removed(message.sequence)
                self.awake[consumer] = None


class JetStreamModel:
    """All streams of one server. Instants are seconds since 1970 and never go back.

    Calls raise `JetStreamRefusedError` as the server refuses, and `JetStreamUnknownError` where it does not answer
    (nobody stores the subject). After each call `run` returns what the server sends because of it.

    Args:
        servers: How many there are to replicate on.
    """

    def __init__(self, servers: int = 1) -> None:
        self._servers = servers
        self._streams: dict[str, _Stream] = {}
        self._outbox: Outbox = []
        self._timers: Timers[_Stream | ConsumerModel] = Timers()
        self._homes: dict[ConsumerModel, _Stream] = {}
        self._awake: dict[ConsumerModel, None] = {}
        # Consumers that have something to look at, in the order in which they got it.

    # Streams.

    def create_stream(self, now: float, config: StreamConfig) -> StreamInfo:
        """Make a stream, or find it with the same configuration."""
        self._advance(now)
        config = normal_stream(config)
        there = self._streams.get(config.name)
        if there is not None:
            if not same_stream(there.model.config, config):
                raise JetStreamRefusedError(
                    ApiError.STREAM_NAME_IN_USE, "stream name already in use with a different configuration"
                )
            return there.info()
        self._check_stream(config)
        self._streams[config.name] = made = _Stream(config, self._awake)
        return made.info()

    def update_stream(self, now: float, config: StreamConfig) -> StreamInfo:
        """Change a stream."""
        self._advance(now)
        config = normal_stream(config)
        stream = self._find(config.name)
        old = stream.model.config
        if config.retention != old.retention:
            raise JetStreamRefusedError(
                10052, "stream configuration update can not change retention policy to/from workqueue"
            )
        if config.storage != old.storage:
            raise JetStreamRefusedError(10052, "stream configuration update can not change storage type")
        if old.deny_delete and not config.deny_delete:
            raise JetStreamRefusedError(10052, "stream configuration update can not cancel deny message deletes")
        self._check_stream(config)
        stream.model.update(config)
        self._timers.wake(stream, stream.next_timer())
        return stream.info()

    def stream(self, now: float, name: str) -> StreamInfo | None:
        """Return a stream, or None."""
        self._advance(now)
        return self._streams[name].info() if name in self._streams else None

    def stream_names(self, now: float, subject: str = "") -> list[str]:
        """Return the names of all streams, or of those that store messages on a subject, sorted."""
        return sorted(
            name
            for name, stream in self._streams.items()
            if not subject or any(collide(subject, pattern) for pattern in stream.model.config.subjects)
        )

    def delete_stream(self, now: float, name: str) -> bool:
        """Delete a stream and its consumers; return whether it was there."""
        self._advance(now)
        stream = self._streams.pop(name, None)
        if stream is None:
            return False
        for consumer in list(stream.consumers):
            self._drop(stream, consumer)
        self._timers.forget(stream)
        return True

    def purge(self, now: float, stream: str, subject: str = "") -> int:
        """Let all messages go, or those on a subject; return how many."""
        self._advance(now)
        return self._find(stream).purge(subject.split(".") if subject else [">"])

    # Messages.

    def stores(self, subject: str) -> bool:
        """Return whether some stream stores what is published to a subject."""
        return any(stream.model.takes(subject) for stream in self._streams.values())

    def publish(
        self,
        now: float,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> PubAck:
        """Store a message.

        Raises:
            JetStreamRefusedError: The stream is full, or the last sequence on the subject is another.
            JetStreamUnknownError: No stream stores the subject: the server says that nobody listens, as it also does
                while a stream has no leader.
        """
        self._advance(now)
        for stream in self._streams.values():
            if stream.model.takes(subject):
                return self._store(
                    now, stream, subject, payload, publish_headers(message_id, expected_last, headers) or {}
                )
        raise JetStreamUnknownError(f"{subject}: no responders")

    def last_message(self, now: float, stream: str, subject: str) -> StoredMessage | None:
        """Return the last message on a subject, or None."""
        self._advance(now)
        return self._find(stream).model.last(subject)

    def message(self, now: float, stream: str, sequence: int) -> StoredMessage | None:
        """Return one message, or None."""
        self._advance(now)
        return self._find(stream).model.message(sequence)

    def next_message(self, now: float, stream: str, subject: str, sequence: int) -> StoredMessage | None:
        """Return the first message from a sequence on whose subject matches, or None."""
        self._advance(now)
        return self._find(stream).model.next(sequence, [subject.split(".")])

    def delete_message(self, now: float, stream: str, sequence: int) -> bool:
        """Let one message go; return whether it was there."""
        self._advance(now)
        model = self._find(stream).model
        if model.config.deny_delete:
            raise JetStreamRefusedError(10057, "message delete not permitted")
        return model.remove(sequence)

    # Consumers.

    def create_consumer(self, now: float, stream: str, config: ConsumerConfig) -> ConsumerInfo:
        """Make a consumer, or find it with the same configuration."""
        self._advance(now)
        home = self._find(stream)
        there = home.consumers.get(config.name)
        if there is not None:
            if not same_consumer(there.config, config):
                raise JetStreamRefusedError(ApiError.CONSUMER_NAME_IN_USE, "consumer already exists")
            return there.info()
        _check_consumer(home, config)
        home.consumers[config.name] = made = ConsumerModel(now, config, home.model, self._outbox)
        self._homes[made] = home
        self._timers.wake(made, made.next_timer())
        return made.info()

    def consumer(self, now: float, stream: str, name: str) -> ConsumerInfo | None:
        """Return a consumer, or None."""
        self._advance(now)
        found = self._find(stream).consumers.get(name)
        return found.info() if found is not None else None

    def consumer_names(self, now: float, stream: str) -> list[str]:
        """Return the names of all consumers of a stream, sorted."""
        self._advance(now)
        return sorted(self._find(stream).consumers)

    def delete_consumer(self, now: float, stream: str, name: str) -> bool:
        """Delete a consumer; return whether it was there."""
        self._advance(now)
        return self._drop(self._find(stream), name)

    # Delivery.

    def pull(
        self,
        now: float,
        stream: str,
        consumer: str,
        puller: Hashable,
        batch: int,
        *,
        expires: float = PULL_EXPIRES,
        idle: float = 0.0,
    ) -> bool:
        """Ask for messages; return False if nobody is there to ask (status 503: no such consumer)."""
        self._advance(now)
        home = self._streams.get(stream)
        found = home.consumers.get(consumer) if home is not None else None
        if found is None:
            return False
        found.pull(now, puller, batch, expires, idle)
        self._awake[found] = None
        return True

    def restart(self) -> None:
        """Forget all pulls, as a server does that ends; everything else was on its disk."""
        for consumer in self._homes:
            consumer.forget_pulls()

    def acknowledge(self, now: float, reply: str) -> bool | None:
        """Take an acknowledgement, whoever sends it and however stale it is.

        Args:
            now: Instant.
            reply: The reply subject of the delivery.

        Returns:
            What one who asks for confirmation learns: True: it was taken; False: nobody is there (status 503: no such
            consumer); None: no answer (nothing was delivered under this sequence).
        """
        self._advance(now)
        _, _, stream, consumer, _, sequence, *_ = reply.split(".")
        home = self._streams.get(stream)
        found = home.consumers.get(consumer) if home is not None else None
        if home is None or found is None:
            return False
        if not found.acknowledge(int(sequence)):
            return None
        if home.model.config.retention == "workqueue":
            home.model.remove(int(sequence))
        self._awake[found] = None
        return True

    def run(self, now: float, hears: Hears = lambda _: True) -> Outbox:
        """Do what is due at an instant; return what the server sends, in order.

        Args:
            now: Instant.
            hears: Tells whether somebody who has pulled still listens.
        """
        self._advance(now)
        awake = list(self._awake)
        self._awake.clear()
        for consumer in awake:
            consumer.run(now, hears)
            self._timers.wake(consumer, consumer.next_timer())
        sent = self._outbox[:]
        self._outbox.clear()
        return sent

    def next_timer(self) -> float:
        """Return the next instant at which `run` may have something to do by itself; infinity if never."""
        return self._timers.next()

    # Inside.

    def _find(self, name: str) -> _Stream:
        stream = self._streams.get(name)
        if stream is None:
            raise JetStreamRefusedError(ApiError.STREAM_NOT_FOUND, "stream not found")
        return stream

    def _advance(self, now: float) -> None:
        """Do what has become due by itself since the last call."""
        for owner in self._timers.due(now):
            if isinstance(owner, _Stream):
                owner.model.expire(now)
                self._fire_schedules(now, owner)
                self._timers.wake(owner, owner.next_timer())
            elif owner.abandoned_at() <= now:
                self._drop(self._homes[owner], owner.config.name)
            else:
                self._awake[owner] = None

    def _drop(self, stream: _Stream, name: str) -> bool:
        consumer = stream.consumers.pop(name, None)
        if consumer is None:
            return False
        consumer.end()
        self._timers.forget(consumer)
        self._awake.pop(consumer, None)
        del self._homes[consumer]
        return True

    def _store(self, now: float, stream: _Stream, subject: str, payload: bytes, headers: Mapping[str, str]) -> PubAck:
        due = None
        if SCHEDULE_HEADER in headers:
            due = _due(stream.model, subject, headers)
            headers = {**headers, ROLLUP_HEADER: "sub"}
        ack = stream.model.publish(now, subject, payload, headers)
        if ack.duplicate:
            return ack
        if due is not None:
            stream.model.schedules[subject] = due
            self._timers.wake(stream, due)
        if stream.model.config.max_age:
            self._timers.wake(stream, stream.model.next_expiry())
        tokens = subject.split(".")
        for consumer in stream.consumers.values():
            if consumer.matches(tokens):
                consumer.on_stored(ack.sequence)
                self._awake[consumer] = None
        return ack

    def _fire_schedules(self, now: float, stream: _Stream) -> None:
        schedules = stream.model.schedules
        due = [subject for subject in schedules if schedules[subject] <= now]
        waiting = [message for subject in due if (message := stream.model.last(subject)) is not None]
        for message in sorted(waiting, key=lambda each: each.sequence):
            self._fire(now, stream, message)

    def _fire(self, now: float, stream: _Stream, message: StoredMessage) -> None:
        target = message.headers[SCHEDULE_TARGET_HEADER]
        self._store(now, stream, target, message.payload, fired_headers(message.headers, message.subject))
        stream.model.remove(message.sequence)

    def _check_stream(self, config: StreamConfig) -> None:
        for other in self._streams.values():
            if other.model.config.name == config.name:
                continue
            for mine in config.subjects:
                if any(collide(mine, its) for its in other.model.config.subjects):
                    raise JetStreamRefusedError(ApiError.SUBJECTS_OVERLAP, "subjects overlap with an existing stream")
        if config.max_age and config.duplicate_window > config.max_age:
            raise JetStreamRefusedError(10052, "duplicates window can not be larger then max age")
        if config.replicas > self._servers:
            raise JetStreamRefusedError(10074, "replicas > 1 not supported in non-clustered mode")
        if config.allow_schedules and config.discard == "new":
            raise JetStreamRefusedError(10052, "message scheduling cannot use discard new")


def _check_consumer(home: _Stream, config: ConsumerConfig) -> None:
    filters = config.filters
    if any(collide(one, other) for place, one in enumerate(filters) for other in filters[:place]):
        raise JetStreamRefusedError(10138, "consumer subject filters cannot overlap")
    if home.model.config.retention != "workqueue":
        return
    if config.acks == "none":
        raise JetStreamRefusedError(10084, "consumer in pull mode requires explicit ack policy on workqueue stream")
    if config.deliver != "all":
        raise JetStreamRefusedError(10101, "consumer must be deliver all on workqueue stream")
    if home.consumers and not filters:
        raise JetStreamRefusedError(10099, "multiple non-filtered consumers not allowed on workqueue stream")
    for other in home.consumers.values():
        its = other.config.filters
        if not its or any(collide(one, theirs) for one in filters for theirs in its):
            raise JetStreamRefusedError(
                ApiError.CONSUMER_FILTER_NOT_UNIQUE, "filtered consumer not unique on workqueue stream"
            )


def _due(stream: StreamModel, subject: str, headers: Mapping[str, str]) -> float:
    if not stream.config.allow_schedules:
        raise JetStreamRefusedError(10188, "message schedules is disabled")
    due = due_at(headers, subject)
    if not stream.takes(headers[SCHEDULE_TARGET_HEADER]):
        raise bad_target()
    return due
