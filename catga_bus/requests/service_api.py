"""ADR-32: every node answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, so that `nats micro` sees the services.

A bus also finds the service of a node this way, which it needs to address the node by its id alone.

Source:
    NATS architecture decision record ADR-32, "Service API".
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from catga_bus.codec import DECODE_ERRORS, Gate
from catga_bus.errors import DisconnectedError, Outcome, PermissionDeniedError
from catga_bus.requests.inboxes import Inboxes
from catga_bus.transport.base import Subscription, Transport
from catga_bus.wire import QUEUE_RPC, SERVICE_API, Names, service_subjects, token

NAMESPACE_KEY = "catga.namespace"
SERVICE_KEY = "catga.service"
NODE_KEY = "catga.node"


class EndpointCounts(msgspec.Struct, frozen=True):
    """What one request type has done, for STATS."""

    type_name: str
    requests: int
    errors: int
    seconds: float
    """Total time in the handler."""


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node says about itself."""

    service: str
    node_id: str
    version: str
    description: str
    metadata: dict[str, str]
    request_types: tuple[str, ...]


class ServiceApi:
    """Answers the three verbs for one node.

    Args:
        transport: The connection.
        names: The namespace.
        inboxes: Where answers may go.
        facts: What the node is.
        counts: Returns what its request types have done.
        started: When the node was started (UTC).
    """

    def __init__(
        self,
        transport: Transport,
        names: Names,
        inboxes: Inboxes,
        facts: NodeFacts,
        counts: Callable[[], list[EndpointCounts]],
        started: datetime,
    ) -> None:
        self._transport = transport
        self._names = names
        self._inboxes = inboxes
        self._facts = facts
        self._counts = counts
        self._started = started
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        """Subscribe to the nine subjects of ADR-32."""
        bodies: dict[str, Callable[[], dict[str, Any]]] = {"PING": self._ping, "INFO": self._info, "STATS": self._stats}
        for verb, body in bodies.items():
            for subject in service_subjects(verb, self._facts.service, self._facts.node_id):
                self._subscriptions.append(await self._transport.subscribe(subject, self._answer(body)))

    async def close(self) -> None:
        """Answer no more."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()

    def _answer(
        self, body: Callable[[], dict[str, Any]]
    ) -> Callable[[str, bytes, str, Mapping[str, str] | None], None]:
        def sink(subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
            del subject, payload, headers
            transport = self._transport
            # Who asks may ask again; answers that wait for a slow connection would only make it slower.
            if transport.is_connected and not transport.is_behind and self._inboxes.allow(reply):
                transport.publish(reply, msgspec.json.encode(body()))

        return sink

    def _identity(self, verb: str) -> dict[str, Any]:
        facts = self._facts
        own = {NAMESPACE_KEY: self._names.namespace, SERVICE_KEY: facts.service, NODE_KEY: facts.node_id}
        return {
            "type": f"io.nats.micro.v1.{verb}_response",
            "name": token(facts.service),
            "id": token(facts.node_id),
            "version": facts.version,
            "metadata": facts.metadata | own,
        }

    def _ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def _info(self) -> dict[str, Any]:
        endpoints = [
            {"name": token(name), "subject": self._names.request(name), "queue_group": QUEUE_RPC, "metadata": {}}
            for name in self._facts.request_types
        ]
        return self._identity("info") | {"description": self._facts.description, "endpoints": endpoints}

    def _stats(self) -> dict[str, Any]:
        endpoints = [
            {
                "name": token(counts.type_name),
                "subject": self._names.request(counts.type_name),
                "queue_group": QUEUE_RPC,
                "num_requests": counts.requests,
                "num_errors": counts.errors,
                "last_error": "",
                "processing_time": int(counts.seconds * 1e9),
                "average_processing_time": int(counts.seconds * 1e9 / counts.requests) if counts.requests else 0,
            }
            for counts in self._counts()
        ]
        started = self._started.isoformat().replace("+00:00", "Z")
        return self._identity("stats") | {"started": started, "endpoints": endpoints}


class NodeFinder:
    """Finds the service of a node from its id, by asking all nodes who they are.

    It remembers 10,000 nodes; the one learnt first is forgotten for the next.

    Args:
        transport: The connection.
        names: The namespace; nodes of others are not seen.
        gate: Lets their answers in.
    """

    _MAX_KNOWN = 10_000

    def __init__(self, transport: Transport, names: Names, gate: Gate) -> None:
        self._transport = transport
        self._names = names
        self._gate = gate
        self._known: dict[str, str] = {}
        self._searches: dict[str, _Search] = {}

    async def find(self, node_id: str, timeout: float) -> str | None:
        """Return the service of a node, or None if it did not answer within `timeout` seconds.

        Whoever looks for a node that is being looked for joins that search.

        Raises:
            DisconnectedError: The connection was closed.
            PermissionDeniedError: The server does not permit this user to ask.
        """
        service = self._known.get(node_id)
        if service is not None:
            return service
        search = self._searches.get(node_id)
        if search is None:
            search = self._searches[node_id] = _Search()
            search.task = asyncio.create_task(self._search(node_id, search))
        search.waiting += 1
        try:
            done, _ = await asyncio.wait({search.task}, timeout=timeout)
            return search.task.result() if done else None
        finally:
            search.waiting -= 1
            if not search.waiting:
                await self._end(node_id, search)

    async def _end(self, node_id: str, search: "_Search") -> None:
        """End a search that nobody waits for any more."""
        if self._searches.get(node_id) is search:
            del self._searches[node_id]
        search.task.cancel()
        await asyncio.gather(search.task, return_exceptions=True)

    async def _search(self, node_id: str, search: "_Search") -> str:
        found = search.found

        def sink(subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
            del subject, reply, headers
            learnt = self._learn(payload)
            if learnt is not None and learnt[0] == node_id and not found.done():
                found.set_result(learnt[1])

        transport = self._transport
        inbox = transport.new_inbox()
        subscription = await transport.subscribe(inbox, sink)
        try:
            while True:
                if transport.is_connected and not transport.is_behind:
                    transport.publish(_PING, b"", reply=inbox)
                await asyncio.wait({found}, timeout=_PING_AGAIN_SECONDS)
                if found.done():
                    return found.result()
        finally:
            if self._searches.get(node_id) is search:
                del self._searches[node_id]  # who comes now finds the node known, or tries again
            if not found.cancel():
                found.exception()  # whoever still waits gets it from the task
            await subscription.close()

    def forget(self, node_id: str) -> None:
        """Ask again the next time."""
        self._known.pop(node_id, None)

    def denied(self, subject: str) -> None:
        """The server refuses a subject: if it is the question, nobody will answer it."""
        if subject.lower() == _PING.lower():
            text = f"the server does not permit this user to publish to {_PING!r}, which finds nodes by their id"
            self._give_up(lambda: PermissionDeniedError(text, _PING))

    def close(self) -> None:
        """End all searches."""
        text = "the bus was closed before the node was found"
        self._give_up(lambda: DisconnectedError(text, outcome=Outcome.NOT_RUN, retryable=True))

    def _give_up(self, error: Callable[[], Exception]) -> None:
        for search in self._searches.values():
            if not search.found.done():
                search.found.set_exception(error())

    def _learn(self, payload: bytes) -> tuple[str, str] | None:
        """Remember what a node says, and return its id and its service."""
        try:
            self._gate.json(payload)
            metadata = msgspec.json.decode(payload, type=_Identity).metadata
        except DECODE_ERRORS:  # the gate's refusal among them
            return None
        node_id, service = metadata.get(NODE_KEY), metadata.get(SERVICE_KEY)
        if metadata.get(NAMESPACE_KEY) != self._names.namespace or not node_id or not service:
            return None
        if node_id not in self._known and len(self._known) >= self._MAX_KNOWN:
            self._known.pop(next(iter(self._known), ""), None)
        self._known[node_id] = service
        return node_id, service


class _Search:
    """One look-up of a node, shared by all who look for it now."""

    __slots__ = ("found", "task", "waiting")

    def __init__(self) -> None:
        self.found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[str]
        self.waiting = 0


class _Identity(msgspec.Struct):
    metadata: dict[str, str] = {}


_PING = f"{SERVICE_API}.PING"
_PING_AGAIN_SECONDS = 0.25
# A question is lost with the connection, and a node that comes up has not heard it: four in the second that a caller
# has patience.
