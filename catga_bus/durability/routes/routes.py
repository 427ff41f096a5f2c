"""Which service handles a type, and how its keys are hashed: the bucket `catga-routes`, and what callers know of it.

A command's route is there exactly when every live node of its service announces the type (`changes`). So a deploy that
adds a type has its commands refused until all nodes can handle them; and one that removes or renames a type has new
commands refused from the first node on that does not know it, while the nodes that do know it still live and handle
what is stored. `NO_HANDLER` is honest; a stored command that nobody can handle would be a dead letter.
"""

import asyncio
import hashlib
import logging
import math
from typing import Any, Literal

import msgspec

from catga_bus.clock import Clock
from catga_bus.errors import CatgaError, ConfigurationError, PermissionDeniedError
from catga_bus.partition.hashing import MAX_PARTITIONS
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.jetstream import (
    API_ROOT,
    ApiError,
    JetStream,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import Names, token

log = logging.getLogger("catga_bus.durability")

FRESH_SECONDS = 2.5
"""Age up to which a caller uses a route as it is."""

STALE_SECONDS = 5.0
"""Age up to which it uses one while it reads it again. An older one is read first, if it can be read."""

ABSENT_SECONDS = 0.25
"""For how long a caller believes that there is no route: a flood of calls to nobody is no flood of reads."""

EVENT_LOG = ""
"""Stands for the log of events, which has a number of partitions and no type; no type has an empty name."""

PARTITIONS_KEY = "catga.partitions"
"""Where a stream's metadata say how many partitions it has."""

_MAX_ENTRIES = 4_096
_HINT_SECONDS = 0.1
_PAUSE_SECONDS = 0.1  # between two attempts to read a route from a bucket that has no leader


class Route(msgspec.Struct, frozen=True):
    """What is known of a type that is stored."""

    type: str
    kind: Literal["command", "event"]
    service: str
    """That handles the commands; empty for events, which many services may handle."""

    partitions: int
    partition_by: str | None
    durable: bool = True
    schema: str = ""
    """Hash of what the bodies look like."""

    retired: bool = False
    """Whether no more is sent, because some node of the service lacks the type, while others handle what is stored."""


_decode = msgspec.json.Decoder(Route).decode


def schema_hash(cls: type) -> str:
    """Return 16 hexadecimal digits that differ when the bodies of a message class differ.

    Its own name does not count, because callers may have another class for the type; nor does what is for people.

    Example:
        >>> class Paid(msgspec.Struct):
        ...     cents: int
        >>> schema_hash(Paid) == schema_hash(Paid)
        True
    """
    (root,), parts = msgspec.json.schema_components([cls], ref_template="#{name}")
    name = root.get("$ref", "#").removeprefix("#")
    schema = _plain({"" if part == name else part: fields for part, fields in parts.items()})
    text = msgspec.json.encode(schema, order="deterministic")
    return hashlib.blake2b(text.replace(b'"#%s"' % name.encode(), b'"#"'), digest_size=8).hexdigest()


def _plain(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key not in ("description", "title")}
    if isinstance(schema, list):
        return [_plain(value) for value in schema]
    return schema


class Cached(msgspec.Struct):
    """What a caller knows of one type, and since when."""

    route: Route | None
    read_at: float
    reading: "asyncio.Task[None] | None" = None
    trouble: str = ""
    """Why the last attempt at reading it has failed."""

    failed_at: float = -math.inf
    """When a known route could not be read again: nobody waits for the next attempt, the bucket has no leader."""

    fresh_until: float = -math.inf
    """Until when a known route is used without a thought."""

    def age_allows(self, now: float) -> Literal["use", "refresh", "read"]:
        """Say what a caller does with it at an instant."""
        age = now - self.read_at
        if self.route is None:
            return "use" if age <= ABSENT_SECONDS else "read"
        if age <= FRESH_SECONDS:
            return "use"
        if now - self.failed_at <= FRESH_SECONDS:
            return "use"
        return "refresh" if age <= STALE_SECONDS or self.failed_at > self.read_at else "read"


class Routes:
    """Reads routes for callers.

    Args:
        jetstream: Where the bucket is.
        names: Its name.
        clock: Monotonic seconds.
    """

    def __init__(self, jetstream: JetStream, names: Names, clock: Clock) -> None:
        self._jetstream = jetstream
        self._bucket = KeyValue(jetstream, names.routes_bucket())
        self._changes = names.route_changes()
        self._log_stream = names.event_stream()
        self._clock = clock
        self._cached: dict[str, Cached] = {}
        self._denied = ""  # a subject, since the connection came up
        self._subscription: Subscription | None = None
        self._transport: Transport | None = None  # until it is listened to

    def known(self, type_name: str, now: float) -> Route | None:
        """Return a route that needs no reading; None if it has to be found."""
        cached = self._cached.get(type_name)
        return None if cached is None or now > cached.fresh_until else cached.route

    async def find(self, type_name: str, timeout: float) -> Route | None:
        """Return the route of a type, or None if nobody handles it.

        Raises:
            JetStreamUnknownError: It could not be read within `timeout` seconds, and no earlier reading is known.
            JetStreamRefusedError: The server refuses to read it.
            PermissionDeniedError: This user may not read it.
        """
        now = self._clock()
        cached = self._cached.get(type_name)
        if cached is None:
            if len(self._cached) >= _MAX_ENTRIES:
                self._forget_idle()
            cached = self._cached[type_name] = Cached(None, -math.inf)
        what = cached.age_allows(now)
        if what == "use":
            return cached.route
        if cached.reading is None:
            cached.reading = asyncio.create_task(self._read(type_name, cached))
        if what == "refresh":
            return cached.route
        reading = cached.reading
        await asyncio.wait({reading}, timeout=timeout)
        if reading.cancelled():
            raise JetStreamUnknownError(f"the route of {type_name} could not be read: the bus was closed")
        if reading.done() and (error := reading.exception()) is not None:
            raise error
        if cached.read_at == -math.inf:
            why = f": {cached.trouble}" if cached.trouble else ""
            raise JetStreamUnknownError(f"the route of {type_name} could not be read for {timeout:.3g} s{why}")
        return cached.route

    async def find_log(self, timeout: float) -> Route | None:
        """Return how keys are hashed in the log of events, or None if there is no log.

        Raises:
            JetStreamUnknownError: As for `find`.
        """
        return await self.find(EVENT_LOG, timeout)

    def forget(self, type_name: str) -> None:
        """Read the route again before it is used the next time."""
        cached = self._cached.get(type_name)
        if cached is not None and cached.read_at > -math.inf:
            cached.read_at = self._clock() - STALE_SECONDS - 1.0
            cached.failed_at = cached.fresh_until = -math.inf

    def listen_on(self, transport: Transport) -> None:
        """Hear of changes at once instead of within `STALE_SECONDS`, from the first call on that needs a route.

        Only a hint: it does not matter if it is lost, or not permitted.
        """
        self._transport = transport

    def denied(self, subject: str) -> None:
        """The server refuses a subject."""
        if subject.startswith(API_ROOT) and subject.rpartition(".")[2] in (self._bucket.stream, self._log_stream):
            self._denied = subject

    def reconnected(self) -> None:
        """The connection is back, and what is permitted may be something else."""
        self._denied = ""

    def _on_change(self, subject: str, _: bytes, __: str, ___: object) -> None:
        key = subject.rpartition(".")[2]
        for name, cached in self._cached.items():
            if cached.reading is None and token(name) == key:
                # The hint comes before the change is stored.
                cached.reading = asyncio.create_task(self._read(name, cached, _HINT_SECONDS))

    async def close(self) -> None:
        """End what is being read."""
        if self._subscription is not None:
            await self._subscription.close()
        tasks = [cached.reading for cached in self._cached.values() if cached.reading is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, type_name: str, cached: Cached, delay: float = 0.0) -> None:
        try:
            await self._listen()
            await asyncio.sleep(delay)
            while True:
                try:
                    if type_name == EVENT_LOG:
                        cached.route = await self._read_log()
                    else:
                        cached.route = await read_route(self._bucket, type_name)
                except JetStreamUnknownError as error:
                    if cached.route is not None:
                        cached.failed_at = self._clock()
                        cached.fresh_until = cached.failed_at + FRESH_SECONDS
                        return  # the bucket has no leader: what was known has to do
                    cached.trouble = str(error)
                    if self._denied:
                        text = f"the server does not permit this user to publish to {self._denied!r}"
                        raise PermissionDeniedError(text, self._denied) from error
                    await asyncio.sleep(_PAUSE_SECONDS)
                else:
                    cached.read_at = self._clock()
                    cached.fresh_until = cached.read_at + FRESH_SECONDS
                    return
        finally:
            cached.reading = None

    async def _listen(self) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        try:
            self._subscription = await transport.subscribe(self._changes, self._on_change)
        except CatgaError:  # there is no connection: the next reading tries again
            self._transport = transport

    async def _read_log(self) -> Route | None:
        info = await self._jetstream.stream(self._log_stream)
        if info is None:
            return None
        return Route(EVENT_LOG, "event", "", partitions_in(info.config), None)

    def _forget_idle(self) -> None:
        for name in [name for name, cached in self._cached.items() if cached.reading is None]:
            del self._cached[name]


def partitions_in(config: StreamConfig) -> int:
    """Return how many partitions a stream has.

    Raises:
        ConfigurationError: It does not say so.
    """
    text = config.metadata.get(PARTITIONS_KEY, "")
    if not text.isdecimal() or not 0 < int(text) <= MAX_PARTITIONS:
        raise ConfigurationError(
            f"the stream {config.name} says {text!r} for {PARTITIONS_KEY} in its metadata: it was not made by the bus; "
            f"delete it, or take another namespace"
        )
    return int(text)


def decode_route(key: str, value: bytes | None) -> Route | None:
    """Return the route in an entry of the bucket; None if there is none any more, or it cannot be read."""
    if not value:
        return None
    try:
        return _decode(value)
    except msgspec.MsgspecError as error:
        log.warning("the route under the key %s cannot be read: %s", key, error)
        return None


async def read_route(bucket: KeyValue, type_name: str) -> Route | None:
    """Return a route as the leader of the bucket has it, or None.

    Raises:
        JetStreamUnknownError: It could not be read.
        JetStreamRefusedError: The server refuses to read it.
    """
    key = token(type_name)
    try:
        entry = await bucket.read(key)
    except JetStreamRefusedError as error:
        if error.code != ApiError.STREAM_NOT_FOUND:
            raise
        return None  # there is no such bucket: nobody handles anything
    route = decode_route(key, entry.value)
    # Long names are hashed: another type may have the same token.
    return route if route is not None and route.type == type_name and not route.retired else None
