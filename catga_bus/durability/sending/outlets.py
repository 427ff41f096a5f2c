"""From a message to the line of its partition: what is known of each class on its way out, and of its keys."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, TypeAlias

import msgspec

from catga_bus.clock import Clock
from catga_bus.codec import Body
from catga_bus.codec.frames import key_as_text
from catga_bus.durability.routes.routes import EVENT_LOG, Route, Routes, schema_hash
from catga_bus.durability.routes.switched_off import jetstream_is_off, says_off
from catga_bus.durability.sending.postings import Line
from catga_bus.errors import (
    ConfigurationError,
    DeadlineExceededError,
    InvalidMessageError,
    NoHandlerError,
    Outcome,
    OverloadedError,
)
from catga_bus.messages import options_of, reply_type
from catga_bus.partition.hashing import partition_of
from catga_bus.transport.jetstream import JetStreamRefusedError, JetStreamUnknownError
from catga_bus.wire import Names

log = logging.getLogger("catga_bus.durability")

Kind: TypeAlias = Literal["Command", "Event"]
Way: TypeAlias = tuple[Line, str]
"""The line of a partition and the subject of a type in it."""

_CHECK_SECONDS: Final = 5.0  # between two looks at what the handlers of an event declare
_CHECK_PATIENCE: Final = 0.5

_MAX_KEYS: Final = 4_096
_SHORT_KEY: Final = 64
# What is remembered of a class's keys, which is a cache: at most 0.7 MB. Longer keys are hashed each time.

_WITH_ARTICLE: Final = {"Request": "a Request", "Command": "a Command", "Event": "an Event"}
_WHAT_TO_DO: Final = {"Request": "send it", "Command": "send or enqueue it", "Event": "publish or broadcast it"}


class Outlet(msgspec.Struct, eq=False):
    """What is known of one message class on its way out."""

    cls: type
    kind: Kind
    type_name: str
    key_field: str | None
    schema: str
    decode: Callable[[Any], Any] | None
    """Of the reply; None for events."""

    source: str
    """The name under which its route is found: its own, or that of the log."""

    route: Route | None = None
    """That the class was compared with, and that `ways` go by."""

    ways: list[Way | None] = []
    """By partition, as far as they were used."""

    by_key: dict[str, Way] = {}
    """Of keys that were used lately: they come again and again, and hashing one takes as long as all other looks."""

    is_warned: bool = False
    check_at: float = 0.0
    """Events: when the class is to be compared with what its handlers declare, for which nobody waits."""


class Outlets:
    """The outlets of all classes that were sent.

    Args:
        routes: Who handles what.
        names: Subjects and streams.
        line: Returns the line of a stream and partition.
        ensure_log: Has a log of events made if there is none, within so many seconds.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        routes: Routes,
        names: Names,
        line: Callable[[str, int], Line],
        ensure_log: Callable[[float], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._routes = routes
        self._ensure_log = ensure_log
        self._names = names
        self._line = line
        self._clock = clock
        self._by_class: dict[type, Outlet] = {}

    def of(self, cls: type, kind: Kind) -> Outlet:
        """Return the outlet of a class.

        Raises:
            ConfigurationError: The class is of another kind.
        """
        outlet = self._by_class.get(cls)
        return outlet if outlet is not None and outlet.kind == kind else self._add(cls, kind)

    def ready(self, cls: type, kind: Kind, now: float) -> Outlet | None:
        """Return the outlet of a class if the way of a message can be told without waiting."""
        outlet = self._by_class.get(cls)
        if outlet is None or outlet.kind != kind or outlet.route is None or now >= outlet.check_at:
            return None
        return outlet if self._routes.known(outlet.source, now) is outlet.route else None

    def is_ready(self, outlet: Outlet, now: float) -> bool:
        """Whether the way of a message can be told without waiting."""
        route = self._routes.known(outlet.source, now)
        return route is not None and route is outlet.route and now < outlet.check_at

    async def make_ready(self, outlet: Outlet, deadline: float) -> None:
        """Find the route of a class, and compare the two.

        Raises:
            NoHandlerError: There is none.
            DeadlineExceededError: It could not be read until the deadline.
            ConfigurationError: JetStream is off, or the route differs from the class in a way that would break what is
                promised.
            OverloadedError: The server refuses to read it.
            PermissionDeniedError: This user may not read it.
        """
        if outlet.source == EVENT_LOG and outlet.route is None:
            await self._ensure_log(deadline - self._clock())
        timeout = deadline - self._clock()
        try:
            route = await self._routes.find(outlet.source, timeout)
        except JetStreamUnknownError as error:
            raise DeadlineExceededError(str(error), outcome=Outcome.NOT_RUN, retryable=True) from error
        except JetStreamRefusedError as error:
            if says_off(error):
                raise jetstream_is_off(error) from error
            text = f"the route of {outlet.type_name} cannot be read: {error}"
            raise OverloadedError(text, outcome=Outcome.NOT_RUN, retryable=True) from error
        if route is None:
            raise _nobody(outlet)
        if outlet.source == EVENT_LOG:
            await self._compare_event(outlet, deadline)
        else:
            self._compare(outlet, route)
        if route is not outlet.route:
            outlet.route = route
            outlet.ways = [None] * route.partitions
            outlet.by_key.clear()

    def way(self, outlet: Outlet, key: str) -> Way:
        """Return the line and the subject for a key; the outlet was made ready.

        Raises:
            InvalidMessageError: It cannot be a key.
        """
        return outlet.by_key.get(key) or self._look_up(outlet, key)

    def _look_up(self, outlet: Outlet, key: str) -> Way:
        partition = partition_of(key, len(outlet.ways))
        way = outlet.ways[partition] or self._find_way(outlet, partition)
        if outlet.key_field is not None and len(key) <= _SHORT_KEY:
            if len(outlet.by_key) >= _MAX_KEYS:
                outlet.by_key.clear()
            outlet.by_key[key] = way
        return way

    def _find_way(self, outlet: Outlet, partition: int) -> Way:
        route, names = outlet.route, self._names
        assert route is not None, "the way goes by a route"
        if outlet.source == EVENT_LOG:
            way = self._line(names.event_stream(), partition), names.event(outlet.type_name, partition)
        else:
            stream = names.command_stream(route.service)
            way = self._line(stream, partition), names.command(route.service, partition)
        outlet.ways[partition] = way
        return way

    def _add(self, cls: type, kind: Kind) -> Outlet:
        options = options_of(cls)
        if options.kind != kind:
            raise ConfigurationError(
                f"{cls.__name__} is {_WITH_ARTICLE[options.kind]} and not {_WITH_ARTICLE[kind]}: "
                f"{_WHAT_TO_DO[options.kind]}"
            )
        is_event = kind == "Event"
        outlet = self._by_class[cls] = Outlet(
            cls,
            kind,
            options.type_name,
            options.partition_by,
            schema_hash(cls),
            decode=None if is_event else Body(reply_type(cls)).decode,
            source=EVENT_LOG if is_event else options.type_name,
            check_at=0.0 if is_event else float("inf"),
        )
        return outlet

    async def _compare_event(self, outlet: Outlet, deadline: float) -> None:
        """Compare the class of an event with those of its handlers, if there are some and that can be known now."""
        now = self._clock()
        if now < outlet.check_at:
            return
        try:
            route = await self._routes.find(outlet.type_name, min(_CHECK_PATIENCE, deadline - now))
        except JetStreamUnknownError:
            route = None
        if route is not None:
            self._compare(outlet, route)  # one that differs is looked at again with each event
        outlet.check_at = now + _CHECK_SECONDS

    def _compare(self, outlet: Outlet, route: Route) -> None:
        where = f"in the service {route.service!r}" if route.service else "where it is handled"
        name = outlet.cls.__name__
        if route.partition_by != outlet.key_field:
            raise ConfigurationError(
                f"class {name}: partition_by is {outlet.key_field!r} here and {route.partition_by!r} {where}: messages "
                f"with one key would not stay in order; declare both alike"
            )
        if not route.durable:
            raise ConfigurationError(
                f"class {name}: the event is durable here and not {where}, which would not get it; declare both alike"
            )
        if route.schema and route.schema != outlet.schema and not outlet.is_warned:
            outlet.is_warned = True
            log.warning(
                "class %s has other fields here than %s; that is fine if one of them is newer and its new fields have "
                "defaults",
                name,
                where,
            )


def key_of(message: Any, outlet: Outlet, key: object) -> str | None:
    """Return the key of a message as text; None if its id is its key.

    Args:
        message: The message.
        outlet: Of its class.
        key: Given at the call, in place of the field; None for none.

    Raises:
        InvalidMessageError: The field that holds it holds none, or what cannot be a key.
    """
    if key is not None:
        return key_as_text(key)
    field = outlet.key_field
    if field is None:
        return None
    value = getattr(message, field, None)
    if value is None:
        raise InvalidMessageError(
            f"{outlet.type_name}: the key field {field!r} is None; give it a value, or a key= at the call",
            outcome=Outcome.NOT_RUN,
        )
    return value if type(value) is str else key_as_text(value)


def _nobody(outlet: Outlet) -> NoHandlerError:
    if outlet.source == EVENT_LOG:
        text = f"{outlet.type_name}: there is no log of events: start a node that handles durable events"
    else:
        text = f"no service handles the command {outlet.type_name}, or not all of its nodes do yet"
    return NoHandlerError(text, outcome=Outcome.NOT_RUN, retryable=True)
