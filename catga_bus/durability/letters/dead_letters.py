"""The log of a service's dead letters: stored before their originals are acknowledged, read by people.

Decided: each letter has a subject of its own, `catga.dlq.<service>.<id>.<mark>`, and is stored only if nothing lies on
that subject yet. So a letter is stored once however often it is buried: after a lost acknowledgement, by the next owner
of the partition, or a week later, when the id that the server remembers for two minutes would not help any more. And
the letters of one message are found without reading the others.
"""

import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import msgspec

from catga_bus.codec import GateError
from catga_bus.durability.letters.letters import DeadLetter, decode_letter, encode_letter, shorten
from catga_bus.durability.letters.repeating import Pauses, repeat
from catga_bus.errors import TooLargeError
from catga_bus.transport.jetstream import (
    ApiError,
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
    PubAck,
    StoredMessage,
    StreamInfo,
)
from catga_bus.wire import Names

PATIENCE = 15.0
"""Seconds for which everything is tried while there is no answer: longer than a change of leaders takes."""

_BLOCK = 64
# Letters that are read at once to be shown the newest first.

T = TypeVar("T")


class Buried(msgspec.Struct, frozen=True):
    """A dead letter where it lies."""

    number: int
    """Its sequence in the stream of dead letters: what people call it by."""

    stored_utc: float
    """When it was stored: seconds since 1970."""

    size_bytes: int
    letter: DeadLetter | None
    """None if what lies there is no letter."""

    fault: str = ""
    """Why it is none."""


class DeadLetters:
    """The dead letters of one service.

    Args:
        jetstream: Stores them.
        names: The names.
        service: Whose.
        rng: Draws the pauses between attempts.
        first_pause: Bound of the first pause, in seconds.
    """

    def __init__(
        self,
        jetstream: JetStream,
        names: Names,
        service: str,
        *,
        rng: random.Random | None = None,
        first_pause: float = 0.1,
    ) -> None:
        self.service = service
        self.stream = names.dead_letter_stream(service)
        self._jetstream = jetstream
        self._names = names
        self._rng = random.Random() if rng is None else rng
        self._first_pause = first_pause

    # -- writing -------------------------------------------------------------------------------------------

    async def bury(self, letter: DeadLetter) -> PubAck:
        """Store a letter; only then may its original be acknowledged.

        It is tried again while the outcome is unknown. What the server will not take because of its size loses the end
        of its body, and says so (`DeadLetter.missing`).

        Returns:
            Where it lies; `duplicate` if it lay there before.

        Raises:
            JetStreamRefusedError: The stream is full: bury it again later, as long as the message is still to be given
                up here.
            JetStreamUnknownError: Nobody knows after `PATIENCE` seconds: bury it again.
            TooLargeError: It does not fit, even without its body.
        """
        mark = letter.mark
        subject = self._names.dead_letter(self.service, letter.id, mark)
        while True:
            payload = encode_letter(letter)
            try:
                return await self._patiently(lambda: self._store(subject, mark, payload))  # noqa: B023 - awaited here
            except TooLargeError:
                shorter = shorten(letter)
                if shorter is None:
                    raise
                letter = shorter

    async def _store(self, subject: str, mark: str, payload: bytes) -> PubAck:
        try:
            return await self._jetstream.publish(subject, payload, message_id=mark, expected_last=0)
        except JetStreamRefusedError as error:
            if error.code != ApiError.WRONG_LAST_SEQUENCE:
                raise
        before = await self._jetstream.last_message(self.stream, subject)
        if before is None:  # of another attempt, which the cluster has not agreed on yet
            raise JetStreamUnknownError(f"whether {subject} is stored is not known yet")
        return PubAck(self.stream, before.sequence, duplicate=True)

    async def remove(self, number: int) -> bool:
        """Delete a letter; return whether it was there. After an attempt without an answer True may be False."""
        return await self._patiently(lambda: self._jetstream.delete_message(self.stream, number))

    # -- reading -------------------------------------------------------------------------------------------

    async def info(self) -> StreamInfo | None:
        """Return the state of the stream; None if the service has none, because it never ran."""
        return await self._patiently(lambda: self._jetstream.stream(self.stream))

    async def at(self, number: int) -> Buried | None:
        """Return the letter with a number, or None if there is none (any more)."""
        stored = await self._patiently(lambda: self._jetstream.message(self.stream, number))
        return None if stored is None else _buried(stored)

    async def of(self, message_id: str) -> list[Buried]:
        """Return all letters of a message, the oldest first: it has several if it failed again when it was retried."""
        subject = self._names.dead_letters_of(self.service, message_id)
        found: list[Buried] = []
        after = 0
        while (buried := await self._next(subject, after + 1)) is not None:
            after = buried.number
            if buried.letter is not None and buried.letter.id == message_id:  # tokens of long ids are hashes
                found.append(buried)
        return found

    async def oldest_first(self, *, through: int | None = None) -> AsyncGenerator[Buried, None]:
        """Yield the letters in the order in which they were buried, one in memory at a time.

        Args:
            through: The last number. None: the last one there is now, so that it ends while more are buried.
        """
        info = await self.info()
        if info is None:
            return
        last = info.last_sequence if through is None else through
        subject = self._names.dead_letters(self.service)
        after = info.first_sequence - 1
        while after < last:
            buried = await self._next(subject, after + 1)
            if buried is None or buried.number > last:
                return
            after = buried.number
            yield buried

    async def newest_first(self) -> AsyncGenerator[Buried, None]:
        """Yield the letters in the opposite order, a small block in memory at a time."""
        info = await self.info()
        if info is None or not info.messages:
            return
        subject = self._names.dead_letters(self.service)
        first, end, size = info.first_sequence, info.last_sequence + 1, _BLOCK
        while end > first:
            start = max(first, end - size)
            buried = await self._next(subject, start)
            if buried is None or buried.number >= end:
                end, size = start, 2 * size  # all of these were deleted
            elif size > _BLOCK:
                size //= 2
            else:
                block: list[Buried] = []
                while buried is not None and buried.number < end:
                    block.append(buried)
                    buried = await self._next(subject, buried.number + 1)
                for one in reversed(block):
                    yield one
                end = start

    async def earlier_of_lane(self, buried: Buried, limit: int) -> list[int]:
        """Return the numbers of the first letters that stand in line before one, because they have its key.

        Args:
            buried: The one.
            limit: How many at most.
        """
        letter = buried.letter
        if letter is None or letter.key is None:
            return []
        found: list[int] = []
        async for other in self.oldest_first(through=buried.number - 1):
            if other.letter is not None and other.letter.key == letter.key:
                found.append(other.number)
                if len(found) >= limit:
                    break
        return found

    async def _next(self, subject: str, number: int) -> Buried | None:
        stored = await self._patiently(lambda: self._jetstream.next_message(self.stream, subject, number))
        return None if stored is None else _buried(stored)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        return await repeat(call, Pauses(self._rng, first=self._first_pause), seconds=PATIENCE)


def _buried(stored: StoredMessage) -> Buried:
    size = len(stored.payload)
    try:
        return Buried(stored.sequence, stored.time, size, decode_letter(stored.payload))
    except GateError as error:
        return Buried(stored.sequence, stored.time, size, None, str(error))
