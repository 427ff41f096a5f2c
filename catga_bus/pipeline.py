"""Middleware: the onion around every handler (inbound) and every call (outbound).

    @bus.middleware
    async def audit(message, ctx, call_next):
        result = await call_next(message)
        log.info("%s ended as %s", ctx.message_id, result)
        return result

Both sides see and return results: `Ok`, or `Err` (what a handler raised has become one by then). The first
registered is the outermost.

Inbound middleware may say that this node cannot take a message now: it answers `OVERLOADED` or `CIRCUIT_OPEN` with
the outcome `not_run` and does not call `call_next`. The node then answers busy, and the caller goes to another one.
After `call_next` has reached the handler such an answer would be untrue, and is a `HANDLER_ERROR`.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from catga_bus.context import Context, Outgoing
from catga_bus.result import Err, Ok

Result: TypeAlias = Ok[Any] | Err
CallNext: TypeAlias = Callable[[Any], Awaitable[Result]]
InboundMiddleware: TypeAlias = Callable[[Any, Context, CallNext], Awaitable[Result]]
OutboundMiddleware: TypeAlias = Callable[[Any, Outgoing, CallNext], Awaitable[Result]]


def compose(
    middlewares: Sequence[Callable[[Any, Any, CallNext], Awaitable[Result]]],
    core: Callable[[Any, Any], Awaitable[Result]],
) -> Callable[[Any, Any], Awaitable[Result]]:
    """Wrap `core` in middlewares, the first one outermost.

    Args:
        middlewares: Each takes a message, its context, and what to call next.
        core: Takes a message and its context; the handler, or the call itself.

    Returns:
        What to call instead of `core`; `core` itself when there is no middleware.
    """
    onion = core
    for middleware in reversed(middlewares):
        onion = _layer(middleware, onion)
    return onion


def _layer(
    middleware: Callable[[Any, Any, CallNext], Awaitable[Result]],
    inner: Callable[[Any, Any], Awaitable[Result]],
) -> Callable[[Any, Any], Awaitable[Result]]:
    def outer(message: Any, context: Any) -> Awaitable[Result]:
        return middleware(message, context, lambda passed: inner(passed, context))

    return outer
