"""The nodes' side of routes: which are written and which deleted, and who does it.

Every node of a service does, by the same rule and with compare-and-set: a command's route is there exactly when every
live node of its service announces the type. Routes of events are only compared with, and stay.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from catga_bus.clock import Clock
from catga_bus.durability.routes import Route, decode_route
from catga_bus.errors import CatgaError
from catga_bus.rarely import RareLog
from catga_bus.transport.jetstream import ApiError, JetStream, JetStreamRefusedError
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import token

log = logging.getLogger("catga_bus.durability")

TEND_SECONDS: Final = 5.0
"""Seconds between two looks at the routes while all is as it should be; one costs a read. A bucket that somebody has
deleted is made again after so long; nodes that come and go cause a look at once."""

BUSY_SECONDS: Final = 1.0
"""The same while something is due or in the way."""

LACKING_SECONDS: Final = 1.0
"""For how long a live node must lack a type before its route is deleted: a view may be wrong for a moment."""

Live = Callable[[], Sequence[Collection[str]]]
"""Returns the command types of each live node of the service, this one included."""

_encode = msgspec.json.Encoder().encode


class Board:
    """What is in the bucket, by type, and with which revisions.

    Attributes:
        routes: The routes that are there.
        cursor: Sequence up to which the bucket was read.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.revisions: dict[str, int] = {}  # by token, those of deleted routes included
        self.cursor = 0

    def revision(self, type_name: str) -> int:
        """Return what a writer has to expect as the last revision; 0 if there never was one."""
        return self.revisions.get(token(type_name), 0)

    def saw(self, key: str, sequence: int, route: Route | None) -> None:
        """Take note of an entry.

        Args:
            key: The token of its type.
            sequence: Its revision.
            route: What it says; None if it was deleted or cannot be read.
        """
        self.cursor = max(self.cursor, sequence)
        self.revisions[key] = sequence
        for gone in [name for name in self.routes if token(name) == key]:
            del self.routes[gone]
        if route is not None and token(route.type) == key:
            self.routes[route.type] = route


class RouteChanges(msgspec.Struct, frozen=True):
    """What a node does about the routes of its service."""

    write: tuple[Route, ...] = ()
    delete: tuple[Route, ...] = ()
    problems: tuple[str, ...] = ()
    """Why this node must not be ready, for people."""

    differing: tuple[Route, ...] = ()
    """Routes of this node that differ from those in the bucket in what may differ: fields, and partitions."""


def route_changes(
    service: str, mine: Iterable[Route], there: Mapping[str, Route], live: Sequence[Collection[str]]
) -> RouteChanges:
    """Decide what is written and what deleted. Pure.

    Args:
        service: The service of this node.
        mine: What this node handles.
        there: What is in the bucket, by type.
        live: The command types of each live node of the service.
    """
    write: list[Route] = []
    problems: list[str] = []
    differing: list[Route] = []
    for route in mine:
        other = there.get(route.type)
        if other is not None and (problem := _conflict(route, other)):
            problems.append(problem)
        elif other is not None:
            if other != route:
                differing.append(route)
        elif route.kind == "event" or all(route.type in types for types in live):
            write.append(route)
    lacking = [
        route
        for route in there.values()
        if route.kind == "command" and route.service == service and not all(route.type in types for types in live)
    ]
    return RouteChanges(tuple(write), tuple(lacking), tuple(problems), tuple(differing))


def _conflict(mine: Route, there: Route) -> str:
    """Return why two declarations of a type cannot both hold; empty if they can."""
    if (mine.kind, mine.service) != (there.kind, there.service):
        return (
            f"the type {mine.type} is {_described(mine)} and already {_described(there)}: give one of them another "
            f"type_name=, or take it out of the other"
        )
    # Not the number of partitions: that of the stream counts, to which each node has compared its own.
    for field in ("partition_by", "durable"):
        here, other = getattr(mine, field), getattr(there, field)
        if here != other:
            return (
                f"the type {mine.type} has {field} {here!r} here and {other!r} on its route, by which callers go: "
                f"declare it as it was, give it another type_name=, or delete the key {token(mine.type)} of the routes"
            )
    return ""


def _described(route: Route) -> str:
    return f"a command of the service {route.service!r}" if route.kind == "command" else "an event"


class Announcer:
    """Keeps the routes of a service as they should be.

    Args:
        jetstream: Where the bucket is.
        bucket: The bucket of routes; it is made again if somebody deletes it.
        service: The service of this node.
        mine: What this node handles.
        live: What the live nodes of the service announce.
        clock: Monotonic seconds.

    Attributes:
        problems: Why this node must not be ready; changes with every look.
    """

    def __init__(
        self,
        jetstream: JetStream,
        bucket: KeyValue,
        service: str,
        mine: Sequence[Route],
        live: Live,
        clock: Clock,
    ) -> None:
        self._jetstream = jetstream
        self._service = service
        self._mine = mine
        self._live = live
        self._bucket = bucket
        self._clock = clock
        self._log = RareLog(log, clock)
        self._board = Board()
        self._lacking_since: dict[str, float] = {}
        self._said: set[str] = set()
        self._nudge = asyncio.Event()
        self.problems: tuple[str, ...] = ()

    def nudge(self) -> None:
        """Look now: a node has come, gone, or announced something else."""
        self._nudge.set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self._nudge.clear()
            is_quiet = False
            try:
                await self.tend()
                is_quiet = not self._lacking_since and not self.problems
            except CatgaError as error:
                self._log.warn("tend", "the routes of %s could not be looked after: %s", self._service, error)
            except Exception as error:  # nobody awaits this task before the end
                self._log.write(logging.ERROR, "broken", "the routes could not be looked after", error=error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TEND_SECONDS if is_quiet else BUSY_SECONDS):
                    await self._nudge.wait()

    async def tend(self) -> None:
        """Read what has changed in the bucket, and write and delete what is due.

        Raises:
            JetStreamUnknownError: The bucket could not be read, or it is not known whether something was written.
        """
        await self._read()
        changes = route_changes(self._service, self._mine, self._board.routes, self._live())
        if changes.problems != self.problems:
            for problem in changes.problems:
                log.error("this node stays unready: %s", problem)
        self.problems = changes.problems
        for route in changes.write:
            await self._put(route.type, _encode(route))
        for route in changes.differing:
            await self._say_once(route)
        await self._delete_lacking(changes.delete)

    async def _say_once(self, route: Route) -> None:
        """Have the route say what this node's class looks like: the last node to start is taken for the newest."""
        if route.type in self._said or not await self._put(route.type, _encode(route)):
            return
        self._said.add(route.type)
        log.warning(
            "%s has other fields here than where its route was written, or its stream was made anew; other fields are "
            "fine if one of the two is newer and its new fields have defaults",
            route.type,
        )

    async def _delete_lacking(self, lacking: Sequence[Route]) -> None:
        now = self._clock()
        names = {route.type for route in lacking}
        self._lacking_since = {name: self._lacking_since.get(name, now) for name in names}
        for route in lacking:
            if now - self._lacking_since[route.type] >= LACKING_SECONDS:
                log.warning(
                    "%s is no longer routed: not every live node of %s handles it. Callers are told NO_HANDLER.",
                    route.type,
                    self._service,
                )
                await self._put(route.type, b"")

    async def _put(self, type_name: str, value: bytes) -> bool:
        """Write an entry; return whether nobody else was faster."""
        try:
            await self._bucket.write(token(type_name), value, self._board.revision(type_name))
        except JetStreamRefusedError as error:
            if error.code != ApiError.WRONG_LAST_SEQUENCE:
                raise
            self._nudge.set()  # look again
            return False
        return True

    async def _read(self) -> None:
        """Read what was written since the last time; a bucket that is gone, or is a new one, is read anew."""
        board, stream = self._board, self._bucket.stream
        info = await self._jetstream.stream(stream)
        if info is None:
            self._board = Board()
            await self._bucket.open()
            return
        if info.last_sequence < board.cursor:
            self._board = board = Board()
        while board.cursor < info.last_sequence:
            message = await self._jetstream.next_message(stream, ">", board.cursor + 1)
            if message is None:
                board.cursor = info.last_sequence
                return
            key = message.subject.rpartition(".")[2]
            board.saw(key, message.sequence, decode_route(key, message.payload))
