"""JetStream over a transport: the API in JSON, publishes with confirmation, and consumers at work."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from catga_bus.clock import Clock
from catga_bus.errors import DisconnectedError
from catga_bus.transport.base import Transport
from catga_bus.transport.calls import Calls
from catga_bus.transport.jetstream import (
    API_ROOT,
    CHANGE_TIMEOUT,
    ApiError,
    ConsumerConfig,
    ConsumerInfo,
    JetStreamError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    JetStreamUnreachedError,
    MessageSink,
    PubAck,
    StatusSink,
    StoredMessage,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.jetstream_configs import publish_headers, same_consumer, same_stream
from catga_bus.transport.jetstream_deliveries import ACK
from catga_bus.transport.jetstream_json import (
    Json,
    consumer_info_from_json,
    consumer_to_json,
    message_from_json,
    stream_info_from_json,
    stream_to_json,
)
from catga_bus.transport.jetstream_outcomes import error_of
from catga_bus.transport.nats_consumption import NatsConsumption

_READ_TIMEOUT: Final = 2.0
# Seconds until the outcome is unknown. Reads and acknowledgements take a round trip.

_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
# All that msgspec raises about bytes.

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class _Failure(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _PubAnswer(msgspec.Struct):
    error: _Failure | None = None
    stream: str = ""
    seq: int = 0
    duplicate: bool = False


_decode_pub_answer = msgspec.json.Decoder(_PubAnswer).decode


class NatsJetStream:
    """JetStream; `catga_bus.transport.jetstream.JetStream` is its contract.

    It holds one subscription for all answers, made with the first call, and one for each consumer at work.

    Args:
        transport: Connected; its owner calls `disconnected` when it is told so.
        clock: Tells the time.
    """

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._calls = Calls(transport, clock)
        self._consumptions: dict[NatsConsumption, None] = {}

    # Its own life.

    def disconnected(self) -> None:
        """The connection was lost: what waits is unknown at once, and every pull is over."""
        self._calls.fail_all("the connection was lost")
        for consumption in self._consumptions:
            consumption.forget_pulls()

    async def close(self) -> None:
        """End every consumption, and let what waits end with an unknown outcome. Closing twice is fine."""
        for consumption in tuple(self._consumptions):
            await consumption.close()
        await self._calls.close()

    # Streams.

    async def account(self) -> Mapping[str, Any]:
        """Return the server's account information."""
        answer = await self._calls.ask(f"{API_ROOT}INFO", b"", _READ_TIMEOUT)
        if answer is None:
            # No server with JetStream listens here: this is not an election, for which the others would answer.
            raise JetStreamRefusedError(ApiError.NOT_ENABLED, "JetStream not enabled")
        return self._read("INFO", answer)

    async def create_stream(self, config: StreamConfig) -> StreamInfo:
        """Create a stream; one that is there already with the same configuration is fine."""
        try:
            answer = await self._api(f"STREAM.CREATE.{config.name}", stream_to_json(config), CHANGE_TIMEOUT)
        except JetStreamRefusedError as error:
            if error.code != ApiError.STREAM_NAME_IN_USE:
                raise
            # The server compares what it would add, too, and a newer one adds more than the one that made the stream.
            there = await self.stream(config.name)
            if there is None or not same_stream(there.config, config):
                raise
            return there
        return _as_asked(config, _parsed(stream_info_from_json, answer))

    async def update_stream(self, config: StreamConfig) -> StreamInfo:
        """Change a stream."""
        answer = await self._api(f"STREAM.UPDATE.{config.name}", stream_to_json(config), CHANGE_TIMEOUT)
        return _as_asked(config, _parsed(stream_info_from_json, answer))

    async def stream(self, name: str) -> StreamInfo | None:
        """Return a stream, or None."""
        answer = await self._find(f"STREAM.INFO.{name}", None, ApiError.STREAM_NOT_FOUND)
        return _parsed(stream_info_from_json, answer) if answer is not None else None

    async def stream_names(self, subject: str = "") -> list[str]:
        """Return the names of all streams, or of those that store a subject."""
        return await self._names("STREAM.NAMES", "streams", {"subject": subject} if subject else {})

    async def delete_stream(self, name: str) -> bool:
        """Delete a stream; return whether it was there."""
        operation = f"STREAM.DELETE.{name}"
        return await self._find(operation, None, ApiError.STREAM_NOT_FOUND, timeout=CHANGE_TIMEOUT) is not None

    async def purge(self, stream: str, *, subject: str = "") -> int:
        """Delete all messages, or those on a subject; return how many."""
        answer = await self._api(f"STREAM.PURGE.{stream}", {"filter": subject} if subject else None, CHANGE_TIMEOUT)
        return _parsed(lambda fields: int(fields["purged"]), answer)

    # Messages.

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 2.0,
    ) -> PubAck:
        """Store a message; see `catga_bus.transport.jetstream.JetStream.publish`."""
        every = publish_headers(message_id, expected_last, headers)
        answer = await self._calls.ask(subject, payload, timeout, every)
        if answer is None:
            raise JetStreamUnreachedError(f"{subject}: no stream stores it, or the stream has no leader")
        try:
            ack = _decode_pub_answer(answer)
        except _UNREADABLE:
            raise _unreadable(subject, answer) from None
        if ack.error is not None:
            raise error_of(ack.error.err_code, ack.error.description, ack.error.code, subject)
        if not ack.stream:
            # Somebody else answers on this subject; who knows whether it was stored.
            raise _unreadable(subject, answer)
        return PubAck(ack.stream, ack.seq, ack.duplicate)

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """Return the last message on a subject as the stream's leader has it, or None."""
        return await self._message(stream, {"last_by_subj": subject})

    async def message(self, stream: str, sequence: int) -> StoredMessage | None:
        """Return one message, or None."""
        return await self._message(stream, {"seq": sequence})

    async def next_message(self, stream: str, subject: str, sequence: int) -> StoredMessage | None:
        """Return the first message from a sequence on whose subject matches, or None."""
        return await self._message(stream, {"seq": sequence, "next_by_subj": subject})

    async def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message; return whether it was there."""
        body = {"seq": sequence, "no_erase": True}
        try:
            await self._api(f"STREAM.MSG.DELETE.{stream}", body, CHANGE_TIMEOUT)
        except JetStreamRefusedError as error:
            if error.code == ApiError.SEQUENCE_NOT_FOUND:
                return False
            # The same words for a message that is gone and for a stream that lets nobody delete.
            if error.code == ApiError.MESSAGE_DELETE_FAILED and await self.message(stream, sequence) is None:
                return False
            raise
        return True

    # Consumers.

    async def create_consumer(
        self, stream: str, config: ConsumerConfig, *, timeout: float = CHANGE_TIMEOUT
    ) -> ConsumerInfo:
        """Create a consumer; one that is there already with the same configuration is fine."""
        operation = f"CONSUMER.CREATE.{stream}.{config.name}"
        if len(config.filters) == 1 and "*" not in config.filters[0] and ">" not in config.filters[0]:
            # So that permissions can tell one partition from another; with wildcards it would be no subject.
            operation += f".{config.filters[0]}"
        body = {"stream_name": stream, "config": consumer_to_json(config), "action": "create"}
        try:
            answer = await self._api(operation, body, timeout)
        except JetStreamRefusedError as error:
            if error.code != ApiError.CONSUMER_NAME_IN_USE:
                raise
            there = await self.consumer(stream, config.name)
            if there is None or not same_consumer(there.config, config):
                raise
            return there
        return _parsed(consumer_info_from_json, answer)

    async def consumer(self, stream: str, name: str) -> ConsumerInfo | None:
        """Return a consumer, or None."""
        answer = await self._find(f"CONSUMER.INFO.{stream}.{name}", None, ApiError.CONSUMER_NOT_FOUND)
        return _parsed(consumer_info_from_json, answer) if answer is not None else None

    async def consumer_names(self, stream: str) -> list[str]:
        """Return the names of all consumers of a stream."""
        return await self._names(f"CONSUMER.NAMES.{stream}", "consumers", {})

    async def delete_consumer(self, stream: str, name: str, *, timeout: float = CHANGE_TIMEOUT) -> bool:
        """Delete a consumer; return whether it was there."""
        operation = f"CONSUMER.DELETE.{stream}.{name}"
        return await self._find(operation, None, ApiError.CONSUMER_NOT_FOUND, timeout=timeout) is not None

    async def consume(
        self, stream: str, consumer: str, on_message: MessageSink, on_status: StatusSink, *, idle: float = 5.0
    ) -> "NatsConsumption":
        """Have a consumer's messages delivered here; nothing comes before the first `pull`."""
        subject = f"{API_ROOT}CONSUMER.MSG.NEXT.{stream}.{consumer}"
        consumption = NatsConsumption(
            self._transport, self._clock, subject, on_message, on_status, idle, self._consumptions.pop
        )
        try:
            await consumption.open()
        except DisconnectedError as error:
            raise JetStreamUnknownError(f"{subject}: {error.message}") from error
        self._consumptions[consumption] = None
        return consumption

    def acknowledge(self, reply: str) -> None:
        """Acknowledge a message, without knowing whether that arrives."""
        with contextlib.suppress(DisconnectedError):
            self._transport.publish(reply, ACK)

    async def acknowledge_confirmed(self, reply: str, *, timeout: float = 2.0) -> bool:
        """Acknowledge a message and wait for the server to say so; return whether it did."""
        return await self._calls.ask(reply, ACK, timeout) is not None

    # Inside.

    async def _message(self, stream: str, body: Mapping[str, Any]) -> StoredMessage | None:
        answer = await self._find(f"STREAM.MSG.GET.{stream}", body, ApiError.MESSAGE_NOT_FOUND)
        return _parsed(lambda fields: message_from_json(fields["message"]), answer) if answer is not None else None

    async def _find(
        self, operation: str, body: Mapping[str, Any] | None, absent: ApiError, *, timeout: float = _READ_TIMEOUT
    ) -> dict[str, Any] | None:
        """Return the answer, or None if the server says that what was asked for is not there."""
        try:
            return await self._api(operation, body, timeout)
        except JetStreamRefusedError as error:
            if error.code == absent:
                return None
            raise

    async def _names(self, operation: str, field: str, body: Mapping[str, Any]) -> list[str]:
        names: list[str] = []
        total = 1
        while len(names) < total:
            answer = await self._api(operation, {**body, "offset": len(names)}, _READ_TIMEOUT)
            page = answer.get(field) or []
            if not page:
                break
            names += page
            total = answer["total"]
        return sorted(names)

    async def _api(self, operation: str, body: Mapping[str, Any] | None, timeout: float) -> dict[str, Any]:
        payload = _encode(body) if body is not None else b""
        answer = await self._calls.ask(API_ROOT + operation, payload, timeout)
        if answer is None:
            raise JetStreamUnknownError(f"{operation}: nobody answers: JetStream is off, or has no leader")
        return self._read(operation, answer)

    def _read(self, operation: str, answer: bytes) -> dict[str, Any]:
        try:
            fields = _decode(answer)
        except _UNREADABLE:
            raise _unreadable(operation, answer) from None
        error = fields.get("error")
        if error is None:
            return fields
        raise error_of(error.get("err_code", 0), error.get("description", ""), error.get("code", 0), operation)


def _parsed(parse: Callable[[Json], T], answer: Json) -> T:
    try:
        return parse(answer)
    except (KeyError, TypeError, ValueError) as error:
        raise JetStreamUnknownError(f"an answer that is not of JetStream ({error!r}): {str(answer)[:80]}") from error


def _unreadable(what: str, answer: bytes) -> JetStreamError:
    return JetStreamUnknownError(f"{what}: an answer that is not of JetStream: {answer[:80]!r}")


def _as_asked(config: StreamConfig, info: StreamInfo) -> StreamInfo:
    """Return what the server has made, if it took all of it: an old one ignores what it does not know."""
    if config.allow_schedules and not info.config.allow_schedules:
        text = f"stream {config.name!r} cannot hold delayed messages: they need nats-server 2.12 or newer"
        raise JetStreamRefusedError(ApiError.INVALID_CONFIG, text)
    return info
