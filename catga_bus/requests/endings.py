"""How calls end that got no `Ok`: the errors, made of what is known."""

import msgspec

from catga_bus.codec import DECODE_ERRORS, explain
from catga_bus.errors import CallError, Code, DeadlineExceededError, DisconnectedError, Outcome, PermissionDeniedError
from catga_bus.requests import attempts
from catga_bus.requests.attempts import Progress, Verdict
from catga_bus.requests.calls import Call
from catga_bus.result import Err
from catga_bus.wire import AnswerFrame, Fault, Status

_decode_fault = msgspec.msgpack.Decoder(Fault).decode


def of_verdict(call: Call, verdict: Verdict, node: str | None) -> Err:
    """Return the end of a call that got no answer, or none that counts.

    Args:
        call: The call.
        verdict: What was decided.
        node: The node that said so; None if none did.
    """
    is_hopeless = verdict.code in (Code.INVALID_MESSAGE, Code.TOO_LARGE)
    return Err(
        str(verdict.code),
        f"{call.route.type_name}: {verdict.message}",
        None,
        verdict.outcome,
        verdict.outcome is Outcome.NOT_RUN and not is_hopeless,
        call.attempts,
        node,
    )


def of_last_word(call: Call, verdict: Verdict, frame: AnswerFrame) -> Err:
    """Return the end of a call that no node would run; if they were too busy, with the reason of the last one."""
    result = of_verdict(call, verdict, frame.node)
    if frame.status != Status.BUSY:
        return result
    try:
        fault = _decode_fault(frame.body)
    except DECODE_ERRORS:
        return result
    text = f"{result.message}; the last one said: {fault.message}"
    return msgspec.structs.replace(result, message=text, details=fault.details)


def of_fault(frame: AnswerFrame, fault: Fault, progress: Progress) -> Err:
    """Return what a node answered that is not OK."""
    return Err(
        fault.code,
        fault.message,
        fault.details,
        _outcome(frame.status, fault.code, progress),
        fault.retryable,
        progress.attempt,
        frame.node,
    )


def _outcome(status: int, code: str, progress: Progress) -> Outcome:
    if status == Status.REFUSED:
        return Outcome.REFUSED
    if status == Status.INVALID:
        return attempts.after_invalid(progress)
    # A handler that was cut off at its own time-out may have done anything.
    return Outcome.UNKNOWN if code == Code.TIMEOUT else Outcome.FAILED


def not_a_reply(call: Call, frame: AnswerFrame, error: BaseException) -> Err:
    """Return the end of a call whose answer cannot be decoded."""
    return Err(
        str(Code.HANDLER_ERROR),
        f"{call.route.type_name}: node {frame.node} answered what the message does not promise: {explain(error)}",
        None,
        Outcome.FAILED,
        attempts=call.attempts,
        node=frame.node,
    )


def not_permitted(subject: str) -> PermissionDeniedError:
    """Return why a call was not written."""
    return PermissionDeniedError(f"the server does not permit this user to publish to {subject!r}", subject)


def not_taken(type_name: str, *, is_closed: bool) -> CallError:
    """Return why a call was not even taken."""
    if is_closed:
        return DisconnectedError(f"{type_name}: the bus was closed before it was sent", outcome=Outcome.NOT_RUN)
    text = f"{type_name}: the connection was behind until the deadline"
    return DeadlineExceededError(text, outcome=Outcome.NOT_RUN)
