"""Commands that are to be handled later: stored with their time, and moved to the work queue when it has come.

They wait in a stream of their own, `catga-at-<service>`: nats-server (2.15.1, error 10052) has no delayed messages in a
stream that refuses when it is full, and a work queue that drops its oldest instead would lose what it has accepted.
When its time has come the server puts a command on a `due` subject of that stream, and some node of the service moves
it on; if the work queue is full it waits there. So the time is that of the server's clock, a second execution is
prevented as for any other command, and a command whose service is down is moved when a node is back.
"""

import asyncio
import logging
import math
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from catga_bus.clock import Clock, utc_now
from catga_bus.durability.sending.postings import pause_after
from catga_bus.errors import CatgaError, ConfigurationError, DeadlineExceededError, Outcome, OverloadedError
from catga_bus.rarely import RareLog
from catga_bus.result import Stored
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    DeliveredMessage,
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
    JetStreamUnreachedError,
    PubAck,
)
from catga_bus.transport.jetstream_json import from_rfc3339
from catga_bus.transport.schedules import SCHEDULE_HEADER, SCHEDULE_TARGET_HEADER, schedule_at
from catga_bus.wire import Names

SCHEDULER_HEADER: Final = "Nats-Scheduler"
"""The server's word on a message whose time has come: the subject on which it has waited."""

DUE_CONSUMER: Final = "due"
"""The consumer that all nodes of a service share."""

SCHEDULES_LEVEL: Final = 2
"""API level of the first server with delayed messages, 2.12."""

_WINDOW: Final = 64  # commands that a node moves at a time
_ACK_WAIT: Final = 30.0
# Seconds after which what a node has taken and not moved goes to another; well within the duplicate window.

_ATTEMPT_SECONDS: Final = 2.0
_CLOCK_SECONDS: Final = 60.0
# For which the server's clock is not asked again.

_DISABLED: Final = 10188
_OVER: Final = (404, 409, 503)  # the pull, the consumer or its leader is gone
_NEEDS: Final = "delayed commands need nats-server 2.12 or newer (API level 2)"


class Scheduler:
    """Stores commands with their time.

    Args:
        jetstream: Where.
        names: The subjects.
        clock: Monotonic seconds.
        rng: Jitter of the pauses.
    """

    def __init__(self, jetstream: JetStream, names: Names, clock: Clock, rng: random.Random) -> None:
        self._jetstream = jetstream
        self._names = names
        self._clock = clock
        self._rng = rng
        self._ahead = 0.0  # of the server's clock, seconds since 1970, over the monotonic one
        self._asked_at = -math.inf
        self._log = RareLog(logging.getLogger("catga_bus.durability"), clock)

    async def instant(self, service: str, delay: float) -> float:
        """Return when a delay from now is over, in seconds since 1970 by the server's clock.

        The clock of this machine may be an hour off; it is asked only where the server does not say its own.
        """
        now = self._clock()
        if now >= self._asked_at + _CLOCK_SECONDS:
            self._ahead = await self._server_time(service) - now  # what the answer takes makes it later, never sooner
            self._asked_at = now
        return self._ahead + now + delay

    async def _server_time(self, service: str) -> float:
        try:
            info = await self._jetstream.stream(self._names.schedule_stream(service))
            said = None if info is None else info.raw.get("ts")
            if isinstance(said, str):
                return from_rfc3339(said)
        except CatgaError as error:
            self._log.warn("clock", "the server's clock cannot be asked, this machine's has to do: %s", error)
        return utc_now().timestamp()

    async def store(
        self, service: str, partition: int, payload: bytes, at_utc: float, type_name: str, deadline: float
    ) -> Stored:
        """Store a record that is due at an instant; one that has passed is due at once.

        Args:
            service: Whose command it is.
            partition: Of its key.
            payload: The record.
            at_utc: Seconds since 1970, by the server's clock.
            type_name: For errors.
            deadline: Instant until which it is tried.

        Raises:
            ConfigurationError: The servers have no delayed messages, or the stream for them is not there.
            DeadlineExceededError: It is not known to be stored.
            OverloadedError: The server refuses it.
        """
        schedule_id = secrets.token_urlsafe(12)
        headers = {SCHEDULE_HEADER: schedule_at(at_utc), SCHEDULE_TARGET_HEADER: self._names.due(service, partition)}
        subject = self._names.schedule(service, schedule_id)
        failures = 0
        may_be_stored = False
        while True:
            try:
                ack = await self._jetstream.publish(
                    subject, payload, message_id=schedule_id, headers=headers, timeout=_ATTEMPT_SECONDS
                )
            except JetStreamRefusedError as error:
                raise _refused(error, type_name) from error
            except JetStreamUnknownError as error:
                may_be_stored |= not isinstance(error, JetStreamUnreachedError)
                failures += 1
                if not may_be_stored and failures == 1:
                    await self._check(service)
                pause = pause_after(failures, self._rng)
                if self._clock() + pause >= deadline:
                    outcome = Outcome.UNKNOWN if may_be_stored else Outcome.NOT_RUN
                    text = f"{type_name}: the server had not said by the deadline that it is stored for later: {error}"
                    raise DeadlineExceededError(text, outcome=outcome, retryable=not may_be_stored) from error
                await asyncio.sleep(pause)
            else:
                return Stored(ack.stream, ack.sequence, 0, ack.duplicate)

    async def _check(self, service: str) -> None:
        """Find out whether there is a stream for delayed commands at all, and if not why."""
        name = self._names.schedule_stream(service)
        try:
            if await self._jetstream.stream(name) is not None:
                return
            level = (await self._jetstream.account()).get("api", {}).get("level", 0)
        except CatgaError:
            return  # there is no leader, or this user may not ask: try on
        if level < SCHEDULES_LEVEL:
            raise ConfigurationError(f"{_NEEDS}; this one has API level {level}")
        raise ConfigurationError(
            f"there is no stream {name} for delayed commands: start a node of the service {service!r}, or run "
            f"`catga streams apply`"
        )


def _refused(error: JetStreamRefusedError, type_name: str) -> CatgaError:
    if error.code == _DISABLED:
        return ConfigurationError(f"the stream for delayed commands was created without them: {error.text}; {_NEEDS}")
    return OverloadedError(f"{type_name}: the server refuses it: {error}", outcome=Outcome.NOT_RUN, retryable=True)


class Mover:
    """Moves commands whose time has come to the work queue of their service; one in every node.

    Args:
        jetstream: The streams.
        names: Their names.
        service: The service.
        clock: Monotonic seconds.
        rng: Jitter of the pauses.

    Attributes:
        moved: Commands that this node has moved.
    """

    def __init__(self, jetstream: JetStream, names: Names, service: str, clock: Clock, rng: random.Random) -> None:
        self._jetstream = jetstream
        self._names = names
        self._service = service
        self._stream = names.schedule_stream(service)
        self._rng = rng
        self._log = RareLog(logging.getLogger("catga_bus.durability"), clock)
        self._taken: asyncio.Queue[DeliveredMessage | None] = asyncio.Queue()
        self.moved = 0

    def reconnected(self) -> None:
        """The connection is back: what was asked for is not."""
        self._taken.put_nowait(None)

    async def run(self) -> None:
        """Move what is due, until cancelled."""
        failures = 0
        while True:
            try:
                await self._serve()
                failures = 0
            except CatgaError as error:
                failures += 1
                self._log.warn("due", "delayed commands of %s cannot be moved for now: %s", self._service, error)
                await asyncio.sleep(pause_after(failures, self._rng))

    async def _serve(self) -> None:
        """Move what is due until the server says that it is over."""
        config = ConsumerConfig(
            name=DUE_CONSUMER,
            filters=(self._names.all_due(self._service),),
            ack_wait=_ACK_WAIT,
            max_ack_pending=1_024,
        )
        await self._jetstream.create_consumer(self._stream, config)
        self._taken = asyncio.Queue()  # bounded by what is asked for
        consumption = await self._jetstream.consume(self._stream, DUE_CONSUMER, self._taken.put_nowait, self._on_status)
        try:
            consumption.pull(_WINDOW)
            while (message := await self._taken.get()) is not None:
                await self._move(message)
                consumption.pull(1)
        finally:
            await consumption.close()

    def _on_status(self, code: int, _: str) -> None:
        if code in _OVER:
            self._taken.put_nowait(None)

    async def _move(self, message: DeliveredMessage) -> None:
        partition = message.subject.rpartition(".")[2]
        schedule_id = (message.headers or {}).get(SCHEDULER_HEADER, "").rpartition(".")[2]
        # The id of the schedule is random. Whoever moves the command a second time stores it under the same one.
        record_id = f"at-{schedule_id or message.sequence}"
        subject = self._names.command(self._service, int(partition))
        await self._until_known(lambda: self._jetstream.publish(subject, message.payload, message_id=record_id))
        self.moved += 1
        await self._jetstream.acknowledge_confirmed(message.reply)

    async def _until_known(self, store: Callable[[], Awaitable[PubAck]]) -> None:
        failures = 0
        while True:
            try:
                await store()
            except (JetStreamUnknownError, JetStreamRefusedError) as error:
                failures += 1
                self._log.warn("move", "a delayed command of %s cannot be moved for now: %s", self._service, error)
                await asyncio.sleep(pause_after(failures, self._rng))
            else:
                return
