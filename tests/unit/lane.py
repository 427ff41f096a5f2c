"""Both ends of the request lane taken apart: a caller with a view of nodes given by hand, and nodes played by hand."""

import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import msgspec

from catga_bus import Request
from catga_bus.clock import monotonic
from catga_bus.codec import Gate
from catga_bus.requests.caller import Caller
from catga_bus.requests.peers import Address, Choice
from catga_bus.resilience.circuit_breaker import BreakerOptions
from catga_bus.testing import RecordedEvents
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.coalescer import Coalescer
from catga_bus.transport.memory import MemoryTransport
from catga_bus.wire import Fault, Kind, MessageFrame, Names, Status, join_batch, join_ids

PATIENCE = 0.05
_encode = msgspec.msgpack.Encoder().encode


class Ask(Request[str]):
    """Asks something."""

    what: str = ""


class AskOnce(Request[str], idempotent=False):
    """Asks something that must not be asked twice."""


def transport(url: str) -> MemoryTransport:
    """Return a transport that is not connected yet."""
    return MemoryTransport(ConnectionOptions(urls=(url,)), RecordedEvents())


class Known(msgspec.Struct):
    """What a choice is asked about."""

    id: str


class View:
    """What the caller knows of the nodes; see `Peers`."""

    def __init__(self) -> None:
        self.troubled: Collection[str] = ()
        self.live: list[str] = []
        self.doubted: list[str] = []
        self.stalled: set[str] = set()

    def pick(self, type_name: str, avoid: Collection[str] = (), choice: Choice | None = None) -> Address | None:
        """Return the first that is live."""
        fits = [one for one in self.live if one not in avoid and (choice is None or choice(Known(one)))]
        return ("shop", fits[0]) if fits else None

    def address(self, node_id: str) -> Address | None:
        """Return the address of any node."""
        return "shop", node_id

    def is_stalled(self, node_id: str) -> bool:
        """Whether it is said to stand still."""
        return node_id in self.stalled

    def doubtful(self, type_name: str) -> list[Address]:
        """Return those in doubt."""
        return [("shop", one) for one in self.doubted]


class FakeNode:
    """A node that does what a test says."""

    def __init__(self, url: str, node_id: str, *, in_group: bool) -> None:
        self.id = node_id
        self.got: list[MessageFrame] = []
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self._in_group = in_group
        self._inbox = ""
        self._gate = Gate()
        self._transport = transport(url)

    async def start(self) -> "FakeNode":
        """Subscribe as a node does."""
        names, own = Names(), ("shop", self.id)
        await self._transport.connect()
        for subject, sink in (
            (names.node_requests(*own), self._on_request),
            (names.node_status(*own), self._on_status),
            (names.node_cancel(*own), self._on_cancel),
        ):
            await self._transport.subscribe(subject, sink)
        for name in ("Ask", "AskOnce") if self._in_group else ():
            await self._transport.subscribe(names.request(name), self._on_request, queue="rpc")
        return self

    async def stop(self) -> None:
        """Be gone."""
        await self._transport.close()

    def _on_request(self, subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
        batch = self._gate.messages(payload)
        self._inbox = batch.head.reply or ""
        self.got.extend(batch.frames)

    def _on_status(self, subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
        self.asked.extend(self._gate.ids(payload).frames)

    def _on_cancel(self, subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
        self.cancelled.extend(self._gate.ids(payload).frames)

    @property
    def ids(self) -> list[str]:
        """The ids of what came, in order."""
        return [frame.id for frame in self.got]

    def accept(self, *ids: str) -> None:
        """Say that it has these."""
        self._transport.publish(self._inbox, join_ids(Kind.ACCEPTED, (self.id,), ids))

    def answer(self, message_id: str, value: Any = "done", status: Status = Status.OK) -> None:
        """Answer one; a fault is that of a node that is too busy unless another one is given."""
        body = value if status is Status.OK or isinstance(value, Fault) else Fault("OVERLOADED", "no")
        self.answer_all((message_id, status, body))

    def answer_all(self, *answers: tuple[str, Status, Any]) -> None:
        """Give answers in one batch: of each the id, the status and the body."""
        frames = [_encode((*answer, self.id)) for answer in answers]
        self._transport.publish(self._inbox, join_batch(Kind.ANSWERS, (self.id,), frames))


StartNode = Callable[..., Awaitable[FakeNode]]
"""Starts a node, given its id and whether it is `in_group`."""


class Lane:
    """A caller and its view."""

    def __init__(self, url: str, breaker: BreakerOptions | None) -> None:
        self.transport = transport(url)
        self.view = View()
        self._breaker = breaker
        self._ids = 0

    async def start(self) -> "Lane":
        """Connect."""
        await self.transport.connect()
        self._coalescer = Coalescer(self.transport, max_frames=64, max_bytes=262_144, max_held_bytes=1_000_000)
        self.caller = Caller(
            self.transport,
            self._coalescer,
            Gate(),
            Names(),
            self.view,
            sender="caller",
            attempt_timeout=PATIENCE,
            breaker=self._breaker,
            clock=monotonic,
            rng=random.Random(1),
        )
        await self.caller.start()
        return self

    async def stop(self) -> None:
        """End everything."""
        await self.caller.close()
        await self._coalescer.close()
        await self.transport.close()

    def send(self, message: Any = None, *, timeout: float = 5.0, **options: Any) -> Any:
        """Make a call; its id is a number, counted from 1."""
        self._ids += 1
        return self.caller.call(Ask() if message is None else message, str(self._ids), timeout, **options)
