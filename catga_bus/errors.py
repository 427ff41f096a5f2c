"""Every exception of the package, and the codes that travel for them.

The tree, grouped by what the caller can do:

    CatgaError
    |- ConfigurationError (ValueError)     fix the program: a bad option, message class or address
    |- RegistrationError (TypeError)       fix the program: a handler that cannot be registered
    |- BusStateError (RuntimeError)        not started, draining, closed, or used in a forked child
    |- PermissionDeniedError               the server refuses a subject: fix the user's permissions
    |- AuthenticationError                 the server refuses the credentials
    `- CallError                           a call failed: code, message, details, outcome, ...
       |- Refused                          the handler said no (business); also raised by handlers
       |- NoHandlerError                   NO_HANDLER
       |- OverloadedError                  OVERLOADED
       |- CircuitOpenError                 CIRCUIT_OPEN
       |- InvalidMessageError              INVALID_MESSAGE
       |- TooLargeError                    TOO_LARGE
       |- HandlerError                     HANDLER_ERROR
       |- DeadLetteredError                DEAD_LETTERED
       |- DeadlineExceededError            TIMEOUT (also a TimeoutError)
       `- DisconnectedError                DISCONNECTED (also a ConnectionError)
"""

from enum import StrEnum
from typing import Any, ClassVar


class Outcome(StrEnum):
    """How far a call that did not return `Ok` has come; says whether its effects may exist."""

    NOT_RUN = "not_run"
    """The handler was never started: sending again cannot do the work twice."""

    REFUSED = "refused"
    """The handler ran and said no; a business answer, never retried by the bus."""

    FAILED = "failed"
    """The handler raised or its answer could not be used: its effects are unknown."""

    UNKNOWN = "unknown"
    """No answer: the handler may have run, be running, or run later."""


class Code(StrEnum):
    """The codes of the bus itself. They are reserved: a handler that returns one is a `HANDLER_ERROR`."""

    NO_HANDLER = "NO_HANDLER"
    OVERLOADED = "OVERLOADED"
    CIRCUIT_OPEN = "CIRCUIT_OPEN"
    INVALID_MESSAGE = "INVALID_MESSAGE"
    TOO_LARGE = "TOO_LARGE"
    HANDLER_ERROR = "HANDLER_ERROR"
    DEAD_LETTERED = "DEAD_LETTERED"
    TIMEOUT = "TIMEOUT"
    DISCONNECTED = "DISCONNECTED"


RESERVED_CODES = frozenset(str(code) for code in Code)


class CatgaError(Exception):
    """The root of everything that the bus raises."""


class ConfigurationError(CatgaError, ValueError):
    """An option, a message class or an address is wrong; raised while building, never while running."""


class RegistrationError(CatgaError, TypeError):
    """A handler, middleware or dependency cannot be registered; names the function and the fix."""


class BusStateError(CatgaError, RuntimeError):
    """The bus is not in the state that the call needs: not started, draining, closed or forked."""


class PermissionDeniedError(CatgaError):
    """The server refuses a subject to this user; the subject is in the text and in `subject`."""

    def __init__(self, message: str, subject: str = "") -> None:
        super().__init__(message)
        self.subject = subject


class AuthenticationError(CatgaError):
    """The server refuses the credentials; no retry helps."""


class CallError(CatgaError):
    """A call failed. The subclasses stand for the reserved codes; `Refused` for all others.

    Attributes:
        code: A reserved code (`Code`) or the handler's own.
        message: For people.
        details: What the handler added: any value that MessagePack can carry.
        outcome: Whether the effects of the call may exist.
        retryable: Advice to the caller; the bus never acts on it.
        attempts: How often the call was sent, 0 if it never was.
        node: The id of the node that answered, or None.
    """

    default_code: ClassVar[str] = Code.HANDLER_ERROR

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        details: Any = None,
        outcome: Outcome = Outcome.UNKNOWN,
        retryable: bool = False,
        attempts: int = 0,
        node: str | None = None,
    ) -> None:
        self.code = str(code if code is not None else self.default_code)
        self.message = message
        self.details = details
        self.outcome = outcome
        self.retryable = retryable
        self.attempts = attempts
        self.node = node
        super().__init__(message)

    def __str__(self) -> str:
        where = f", node {self.node}" if self.node else ""
        return f"{self.code}: {self.message} ({self.outcome}{where})"


class Refused(CallError):  # noqa: N818 - reads as a sentence where it is raised: `raise Refused(...)`
    """The handler said no. Handlers raise it to refuse; `Err.unwrap()` raises it for a refused call.

    Args:
        code: The handler's own code; not one of `Code`.
        message: For people.
        details: Anything that MessagePack can carry.
        retryable: Advice to the caller.

    Example:
        >>> raise Refused("OUT_OF_STOCK", "none left", {"sku": "sku-9"})
        Traceback (most recent call last):
        ...
        catga_bus.errors.Refused: OUT_OF_STOCK: none left (refused)
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        details: Any = None,
        *,
        retryable: bool = False,
        outcome: Outcome = Outcome.REFUSED,
        attempts: int = 0,
        node: str | None = None,
    ) -> None:
        super().__init__(
            message,
            code=code,
            details=details,
            outcome=outcome,
            retryable=retryable,
            attempts=attempts,
            node=node,
        )


class NoHandlerError(CallError):
    """Nobody handles the message, or the named node is not there."""

    default_code = Code.NO_HANDLER


class OverloadedError(CallError):
    """Every node asked was too busy to take the call within its deadline."""

    default_code = Code.OVERLOADED


class CircuitOpenError(CallError):
    """The circuit breaker holds the call back."""

    default_code = Code.CIRCUIT_OPEN


class InvalidMessageError(CallError):
    """The message does not fit its type; the text names the field and what was expected."""

    default_code = Code.INVALID_MESSAGE


class TooLargeError(CallError):
    """The message or its answer is larger than the bound named in the text."""

    default_code = Code.TOO_LARGE


class HandlerError(CallError):
    """The handler raised, or returned what its message does not promise."""

    default_code = Code.HANDLER_ERROR


class DeadLetteredError(CallError):
    """Every attempt failed and the message lies with the dead letters."""

    default_code = Code.DEAD_LETTERED


class DeadlineExceededError(CallError, TimeoutError):
    """The deadline passed before an answer came."""

    default_code = Code.TIMEOUT


class DisconnectedError(CallError, ConnectionError):
    """There is no connection to a server."""

    default_code = Code.DISCONNECTED


CALL_ERRORS: dict[str, type[CallError]] = {
    str(error.default_code): error
    for error in (
        NoHandlerError,
        OverloadedError,
        CircuitOpenError,
        InvalidMessageError,
        TooLargeError,
        HandlerError,
        DeadLetteredError,
        DeadlineExceededError,
        DisconnectedError,
    )
}
"""The exception class of each reserved code."""
