"""Calling: from a call on the bus, or on the context of a handler, to the lane that carries it.

checked -> outbound middleware -> deadline, trace, id -> request lane | durable half | fan-out
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal

from catga_bus.clock import Clock, monotonic
from catga_bus.cluster.directory import Directory
from catga_bus.cluster.records import NodeInfo
from catga_bus.config import BusConfig
from catga_bus.context import Context, Outgoing
from catga_bus.errors import CallError, Code, ConfigurationError, Outcome
from catga_bus.messages import Event, options_of
from catga_bus.node import ConnectionEvents, Node
from catga_bus.pipeline import OutboundMiddleware, compose
from catga_bus.result import Err, Ok

MAX_TIMEOUT = 31_536_000
"""Seconds that a call may wait at most: a year."""

_HOPELESS = (Code.INVALID_MESSAGE, Code.TOO_LARGE)  # a message meets the same end every time


class Calling:
    """The calls of one bus.

    Args:
        open: Returns the node, or raises because there is none.
        connection: Knows whether there is a connection.
        config: The options of the bus.
        clock: Monotonic seconds.
        outbound: Middleware of the bus, outermost first.

    Attributes:
        has_middleware: Whether calls go through middleware.
    """

    def __init__(
        self,
        open: Callable[[], Node],  # noqa: A002 - what it does
        connection: ConnectionEvents,
        config: BusConfig,
        clock: Clock,
        outbound: list[OutboundMiddleware],
    ) -> None:
        self._open = open
        self._connection = connection
        self._config = config
        self._clock = clock
        self.has_middleware = bool(outbound)
        self._send_through = compose(outbound, self._send_core) if outbound else None
        self._fire_through = compose(outbound, self._fire_core) if outbound else None

    # -- requests and commands that wait for their result ----------------------------------------------------

    async def send(
        self,
        request: Any,
        timeout: float | None,
        node: str | None,
        where: Callable[[NodeInfo], bool] | None,
        parent: Context | None = None,
    ) -> Ok[Any] | Err:
        """Send a request or a command and return its result."""
        limit = self.checked_timeout(timeout)
        if parent is not None:
            limit = min(limit, parent.remaining)
        if self._send_through is None:
            return await self._send_to(request, limit, node, where, parent)
        outgoing = _OutgoingRequest(
            "send", limit, node, parent, where, deadline=self._clock() + limit, clock=self._clock
        )
        result: Ok[Any] | Err = await self._send_through(request, outgoing)
        return result if isinstance(result, Ok) else await after_a_turn(result)

    async def _send_core(self, request: Any, outgoing: "_OutgoingRequest") -> Ok[Any] | Err:
        left = outgoing.deadline - self._clock()  # the deadline counts from the call, not from the end of middleware
        return await self._send_to(request, left, outgoing.node, outgoing.where, outgoing.parent)

    async def _send_to(
        self,
        request: Any,
        limit: float,
        node: str | None,
        where: Callable[[NodeInfo], bool] | None,
        parent: Context | None,
    ) -> Ok[Any] | Err:
        here = self._open()
        if limit <= 0.0:
            text = "the deadline had passed before the request was written"
            return await after_a_turn(Err(str(Code.TIMEOUT), text, None, Outcome.NOT_RUN, retryable=True))
        began = self._clock()
        target: tuple[str, str] | None = None
        if node is not None or where is not None:
            found = await self._target(here, request, limit, node, where)
            if isinstance(found, Err):
                return await after_a_turn(found)
            target = found
        limit -= self._clock() - began
        if here.outgoing.is_blocked:
            limit = await here.wait_room(limit)
        try:
            choice = None if where is None else _tolerant(where)
            call = here.call(request, here.take_id(), limit, _trace(here, parent), target, choice)
        except CallError as error:
            return await after_a_turn(as_err(error))
        try:
            return await call.future
        except BaseException:
            here.caller.forget(call)
            raise

    async def _target(
        self,
        here: Node,
        request: Any,
        limit: float,
        node: str | None,
        where: Callable[[NodeInfo], bool] | None,
    ) -> tuple[str, str] | Err:
        """Find the one node to ask; without a connection wait for one, then for the node to be heard of."""
        if node is not None and where is not None:
            raise ConfigurationError(f"node={node!r} names the one node to ask already; leave out node or where")
        directory = here.directory
        began = self._clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._connection.up.wait()
        if not here.transport.is_connected:
            text = "there was no connection to send it to " + ("a node" if node is None else f"node {node!r}")
            return Err(str(Code.DISCONNECTED), text, None, Outcome.NOT_RUN, retryable=True)
        left = limit - (self._clock() - began)
        if node is not None:
            find: Callable[[], tuple[str, str] | None] = functools.partial(directory.address, node)
            is_known_dead = directory.is_dead(node)
        else:
            find = functools.partial(_pick, directory, options_of(type(request)).type_name, where)
            is_known_dead = False
        found = None if is_known_dead else await directory.wait_for(find, min(left, directory.interval))
        if found is not None and not (node is not None and directory.is_dead(node)):
            return found
        if node is not None:
            text = directory.describe(node)
        else:
            name = options_of(type(request)).type_name
            text = f"no node fits where={_name_of(where)}; {directory.describe_live(name)}"
        return Err(str(Code.NO_HANDLER), text, None, Outcome.NOT_RUN, retryable=True)

    # -- events ----------------------------------------------------------------------------------------------

    async def fire(
        self, operation: Literal["publish", "broadcast"], event: Event, parent: Context | None = None
    ) -> None:
        """Publish or broadcast an event."""
        if self._fire_through is None:
            await self._fire_now(operation, event, parent)
            return
        result = await self._fire_through(event, Outgoing(operation, None, None, parent))
        if isinstance(result, Err):
            raise result.error()

    async def _fire_core(self, event: Any, outgoing: Outgoing) -> Ok[Any] | Err:
        try:
            await self._fire_now(outgoing.operation, event, outgoing.parent)
        except CallError as error:
            return as_err(error)
        return Ok(None)

    async def _fire_now(self, operation: str, event: Event, parent: Context | None) -> None:
        here = self._open()
        fire = here.fanout.publish if operation == "publish" else here.fanout.broadcast
        await fire(event, here.take_id(), _trace(here, parent))

    # -- checks ----------------------------------------------------------------------------------------------

    def checked_timeout(self, timeout: float | None) -> float:
        """Return the seconds that a call waits.

        Raises:
            ConfigurationError: That is no time.
        """
        if timeout is None:
            return self._config.send_timeout
        try:
            if 0.0 < timeout <= MAX_TIMEOUT:
                return timeout
        except TypeError:
            pass
        raise ConfigurationError(f"timeout must be seconds above 0, at most {MAX_TIMEOUT:,}, got {timeout!r}")


class _OutgoingRequest(Outgoing, frozen=True):
    """What outbound middleware is told about a request, with the instant at which its time is over."""

    deadline: float = 0.0
    clock: Clock = monotonic

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(0.0, self.deadline - self.clock())


def _trace(here: Node, parent: Context | None) -> str | None:
    current = None if here.trace is None else here.trace()
    return current if current is not None or parent is None else parent.trace


async def after_a_turn(error: Err) -> Err:
    """Return what was decided without waiting for anybody, after a turn of the event loop.

    Who only tries again would else keep the loop from everything, also from what would let the next call through.
    """
    await asyncio.sleep(0)
    return error


def as_err(error: CallError) -> Err:
    """Return an exception of a call as the value that `send` returns."""
    retryable = error.retryable or (error.outcome is Outcome.NOT_RUN and error.code not in _HOPELESS)
    return Err(error.code, error.message, error.details, error.outcome, retryable, error.attempts, error.node)


def _pick(directory: Directory, type_name: str, where: Callable[[NodeInfo], bool] | None) -> tuple[str, str] | None:
    try:
        return directory.pick(type_name, (), where)
    except Exception as error:
        raise ConfigurationError(f"where={_name_of(where)} raised {type(error).__name__}: {error}") from error


def _tolerant(where: Callable[[NodeInfo], bool]) -> Callable[[NodeInfo], bool]:
    """Return the same choice for later attempts, which nobody is there to be told of an error of."""

    def fits(info: NodeInfo) -> bool:
        try:
            return where(info)
        except Exception:
            return False

    return fits


def _name_of(where: Callable[[NodeInfo], bool] | None) -> str:
    return getattr(where, "__qualname__", repr(where))
