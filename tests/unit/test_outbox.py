"""The outbox: what was committed is published in order, again after a failure, and by the next owner after a crash."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from catga_bus.clock import monotonic
from catga_bus.durability.inbox.base import FencedError, InboxError, Recorded
from catga_bus.durability.inbox.memory_inbox import MemoryInbox
from catga_bus.durability.inbox.outbox import MAX_BATCH, MAX_WAITING, Line, Relay, Source
from catga_bus.effects import Fence, Outbound
from catga_bus.resilience.retry import RetryOptions
from catga_bus.testing import eventually

SERVICE = "billing"
FENCE = Fence(3, 100)
DONE = Recorded(0, b"")
PAUSES = RetryOptions(first=0.001, longest=0.002)


def message(number: int, subject: str = "a") -> Outbound:
    return Outbound(subject, f"m.{number}", b"%d" % number)


class Streams:
    """What is published, and whether it is stored."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish(self, outbound: Outbound) -> None:
        self.calls.append(outbound.message_id)
        await self.gate.wait()
        if outbound.subject in self.broken:
            raise InboxError("the stream is full")
        self.stored.append(outbound.message_id)


class FlakyInbox(MemoryInbox):
    """Fails as often as it is told."""

    failures = 0

    async def unsent(self, service: str, fence: Fence, limit: int) -> list[Outbound]:
        self._fail()
        return await super().unsent(service, fence, limit)

    async def sent(self, service: str, message_ids: object) -> None:
        self._fail()
        await super().sent(service, message_ids)  # type: ignore[arg-type]

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise InboxError("locked")


@pytest.fixture
async def inbox() -> AsyncIterator[FlakyInbox]:
    inbox = FlakyInbox()
    await inbox.open()
    yield inbox
    await inbox.close()


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
async def make_relay(inbox: FlakyInbox, streams: Streams) -> AsyncIterator[Callable[[], Relay]]:
    async with AsyncExitStack() as stack:

        def make_relay() -> Relay:
            relay = Relay(inbox, SERVICE, streams.publish, clock=monotonic, chance=lambda: 1.0, pauses=PAUSES)
            stack.push_async_callback(relay.close)
            return relay

        yield make_relay


async def commit(inbox: MemoryInbox, *messages: Outbound, fence: Fence = FENCE) -> tuple[Outbound, ...]:
    unit = inbox.unit(SERVICE, f"parent of {messages[0].message_id}", fence)
    for outbound in messages:
        unit.send(outbound)
    await unit.commit(DONE)
    return tuple(unit.outbound)


def ids(numbers: range) -> list[str]:
    return [f"m.{number}" for number in numbers]


# -- a line


def test_what_follows_a_failure_goes_out_again_behind_it() -> None:
    line, source = Line(), Source(FENCE)
    for number in range(5):
        line.add(source, message(number))
    assert line.take(3) == [message(0), message(1), message(2)]
    assert line.settle([True, False, True]) == ([message(0)], True)
    assert (line.failures, len(line), source.waiting) == (1, 4, 4)
    assert line.take(10) == [message(number) for number in range(1, 5)]
    assert line.settle([True] * 4) == ([message(number) for number in range(1, 5)], False)
    assert (line.failures, len(line), source.waiting) == (0, 0, 0)


def test_a_line_leaves_out_what_was_dropped() -> None:
    line, mine, other = Line(), Source(FENCE), Source(Fence(4, 1))
    for number in range(6):
        line.add(mine if number % 2 else other, message(number))
    other.is_dropped = True
    assert line.take(2) == [message(1), message(3)]
    assert other.waiting == 1
    assert line.settle([False, False]) == ([], True)
    mine.is_dropped = True
    assert line.take(2) == []
    assert (mine.waiting, other.waiting, len(line)) == (0, 0, 0)


# -- the relay


async def test_what_is_committed_is_published_and_then_forgotten(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay = make_relay()
    for number in range(0, 30, 3):
        relay.send(FENCE, await commit(inbox, *(message(number + more) for more in range(3))))
    await relay.flush(FENCE)
    assert streams.stored == ids(range(30))
    assert await inbox.unsent(SERVICE, FENCE, 100) == []
    assert relay.waiting == 0


async def test_what_is_stored_is_forgotten_without_a_flush(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay = make_relay()
    inbox.failures = 1
    relay.send(FENCE, await commit(inbox, message(1)))
    await eventually(lambda: streams.stored)

    async def until_forgotten() -> None:
        while await inbox.unsent(SERVICE, FENCE, 10):
            await asyncio.sleep(0.005)

    await eventually(lambda: not inbox.failures, what="the failure of the store to be met")
    await asyncio.wait_for(until_forgotten(), 5.0)


async def test_one_batch_of_a_subject_is_on_its_way_at_a_time(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay = make_relay()
    streams.gate.clear()
    relay.send(FENCE, await commit(inbox, message(0)))
    await eventually(lambda: streams.calls)
    relay.send(FENCE, await commit(inbox, *map(message, range(1, 300))))
    relay.send(FENCE, await commit(inbox, message(1_000, "b")))
    await eventually(lambda: len(streams.calls) == 2)
    assert streams.calls == ["m.0", "m.1000"]
    streams.gate.set()
    await relay.flush(FENCE)
    assert [name for name in streams.stored if name != "m.1000"] == ids(range(300))


async def test_a_failed_message_is_not_overtaken_and_others_go_on(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay = make_relay()
    streams.broken.add("a")
    relay.send(FENCE, await commit(inbox, message(0), message(1), message(2, "b")))
    await eventually(lambda: streams.calls.count("m.0") >= 3)
    relay.send(FENCE, await commit(inbox, message(3)))
    assert streams.stored == ["m.2"]
    streams.broken.clear()
    await relay.flush(FENCE)
    assert streams.stored == ["m.2", "m.0", "m.1", "m.3"]


async def test_the_next_owner_publishes_what_a_crashed_one_has_committed(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    for start in range(0, 600, 6):
        await commit(inbox, *map(message, range(start, start + 6)))
    relay, mine = make_relay(), Fence(FENCE.partition, FENCE.epoch + 1)
    streams.gate.clear()
    relay.take_over(mine)
    relay.send(mine, await commit(inbox, message(600), fence=mine))  # runs meanwhile, and is published after it
    assert relay.behind == 1
    streams.gate.set()
    await relay.flush(mine)
    assert list(dict.fromkeys(streams.stored)) == ids(range(601))
    assert relay.behind == 0
    relay.send(mine, await commit(inbox, message(601), fence=mine))
    await relay.flush(mine)
    assert streams.stored[-1] == "m.601"
    assert await inbox.unsent(SERVICE, mine, 10) == []


async def test_taking_over_fences_the_former_owner(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay, mine = make_relay(), Fence(FENCE.partition, FENCE.epoch + 1)
    relay.take_over(mine)
    await relay.flush(mine)
    with pytest.raises(FencedError):
        await commit(inbox, message(0))
    relay.send(mine, await commit(inbox, message(1), fence=mine))
    late = make_relay()
    late.take_over(FENCE)
    late.send(FENCE, [message(0)])
    await late.flush(FENCE)
    await relay.flush(mine)
    assert streams.calls == ["m.1"]


async def test_memory_holds_a_bounded_part_and_the_store_the_rest(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay = make_relay()
    streams.gate.clear()
    count = MAX_WAITING + 3 * MAX_BATCH
    for start in range(0, count, 64):
        relay.send(FENCE, await commit(inbox, *map(message, range(start, start + 64))))
    assert relay.waiting == MAX_WAITING
    assert relay.behind == 1
    inbox.failures = 3  # met on the way
    streams.gate.set()
    await eventually(lambda: not relay.behind, timeout=20.0, what="the relay to catch up")
    await relay.flush(FENCE)
    assert list(dict.fromkeys(streams.stored)) == ids(range(count))
    assert await inbox.unsent(SERVICE, FENCE, 10) == []


async def test_a_dropped_partition_is_left_to_its_next_owner(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay, other = make_relay(), Fence(4, 7)
    streams.broken.add("a")
    relay.send(FENCE, await commit(inbox, message(0)))
    relay.send(other, await commit(inbox, message(1), fence=other))
    await eventually(lambda: len(streams.calls) >= 2)
    relay.drop(FENCE)
    relay.send(FENCE, await commit(inbox, message(2)))
    await relay.flush(FENCE)  # nothing to wait for
    streams.broken.clear()
    await relay.flush(other)
    assert streams.stored == ["m.1"]
    assert await inbox.unsent(SERVICE, FENCE, 10) == [message(0), message(2)]
    mine = Fence(FENCE.partition, FENCE.epoch + 1)
    relay.take_over(mine)
    relay.drop(FENCE)  # late, and of an epoch that is over
    await relay.flush(mine)
    assert streams.stored == ["m.1", "m.0", "m.2"]


async def test_what_comes_with_a_former_epoch_is_left_to_the_store(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay, mine = make_relay(), Fence(FENCE.partition, FENCE.epoch + 1)
    committed = await commit(inbox, message(0))
    relay.take_over(mine)
    relay.send(FENCE, committed)
    await relay.flush(mine)
    assert streams.stored == ["m.0"]


async def test_a_partition_that_is_fenced_while_it_catches_up_is_dropped(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    for number in range(2 * MAX_BATCH):
        await commit(inbox, message(number))
    relay, mine = make_relay(), Fence(FENCE.partition, FENCE.epoch + 1)
    streams.gate.clear()
    relay.take_over(mine)
    await eventually(lambda: len(streams.calls) == MAX_BATCH)
    await inbox.unsent(SERVICE, Fence(FENCE.partition, FENCE.epoch + 2), 1)
    streams.gate.set()
    await eventually(lambda: not relay.behind)
    await relay.flush(mine)
    assert streams.stored == ids(range(MAX_BATCH))


async def test_what_is_committed_while_the_store_is_read_is_not_forgotten(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = make_relay()
    real, late = inbox.unsent, iter((True,))

    async def unsent(service: str, fence: Fence, limit: int) -> list[Outbound]:
        page = await real(service, fence, limit)
        if next(late, False):
            relay.send(FENCE, await commit(inbox, message(0)))
        return page

    monkeypatch.setattr(inbox, "unsent", unsent)
    relay.take_over(FENCE)
    await eventually(lambda: streams.stored == ["m.0"])
    await eventually(lambda: not relay.behind)


async def test_closed_it_leaves_the_rest_in_the_store(
    inbox: FlakyInbox, streams: Streams, make_relay: Callable[[], Relay]
) -> None:
    relay = make_relay()
    relay.send(FENCE, await commit(inbox, message(0)))
    await eventually(lambda: streams.stored)
    streams.gate.clear()
    relay.send(FENCE, await commit(inbox, message(1)))
    flushing = asyncio.ensure_future(relay.flush(FENCE))
    await eventually(lambda: len(streams.calls) == 2)
    await relay.close()
    await flushing
    relay.send(FENCE, [message(2)])
    assert await inbox.unsent(SERVICE, FENCE, 10) == [message(1)]
    assert streams.stored == ["m.0"]


@pytest.mark.parametrize("seed", range(20))
async def test_published_exactly_if_committed_and_in_order_whoever_fails(
    inbox: FlakyInbox, make_relay: Callable[[], Relay], streams: Streams, seed: int
) -> None:
    """Streams and store fail at random, owners crash and take over: each subject gets its commits, in order."""
    rng = random.Random(seed)
    failing: set[str] = set()

    async def publish(outbound: Outbound) -> None:
        # As the sender does: what is handed over behind a failure fails, too, until the line has come to rest.
        await asyncio.sleep(0)
        if outbound.subject in failing or rng.random() < 0.05:
            failing.add(outbound.subject)
            asyncio.get_running_loop().call_soon(failing.discard, outbound.subject)
            raise InboxError("refused")
        streams.stored.append(outbound.message_id)

    committed: dict[str, list[str]] = {"a": [], "b": []}
    number = 0
    for epoch in range(1, 6):
        relay = Relay(inbox, SERVICE, publish, clock=monotonic, chance=lambda: 1.0, pauses=PAUSES)
        fence = Fence(3, epoch)
        relay.take_over(fence)
        for _ in range(rng.randrange(1, 40)):
            batch = [message(number + more, rng.choice("ab")) for more in range(rng.randrange(1, 6))]
            number += len(batch)
            relay.send(fence, await commit(inbox, *batch, fence=fence))
            for outbound in batch:
                committed[outbound.subject].append(outbound.message_id)
            inbox.failures = rng.random() < 0.1
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        inbox.failures = 0
        if epoch == 5:
            await relay.flush(fence)
        await relay.close()
    stored = list(dict.fromkeys(streams.stored))
    for names in committed.values():
        assert [name for name in stored if name in set(names)] == names
    assert len(stored) == number
    assert await inbox.unsent(SERVICE, Fence(3, 6), 10) == []
