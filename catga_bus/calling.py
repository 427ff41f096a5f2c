"""Calling: from a call on the bus, or on the context of a handler, to the lane that carries it.

checked -> outbound middleware -> deadline, trace, id -> request lane | durable half | fan-out
"""

import asyncio
import contextlib
import functools
import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

from catga_bus.clock import Clock, monotonic
from catga_bus.cluster.directory import Directory
from catga_bus.cluster.records import NodeInfo
from catga_bus.config import BusConfig
from catga_bus.context import Context, Key, Outgoing, Where
from catga_bus.errors import CallError, Code, ConfigurationError, Outcome
from catga_bus.messages import Command, options_of
from catga_bus.node import ConnectionEvents, Node
from catga_bus.pipeline import OutboundMiddleware, compose
from catga_bus.result import Err, Ok, Stored

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
        self._store_through = compose(outbound, self._store_core) if outbound else None

    # -- requests and commands that wait for their result ----------------------------------------------------

    async def send(
        self,
        message: Any,
        timeout: float | None,
        node: str | None,
        where: Where | None,
        key: Key | None,
        parent: Context | None = None,
    ) -> Ok[Any] | Err:
        """Send a request or a command and return its result."""
        limit = self.checked_timeout(timeout)
        if parent is not None:
            limit = min(limit, parent.remaining)
        outgoing = _Timed("send", limit, node, parent, where, key, deadline=self._clock() + limit, clock=self._clock)
        if self._send_through is None:
            return await self._send_core(message, outgoing)
        result: Ok[Any] | Err = await self._send_through(message, outgoing)
        return result if isinstance(result, Ok) else await after_a_turn(result)

    async def _send_core(self, message: Any, outgoing: "_Timed") -> Ok[Any] | Err:
        left = outgoing.deadline - self._clock()  # the deadline counts from the call, not from the end of middleware
        if isinstance(message, Command):
            return await self._send_command(message, left, outgoing)
        if outgoing.key is not None:
            raise key_of_request(message)
        return await self._send_to(message, left, outgoing.node, outgoing.where, outgoing.parent)

    async def _send_command(self, command: Command[Any], limit: float, outgoing: Outgoing) -> Ok[Any] | Err:
        if outgoing.node is not None or outgoing.where is not None:
            raise ConfigurationError(
                f"{type(command).__name__} is a command: the owner of its partition handles it, so node= and where= "
                f"mean nothing; leave them out, or make it a Request"
            )
        here, parent = self._open(), outgoing.parent
        return await self.send_stored(here, command, _id_for(here, parent), limit, outgoing.key, _trace(here, parent))

    async def send_stored(
        self, here: Node, command: Command[Any], message_id: str, limit: float, key: Key | None, trace: str | None
    ) -> Ok[Any] | Err:
        """Send a command for which something may have to be waited for before it is written."""
        try:
            return await here.durable.sender.send(command, message_id, key=key, timeout=limit, trace=trace)
        except CallError as error:
            return await after_a_turn(as_err(error))

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
            call = here.call(request, _id_for(here, parent), limit, _trace(here, parent), target, choice)
        except CallError as error:
            return await after_a_turn(as_err(error))
        try:
            return await call.future
        except BaseException:
            here.caller.forget(call)
            del call  # it is not tracked by the collector, and the error's traceback has it
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

    # -- what is stored, and events --------------------------------------------------------------------------

    async def store(
        self,
        operation: Literal["enqueue", "publish", "broadcast"],
        message: Any,
        *,
        key: Key | None = None,
        timeout: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        parent: Context | None = None,
    ) -> Stored | None:
        """Enqueue a command, or publish or broadcast an event; return where it is stored, if it is."""
        kind = options_of(type(message)).kind
        if kind != ("Command" if operation == "enqueue" else "Event"):
            article = "an" if kind == "Event" else "a"
            text = f"{type(message).__name__} is {article} {kind}, which cannot be given to {operation}()"
            raise ConfigurationError(text)
        limit: float | None = None
        if operation == "enqueue" or (operation == "publish" and options_of(type(message)).durable):
            limit = self._config.store_timeout if timeout is None else self.checked_timeout(timeout)
        elif key is not None or timeout is not None:
            raise ConfigurationError(
                f"{type(message).__name__} is not stored, so key= and timeout= mean nothing; leave them out"
            )
        due_utc = _checked_due(delay, at)
        if self._store_through is None and limit is None:
            return await self._store_now(message, Outgoing(operation, None, None, parent))
        deadline = math.inf if limit is None else self._clock() + limit
        outgoing = _Timed(
            operation, limit, None, parent, None, key, due_utc, delay, deadline=deadline, clock=self._clock
        )
        if self._store_through is None:
            return await self._store_now(message, outgoing)
        result = await self._store_through(message, outgoing)
        if isinstance(result, Err):
            raise result.error()
        return result.value if isinstance(result.value, Stored) else None

    async def _store_core(self, message: Any, outgoing: Outgoing) -> Ok[Any] | Err:
        try:
            return Ok(await self._store_now(message, outgoing))
        except CallError as error:
            return as_err(error)

    async def _store_now(self, message: Any, outgoing: Outgoing) -> Stored | None:
        here, parent = self._open(), outgoing.parent
        message_id, trace = _id_for(here, parent), _trace(here, parent)
        if outgoing.timeout is None:
            fire = here.fanout.publish if outgoing.operation == "publish" else here.fanout.broadcast
            await fire(message, message_id, trace)
            return None
        store = here.durable.enqueue if outgoing.operation == "enqueue" else here.durable.publish
        return await store(
            message,
            message_id,
            key=outgoing.key,
            timeout=outgoing.remaining,
            trace=trace,
            due_utc=outgoing.due_utc,
            delay=outgoing.delay,
            effects=None if parent is None else parent.effects,
        )

    # -- checks ----------------------------------------------------------------------------------------------

    def checked_timeout(self, timeout: float | None) -> float:
        """Return the seconds that a call waits.

        Raises:
            ConfigurationError: That is no time.
        """
        if timeout is None:
            return self._config.send_timeout
        try:
            if 0.0 < timeout <= MAX_TIMEOUT and timeout is not True:
                return timeout
        except TypeError:
            pass
        raise ConfigurationError(f"timeout must be seconds above 0, at most {MAX_TIMEOUT:,}, got {timeout!r}")


class _Timed(Outgoing, frozen=True):
    """A call with a deadline, and the instant at which its time is over."""

    deadline: float = 0.0
    clock: Clock = monotonic

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(0.0, self.deadline - self.clock())


def _checked_due(delay: Any, at: datetime | None) -> float | None:
    """Return `at` in seconds since 1970, if it is given.

    Raises:
        ConfigurationError: Both are given, or one that cannot be.
    """
    if delay is not None:
        is_number = isinstance(delay, int | float) and not isinstance(delay, bool)
        if at is not None:
            raise ConfigurationError(f"give delay={delay!r} or at={at!r}, not both")
        if not is_number or not 0.0 <= delay <= MAX_TIMEOUT:
            raise ConfigurationError(f"delay must be 0 to {MAX_TIMEOUT:,} seconds, got {delay!r}")
    if at is None:
        return None
    if getattr(at, "tzinfo", None) is None:
        raise ConfigurationError(f"at must be a datetime with a time zone (datetime.now(UTC)), got {at!r}")
    return at.timestamp()


def key_of_request(request: Any) -> ConfigurationError:
    """Return the error that says that requests take no key at the call."""
    return ConfigurationError(
        f"{type(request).__name__} is a request: its key is the field that partition_by names; leave out key="
    )


def _id_for(here: Node, parent: Context | None) -> str:
    """Return a fresh id, or the one that a second execution of the same handler would give."""
    derived = None if parent is None else parent.take_id()
    return here.take_id() if derived is None else derived


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
