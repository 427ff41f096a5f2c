"""A bucket of keys and values with revisions: the last message of each subject of a stream.

The layout is that of the KV buckets of the NATS clients, so `nats kv` and every client can read it. Reads go through
the stream's leader; the sequence of a value's message is its revision, and rises over all keys of the bucket.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import Final

import msgspec

from catga_bus.errors import ConfigurationError
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    DeliveredMessage,
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.validation import checked_subject

OPERATION_HEADER: Final = "KV-Operation"
MARKER_HEADER: Final = "Nats-Marker-Reason"

_READER_LIVES: Final = 10.0
# Seconds until the server deletes a reader whose owner died.

_SILENCE: Final = 2.0
# Seconds without a message after which a listing is given up.


class Entry(msgspec.Struct, frozen=True):
    """What a bucket holds under a key."""

    value: bytes | None
    """None: it was deleted, has expired, or never was."""

    revision: int
    """What a compare-and-set of this key has to name; 0 if the key never was."""


class KeyValue:
    """A bucket.

    Args:
        jetstream: Where it is stored.
        bucket: Its name: letters, digits, `_` and `-`.
        replicas: Of a bucket that has to be made.
        metadata: Of a bucket that has to be made.
    """

    def __init__(
        self, jetstream: JetStream, bucket: str, *, replicas: int = 1, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._jetstream = jetstream
        self._bucket = bucket
        self._replicas = replicas
        self._metadata = metadata or {}
        self._root = checked_subject(f"$KV.{bucket}") + "."
        self.stream = f"KV_{bucket}"
        """The stream that holds it."""

    def config(self, first_sequence: int = 0) -> StreamConfig:
        """Return the stream's configuration.

        Args:
            first_sequence: Revisions begin here; 0: at 1.
        """
        return StreamConfig(
            name=self.stream,
            subjects=(f"{self._root}>",),
            replicas=self._replicas,
            max_messages_per_subject=1,
            discard="new",
            deny_delete=True,
            allow_rollup=True,
            first_sequence=first_sequence,
            metadata=self._metadata,
        )

    async def open(self, first_sequence: int = 0) -> StreamInfo:
        """Make the bucket, or use the one that is there.

        Of two who make it at once both use the one of the faster, whatever `first_sequence` the other asked for.
        Replicas and limits of a bucket that is there are its operator's choice; only what could make keys vanish is
        not.

        Args:
            first_sequence: Revisions of a new bucket begin here, so that one that was lost goes on rising.

        Raises:
            ConfigurationError: There is a stream of its name that cannot serve; the text says why.
            JetStreamRefusedError: It cannot be made.
            JetStreamUnknownError: Nobody knows; opening again is harmless.
        """
        try:
            return await self._jetstream.create_stream(self.config(first_sequence))
        except JetStreamRefusedError as error:
            if error.code != ApiError.STREAM_NAME_IN_USE:
                raise
            there = await self._jetstream.stream(self.stream)
            if there is None:
                raise
            self._check(there.config)
            return there

    async def read(self, key: str) -> Entry:
        """Return what the leader has under a key.

        Raises:
            JetStreamRefusedError: There is no such bucket (`STREAM_NOT_FOUND`).
            ConfigurationError: The key cannot be part of a subject.
        """
        message = await self._jetstream.last_message(self.stream, self._subject(key))
        if message is None:
            return Entry(None, 0)
        return _entry(message.payload, message.headers, message.sequence)

    async def write(self, key: str, value: bytes, last: int) -> int:
        """Write a value if the key's revision is still `last`; return the new revision. Tried once.

        Args:
            key: Letters, digits, `_`, `-`, `=`, `/` and single dots.
            value: What.
            last: The revision that `read` returned, also that of a deleted key; 0: the key must never have been.

        Raises:
            JetStreamRefusedError: The revision is another (`WRONG_LAST_SEQUENCE`), or the bucket is full.
            JetStreamUnknownError: It may have been written, or may still be; reading tells.
        """
        ack = await self._jetstream.publish(self._subject(key), value, expected_last=last)
        if ack.stream != self.stream:
            raise ConfigurationError(
                f"the keys of bucket {self._bucket!r} are stored by another stream, {ack.stream!r}"
            )
        return ack.sequence

    async def keys(self) -> list[str]:
        """Return all keys that have a value, sorted."""
        entries = await self.entries()
        return sorted(key for key, entry in entries.items() if entry.value is not None)

    async def entries(self) -> dict[str, Entry]:
        """Return everything, deleted keys too, in three round trips however much it is.

        It comes from one of the replicas, which may lag behind the leader: good for looking at and for planning, not
        for a compare-and-set.

        Raises:
            JetStreamRefusedError: There is no such bucket (`STREAM_NOT_FOUND`).
            JetStreamUnknownError: The listing could not be completed.
        """
        reader = ConsumerConfig(
            name=f"list-{secrets.token_hex(8)}",
            filters=(f"{self._root}>",),
            acks="none",
            deliver="last_per_subject",
            in_memory=True,
            replicas=1,
            inactive_threshold=_READER_LIVES,
        )
        info = await self._jetstream.create_consumer(self.stream, reader)
        try:
            return await self._read_all(reader.name, info.pending)
        finally:
            # If it is not deleted here, the server does so after a while.
            with contextlib.suppress(JetStreamRefusedError, JetStreamUnknownError):
                await self._jetstream.delete_consumer(self.stream, reader.name)

    async def _read_all(self, reader: str, count: int) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        left = count
        has_come = asyncio.Event()

        def take(message: DeliveredMessage) -> None:
            nonlocal left
            left -= 1
            has_come.set()
            key = message.subject.removeprefix(self._root)
            found[key] = _entry(message.payload, message.headers or {}, message.sequence)

        if not count:
            return found
        consumption = await self._jetstream.consume(self.stream, reader, take, lambda _, __: None)
        try:
            consumption.pull(count)
            while left > 0:
                has_come.clear()
                async with asyncio.timeout(_SILENCE):
                    await has_come.wait()
        except TimeoutError:
            raise JetStreamUnknownError(f"bucket {self._bucket!r}: {left} of {count} entries did not come") from None
        finally:
            await consumption.close()
        return found

    def _subject(self, key: str) -> str:
        return checked_subject(self._root + key)

    def _check(self, there: StreamConfig) -> None:
        wanted = self.config()
        problems = []
        if there.subjects != wanted.subjects:
            problems.append(f"its subjects are {there.subjects}, not {wanted.subjects}")
        if there.retention != "limits":
            problems.append(f"its retention is {there.retention!r}, not 'limits'")
        if there.max_age:
            problems.append(f"its keys expire after {there.max_age} s")
        if there.discard == "old" and there.max_bytes >= 0:
            problems.append("it discards old keys when it is full")
        if problems:
            raise ConfigurationError(
                f"stream {self.stream!r} cannot be the bucket {self._bucket!r}: {'; '.join(problems)};"
                " change it, or use another namespace"
            )


def _entry(payload: bytes, headers: Mapping[str, str], revision: int) -> Entry:
    is_marker = OPERATION_HEADER in headers or MARKER_HEADER in headers
    return Entry(None if is_marker else payload, revision)
