"""A transport whose server is played by the test: it keeps what is published and hands in what the test says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from catga_bus.errors import DisconnectedError
from catga_bus.transport.base import Sink
from catga_bus.transport.subjects import covers


class Published(NamedTuple):
    subject: str
    payload: bytes
    reply: str
    headers: Mapping[str, str] | None

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.payload)


class PlayedSubscription:
    def __init__(self, server: "PlayedServer", subject: str, sink: Sink) -> None:
        self.server = server
        self.subject = subject
        self.sink = sink

    async def unsubscribe(self) -> None:
        await self.close()

    async def close(self) -> None:
        self.server.subscriptions.pop(self, None)


class PlayedServer:
    """Fills `catga_bus.transport.base.Transport`, as far as JetStream uses it."""

    max_payload = 1_048_576
    is_behind = False
    url = "played://"

    def __init__(self) -> None:
        self.is_connected = True
        self.published: list[Published] = []
        self.subscriptions: dict[PlayedSubscription, None] = {}
        self.inboxes = 0

    async def connect(self) -> None: ...

    async def close(self) -> None: ...

    async def flush(self, timeout: float = 5.0) -> None: ...

    def push(self) -> None: ...

    async def wait_writable(self) -> None: ...

    def new_inbox(self) -> str:
        self.inboxes += 1
        return f"_INBOX.{self.inboxes}"

    async def subscribe(self, subject: str, sink: Sink, *, queue: str = "") -> PlayedSubscription:
        subscription = PlayedSubscription(self, subject, sink)
        self.subscriptions[subscription] = None
        return subscription

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        if not self.is_connected:
            raise DisconnectedError("not connected")
        self.published.append(Published(subject, payload, reply, headers))

    def say(
        self,
        to: str,
        payload: bytes = b"",
        *,
        subject: str = "",
        reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Hand a message to whoever listens to `to`; return to how many."""
        heard = [each for each in self.subscriptions if covers(each.subject.split("."), to.split("."))]
        for subscription in heard:
            subscription.sink(subject or to, payload, reply, headers)
        return len(heard)

    def answer(self, answer: Any, place: int = -1) -> None:
        """Answer a published request: with bytes as they are, else with JSON."""
        payload = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
        self.say(self.published[place].reply, payload)

    def say_nobody(self, place: int = -1) -> None:
        """Let a published request come back: nobody listens."""
        self.say(self.published[place].reply, headers={"Status": "503"})
