"""Messages as JSON, without their classes: what any NATS client can send, in any language."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from catga_bus.errors import (
    CatgaError,
    Code,
    DeadlineExceededError,
    DisconnectedError,
    HandlerError,
    NoHandlerError,
    Outcome,
    PermissionDeniedError,
)
from catga_bus.result import Err
from catga_bus.transport.base import Transport
from catga_bus.wire import (
    ERROR_CODE_HEADER,
    ERROR_HEADER,
    NO_RESPONDERS,
    STATUS_HEADER,
    Names,
)

_NOT_RUN = (Code.NO_HANDLER, Code.OVERLOADED, Code.CIRCUIT_OPEN, Code.INVALID_MESSAGE)
_FAILED = (Code.HANDLER_ERROR, Code.TOO_LARGE, Code.DEAD_LETTERED)


class _Fault(msgspec.Struct):
    """The body of an answer that says no."""

    code: str
    message: str = ""
    details: Any = None
    retryable: bool = False


class DoorEvents:
    """Listens for what makes waiting for an answer pointless."""

    def __init__(self) -> None:
        self.waiting: asyncio.Future[Any] | None = None
        """Fails when something goes wrong."""

        self.denied: PermissionDeniedError | None = None
        """What the server refused, if anything."""

        self.lost: Callable[[], None] = lambda: None
        """Called when the connection is lost."""

        self.refused = asyncio.Event()
        """Set when the server refuses a subject."""

    def on_disconnected(self, reason: str) -> None:
        """Fail what waits: its answer would come on a connection that is gone."""
        self._fail(DisconnectedError(f"the connection was lost: {reason}"))
        self.lost()

    def on_reconnected(self, url: str) -> None:
        """Nothing waits any more."""

    def on_denied(self, subject: str, text: str) -> None:
        """Fail what waits: the server did not take it."""
        self.denied = PermissionDeniedError(text, subject)
        self.refused.set()
        self._fail(self.denied)

    def on_error(self, text: str) -> None:
        """What was survived is of no interest to one call."""

    def _fail(self, error: CatgaError) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(error)


class Door:
    """Sends JSON on a connection that is open already.

    Args:
        transport: The connection.
        names: The subjects.
        events: What the transport tells its owner.
    """

    def __init__(self, transport: Transport, names: Names, events: DoorEvents) -> None:
        self._transport = transport
        self._names = names
        self._events = events

    async def request(self, type_name: str, body: bytes, timeout: float) -> Any:
        """Ask whoever handles the type; returns the answer, decoded.

        Args:
            type_name: The name on the wire.
            body: JSON.
            timeout: In seconds.

        Raises:
            CallError: The subclass that stands for the answer's code, or for there being no answer.
            PermissionDeniedError: The server does not let this user ask.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._events.waiting = answer

        def on_answer(_: str, payload: bytes, __: str, headers: Mapping[str, str] | None) -> None:
            if answer.done():
                return
            try:
                answer.set_result(_decoded(type_name, payload, headers or {}))
            except CatgaError as error:
                answer.set_exception(error)

        inbox = self._transport.new_inbox()
        subscription = await self._transport.subscribe(inbox, on_answer)
        try:
            self._transport.publish(self._names.request(type_name), body, reply=inbox)
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError as error:
            if isinstance(error, CatgaError):
                raise
            raise DeadlineExceededError(f"no answer to {type_name} within {timeout:g} s", attempts=1) from None
        finally:
            self._events.waiting = None
            await subscription.close()

    async def tick(self, type_name: str, body: bytes) -> str:
        """Publish an event that is not stored; returns its subject."""
        return await self._tell(self._names.tick(type_name), body)

    async def broadcast(self, type_name: str, body: bytes) -> str:
        """Broadcast an event to every live node; returns its subject."""
        return await self._tell(self._names.broadcast(type_name), body)

    async def _tell(self, subject: str, body: bytes) -> str:
        self._transport.publish(subject, body)
        await self._transport.flush()  # the server has taken or refused it when this returns
        if self._events.denied is not None:
            raise self._events.denied
        return subject


def _decoded(type_name: str, payload: bytes, headers: Mapping[str, str]) -> Any:
    if headers.get(STATUS_HEADER) == NO_RESPONDERS:
        raise NoHandlerError(
            f"nobody handles {type_name}: no node that does is connected to this server",
            outcome=Outcome.NOT_RUN,
            attempts=1,
        )
    code = headers.get(ERROR_CODE_HEADER)
    if code is not None:
        raise _fault(code, headers.get(ERROR_HEADER, ""), payload)
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise HandlerError(
            f"the answer to {type_name} is not JSON: {error}", outcome=Outcome.FAILED, attempts=1
        ) from None


def _fault(code: str, message: str, payload: bytes) -> CatgaError:
    try:
        fault = msgspec.json.decode(payload, type=_Fault)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        fault = _Fault(code, message)  # from a service that is not of this bus: its headers say enough
    if fault.code in _NOT_RUN:
        outcome = Outcome.NOT_RUN
    elif fault.code in _FAILED:
        outcome = Outcome.FAILED
    elif fault.code in (Code.TIMEOUT, Code.DISCONNECTED):
        outcome = Outcome.UNKNOWN
    else:
        outcome = Outcome.REFUSED
    return Err(fault.code, fault.message, fault.details, outcome, fault.retryable, 1).error()
