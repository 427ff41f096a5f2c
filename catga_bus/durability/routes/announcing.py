"""The nodes' side of routes: which are written and which deleted, and who does it.

Every node of a service does, by the same rule and with compare-and-set: a command's route is there exactly when every
live node of its service announces the type. While only some do it is retired: callers are told that nobody handles it,
and the nodes that do own the partitions until they leave (`Announcer.needed`), so that what is stored is handled. The
last of them sees to that (`Announcer.retire`). Routes of events are only compared with, and stay.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from catga_bus.clock import Clock
from catga_bus.durability.routes.routes import Route, decode_route
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

HINT_SECONDS: Final = 0.3
"""In which callers have heard of a change, unless the hint was lost (then `routes.STALE_SECONDS`): three times what
they wait until they read it."""

_LOOK_SECONDS: Final = 0.05

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
        self.wrote(key, sequence, route)

    def wrote(self, key: str, sequence: int, route: Route | None) -> None:
        """Take note of an entry of one's own; others may have written before it what was not read yet."""
        self.revisions[key] = sequence
        for gone in [name for name in self.routes if token(name) == key]:
            del self.routes[gone]
        if route is not None and token(route.type) == key:
            self.routes[route.type] = route


class RouteChanges(msgspec.Struct, frozen=True):
    """What a node does about the routes of its service."""

    write: tuple[Route, ...] = ()
    retire: tuple[Route, ...] = ()
    delete: tuple[Route, ...] = ()
    """Of types that no live node handles any more."""

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
        is_known = route.kind == "event" or all(route.type in types for types in live)
        if other is not None and (problem := _conflict(route, other)):
            problems.append(problem)
        elif other is None or other.retired:
            if is_known:
                write.append(route)
        elif other != route:
            differing.append(route)
    lacking = [
        route
        for route in there.values()
        if route.kind == "command" and route.service == service and not all(route.type in types for types in live)
    ]
    delete = [route for route in lacking if not any(route.type in types for types in live)]
    retire = [route for route in lacking if not route.retired and route not in delete]
    return RouteChanges(tuple(write), tuple(retire), tuple(delete), tuple(problems), tuple(differing))


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
        on_needed: Called when `needed` has changed.

    Attributes:
        problems: Why this node must not be ready; changes with every look.
        needed: The command types of which something may be stored and that some live node handles: who lacks one of
            them should own no partition while there are others.
    """

    def __init__(
        self,
        jetstream: JetStream,
        bucket: KeyValue,
        service: str,
        mine: Sequence[Route],
        live: Live,
        clock: Clock,
        *,
        on_needed: Callable[[], None] = lambda: None,
    ) -> None:
        self._jetstream = jetstream
        self._service = service
        self._mine = mine
        self._live = live
        self._bucket = bucket
        self._clock = clock
        self._log = RareLog(log, clock)
        self._board = Board()
        self._said: set[str] = set()
        self._nudge = asyncio.Event()
        self._on_needed = on_needed
        self.problems: tuple[str, ...] = ()
        self.needed: frozenset[str] = frozenset()

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
                is_quiet = not self.problems
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
            await self._put(route.type, route)
        for route in changes.differing:
            await self._say_once(route)
        for route in changes.retire:
            await self._retire(route)
        for route in changes.delete:
            await self._put(route.type, None)
        needed = self._needed()
        if needed != self.needed:
            self.needed = needed
            self._on_needed()

    def _needed(self) -> frozenset[str]:
        live = self._live()
        return frozenset(
            name
            for name, route in self._board.routes.items()
            if route.service == self._service and any(name in types for types in live)
        )

    async def retire(self, stream: str, patience: float) -> None:
        """Before this node leaves: see that nothing is left of what only it handles.

        Where others of the service live and none of them handles a type (its last version leaves, or a roll back goes
        on), callers are told that nobody does, and what is stored by then is waited for. Where no others live nothing
        is done: commands wait for the next start.

        Args:
            stream: The work queue.
            patience: Seconds, at most.
        """
        live = self._live()
        alone = [
            route for route in self._mine if route.kind == "command" and sum(route.type in types for types in live) == 1
        ]
        if len(live) < 2 or not alone:
            return
        try:
            async with asyncio.timeout(patience):
                await self.tend()
                await asyncio.sleep(HINT_SECONDS)
                await self._wait_handled(stream)
                for route in alone:
                    await self._put(route.type, None)
        except (TimeoutError, CatgaError) as error:
            names = ", ".join(route.type for route in alone)
            log.warning("commands that only this node handles (%s) may be left in %s: %r", names, stream, error)

    async def _wait_handled(self, stream: str) -> None:
        """Wait until all is done that is stored now."""
        info = await self._jetstream.stream(stream)
        last = 0 if info is None else info.last_sequence
        while info is not None and info.messages and info.first_sequence <= last:
            await asyncio.sleep(_LOOK_SECONDS)
            info = await self._jetstream.stream(stream)

    async def _say_once(self, route: Route) -> None:
        """Have the route say what this node's class looks like: the last node to start is taken for the newest."""
        if route.type in self._said or not await self._put(route.type, route):
            return
        self._said.add(route.type)
        log.warning(
            "%s has other fields here than where its route was written, or its stream was made anew; other fields are "
            "fine if one of the two is newer and its new fields have defaults",
            route.type,
        )

    async def _retire(self, route: Route) -> None:
        if await self._put(route.type, msgspec.structs.replace(route, retired=True)):
            log.warning(
                "%s is no longer routed: not every live node of %s handles it. Callers are told NO_HANDLER.",
                route.type,
                self._service,
            )

    async def _put(self, type_name: str, route: Route | None) -> bool:
        """Write an entry; return whether nobody else was faster."""
        key = token(type_name)
        value = b"" if route is None else _encode(route)
        try:
            sequence = await self._bucket.write(key, value, self._board.revision(type_name))
        except JetStreamRefusedError as error:
            if error.code != ApiError.WRONG_LAST_SEQUENCE:
                raise
            self._nudge.set()  # look again
            return False
        self._board.wrote(key, sequence, route)
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
