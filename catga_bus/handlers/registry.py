"""Message type <-> wire name <-> handler: what makes a function a handler, and who handles what.

Everything that can be known about a handler is found out here, when it is registered; a dispatcher
then only calls `Handler.call`. Errors name the function, where it stands, and the fix.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import NoneType
from typing import Any, Final, Literal, NamedTuple, get_origin

import msgspec

from catga_bus.errors import ConfigurationError, RegistrationError
from catga_bus.handlers.dependencies import Injection, Overrides
from catga_bus.handlers.shapes import fits_reply, union_members, why_not_decodable
from catga_bus.handlers.signatures import (
    EMPTY,
    Function,
    Kind,
    Parameter,
    Signature,
    Unresolved,
    kind_of,
    name_of,
    place_of,
    shown,
    signature_of,
)
from catga_bus.messages import (
    Command,
    Event,
    MessageMeta,
    MessageOptions,
    Request,
    options_of,
    reply_type,
)
from catga_bus.pipeline import InboundMiddleware
from catga_bus.resilience.retry import RetryOptions

MAX_CONCURRENCY: Final = 100_000
MAX_ATTEMPTS: Final = 1_000


class HandlerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a handler is run."""

    concurrency: int = 64
    """Executions at a time in one node; 1 to 100,000. `def` handlers: as many threads."""

    timeout: float | None = None
    """Seconds that one execution may take, above 0. None: requests, until the caller's deadline; commands and
    durable events, 30."""

    max_attempts: int = 5
    """Executions of a command or durable event until it is a dead letter; 1 to 1,000."""

    retry: RetryOptions = RetryOptions()
    """The pauses between the executions of a command or durable event that fails."""

    start: Literal["new", "all"] = "new"
    """Durable events: where a service begins that has no position in the log yet."""


class Handler(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """A function that handles messages, with all that was found out about it."""

    function: Function
    """The user's own."""

    call: Callable[..., Any]
    """What to call, by position: `call(message)`, or `call(message, context)`: `takes_context`."""

    takes_context: bool
    """Whether `call` wants the context as its second argument."""

    is_async: bool
    """Whether `call` returns a coroutine; if not it needs a thread and a `BlockingContext`."""

    message_types: tuple[type, ...]
    """The classes that it handles, by exact type."""

    options: HandlerOptions
    """How to run it."""

    name: str
    """`module.qualname`, for errors and logs."""

    middleware: tuple[InboundMiddleware, ...] = ()
    """Of the routers it came through and then its own, outermost first; goes inside the middleware of the bus."""

    injection: Injection | None = None
    """What fills the parameters, where the function cannot be called as it is."""

    def included_in(self, overrides: Overrides, middleware: tuple[InboundMiddleware, ...]) -> "Handler":
        """Return this handler as the bus or router that includes it runs it.

        Args:
            overrides: The dependency overrides of whoever includes it.
            middleware: Goes around the middleware that it has.
        """
        injection = self.injection.bound_to(overrides) if self.injection else None
        return msgspec.structs.replace(
            self,
            injection=injection,
            call=injection.call if injection else self.call,
            middleware=middleware + self.middleware,
        )


def inspect_handler(
    function: Any,
    options: HandlerOptions,
    *,
    frame_locals: Mapping[str, Any] | None,
    overrides: Overrides | None = None,
    middleware: tuple[InboundMiddleware, ...] = (),
) -> Handler:
    """Find out all about a function that is to handle messages.

    Args:
        function: A function, bound method, partial or object with `__call__`; async or not.
        options: How to run it.
        frame_locals: The locals of the frame that registers it, for annotations that name local
            classes.
        overrides: Dependencies to replace; read at every call.
        middleware: Around this handler alone, outermost first.

    Raises:
        RegistrationError: It cannot be a handler; the text says why and what to do.
    """
    called = _callable(function)
    place = place_of(called)
    _check_options(place, options)
    is_async = _is_async(place, called)
    signature = signature_of(called, frame_locals)
    if signature.variadic:
        raise RegistrationError(
            f"{place} has {signature.variadic}, which nobody can fill; name the parameters: the "
            "message first, then Context or Annotated[..., Depends(...)]"
        )
    message_types = _message_types(place, signature)
    _check_reply(place, signature.returns, message_types)
    injection = Injection(
        called,
        signature,
        message_types,
        is_async=is_async,
        frame_locals=frame_locals,
        overrides={} if overrides is None else overrides,
    )
    wrapped = injection.is_needed
    return Handler(
        function=function,
        call=injection.call if wrapped else called,
        takes_context=wrapped or injection.takes_context,
        is_async=is_async,
        message_types=message_types,
        options=options,
        name=name_of(called),
        middleware=middleware,
        injection=injection if wrapped else None,
    )


def _callable(function: Any) -> Function:
    """Return what to call, or say how to register what is no function."""
    if isinstance(function, staticmethod | classmethod):
        raise RegistrationError(
            f"{name_of(function.__func__)} is a {type(function).__name__}, which is not bound to "
            "its class yet; register it after the class: "
            f"bus.handler(TheClass.{function.__func__.__name__})"
        )
    if isinstance(function, type):
        raise RegistrationError(
            f"{place_of(function)} is a class; register a function, or a bound method of an "
            f"object: bus.handler({function.__name__}().method)"
        )
    if not callable(function):
        raise RegistrationError(
            f"a handler must be a function, got {function!r}; write @bus.handler, or @bus.handler(concurrency=...)"
        )
    if isinstance(function, partial) or inspect.isroutine(function):
        return function
    called: Function = function.__call__
    return called


def _check_options(place: str, options: HandlerOptions) -> None:
    for option, bound in (("concurrency", MAX_CONCURRENCY), ("max_attempts", MAX_ATTEMPTS)):
        value: Any = getattr(options, option)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
            raise RegistrationError(f"{place}: {option} must be an integer from 1 to {bound:,}, got {value!r}")
    timeout: Any = options.timeout
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout < math.inf):
        raise RegistrationError(f"{place}: timeout must be seconds above 0, or None, got {timeout!r}")
    if options.start not in ("new", "all"):
        raise RegistrationError(f"{place}: start must be 'new' or 'all', got {options.start!r}")
    retry: Any = options.retry
    if not isinstance(retry, RetryOptions):
        raise RegistrationError(f"{place}: retry must be RetryOptions, such as RetryOptions(first=1.0), got {retry!r}")


def _is_async(place: str, function: Function) -> bool:
    kind = kind_of(function)
    if kind in (Kind.GENERATOR, Kind.ASYNC_GENERATOR):
        raise RegistrationError(f"{place} yields, but a message has one reply; return it instead of yielding")
    return kind is Kind.ASYNC


def _message_types(place: str, signature: Signature) -> tuple[type, ...]:
    if not signature.parameters:
        raise RegistrationError(f"{place} takes no parameters; the first one takes the message: (request: Quote)")
    first = signature.parameters[0]
    _check_first(place, first)
    members = tuple(dict.fromkeys(union_members(first.annotation)))
    for member in members:
        _check_message_class(place, first, member)
        problem = why_not_decodable(member, member.__name__)
        if problem is None and not issubclass(member, Event):
            problem = why_not_decodable(_reply_of(place, member), f"the reply of {member.__name__}")
        if problem:
            raise RegistrationError(f"{place}: {problem}")
    return members


def _check_first(place: str, first: Parameter) -> None:
    if first.keyword_only:
        raise RegistrationError(f"{place}: the message is passed by position, but {first.name!r} is keyword-only")
    if first.annotation is EMPTY:
        hint = f"write {first.name}: Quote, with the class of the message"
        if first.name in ("self", "cls"):
            hint = "to register a method, pass it bound: bus.handler(instance.method)"
        elif place.split(" ")[0].endswith("<lambda>"):
            hint = "a lambda cannot have one; write a function"
        raise RegistrationError(f"{place}: the first parameter {first.name!r} has no annotation; {hint}")
    if isinstance(first.annotation, Unresolved):
        raise RegistrationError(f"{place}: the annotation of {first.name!r} {first.annotation}")


def _check_message_class(place: str, first: Parameter, member: Any) -> None:
    origin = get_origin(member) or member
    if not isinstance(origin, MessageMeta):
        raise RegistrationError(
            f"{place}: the first parameter {first.name!r} takes the message, but {shown(member)} "
            "is not a message class; derive one from Request[Reply], Command[Reply] or Event"
        )
    if origin in (Request, Command, Event):
        raise RegistrationError(
            f"{place}: {shown(member)} stands for every {origin.__name__.lower()}, and a handler "
            f"takes exact types; derive a class from it: class Quote({shown(member)})"
        )
    if origin is not member:
        raise RegistrationError(
            f"{place}: {shown(member)} has no name on the wire; derive a class from it: class Quote({shown(member)})"
        )


def _reply_of(place: str, message_type: type) -> Any:
    if issubclass(message_type, Event):
        return NoneType
    try:
        return reply_type(message_type)
    except ConfigurationError as error:
        raise RegistrationError(f"{place}: {error}") from error


def _check_reply(place: str, returns: Any, message_types: tuple[type, ...]) -> None:
    if returns is EMPTY or isinstance(returns, Unresolved):
        return
    replies = {message_type: _reply_of(place, message_type) for message_type in message_types}
    for member in union_members(returns):
        if not any(fits_reply(member, reply) for reply in replies.values()):
            promised = " and ".join(f"{cls.__name__} is answered with {shown(reply)}" for cls, reply in replies.items())
            raise RegistrationError(
                f"{place} says that it returns {shown(member)}, but {promised}; correct the return "
                "annotation (the reply, Ok[reply] and Err are allowed) or the class of the message"
            )


class Registered(NamedTuple):
    """One message type and who handles it."""

    type_name: str
    message_type: type
    options: MessageOptions
    handlers: tuple[Handler, ...]


class Registry:
    """Message type <-> wire name <-> handlers, in order of registration."""

    def __init__(self) -> None:
        self._by_name: dict[str, Registered] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Registered]:
        return iter(self._by_name.values())

    def add(self, *handlers: Handler) -> None:
        """Add handlers for all of their message types, or none of them if one cannot be added.

        Raises:
            RegistrationError: A request, a command or a durable event would have two handlers, one
                function would handle an event twice, or two classes have one name on the wire.
        """
        before = dict(self._by_name)
        try:
            for handler in handlers:
                for message_type in handler.message_types:
                    entry = self._with(handler, message_type)
                    self._by_name[entry.type_name] = entry
        except RegistrationError:
            self._by_name = before
            raise

    def _with(self, handler: Handler, message_type: type) -> Registered:
        options = options_of(message_type)
        present = self._by_name.get(options.type_name)
        if present is None:
            return Registered(options.type_name, message_type, options, (handler,))
        if present.message_type is not message_type:
            raise RegistrationError(
                f"{place_of(handler.function)}: {_path_of(message_type)} and "
                f"{_path_of(present.message_type)} are both called {options.type_name!r} on the "
                "wire; rename one, or give it type_name="
            )
        others = present.handlers
        both = f"{place_of(handler.function)} and {place_of(others[0].function)}"
        if options.kind != "Event":
            raise RegistrationError(
                f"{both} both handle {message_type.__name__}; a {options.kind.lower()} has one "
                "handler in a service: remove one"
            )
        if options.durable:
            raise RegistrationError(
                f"{both} both handle {message_type.__name__}; a durable event has one handler in a "
                "service, because its position and attempts belong to the service: call both from "
                f"one, or write class {message_type.__name__}(Event, durable=False) if it need not "
                "be stored"
            )
        if any(other.function == handler.function for other in others):
            raise RegistrationError(f"{place_of(handler.function)} is registered already for {message_type.__name__}")
        return present._replace(handlers=(*others, handler))

    def handlers_of(self, type_name: str) -> tuple[Handler, ...]:
        """Return the handlers of a type by its name on the wire; none if it is not known."""
        entry = self._by_name.get(type_name)
        return entry.handlers if entry else ()

    def find(self, type_name: str) -> Registered | None:
        """Return what is known about a type by its name on the wire."""
        return self._by_name.get(type_name)

    def handlers(self) -> tuple[Handler, ...]:
        """Return every handler once, in order of registration."""
        return tuple(dict.fromkeys(handler for entry in self for handler in entry.handlers))

    def requests(self) -> tuple[Registered, ...]:
        """Return the request types that are handled here."""
        return self._of_kind("Request")

    def commands(self) -> tuple[Registered, ...]:
        """Return the command types that are handled here."""
        return self._of_kind("Command")

    def events(self) -> tuple[Registered, ...]:
        """Return the event types that are handled here."""
        return self._of_kind("Event")

    def event_start(self) -> Literal["new", "all"]:
        """Return where the service begins in the log of events.

        Raises:
            ConfigurationError: Its handlers say different things: a service has one position for all of its events.
        """
        by_start = {
            handler.options.start: handler
            for entry in self.events()
            if entry.options.durable
            for handler in entry.handlers
        }
        if len(by_start) > 1:
            both = " and ".join(
                f"{place_of(handler.function)} has start={start!r}" for start, handler in sorted(by_start.items())
            )
            raise ConfigurationError(
                f"{both}: a service has one position in the log of events; give all of its handlers of durable events "
                f"the same start="
            )
        return next(iter(by_start), "new")

    def _of_kind(self, kind: str) -> tuple[Registered, ...]:
        return tuple(entry for entry in self if entry.options.kind == kind)


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
