"""The JSON door: requests of clients that are not a bus, one per message, answered in JSON on their reply subject."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from catga_bus.clock import Clock
from catga_bus.dispatch.deliveries import Delivery, Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.dispatch.failures import describe
from catga_bus.errors import Code
from catga_bus.ids import MessageIds
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.coalescer import Coalescer
from catga_bus.wire import ERROR_CODE_HEADER, ERROR_HEADER, Fault, Status

FULL = Fault(Code.OVERLOADED, "the intake is full", retryable=True)

_HEADER_BYTES = 1_024  # of an error: at most 576 characters of code and text, and the names

_encode_json = msgspec.json.Encoder().encode


class Endpoint(msgspec.Struct):
    """A request type that this node answers."""

    station: Station
    encode_json: Callable[[Any], bytes]
    subscription: Subscription | None = None


class JsonDoor:
    """Hands JSON requests to the dispatcher and answers them; without ids of their own nothing knows them again.

    Args:
        transport: Says how large an answer may be.
        answers: Says whether the way back is full.
        dispatcher: Runs the handlers.
        ids: Ids for the messages, which come without.
        default_timeout: Seconds for which a client waits: its messages do not say.
        publish: Writes a subject, a payload and headers.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        transport: Transport,
        answers: Coalescer,
        dispatcher: Dispatcher,
        ids: MessageIds,
        *,
        default_timeout: float,
        publish: Callable[[str, bytes, Mapping[str, str] | None], None],
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._answers = answers
        self._dispatcher = dispatcher
        self._ids = ids
        self._default_timeout = default_timeout
        self._publish = publish
        self._clock = clock

    def take(self, endpoint: Endpoint, payload: bytes, reply: str) -> None:
        """Take a request that may be answered on `reply`."""
        delivery = Delivery(
            station=endpoint.station,
            id=self._ids.take(),
            key=None,
            attempt=1,
            trace=None,
            sender="json",
            body=payload,
            size=len(payload),
            deadline=self._clock() + self._default_timeout,
            settle=self._settle,
            target=(reply, endpoint),
            json=True,
        )
        if self._dispatcher.admit(delivery):
            self._dispatcher.wake()
        else:
            self.refuse(reply, FULL)

    def refuse(self, reply: str, fault: Fault) -> None:
        """Answer what is not run; while the way back is full such answers are dropped, never stored."""
        if not self._answers.is_full:
            self._answer_fault(reply, fault)

    def _settle(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        del seconds  # a lone client has no grain to set
        reply: str = delivery.target[0]
        endpoint: Endpoint = delivery.target[1]
        if status is not Status.OK:
            self._answer_fault(reply, value)
            return
        try:
            body = endpoint.encode_json(value)
        except Exception as error:
            self._answer_fault(reply, not_encodable(delivery, error))
            return
        if len(body) > self._transport.max_payload:
            self._answer_fault(reply, too_large(delivery, len(body), self._transport.max_payload))
            return
        self._publish(reply, body, None)

    def _answer_fault(self, reply: str, fault: Fault) -> None:
        body, headers = _encode_fault(fault)
        if len(body) + _HEADER_BYTES > self._transport.max_payload:
            body, headers = _encode_fault(Fault(fault.code, "the details are too large to be sent"))
        self._publish(reply, body, headers)


def _encode_fault(fault: Fault) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a failure: whatever a handler put into it, both can be sent."""
    code = _one_line(fault.code, 64) or str(Code.HANDLER_ERROR)
    text = _one_line(fault.message, 512) or code
    body = {"code": code, "message": _text(fault.message), "details": fault.details, "retryable": fault.retryable}
    try:
        encoded = _encode_json(body)
    except Exception:
        encoded = _encode_json(body | {"details": None})
    return encoded, {ERROR_CODE_HEADER: code, ERROR_HEADER: text}


def _text(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _one_line(value: object, most: int) -> str:
    return " ".join(_text(value).replace("\0", " ").split())[:most]


def not_encodable(delivery: Delivery, error: Exception) -> Fault:
    """Return the fault of a handler whose answer cannot be encoded."""
    return Fault(Code.HANDLER_ERROR, f"the answer of {delivery.station.name} cannot be encoded: {describe(error)}")


def too_large(delivery: Delivery, size: int, bound: int) -> Fault:
    """Return the fault of an answer of `size` bytes where the server takes `bound`."""
    return Fault(Code.TOO_LARGE, f"the answer of {delivery.station.name} is {size:,} bytes; the server takes {bound:,}")
