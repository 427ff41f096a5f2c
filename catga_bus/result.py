"""What calls return: `Ok` with a value, `Err` with the reason there is none, or `Stored`."""

from typing import Any, ClassVar, Generic, Literal, NoReturn, TypeVar

import msgspec

from catga_bus.errors import CALL_ERRORS, CallError, Outcome, Refused

T_co = TypeVar("T_co", covariant=True)


class Ok(msgspec.Struct, Generic[T_co], frozen=True):
    """The call succeeded.

    Example:
        >>> match Ok(3):
        ...     case Ok(value):
        ...         value
        3
    """

    value: T_co
    """What the handler returned."""

    is_ok: ClassVar[Literal[True]] = True
    """Tells `Ok` from `Err` where `match` would be too much.

    `isinstance(result, Err)` and `result.is_ok is True` narrow the type for all type checkers, a plain
    `if result.is_ok:` for mypy alone.
    """

    def unwrap(self) -> T_co:
        """Return the value."""
        return self.value


class Err(msgspec.Struct, frozen=True):
    """The call did not succeed: a value, never raised by `send`.

    Handlers return `Err(code, message)` to refuse; what they return is always `refused`.
    """

    code: str
    """The handler's own code, or one of `Code` when the bus itself speaks."""

    message: str = ""
    """For people."""

    details: Any = None
    """What the handler added."""

    outcome: Outcome = Outcome.REFUSED
    """Whether the effects of the call may exist."""

    retryable: bool = False
    """Advice to the caller; the bus never acts on it. What the bus says did not run may be tried again, but for
    `INVALID_MESSAGE` and `TOO_LARGE`, which would meet the same end."""

    attempts: int = 0
    """How often the call was sent; 0 if it never was."""

    node: str | None = None
    """The node that answered."""

    @property
    def is_ok(self) -> Literal[False]:
        """False: tells `Err` from `Ok` where `match` would be too much."""
        return False

    def error(self) -> CallError:
        """Return the exception that stands for this result, without raising it."""
        facts: dict[str, Any] = {
            "details": self.details,
            "outcome": self.outcome,
            "retryable": self.retryable,
            "attempts": self.attempts,
            "node": self.node,
        }
        known = CALL_ERRORS.get(self.code)
        if known is None:
            return Refused(self.code, self.message, **facts)
        return known(self.message, **facts)

    def unwrap(self) -> NoReturn:
        """Raise the exception that stands for this result.

        Raises:
            CallError: The subclass of the reserved code, or `Refused` for the handler's own codes.
        """
        raise self.error()


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A command or event is accepted: it lies in a stream and will be handled."""

    stream: str
    sequence: int
    """Of its record in the stream, from 1. 0: it is stored with the commit of the handler that sends it through its
    context, in a service with an inbox, so that nobody knows yet where."""

    index: int
    """Of the message in its record, from 0."""

    duplicate: bool = False
    """Whether it was stored before, by an earlier attempt of the same call or another call with the same id."""
