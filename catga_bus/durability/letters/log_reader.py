"""Reads a range of a stream in order, however often the reading is interrupted."""

import asyncio
import contextlib
import random
import secrets
from collections import deque
from collections.abc import AsyncGenerator

from catga_bus.durability.letters.repeating import Pauses
from catga_bus.errors import CatgaError
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    Consumption,
    DeliveredMessage,
    JetStream,
    JetStreamError,
    JetStreamUnknownError,
)

PATIENCE = 15.0
"""Seconds without anything read after which it is given up: longer than a change of leaders takes."""

_WINDOW = 64
# Messages that are asked for at once: records of up to half a megabyte each are held in memory.

_SILENCE = 3.0
# Seconds without a message after which the reading begins anew, and finds whether there is one.

_IDLE = 1.0
# The server says at least this often that it has nothing.

_FORGET = 30.0
# Seconds after which the server deletes a consumer that nobody reads: ours, when this process is killed.

_FAILURES = 400
_OVER = (404, 408)
# Statuses from which on something is wrong, and those that end a pull and say nothing about the consumer.


class Range:
    """A range of a stream, read by consumers of its own that need no acknowledgement.

    A consumer that is lost, or whose deliveries have a gap, is replaced by one that begins behind the last message
    read: each message is read once, in order.

    Args:
        jetstream: Where.
        stream: Of which stream.
        filters: Subjects; several need server 2.10.
        through: The last sequence.
        start_sequence: The first sequence; 0 to begin by `start_utc`.
        start_utc: When the first message was stored, at least: seconds since 1970.
        rng: Draws the pauses.
    """

    def __init__(
        self,
        jetstream: JetStream,
        stream: str,
        filters: tuple[str, ...],
        *,
        through: int,
        start_sequence: int = 0,
        start_utc: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        self._jetstream = jetstream
        self._stream = stream
        self._filters = filters
        self._through = through
        self._next = start_sequence
        self._start_utc = start_utc
        self._rng = random.Random() if rng is None else rng

    async def read(self) -> AsyncGenerator[DeliveredMessage, None]:
        """Yield the messages; close it when it is left early, or the consumer stays for half a minute.

        Raises:
            JetStreamRefusedError: There is no such stream, or it may not be read.
            JetStreamUnknownError: Nothing could be read for `PATIENCE` seconds.
        """
        loop = asyncio.get_running_loop()
        pauses = Pauses(self._rng)
        read_at = loop.time()
        while self._next <= self._through:
            reading = _Reading(self._jetstream, self._stream)
            try:
                await reading.begin(self._config())
                while (message := await reading.next()) is not None:
                    if message.sequence > self._through:
                        return
                    read_at = loop.time()
                    pauses.reset()
                    yield message
                    self._next = message.sequence + 1
                    if message.pending == 0:
                        return
                if reading.is_empty:
                    return
            except JetStreamUnknownError:
                if loop.time() - read_at > PATIENCE:
                    raise
            finally:
                await reading.end()
            if loop.time() - read_at > PATIENCE:
                raise JetStreamUnknownError(f"stream {self._stream} brings nothing for {PATIENCE:g} s")
            await asyncio.sleep(pauses.take())

    def _config(self) -> ConsumerConfig:
        by_time = self._next <= 0
        return ConsumerConfig(
            name=f"read-{secrets.token_hex(8)}",
            filters=self._filters,
            acks="none",
            deliver="by_start_time" if by_time else "by_start_sequence",
            start_time=self._start_utc if by_time else 0.0,
            start_sequence=0 if by_time else self._next,
            in_memory=True,
            replicas=1,
            inactive_threshold=_FORGET,
        )


class _Reading:
    """One consumer."""

    def __init__(self, jetstream: JetStream, stream: str) -> None:
        self.is_empty = False
        self._jetstream = jetstream
        self._stream = stream
        self._name = ""
        self._consumption: Consumption | None = None
        self._arrived: deque[DeliveredMessage] = deque()  # `_WINDOW` at most: more are asked for when it is empty
        self._heard = asyncio.Event()
        self._expected = 1  # number of the next delivery
        self._is_broken = False

    async def begin(self, config: ConsumerConfig) -> None:
        info = await self._jetstream.create_consumer(self._stream, config)
        self._name = config.name
        if info.pending == 0:
            self.is_empty = True
            return
        self._consumption = await self._jetstream.consume(
            self._stream, config.name, self._on_message, self._on_status, idle=_IDLE
        )

    async def next(self) -> DeliveredMessage | None:
        """Return the next message; None when this consumer brings no more."""
        if self._consumption is None:
            return None
        try:
            async with asyncio.timeout(_SILENCE):
                while not self._arrived and not self._is_broken:
                    if self._consumption.credit <= 0:
                        self._consumption.pull(_WINDOW)
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            return None
        return self._arrived.popleft() if self._arrived else None

    async def end(self) -> None:
        with contextlib.suppress(CatgaError):
            if self._consumption is not None:
                await self._consumption.close()
        if self._name:
            with contextlib.suppress(JetStreamError):  # the server forgets it by itself
                await self._jetstream.delete_consumer(self._stream, self._name)

    def _on_message(self, message: DeliveredMessage) -> None:
        if message.consumer_sequence == self._expected and not self._is_broken:
            self._expected += 1
            self._arrived.append(message)
        else:
            self._is_broken = True
        self._heard.set()

    def _on_status(self, code: int, text: str) -> None:
        del text
        if code >= _FAILURES and code not in _OVER:
            self._is_broken = True
        self._heard.set()
