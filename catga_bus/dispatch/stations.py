"""Builds what the dispatcher runs out of what the user registered: threads, middleware and checks around a handler."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from catga_bus.codec import Body
from catga_bus.context import BlockingContext, Context
from catga_bus.dispatch.deliveries import Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.dispatch.failures import refused
from catga_bus.dispatch.threads import HandlerThreads
from catga_bus.errors import Code, Outcome, Refused
from catga_bus.handlers.registry import Handler
from catga_bus.handlers.shapes import union_members
from catga_bus.messages import options_of, reply_type
from catga_bus.pipeline import InboundMiddleware, Result, compose
from catga_bus.result import Err, Ok


def build_station(
    handler: Handler,
    message_type: type,
    dispatcher: Dispatcher,
    middleware: Sequence[InboundMiddleware],
    timeout: float | None,
) -> tuple[Station, HandlerThreads | None]:
    """Return the station of one handler for one of its message types.

    Args:
        handler: What was registered.
        message_type: Which of its types.
        dispatcher: Will run the station.
        middleware: Inbound, outermost first.
        timeout: Seconds of one execution where the handler does not say; None for the message's deadline alone.

    Returns:
        The station, and the handler's threads if they were made for it: once for all types of the handler. Whoever
        asked for them closes them.
    """
    options = options_of(message_type)
    slots = dispatcher.slots(handler, handler.options.concurrency)
    body: Body[Any] = Body(message_type)
    made: HandlerThreads | None = None
    entry: Callable[..., Any] = handler.call
    takes_context = handler.takes_context
    if not handler.is_async:
        threads = slots.threads
        if threads is None:
            threads = made = slots.threads = HandlerThreads(slots.concurrency, f"catga-{handler.name}")
        entry = partial(_in_thread, handler, threads, dispatcher)
        takes_context = True
    station = Station(
        name=handler.name,
        type_name=options.type_name,
        decode=body.decode,
        decode_json=body.decode_json,
        entry=entry,
        takes_context=takes_context,
        has_middleware=bool(middleware),
        slots=slots,
        timeout=handler.options.timeout if handler.options.timeout is not None else timeout,
        fits=None if options.kind == "Event" else reply_check(reply_type(message_type)),
    )
    if middleware:
        inner = entry if takes_context else partial(_without_context, entry)
        station.entry = compose(middleware, partial(_as_result, inner, station, dispatcher))
        station.takes_context = True
    return station, made


async def _without_context(entry: Callable[[Any], Any], message: Any, _: Context) -> Any:
    return await entry(message)


async def _in_thread(
    handler: Handler, threads: HandlerThreads, dispatcher: Dispatcher, message: Any, ctx: Context
) -> Any:
    """Run a `def` handler in a thread. One that runs on after its deadline keeps its slot until it ends."""
    arguments: tuple[Any, ...] = (message,)
    if handler.takes_context:
        arguments = (message, BlockingContext(ctx, asyncio.get_running_loop()))
    free_slot: Callable[[], None] | None = None
    has_ended = False

    def ended() -> None:
        nonlocal has_ended
        has_ended = True
        if free_slot is not None:
            free_slot()

    future = threads.submit(partial(handler.call, *arguments), ended)
    try:
        return await future
    except asyncio.CancelledError:
        if not has_ended:
            free_slot = dispatcher.keep_slot()
        raise


async def _as_result(
    inner: Callable[[Any, Context], Any], station: Station, dispatcher: Dispatcher, message: Any, ctx: Context
) -> Result:
    """Run a handler and say as a value how it ended, so that middleware sees one thing and not two."""
    ctx.handler_started = True
    try:
        value = await inner(message, ctx)
    except Refused as refusal:
        return refused(station.name, refusal.code, refusal.message, refusal.details, retryable=refusal.retryable)
    except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = dispatcher.raised(station, ctx.message_id, error)
        return Err(str(Code.HANDLER_ERROR), text, None, Outcome.FAILED)
    if isinstance(value, Err):
        return refused(station.name, value.code, value.message, value.details, retryable=value.retryable)
    return value if isinstance(value, Ok) else Ok(value)


def reply_check(reply: Any) -> Callable[[Any], str | None] | None:
    """Return a quick check of a handler's value: the class of the value, not its insides.

    Checking every field would cost as much as decoding; a value whose insides are wrong is found when the caller
    decodes it.

    Returns:
        A function that says what is wrong with a value, or None; None if anything fits.
    """
    classes: list[type] = []
    for member in union_members(reply):
        origin = get_origin(member) or member
        if origin is Literal:
            classes.extend(type(value) for value in get_args(member))
        elif isinstance(origin, type):
            classes.append(origin)
        else:
            return None  # Any, a type variable, a protocol: nothing to check by class
    if float in classes:
        classes.append(int)
    wanted = tuple(classes)
    text = _type_text(reply)
    if len(wanted) == 1:
        only = wanted[0]

        def check_one(value: Any) -> str | None:
            if type(value) is only or isinstance(value, only):
                return None
            return f"expected {text}, got {type(value).__name__}"

        return check_one

    def check(value: Any) -> str | None:
        return None if isinstance(value, wanted) else f"expected {text}, got {type(value).__name__}"

    return check


def _type_text(reply: Any) -> str:
    if reply is NoneType:
        return "None"
    return reply.__name__ if isinstance(reply, type) and get_origin(reply) is None else str(reply)
