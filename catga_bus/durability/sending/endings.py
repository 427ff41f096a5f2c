"""How calls end that are stored first: the results and errors, made of what is known."""

from typing import Any

import msgspec

from catga_bus.codec import DECODE_ERRORS, explain
from catga_bus.durability.sending.postings import Posting
from catga_bus.errors import CALL_ERRORS, CallError, Code, Outcome, PermissionDeniedError
from catga_bus.result import Err, Ok
from catga_bus.wire import AnswerFrame, Fault, Status

_decode_fault = msgspec.msgpack.Decoder(Fault).decode


def as_err(error: CallError) -> Err:
    """Return the result that an exception stands for."""
    return Err(error.code, error.message, error.details, error.outcome, error.retryable, error.attempts, error.node)


def fail(posting: Posting, code: Code, outcome: Outcome, text: str) -> None:
    """End a message that was not stored, or of which that is not known; without effect if it has an end."""
    posting.is_over = True
    if posting.future.done():
        return
    message = f"{posting.type_name}: {text}"
    is_hopeless = code in (Code.INVALID_MESSAGE, Code.TOO_LARGE)
    retryable = outcome is Outcome.NOT_RUN and not is_hopeless
    attempts = int(posting.is_written)
    details = where(posting)
    if posting.decode is not None:
        posting.future.set_result(Err(str(code), message, details, outcome, retryable, attempts))
        return
    error = CALL_ERRORS[str(code)]
    posting.future.set_exception(
        error(message, details=details, outcome=outcome, retryable=retryable, attempts=attempts)
    )


def where(posting: Posting) -> dict[str, Any] | None:
    """Return where a message lies, as far as that is known, for the details of an error."""
    stored = posting.stored
    if stored is None:
        return None
    return {"stream": stored.stream, "sequence": stored.sequence, "index": stored.index}


def late(posting: Posting, *, is_connected: bool, trouble: str = "") -> None:
    """End a message whose deadline has passed.

    Args:
        posting: The message.
        is_connected: Whether there is a connection.
        trouble: What kept its line from being written at last; empty if nothing did.
    """
    reason = f"; the last attempt failed: {trouble}" if trouble and is_connected else ""
    if posting.stored is not None:
        stored = posting.stored
        text = (
            f"no result came until the deadline; it lies in {stored.stream} as {stored.sequence:,}.{stored.index} and "
            f"will be handled"
        )
        fail(posting, Code.TIMEOUT, Outcome.UNKNOWN, text)
    elif posting.is_written:
        text = f"until the deadline the server had not said that it is stored; it may be{reason}"
        fail(posting, Code.TIMEOUT, Outcome.UNKNOWN, text)
    else:
        why = "others were before it" if is_connected else "there was no connection"
        fail(posting, Code.TIMEOUT, Outcome.NOT_RUN, f"it was not written before the deadline: {why}{reason}")


def not_permitted(posting: Posting, subject: str) -> None:
    """End a message that this user may not publish."""
    posting.is_over = True
    if not posting.future.done():
        text = f"the server does not permit this user to publish to {subject!r}"
        posting.future.set_exception(PermissionDeniedError(text, subject))


def of_answer(posting: Posting, frame: AnswerFrame) -> Ok[Any] | Err:
    """Return the result that a node has answered."""
    if frame.status == Status.OK:
        try:
            return Ok(posting.decode(frame.body))
        except DECODE_ERRORS as error:
            return _not_a_reply(posting, frame, error)
    try:
        fault = _decode_fault(frame.body)
    except DECODE_ERRORS as error:
        return _not_a_reply(posting, frame, error)
    outcome = _OUTCOMES.get(frame.status, Outcome.FAILED)
    return Err(fault.code, fault.message, fault.details, outcome, fault.retryable, 1, frame.node)


_OUTCOMES: dict[int, Outcome] = {
    Status.REFUSED: Outcome.REFUSED,
    Status.INVALID: Outcome.NOT_RUN,
    Status.BUSY: Outcome.NOT_RUN,
    Status.EXPIRED: Outcome.NOT_RUN,
}


def _not_a_reply(posting: Posting, frame: AnswerFrame, error: BaseException) -> Err:
    return Err(
        str(Code.HANDLER_ERROR),
        f"{posting.type_name}: node {frame.node} answered what the message does not promise: {explain(error)}",
        None,
        Outcome.FAILED,
        attempts=1,
        node=frame.node,
    )
