"""JetStream as the broker in memory serves it: the API's subjects in front of the model.

So a client of JetStream needs no twin of its own: it talks to this as it talks to nats-server, over the transport, and
whoever acknowledges by a plain publish is heard, too. What is stored lives as long as the broker, cut or not.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias

import msgspec

from catga_bus.clock import monotonic, utc_now
from catga_bus.transport.consumer_model import PullStatus, Sent
from catga_bus.transport.jetstream import ApiError, JetStreamRefusedError
from catga_bus.transport.jetstream_deliveries import ACK, ACK_ROOT, PENDING_HEADER
from catga_bus.transport.jetstream_json import (
    consumer_from_json,
    consumer_info_to_json,
    message_to_json,
    stream_from_json,
    stream_info_to_json,
)
from catga_bus.transport.jetstream_model import JetStreamModel
from catga_bus.transport.nats_protocol import DESCRIPTION_HEADER
from catga_bus.wire import STATUS_HEADER

Send: TypeAlias = Callable[[str, str, bytes, str, Mapping[str, str] | None], None]
"""Sends a message: to whom (a subject), under which subject, payload, reply subject, headers."""

_ROOT: Final = "$JS."
_API: Final = "$JS.API."
_NEXT: Final = ["CONSUMER", "MSG", "NEXT"]
_API_LEVEL: Final = 2
# What the model knows: the level of nats-server 2.12.

_MAX_CONSUMERS: Final = -1
_ACKS: Final = (ACK, b"")
_BAD_REQUEST: Final = 10003
_NANOSECONDS: Final = 1_000_000_000
_CLIENT_ERRORS: Final = {
    ApiError.STREAM_NOT_FOUND: 404,
    ApiError.CONSUMER_NOT_FOUND: 404,
    ApiError.MESSAGE_NOT_FOUND: 404,
    ApiError.STREAM_STORE_FAILED: 503,
}

_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _PullRequest(msgspec.Struct):
    batch: Annotated[int, msgspec.Meta(ge=1)]
    expires: Annotated[int, msgspec.Meta(ge=1)]
    """Nanoseconds, as is the next."""

    idle_heartbeat: int = 0


_Json: TypeAlias = dict[str, Any]
_decode_pull = msgspec.json.Decoder(_PullRequest).decode
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class MemoryJetStream:
    """Answers what is published to `$JS.API.>` and `$JS.ACK.>`, and stores what is published to a stream.

    Whoever owns it calls it from one thread at a time; it knows no event loop.

    Args:
        send: Sends what it answers and delivers; called from within `accept` and `run`.
        hears: Tells whether somebody listens to a subject.
    """

    def __init__(self, send: Send, hears: Callable[[str], bool]) -> None:
        self.model = JetStreamModel()
        self.is_on = True
        """Whether JetStream is there at all; if not, nobody answers."""

        self._send = send
        self._hears = hears
        self._offset = utc_now().timestamp() - monotonic()
        # Read once: what is stored carries a time for people, and yet it never goes back.
        self._operations: dict[str, Callable[[float, list[str], _Json], _Json]] = {
            "INFO": self._account,
            "STREAM.CREATE": self._create_stream,
            "STREAM.UPDATE": self._update_stream,
            "STREAM.INFO": self._stream,
            "STREAM.NAMES": self._stream_names,
            "STREAM.DELETE": self._delete_stream,
            "STREAM.PURGE": self._purge,
            "STREAM.MSG.GET": self._message,
            "STREAM.MSG.DELETE": self._delete_message,
            "CONSUMER.CREATE": self._create_consumer,
            "CONSUMER.INFO": self._consumer,
            "CONSUMER.NAMES": self._consumer_names,
            "CONSUMER.DELETE": self._delete_consumer,
        }

    def accept(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> bool:
        """Take a message that somebody has published.

        Returns:
            Whether anybody here has heard it; if not, and nobody else has, the publisher is told that nobody listens.
        """
        if not self.is_on:
            return False
        if subject.startswith(_ROOT):
            is_heard = self._control(self._now(), subject, payload, reply)
        elif self.model.stores(subject):
            is_heard = self._publish(self._now(), subject, payload, reply, headers)
        else:
            return False
        if is_heard:
            self.run()
        return is_heard

    def run(self) -> None:
        """Send what is due."""
        for sent in self.model.run(self._now(), self._hears_puller):
            self._deliver(sent)

    def seconds_to_next(self) -> float:
        """Return after how many seconds `run` has something to do; infinity if never."""
        instant = self.model.next_timer()
        return max(0.0, instant - self._now()) if instant < math.inf else math.inf

    # Deliveries.

    def _now(self) -> float:
        return monotonic() + self._offset

    def _hears_puller(self, puller: object) -> bool:
        return self._hears(str(puller))

    def _deliver(self, sent: Sent) -> None:
        puller, content = str(sent.puller), sent.content
        if not isinstance(content, PullStatus):
            self._send(puller, content.subject, content.payload, content.reply, content.headers)
            return
        headers = {STATUS_HEADER: str(content.code), DESCRIPTION_HEADER: content.text}
        if content.code == 408:
            headers[PENDING_HEADER] = str(content.ended)
        self._send(puller, puller, b"", "", headers)

    # What comes in.

    def _publish(self, now: float, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> bool:
        try:
            ack = self.model.publish(now, subject, payload, headers=headers)
        except JetStreamRefusedError as error:
            answer = _failure(error)
        else:
            answer = {"stream": ack.stream, "seq": ack.sequence}
            if ack.duplicate:
                answer["duplicate"] = True
        self._answer(reply, answer)
        return True

    def _control(self, now: float, subject: str, payload: bytes, reply: str) -> bool:
        if subject.startswith(ACK_ROOT):
            return self._acknowledge(now, subject, payload, reply)
        if not subject.startswith(_API):
            return False
        tokens = subject.removeprefix(_API).split(".")
        if tokens[:3] == _NEXT and len(tokens) == 5:
            return self._pull(now, tokens[3], tokens[4], payload, reply)
        for length in (3, 2, 1):
            operation = self._operations.get(".".join(tokens[:length]))
            if operation is not None:
                self._answer(reply, _outcome(operation, now, tokens[length:], payload))
                return True
        return False

    def _acknowledge(self, now: float, subject: str, payload: bytes, reply: str) -> bool:
        if payload not in _ACKS:
            # Postponed, terminated or still at work: the bus says none of it, and the model knows none of it.
            return True
        try:
            taken = self.model.acknowledge(now, subject)
        except ValueError:
            return False
        if taken and reply:
            self._send(reply, reply, b"", "", None)
        return taken is not False

    def _pull(self, now: float, stream: str, consumer: str, payload: bytes, reply: str) -> bool:
        try:
            request = _decode_pull(payload)
        except _UNREADABLE as error:
            self._send(reply, reply, b"", "", {STATUS_HEADER: "400", DESCRIPTION_HEADER: f"Bad Request - {error}"})
            return True
        expires, idle = request.expires / _NANOSECONDS, request.idle_heartbeat / _NANOSECONDS
        return self.model.pull(now, stream, consumer, reply, request.batch, expires=expires, idle=idle)

    def _answer(self, reply: str, answer: _Json) -> None:
        if reply:
            self._send(reply, reply, _encode(answer), "", None)

    # The operations of the API: instant, the tokens behind their name, the body.

    def _account(self, now: float, names: list[str], body: _Json) -> _Json:
        streams = self.model.stream_names(now)
        found = [info for name in streams if (info := self.model.stream(now, name)) is not None]
        return {
            "memory": sum(info.bytes for info in found if info.config.storage == "memory"),
            "storage": sum(info.bytes for info in found if info.config.storage == "file"),
            "streams": len(found),
            "consumers": sum(info.consumers for info in found),
            "limits": {"max_memory": -1, "max_storage": -1, "max_streams": -1, "max_consumers": _MAX_CONSUMERS},
            "api": {"level": _API_LEVEL, "total": 0, "errors": 0},
        }

    def _create_stream(self, now: float, names: list[str], body: _Json) -> _Json:
        return stream_info_to_json(self.model.create_stream(now, stream_from_json(body)))

    def _update_stream(self, now: float, names: list[str], body: _Json) -> _Json:
        return stream_info_to_json(self.model.update_stream(now, stream_from_json(body)))

    def _stream(self, now: float, names: list[str], body: _Json) -> _Json:
        info = self.model.stream(now, names[0])
        if info is None:
            raise JetStreamRefusedError(ApiError.STREAM_NOT_FOUND, "stream not found")
        return stream_info_to_json(info)

    def _stream_names(self, now: float, names: list[str], body: _Json) -> _Json:
        return _page("streams", self.model.stream_names(now, body.get("subject", "")), body)

    def _delete_stream(self, now: float, names: list[str], body: _Json) -> _Json:
        if not self.model.delete_stream(now, names[0]):
            raise JetStreamRefusedError(ApiError.STREAM_NOT_FOUND, "stream not found")
        return {"success": True}

    def _purge(self, now: float, names: list[str], body: _Json) -> _Json:
        return {"success": True, "purged": self.model.purge(now, names[0], body.get("filter", ""))}

    def _message(self, now: float, names: list[str], body: _Json) -> _Json:
        model = self.model
        if "last_by_subj" in body:
            message = model.last_message(now, names[0], body["last_by_subj"])
        elif "next_by_subj" in body:
            message = model.next_message(now, names[0], body["next_by_subj"], body.get("seq", 0))
        else:
            message = model.message(now, names[0], body["seq"])
        if message is None:
            raise JetStreamRefusedError(ApiError.MESSAGE_NOT_FOUND, "no message found")
        return {"message": message_to_json(message)}

    def _delete_message(self, now: float, names: list[str], body: _Json) -> _Json:
        if not self.model.delete_message(now, names[0], body["seq"]):
            raise JetStreamRefusedError(ApiError.MESSAGE_DELETE_FAILED, "no message found")
        return {"success": True}

    def _create_consumer(self, now: float, names: list[str], body: _Json) -> _Json:
        info = self.model.create_consumer(now, names[0], consumer_from_json(body["config"]))
        return consumer_info_to_json(names[0], info)

    def _consumer(self, now: float, names: list[str], body: _Json) -> _Json:
        info = self.model.consumer(now, names[0], names[1])
        if info is None:
            raise JetStreamRefusedError(ApiError.CONSUMER_NOT_FOUND, "consumer not found")
        return consumer_info_to_json(names[0], info)

    def _consumer_names(self, now: float, names: list[str], body: _Json) -> _Json:
        return _page("consumers", self.model.consumer_names(now, names[0]), body)

    def _delete_consumer(self, now: float, names: list[str], body: _Json) -> _Json:
        if not self.model.delete_consumer(now, names[0], names[1]):
            raise JetStreamRefusedError(ApiError.CONSUMER_NOT_FOUND, "consumer not found")
        return {"success": True}


def _outcome(
    operation: Callable[[float, list[str], _Json], _Json], now: float, names: list[str], payload: bytes
) -> _Json:
    try:
        return operation(now, names, _decode(payload) if payload else {})
    except JetStreamRefusedError as error:
        return _failure(error)
    except (*_UNREADABLE, AttributeError, LookupError, TypeError, ValueError) as error:
        return _failure(JetStreamRefusedError(_BAD_REQUEST, f"bad request: {error!r}"))


def _failure(error: JetStreamRefusedError) -> _Json:
    status = next((status for code, status in _CLIENT_ERRORS.items() if code == error.code), 400)
    return {"error": {"code": status, "err_code": int(error.code), "description": error.text}}


def _page(field: str, names: list[str], body: _Json) -> _Json:
    return {"total": len(names), "offset": body.get("offset", 0), field: names[body.get("offset", 0) :]}
