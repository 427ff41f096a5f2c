"""Routers: handlers and middleware collected in a module, for a bus to include.

    router = Router()

    @router.handler
    async def quote(request: Quote) -> Price: ...

    bus.include(router)

`Bus` derives from `Router`, so both have the same decorators.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import msgspec

from catga_bus.errors import RegistrationError
from catga_bus.handlers.registry import HandlerOptions, Registry, inspect_handler
from catga_bus.handlers.signatures import Function, Kind, kind_of, name_of, place_of
from catga_bus.pipeline import InboundMiddleware, OutboundMiddleware
from catga_bus.resilience.retry import RetryOptions

F = TypeVar("F", bound=Callable[..., Any])
In = TypeVar("In", bound=InboundMiddleware)
Out = TypeVar("Out", bound=OutboundMiddleware)


class Collected(msgspec.Struct):
    """What a router has collected; a bus builds itself from it."""

    registry: Registry = msgspec.field(default_factory=Registry)
    """The handlers, each with the middleware of the routers it came through."""

    inbound: list[InboundMiddleware] = msgspec.field(default_factory=list)
    """The router's own, outermost first: goes around all of its handlers."""

    outbound: list[OutboundMiddleware] = msgspec.field(default_factory=list)
    """The router's own and that of the routers it includes, outermost first."""

    sealed: str | None = None
    """Why nothing more may be registered; None while it may."""


class Router:
    """Collects handlers and middleware.

    Its inbound middleware runs around its own handlers, inside that of whoever includes it; its
    outbound middleware sees every call of the bus that includes it, because a call belongs to no
    handler.

    Attributes:
        dependency_overrides: For tests: what to run instead of which dependency, as in
            `bus.dependency_overrides[get_repo] = lambda: FakeRepo()`. Obeyed by all handlers of
            this bus or router, included ones too, from the next message on. The overrides of an
            included router are not looked at.
    """

    def __init__(self) -> None:
        self.dependency_overrides: dict[Function, Function] = {}
        self._collected = Collected()

    @property
    def registry(self) -> Registry:
        """What is handled here so far; for looking at."""
        return self._collected.registry

    @overload
    def handler(self, function: F, /) -> F: ...

    @overload
    def handler(
        self,
        /,
        *,
        concurrency: int = ...,
        timeout: float | None = ...,
        max_attempts: int = ...,
        retry: RetryOptions = ...,
        start: Literal["new", "all"] = ...,
        middleware: Sequence[InboundMiddleware] = ...,
    ) -> Callable[[F], F]: ...

    def handler(
        self,
        function: F | None = None,
        /,
        *,
        concurrency: int = 64,
        timeout: float | None = None,
        max_attempts: int = 5,
        retry: RetryOptions = RetryOptions(),  # noqa: B008 - frozen
        start: Literal["new", "all"] = "new",
        middleware: Sequence[InboundMiddleware] = (),
    ) -> F | Callable[[F], F]:
        """Register a function as handler of the type of its first parameter.

        Used bare or with options: `@bus.handler`, `@bus.handler(concurrency=8)`. The function is
        returned unchanged, so that it can be called and tested like any other.

        Args:
            function: `async def`, or `def` to run in a thread. It takes the message, and by
                annotation a `Context` (`BlockingContext` for `def`) and what it marks with
                `Depends`.
            concurrency: Executions at a time in one node; 1 to 100,000.
            timeout: Seconds that one execution may take. None: for requests until the caller's
                deadline, for commands and durable events 30.
            max_attempts: Executions of one command or durable event before it becomes a dead
                letter; 1 to 1,000.
            retry: The pauses between these executions, in which its key waits and other keys go
                on; `RetryOptions`. Requests are never retried here.
            start: Durable events: where a service begins that has never handled durable events
                before: `new`, with what is published from now on; `all`, with the oldest event in
                the log.
            middleware: Around this handler alone, inside that of the bus, the first one outermost:
                `middleware=[RateLimiter(rate=100.0), audit]`.

        Raises:
            RegistrationError: The function cannot be registered; the text names it, the reason and
                the fix.
        """
        options = HandlerOptions(
            concurrency=concurrency, timeout=timeout, max_attempts=max_attempts, retry=retry, start=start
        )
        frame_locals = sys._getframe(1).f_locals  # noqa: SLF001 - to see local classes

        def register(function: F) -> F:
            self._check_open(function)
            self._collected.registry.add(
                inspect_handler(
                    function,
                    options,
                    frame_locals=frame_locals,
                    overrides=self.dependency_overrides,
                    middleware=_checked_middlewares(function, middleware),
                )
            )
            return function

        return register if function is None else register(function)

    @overload
    def middleware(self, function: In, /, *, side: Literal["inbound"] = ...) -> In: ...

    @overload
    def middleware(self, function: Out, /, *, side: Literal["outbound"]) -> Out: ...

    @overload
    def middleware(self, /, *, side: Literal["inbound"] = ...) -> Callable[[In], In]: ...

    @overload
    def middleware(self, /, *, side: Literal["outbound"]) -> Callable[[Out], Out]: ...

    def middleware(self, function: Any = None, /, *, side: Literal["inbound", "outbound"] = "inbound") -> Any:
        """Register middleware: around handlers, or around calls with `side="outbound"`.

        It is `async def audit(message, ctx, call_next)`, calls `await call_next(message)` and
        returns the result. The first registered is the outermost. Outbound, `ctx` is an `Outgoing`.
        Objects with such a `__call__` are middleware, too: `bus.middleware(RateLimiter(rate=50.0),
        side="outbound")`.

        Args:
            function: The middleware; as a decorator with options it comes later.
            side: `inbound` or `outbound`.

        Raises:
            RegistrationError: It is not an async function of three parameters, or `side` is
                neither.
        """
        if side not in ("inbound", "outbound"):
            raise RegistrationError(f"middleware: side must be 'inbound' or 'outbound', got {side!r}")

        def register(function: Any) -> Any:
            self._check_open(function)
            _check_middleware(function)
            mine = self._collected
            (mine.inbound if side == "inbound" else mine.outbound).append(function)
            return function

        return register if function is None else register(function)

    def include(self, router: "Router") -> None:
        """Take over all that a router has collected; from then on it takes no more registrations.

        Args:
            router: May be included by several buses, and include others itself.

        Raises:
            RegistrationError: One of its message types is handled here already; then nothing is
                taken over.
        """
        self._check_open(router)
        found: Any = router
        if not isinstance(found, Router) or found is self:
            raise RegistrationError(f"include takes another Router, got {router!r}")
        theirs = router._collected  # noqa: SLF001 - the same class
        self._collected.registry.add(
            *(
                handler.included_in(self.dependency_overrides, tuple(theirs.inbound))
                for handler in theirs.registry.handlers()
            )
        )
        self._collected.outbound.extend(theirs.outbound)
        theirs.sealed = "its router has been included already; register first, then include"

    def _check_open(self, what: Any) -> None:
        if self._collected.sealed is not None:
            name = repr(what) if isinstance(what, Router) else name_of(what)
            raise RegistrationError(f"{name} cannot be registered: {self._collected.sealed}")


def _checked_middlewares(handler: Any, middlewares: Any) -> tuple[InboundMiddleware, ...]:
    if not isinstance(middlewares, list | tuple):
        raise RegistrationError(
            f"{name_of(handler)}: middleware must be a list, such as [RateLimiter(rate=100.0)], got {middlewares!r}"
        )
    for middleware in middlewares:
        _check_middleware(middleware)
    return tuple(middlewares)


def _check_middleware(function: Any) -> None:
    wanted = "middleware is `async def audit(message, ctx, call_next)`, or an object with such a `__call__`"
    if isinstance(function, type):
        name = function.__name__
        raise RegistrationError(f"{wanted}, got the class {name}; pass an object of it: {name}(...)")
    if not callable(function):
        raise RegistrationError(f"{wanted}, got {function!r}")
    if kind_of(function) is not Kind.ASYNC:
        raise RegistrationError(f"{place_of(function)} is not `async def`; {wanted}")
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        raise RegistrationError(
            f"{place_of(function)} cannot be called with three arguments ({error}); {wanted}"
        ) from error
