"""ADR-32: every node answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, so that `nats micro` sees the services.

Source:
    NATS architecture decision record ADR-32, "Service API".
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from catga_bus.requests.inboxes import Inboxes
from catga_bus.transport.base import Subscription, Transport
from catga_bus.wire import QUEUE_RPC, Names, service_subjects, token

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
