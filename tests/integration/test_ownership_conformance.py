"""What the ownership of partitions asks of the broker is answered alike by the simulated one and by nats-server.

The same scripts run against the model behind the simulation's conversations (`tests.ownership.broker`), against the
broker in memory (which the simulation of whole nodes puts its bad habits in front of), and against a real server; what
was observed is compared.
"""

import asyncio
import itertools
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import msgspec
import pytest

from catga_bus.clock import monotonic
from catga_bus.partition.broker import Broker
from catga_bus.partition.owners_bucket import OwnersBucket
from catga_bus.partition.protocol import (
    CreateBucket,
    CreateConsumer,
    DeleteConsumer,
    Done,
    FindFirst,
    ListConsumers,
    Operation,
    Outcome,
    Ownership,
    Party,
    Read,
    ReadPosition,
    Refused,
    Write,
)
from catga_bus.partition.records import Domain, Mark, OwnerRecord, StaleError
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream, make_transport
from catga_bus.transport.consumer_model import PullStatus
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    DeliveredMessage,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.wire import Names
from tests.ownership.broker import BUCKET, SimulatedBroker
from tests.servers import NatsServer

NAMES = Names("catga")
QUEUE = Domain(names=NAMES, service="shop", window=4)
LOG = Domain(names=NAMES, service="shop", types=("Debited", "Credited"), window=4)
P = 3
FIRST_REVISION = 100
PATIENCE = 10.0

pytestmark = pytest.mark.nats


class Side:
    """A broker, and all that was seen of it."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.seen: list[Any] = []
        self.replies: list[str] = []

    async def do(self, operation: Operation) -> Outcome:
        """Carry an operation out, and note its outcome."""
        outcome = await self.perform(operation)
        if isinstance(operation, CreateBucket):
            # Somebody else was faster: a refusal or not, it is there.
            outcome = Done()
        if isinstance(operation, CreateConsumer | DeleteConsumer) and isinstance(outcome, Done):
            outcome = Done()
        noted: Any = (outcome.code,) if isinstance(outcome, Refused) else outcome
        self.seen.append((type(operation).__name__, noted))
        return outcome

    async def perform(self, operation: Operation) -> Outcome:
        raise NotImplementedError

    async def store(self, *subjects: int, message_id: str = "") -> None:
        """Store records, each on one of the filters of the partition."""
        for subject in subjects:
            self.seen.append(("stored", await self.publish(self.domain.filters(P)[subject], message_id)))

    async def publish(self, subject: str, message_id: str) -> tuple[int, bool]:
        raise NotImplementedError

    async def deliver(self, consumer: str, count: int) -> None:
        """Have records delivered, and note them."""
        for message in await self.pull(consumer, count):
            self.seen.append(("delivered", message.sequence, message.consumer_sequence, message.deliveries))
            self.replies.append(message.reply)

    async def pull(self, consumer: str, count: int) -> list[DeliveredMessage]:
        raise NotImplementedError

    async def acknowledge(self, place: int) -> None:
        """Acknowledge what was delivered, in whatever epoch that was, and note whether that was taken."""
        self.seen.append(("acknowledged", place, await self.confirm(self.replies[place])))

    async def confirm(self, reply: str) -> bool | None:
        raise NotImplementedError

    async def delete_bucket(self) -> None:
        raise NotImplementedError

    async def add_consumer(self, config: ConsumerConfig) -> None:
        raise NotImplementedError


class ModelSide(Side):
    """The model of the conversations."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain)
        self.broker = SimulatedBroker(domain)
        self.model = self.broker.model
        self.now = 1.0

    async def perform(self, operation: Operation) -> Outcome:
        return self.broker.perform(self.now, P, operation)

    async def publish(self, subject: str, message_id: str) -> tuple[int, bool]:
        ack = self.model.publish(self.now, subject, b"record", message_id=message_id)
        return ack.sequence, ack.duplicate

    async def pull(self, consumer: str, count: int) -> list[DeliveredMessage]:
        self.model.pull(self.now, self.domain.stream, consumer, "me", count)
        found = [sent.content for sent in self.model.run(self.now)]
        while sum(isinstance(each, DeliveredMessage) for each in found) < count:
            self.now = self.model.next_timer()
            found += [sent.content for sent in self.model.run(self.now)]
        return [each for each in found if isinstance(each, DeliveredMessage)]

    async def confirm(self, reply: str) -> bool | None:
        return self.model.acknowledge(self.now, reply)

    async def delete_bucket(self) -> None:
        self.model.delete_stream(self.now, BUCKET)

    async def add_consumer(self, config: ConsumerConfig) -> None:
        self.model.create_consumer(self.now, self.domain.stream, config)

    def heard_of_deletion(self, consumer: str) -> list[Any]:
        self.model.pull(self.now, self.domain.stream, consumer, "me", 1)
        self.model.delete_consumer(self.now, self.domain.stream, consumer)
        return [sent.content for sent in self.model.run(self.now)]


class WireSide(Side):
    """A server that is talked to by the product's client."""

    def __init__(self, domain: Domain, url: str) -> None:
        super().__init__(domain)
        self.transport = make_transport(ConnectionOptions(urls=(url,)), RecordedEvents())

    async def __aenter__(self) -> "WireSide":
        await self.transport.connect()
        self.js = make_jetstream(self.transport, monotonic)
        owners = OwnersBucket(self.js, NAMES)
        await owners.create(FIRST_REVISION)
        domain = self.domain
        await self.js.create_stream(
            StreamConfig(
                name=domain.stream,
                subjects=(NAMES.events() if domain.is_log else NAMES.commands(domain.service),),
                retention="limits" if domain.is_log else "workqueue",
            )
        )
        self.broker = Broker(self.js, owners, domain, P, _nothing)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.js.close()
        await self.transport.close()

    async def perform(self, operation: Operation) -> Outcome:
        return await self.broker.perform(operation)

    async def publish(self, subject: str, message_id: str) -> tuple[int, bool]:
        ack = await self.js.publish(subject, b"record", message_id=message_id)
        return ack.sequence, ack.duplicate

    async def pull(self, consumer: str, count: int) -> list[DeliveredMessage]:
        found: list[DeliveredMessage] = []
        consumption = await self.js.consume(self.domain.stream, consumer, found.append, lambda _, __: None)
        consumption.pull(count)
        try:
            await eventually(lambda: len(found) >= count, PATIENCE)
        finally:
            await consumption.close()
        return found

    async def confirm(self, reply: str) -> bool | None:
        try:
            return await self.js.acknowledge_confirmed(reply, timeout=0.3)
        except JetStreamUnknownError:
            return None

    async def delete_bucket(self) -> None:
        await self.js.delete_stream(f"KV_{NAMES.owners_bucket()}")

    async def add_consumer(self, config: ConsumerConfig) -> None:
        await self.js.create_consumer(self.domain.stream, config)


async def _nothing(_: str, __: Mark | None) -> None:
    """Pulling is the keeper's business."""


Script: TypeAlias = Callable[[Side], Awaitable[None]]


def party(node: str) -> Party:
    count = itertools.count(1)
    return Party(node, (1, 1), lambda: f"{node}-{next(count)}", lambda: 5_000)


class Talk:
    """A conversation, one operation at a time."""

    def __init__(self, side: Side, steps: Any) -> None:
        self._side = side
        self._steps = steps
        self._operation: Operation | None = next(steps)
        self.value: Any = None

    @property
    def is_over(self) -> bool:
        return self._operation is None

    async def step(self) -> None:
        assert self._operation is not None
        outcome = await self._side.do(self._operation)
        try:
            self._operation = self._steps.send(outcome)
        except StopIteration as end:
            self.value, self._operation = end.value, None
        except (StaleError, JetStreamRefusedError) as error:
            self._side.seen.append(type(error).__name__)
            self._operation = None

    async def end(self) -> Any:
        while not self.is_over:
            await self.step()
        return self.value


def claim(side: Side, node: str, *, above: int = 0) -> Talk:
    return Talk(side, Ownership(party(node), side.domain, P).claim(lambda _: True, above))


async def state(side: Side) -> None:
    """Note all that can be asked."""
    await side.do(Read())
    names = await side.do(ListConsumers())
    assert isinstance(names, Done)
    for name in names.value:
        await side.do(ReadPosition(name))
    for start in (1, 2, 5):
        await side.do(FindFirst(start))


# -- scripts -----------------------------------------------------------------------------------------------------------


async def one_after_another(side: Side) -> None:
    """Claims, an amendment, a release, a claim on it."""
    await side.store(0, -1, 0)
    first = Ownership(party("a"), side.domain, P)
    claimed = await Talk(side, first.claim(lambda _: True)).end()
    held = await Talk(side, first.amend(claimed, claimed.held, mark=Mark(1, 2), floor=1)).end()
    await state(side)
    await Talk(side, first.amend(claimed, held, is_released=True)).end()
    await claim(side, "b").end()
    await Talk(side, first.amend(claimed, held)).end()  # stale
    await Talk(side, first.reclaim(claimed.epoch)).end()  # stale
    await claim(side, "c", above=90_000).end()
    await state(side)


async def compare_and_set(side: Side) -> None:
    """Writes with right and wrong revisions."""
    record = OwnerRecord(node="a", incarnation=(1, 1), nonce="n", last="c", epoch=7)
    await side.do(Read())
    for last in (3, 0, 0, FIRST_REVISION, FIRST_REVISION, FIRST_REVISION + 1):
        await side.do(Write(record, last))
    await side.do(Read())


async def a_lost_bucket(side: Side) -> None:
    """The bucket is deleted under an owner and made again, twice at once."""
    owner = Ownership(party("a"), side.domain, P)
    claimed = await Talk(side, owner.claim(lambda _: True)).end()
    await side.delete_bucket()
    await side.do(Read())
    again = await Talk(side, owner.reclaim(claimed.epoch)).end()
    assert again.epoch > claimed.epoch
    await side.do(CreateBucket(9_000))
    await state(side)


async def stale_acknowledgements(side: Side) -> None:
    """A former owner's acknowledgements of a consumer that is gone, and of one that was made again by its name."""
    await side.store(0, 0, 0)
    old = (await claim(side, "a").end()).consumer
    await side.deliver(old, 2)
    await side.acknowledge(0)
    new = (await claim(side, "b").end()).consumer
    await side.acknowledge(1)  # nobody is there
    await state(side)
    await side.deliver(new, 2)
    await side.acknowledge(2)
    await side.acknowledge(2)  # once more
    await state(side)
    await side.do(DeleteConsumer(new))
    await side.do(DeleteConsumer(new))
    await side.do(CreateConsumer(new, 3))
    await side.acknowledge(3)  # of the consumer's former life, before it has come so far
    await side.deliver(new, 1)
    await side.acknowledge(3)  # and after that
    await state(side)


async def delivered_again(side: Side) -> None:
    """What is not acknowledged in time comes again; the acknowledgement of the first delivery counts."""
    await side.store(0, 0)
    await side.add_consumer(
        ConsumerConfig(name="shop-p3-e5-00000000", filters=side.domain.filters(P), ack_wait=0.5, max_ack_pending=4)
    )
    await side.deliver("shop-p3-e5-00000000", 2)
    await side.deliver("shop-p3-e5-00000000", 2)
    await side.acknowledge(0)
    await side.acknowledge(3)
    await state(side)


async def out_of_order(side: Side) -> None:
    """Acknowledgements out of order, and a new epoch behind them."""
    await side.store(0, -1, 0, -1, 0)
    first = (await claim(side, "a").end()).consumer
    await side.deliver(first, 4)
    for place in (3, 0, 1):
        await side.acknowledge(place)
    await state(side)
    second = (await claim(side, "b").end()).consumer
    await side.deliver(second, 2 if not side.domain.is_log else 3)
    await state(side)


async def not_the_buss(side: Side) -> None:
    """A consumer of somebody else, one of a higher epoch, one of a lower."""
    for name in ("somebody", "shop-p3-e777777-00000000", "shop-p3-e7-00000000"):
        await side.add_consumer(ConsumerConfig(name=name, filters=side.domain.filters(P)))
        await claim(side, "a").end()
        await state(side)
        await side.do(DeleteConsumer(name))
        await claim(side, "b").end()
        names = await side.do(ListConsumers())
        for each in names.value:  # type: ignore[union-attr]
            await side.do(DeleteConsumer(each))


async def consumers(side: Side) -> None:
    """A consumer made twice, with the same and with another beginning."""
    await side.store(0, 0)
    for start in (1, 1, 2):
        await side.do(CreateConsumer("shop-p3-e5-00000000", start))
    await side.do(CreateConsumer("shop-p3-e6-00000000", 1))
    await state(side)


async def stored_twice(side: Side) -> None:
    """A record that its sender stores again, because it does not know."""
    for message_id in ("x", "x", "y", "x"):
        await side.store(0, message_id=message_id)
    await state(side)


def interleaved(seed: int) -> Script:
    """Two or three claims in some order."""

    async def script(side: Side) -> None:
        rng = random.Random(seed)
        await side.store(0)
        if rng.random() < 0.5:
            await claim(side, "dead").end()
        talks = [claim(side, node) for node in ("a", "b", "c")[: rng.choice((2, 2, 3))]]
        while waiting := [talk for talk in talks if not talk.is_over]:
            await rng.choice(waiting).step()
        await state(side)

    script.__name__ = f"interleaved_{seed}"
    return script


SCRIPTS: tuple[Script, ...] = (
    one_after_another, compare_and_set, a_lost_bucket, stale_acknowledgements, delivered_again, out_of_order,
    not_the_buss, consumers, stored_twice, *(interleaved(seed) for seed in range(12)),
)  # fmt: skip


@pytest.fixture
async def make_side(start_server: Callable[..., NatsServer]) -> AsyncIterator[Callable[..., Awaitable[WireSide]]]:
    async with AsyncExitStack() as stack:
        servers: list[NatsServer] = []

        async def make(domain: Domain, where: str) -> WireSide:
            if where == "nats" and not servers:
                servers.append(start_server(jetstream=True))
            url = servers[0].url if where == "nats" else f"memory://{secrets.token_hex(4)}"
            return await stack.enter_async_context(WireSide(domain, url))

        yield make


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
async def test_all_three_answer_alike(
    make_side: Callable[..., Awaitable[WireSide]], domain: Domain, script: Script
) -> None:
    model, memory, server = ModelSide(domain), await make_side(domain, "memory"), await make_side(domain, "nats")
    async with asyncio.timeout(60.0):
        for side in (model, memory, server):
            await script(side)
    assert _plain(memory.seen) == _plain(server.seen)
    assert _plain(model.seen) == _plain(server.seen)
    assert len(server.seen) > 5


def _plain(seen: list[Any]) -> list[Any]:
    return [msgspec.to_builtins(each) if not isinstance(each, str) else each for each in seen]


@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
async def test_all_say_that_a_consumer_was_deleted(
    make_side: Callable[..., Awaitable[WireSide]], domain: Domain
) -> None:
    name = "shop-p3-e5-00000000"
    model = ModelSide(domain)
    await model.do(CreateConsumer(name, 1))
    assert model.heard_of_deletion(name) == [PullStatus(409, "Consumer Deleted", 1)]
    for where in ("memory", "nats"):
        side = await make_side(domain, where)
        await side.do(CreateConsumer(name, 1))
        heard: list[tuple[int, str]] = []
        consumption = await side.js.consume(
            domain.stream, name, lambda _: None, lambda code, text, heard=heard: heard.append((code, text))
        )
        consumption.pull(1)
        await side.transport.flush()
        await side.do(DeleteConsumer(name))
        await eventually(lambda heard=heard: heard == [(409, "Consumer Deleted")], PATIENCE)
        assert consumption.credit == 0
        consumption.pull(1)
        await eventually(lambda heard=heard: heard[-1][0] == 503, PATIENCE)  # after the patience with a new consumer
        await consumption.close()
