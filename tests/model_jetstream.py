"""JetStream over its model, with faults on order: for tests of what is built on it."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from catga_bus.errors import TooLargeError
from catga_bus.transport.consumer_model import PullStatus
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    ConsumerInfo,
    DeliveredMessage,
    JetStreamError,
    JetStreamUnknownError,
    MessageSink,
    PubAck,
    StatusSink,
    StoredMessage,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.jetstream_model import JetStreamModel


class ModelJetStream:
    """A server of its own.

    Attributes:
        model: What it has.
        now: Its clock: seconds since 1970; moved by the test.
        max_payload: Bytes that a publish may have.
        calls: How often each call was made.
        on_call: Told of each call before it is made.
        drops: Whether a delivery is lost on its way.
    """

    def __init__(self, now: float = 1_764_072_000.0) -> None:
        self.model = JetStreamModel()
        self.now = now
        self.max_payload = 1_048_576
        self.calls: Counter[str] = Counter()
        self._before: dict[str, list[JetStreamError]] = defaultdict(list)
        self._after: dict[str, list[JetStreamError]] = defaultdict(list)
        self._pullers: dict[object, ModelConsumption] = {}
        self.on_call: Callable[[str], None] = lambda _: None
        self.drops: Callable[[DeliveredMessage], bool] = lambda _: False

    def fail(self, call: str, *errors: JetStreamError) -> None:
        """Let the next calls do nothing and raise."""
        self._before[call] += errors

    def lose_answers(self, call: str, count: int = 1) -> None:
        """Let the next calls do what they are asked for, and nobody learn of it."""
        self._after[call] += [JetStreamUnknownError("no answer")] * count

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        self.calls[name] += 1
        self.on_call(name)
        if self._before[name]:
            raise self._before[name].pop(0)
        answer = getattr(self.model, name)(self.now, *args, **options)
        self.run()
        if self._after[name]:
            raise self._after[name].pop(0)
        return answer

    def run(self) -> None:
        """Deliver what is due."""
        for puller, content in self.model.run(self.now, self._pullers.__contains__):
            asyncio.get_running_loop().call_soon(self._deliver, puller, content)

    def _deliver(self, puller: object, content: DeliveredMessage | PullStatus) -> None:
        if puller in self._pullers:
            self._pullers[puller].take(content)

    def disconnected(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def account(self) -> Mapping[str, Any]:
        return {}

    async def create_stream(self, config: StreamConfig) -> StreamInfo:
        return self._call("create_stream", config)

    async def update_stream(self, config: StreamConfig) -> StreamInfo:
        return self._call("update_stream", config)

    async def stream(self, name: str) -> StreamInfo | None:
        return self._call("stream", name)

    async def stream_names(self, subject: str = "") -> list[str]:
        return self._call("stream_names", subject)

    async def delete_stream(self, name: str) -> bool:
        return self._call("delete_stream", name)

    async def purge(self, stream: str, *, subject: str = "") -> int:
        return self._call("purge", stream, subject)

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 2.0,
    ) -> PubAck:
        if len(payload) > self.max_payload:
            raise TooLargeError(f"{len(payload)} bytes")
        await asyncio.sleep(0)
        return self._call(
            "publish", subject, payload, message_id=message_id, expected_last=expected_last, headers=headers
        )

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        return self._call("last_message", stream, subject)

    async def message(self, stream: str, sequence: int) -> StoredMessage | None:
        return self._call("message", stream, sequence)

    async def next_message(self, stream: str, subject: str, sequence: int) -> StoredMessage | None:
        return self._call("next_message", stream, subject, sequence)

    async def delete_message(self, stream: str, sequence: int) -> bool:
        return self._call("delete_message", stream, sequence)

    async def create_consumer(self, stream: str, config: ConsumerConfig, *, timeout: float = 5.0) -> ConsumerInfo:
        return self._call("create_consumer", stream, config)

    async def consumer(self, stream: str, name: str) -> ConsumerInfo | None:
        return self._call("consumer", stream, name)

    async def consumer_names(self, stream: str) -> list[str]:
        return self._call("consumer_names", stream)

    async def delete_consumer(self, stream: str, name: str, *, timeout: float = 5.0) -> bool:
        return self._call("delete_consumer", stream, name)

    async def consume(
        self, stream: str, consumer: str, on_message: MessageSink, on_status: StatusSink, *, idle: float = 5.0
    ) -> "ModelConsumption":
        made = ModelConsumption(self, stream, consumer, on_message, on_status)
        self._pullers[made] = made
        return made

    def acknowledge(self, reply: str) -> None:
        self._call("acknowledge", reply)

    async def acknowledge_confirmed(self, reply: str) -> bool:
        return bool(self._call("acknowledge", reply))

    # -- for tests -----------------------------------------------------------------------------------------

    def stored(self, stream: str) -> list[StoredMessage]:
        """All that lies in a stream, in order."""
        found: list[StoredMessage] = []
        while (
            one := self.model.next_message(self.now, stream, ">", found[-1].sequence + 1 if found else 1)
        ) is not None:
            found.append(one)
        return found

    def leave(self, puller: "ModelConsumption") -> None:
        self._pullers.pop(puller, None)


class ModelConsumption:
    """A consumer at work."""

    def __init__(
        self, jetstream: ModelJetStream, stream: str, consumer: str, on_message: MessageSink, on_status: StatusSink
    ) -> None:
        self.credit = 0
        self.heard_at = 0.0
        self._jetstream = jetstream
        self._place = stream, consumer
        self._on_message = on_message
        self._on_status = on_status

    def pull(self, batch: int) -> None:
        self._jetstream.calls["pull"] += 1
        self.credit += batch
        if self._jetstream.model.pull(self._jetstream.now, *self._place, self, batch):
            self._jetstream.run()
        else:
            self.credit = 0
            asyncio.get_running_loop().call_soon(self._on_status, 503, "no responders")

    def take(self, content: DeliveredMessage | PullStatus) -> None:
        if isinstance(content, PullStatus):
            self.credit -= content.ended
            self._on_status(content.code, content.text)
        else:
            self.credit -= 1
            if not self._jetstream.drops(content):
                self._on_message(content)

    async def close(self) -> None:
        self._jetstream.leave(self)
