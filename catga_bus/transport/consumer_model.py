"""One pull consumer as nats-server keeps it, its bad habits included: a pure model, see `stream_model`.

What surprises, and is so on purpose because the server does it:

- An acknowledgement is judged by the sequence in the stream alone. One of an older delivery counts although the message
  was delivered again to somebody else; on a work queue even one of a message that this consumer never delivered removes
  it, as long as the consumer is past it.
- A consumer that was deleted and made again under the same name takes the acknowledgements of the old one.
- What waits to be delivered again does not count against `max_ack_pending`.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable
from typing import Final, NamedTuple, TypeAlias

import msgspec

from catga_bus.transport.jetstream import ConsumerConfig, ConsumerInfo, DeliveredMessage, StoredMessage
from catga_bus.transport.stream_model import StreamModel
from catga_bus.transport.subjects import covers


class PullStatus(NamedTuple):
    """The server's word about a pull, as `catga_bus.transport.jetstream.StatusSink` takes it."""

    code: int
    text: str
    ended: int
    """Messages that were asked for and will not come by this pull; for 100 it is 0."""


class Sent(NamedTuple):
    """Something that the server sends to whoever pulls."""

    puller: Hashable
    content: DeliveredMessage | PullStatus


Outbox: TypeAlias = list[Sent]

Hears: TypeAlias = Callable[[Hashable], bool]
"""Tells whether somebody who has pulled still listens."""

MAX_WAITING: Final = 512
"""Pulls that may wait at one consumer; the server's default."""


class _Pull(msgspec.Struct):
    puller: Hashable
    remaining: int
    expires_at: float
    idle: float
    """Seconds between heartbeats."""

    beat_at: float


class _Pending(msgspec.Struct):
    consumer_sequence: int
    """Of the first delivery."""

    at: float
    """Instant of the last delivery."""


class _Floor(NamedTuple):
    """Up to where everything is acknowledged."""

    consumer: int
    """In the sequence of deliveries."""

    internal: int
    """In the stream, for the server itself: messages that were passed over count."""

    reported: int
    """In the stream, as it says: they do not."""


class ConsumerModel:
    """A consumer: what it delivers, to whom, and what is acknowledged.

    Args:
        now: Instant of its creation.
        config: How it behaves.
        stream: Where it reads.
        outbox: What it sends is appended here.
    """

    def __init__(self, now: float, config: ConsumerConfig, stream: StreamModel, outbox: Outbox) -> None:
        self.config = config
        self.patterns = [subject.split(".") for subject in config.filters] or [[">"]]
        self._stream = stream
        self._outbox = outbox
        self._skip_list: deque[int] = deque()
        self._next = self._start()
        self._resume = 0
        if config.deliver == "last_per_subject":
            self._skip_list = deque(stream.last_per_subject(self.patterns))
            self._resume = stream.last_sequence + 1
            self._next = self._skip_list[0] if self._skip_list else self._resume
        self._delivered = 0
        self._delivered_to = self._next - 1
        self._floor = _Floor(0, self._next - 1, self._next - 1)
        self._has_acknowledged = False
        self._pending: dict[int, _Pending] = {}
        # In the order of their last delivery: the first is the first to be overdue.
        self._repeats: dict[int, int] = {}
        self._due: deque[int] = deque()
        self._pulls: deque[_Pull] = deque()
        self._unseen = len(self._skip_list) or stream.count(self._next, self.patterns)
        self._active_at = now

    def matches(self, subject: list[str]) -> bool:
        """Return whether messages on a subject, cut into tokens, are for this consumer."""
        return any(covers(pattern, subject) for pattern in self.patterns)

    def info(self) -> ConsumerInfo:
        """Return what the server would say.

        A consumer of a replicated stream reports a floor of 0 until its first acknowledgement, wherever it started.
        """
        is_replicated = (self.config.replicas or self._stream.config.replicas) > 1
        floor = 0 if is_replicated and not self._has_acknowledged else self._floor.reported
        delivered_to = self._delivered_to
        if not delivered_to and (self.config.in_memory or self._stream.config.storage == "memory"):
            # There it keeps nothing before the first delivery, and says where it will go on.
            delivered_to = self._next - 1
        return ConsumerInfo(self.config.name, self.config, floor, delivered_to, len(self._pending), self._unseen)

    # What clients do.

    def pull(self, now: float, puller: Hashable, batch: int, expires: float, idle: float) -> None:
        """Ask for messages.

        Args:
            now: Instant.
            puller: Whom to send them to.
            batch: How many.
            expires: Seconds until what is left of the pull ends with a 408.
            idle: Seconds without a message after which a heartbeat (100) is sent; 0.0: never.
        """
        self._active_at = now
        if len(self._pulls) < MAX_WAITING:
            self._pulls.append(_Pull(puller, batch, now + expires, idle, now + idle if idle else math.inf))
        elif not idle:
            # Who has asked for heartbeats will notice that there are none.
            self._outbox.append(Sent(puller, PullStatus(409, "Exceeded MaxWaiting", batch)))

    def forget_pulls(self) -> None:
        """Forget all pulls, as a server does that ends."""
        self._pulls.clear()

    def acknowledge(self, sequence: int) -> bool:
        """Take an acknowledgement; return whether the server answers one that asks for confirmation.

        The caller removes the message from a work queue when this returns True.
        """
        if sequence >= self._next:
            return False
        self._settle(sequence)
        self._has_acknowledged = True
        return True

    # What the stream and time do.

    def on_stored(self, sequence: int) -> None:
        """Count a new message that matches."""
        if sequence >= self._next:
            self._unseen += 1

    def on_removed(self, sequence: int) -> None:
        """Forget a message that has left the stream and matches."""
        skipping = self._skip_list
        if sequence in skipping or sequence >= (self._resume if skipping else self._next):
            self._unseen -= 1
        if sequence in self._pending:
            self._settle(sequence)

    def on_purged(self, start: int) -> None:
        """Move past the end: nothing is left of what this consumer reads.

        Args:
            start: One more than the stream's last sequence.
        """
        self._next = max(self._next, start)
        if not self._pending:
            self._repeats.clear()
            self._floor = _Floor(self._delivered, self._next - 1, self._next - 1)
        self._delivered_to = self._next - 1

    def run(self, now: float, hears: Hears) -> None:
        """Do what is due: deliver again, end pulls, say that there is nothing, deliver.

        Args:
            now: Instant.
            hears: Tells whether somebody who pulls is still there; the server forgets the pulls of the others.
        """
        self._find_overdue(now)
        self._pulls = deque(pull for pull in self._pulls if hears(pull.puller))
        self._end_pulls(now)
        while self._pulls and (message := self._take()) is not None:
            self._deliver(now, message)
        for pull in self._pulls:
            if now >= pull.beat_at:
                pull.beat_at = now + pull.idle
                self._outbox.append(Sent(pull.puller, PullStatus(100, "Idle Heartbeat", 0)))

    def end(self) -> None:
        """Tell whoever waits that the consumer is gone."""
        for pull in self._pulls:
            self._outbox.append(Sent(pull.puller, PullStatus(409, "Consumer Deleted", pull.remaining)))
        self._pulls.clear()

    def next_timer(self) -> float:
        """Return the instant at which `run` may have something to do by itself; infinity if never."""
        instants = [min(pull.expires_at, pull.beat_at) for pull in self._pulls]
        instants.append(self.abandoned_at())
        if self._pending and self.config.ack_wait:
            instants.append(next(iter(self._pending.values())).at + self.config.ack_wait)
        return min(instants)

    def abandoned_at(self) -> float:
        """Return the instant at which the server deletes it because nobody pulls; infinity if never."""
        if self._pulls or not self.config.inactive_threshold:
            return math.inf
        return self._active_at + self.config.inactive_threshold

    # Inside.

    def _start(self) -> int:
        config, stream = self.config, self._stream
        if config.deliver == "new":
            return stream.last_sequence + 1
        first = max(stream.first_sequence, 1)
        if config.deliver == "by_start_sequence":
            return max(config.start_sequence, first)
        if config.deliver == "by_start_time":
            return max(stream.since_time(config.start_time), first)
        return first

    def _settle(self, sequence: int) -> None:
        pending = self._pending.pop(sequence, None)
        if pending is not None:
            self._move_floor(pending.consumer_sequence, sequence)
        self._repeats.pop(sequence, None)
        if sequence in self._due:
            self._due.remove(sequence)

    def _move_floor(self, consumer_sequence: int, sequence: int) -> None:
        if not self._pending:
            self._floor = _Floor(self._delivered, self._next - 1, self._delivered_to)
        elif consumer_sequence == self._floor.consumer + 1:
            # As the server: up to just below the next message that is still pending, in stream order.
            self._floor = _Floor(consumer_sequence, sequence, sequence)
            lowest = next((other for other in range(sequence + 1, self._next) if other in self._pending), None)
            if lowest is not None:
                self._floor = _Floor(self._pending[lowest].consumer_sequence - 1, lowest - 1, lowest - 1)

    def _find_overdue(self, now: float) -> None:
        overdue = []
        for sequence, pending in self._pending.items():
            if not self.config.ack_wait or pending.at + self.config.ack_wait > now:
                break
            overdue.append(sequence)
        for sequence in sorted(overdue):
            self._touch(now, sequence)
            if sequence not in self._due:
                self._due.append(sequence)

    def _touch(self, now: float, sequence: int) -> None:
        pending = self._pending.pop(sequence)
        pending.at = now
        self._pending[sequence] = pending

    def _end_pulls(self, now: float) -> None:
        if not any(now >= pull.expires_at for pull in self._pulls):
            return
        kept: deque[_Pull] = deque()
        for pull in self._pulls:
            if now >= pull.expires_at:
                self._active_at = now
                self._outbox.append(Sent(pull.puller, PullStatus(408, "Request Timeout", pull.remaining)))
            else:
                kept.append(pull)
        self._pulls = kept

    def _take(self) -> StoredMessage | None:
        """Return the next message to deliver and move past it, or None."""
        while self._due:
            message = self._stream.message(self._due.popleft())
            if message is not None:
                return message
        if self.config.acks == "explicit" and 0 < self.config.max_ack_pending <= len(self._pending):
            return None
        message = self._take_skipping() or self._stream.next(self._next, self.patterns)
        if message is None:
            self._next = max(self._next, self._stream.last_sequence + 1)
            return None
        self._next = message.sequence + 1
        self._unseen -= 1
        if self._resume and not self._skip_list:
            self._next, self._resume = max(self._next, self._resume), 0
        return message

    def _take_skipping(self) -> StoredMessage | None:
        """Return the next of the last messages of each subject, if that is where the consumer is."""
        while self._skip_list:
            message = self._stream.message(self._skip_list.popleft())
            if message is not None:
                return message
        self._next = max(self._next, self._resume)
        return None

    def _deliver(self, now: float, message: StoredMessage) -> None:
        pull = self._pulls.popleft()
        self._delivered += 1
        deliveries = 1
        pending = self._pending.get(message.sequence)
        if pending is not None:
            deliveries = 2 + self._repeats.get(message.sequence, 0)
            self._repeats[message.sequence] = deliveries - 1
            self._touch(now, message.sequence)
        elif self.config.acks == "explicit":
            self._pending[message.sequence] = _Pending(self._delivered, now)
        else:
            self._floor = _Floor(self._delivered, message.sequence, message.sequence)
        self._delivered_to = max(self._delivered_to, message.sequence)
        self._outbox.append(Sent(pull.puller, self._delivery(message, deliveries)))
        pull.remaining -= 1
        self._active_at = now
        if pull.remaining:
            pull.beat_at = now + pull.idle if pull.idle else math.inf
            self._pulls.append(pull)

    def _delivery(self, message: StoredMessage, deliveries: int) -> DeliveredMessage:
        # The server's reply subject: stream, consumer, deliveries, both sequences, nanoseconds, what is left.
        reply = (
            f"$JS.ACK.{self._stream.config.name}.{self.config.name}.{deliveries}.{message.sequence}"
            f".{self._delivered}.{round(message.time * 1e9)}.{self._unseen}"
        )
        return DeliveredMessage(
            message.subject,
            message.payload,
            message.headers or None,
            reply,
            message.sequence,
            self._delivered,
            deliveries,
            self._unseen,
            message.time,
        )
