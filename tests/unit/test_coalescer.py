"""Frames for one subject and turn travel as one message; nothing is held back, nothing grows without bound."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from catga_bus.errors import CatgaError, DisconnectedError
from catga_bus.testing import eventually
from catga_bus.transport.coalescer import Coalescer


class FakeTransport:
    """Takes down what is published; can be made slow or lose its connection."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes, str]] = []
        self.pushes = 0
        self.is_connected = True
        self.is_behind = False
        self.max_payload = 1_000_000
        self.room: int | None = None  # messages until it is behind
        self.writable = asyncio.Event()

    def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        del headers
        if not self.is_connected:
            raise DisconnectedError("no connection")
        self.published.append((subject, payload, reply))
        if self.room is not None:
            self.room -= 1
            self.is_behind = self.room <= 0

    def push(self) -> None:
        self.pushes += 1

    async def wait_writable(self) -> None:
        if self.is_behind:
            await self.writable.wait()
            self.is_behind = False


def seal(number: int, frames: Sequence[bytes], sums: float) -> tuple[bytes, str]:
    return b"|".join(frames), f"{number}:{sums:g}"


def payloads(transport: FakeTransport) -> list[tuple[str, bytes]]:
    return [(subject, payload) for subject, payload, _ in transport.published]


@pytest.fixture
async def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
async def coalescer(transport: FakeTransport) -> Coalescer:
    return Coalescer(transport, max_frames=4, max_bytes=100, max_held_bytes=10)  # type: ignore[arg-type]


async def test_frames_of_one_turn_leave_at_its_end_as_one_message(
    coalescer: Coalescer, transport: FakeTransport
) -> None:
    lane = coalescer.lane("s", seal)
    numbers = [lane.add(frame) for frame in (b"a", b"b", b"c")]
    assert transport.published == []
    await asyncio.sleep(0)
    assert payloads(transport) == [("s", b"a|b|c")]
    assert len(set(numbers)) == 1
    assert transport.pushes == 1


async def test_a_lone_frame_is_not_held_back(coalescer: Coalescer, transport: FakeTransport) -> None:
    coalescer.lane("s", seal).add(b"a")
    await asyncio.sleep(0)
    assert payloads(transport) == [("s", b"a")]


async def test_a_full_batch_is_closed_and_order_is_kept(coalescer: Coalescer, transport: FakeTransport) -> None:
    lane, other = coalescer.lane("s", seal), coalescer.lane("t", seal)
    other.add(b"x")
    numbers = [lane.add(str(n).encode()) for n in range(9)]
    await asyncio.sleep(0)
    assert [payload for subject, payload in payloads(transport) if subject == "s"] == [b"0|1|2|3", b"4|5|6|7", b"8"]
    assert len(set(numbers)) == 3
    assert coalescer.statistics().frames_per_batch == 2.5


async def test_a_batch_is_bounded_in_bytes_and_a_large_frame_travels_alone(
    coalescer: Coalescer, transport: FakeTransport
) -> None:
    lane = coalescer.lane("s", seal)
    for frame in (b"a" * 60, b"b" * 60, b"c" * 500, b"d"):
        lane.add(frame)
    await asyncio.sleep(0)
    assert [len(payload) for _, payload in payloads(transport)] == [60, 60, 500, 1]


async def test_sums_belong_to_their_batch(coalescer: Coalescer, transport: FakeTransport) -> None:
    lane = coalescer.lane("s", seal, limit=2)
    for number in range(3):
        lane.add(b"a")
        lane.sums += number + 1
    await asyncio.sleep(0)
    assert [reply.partition(":")[2] for _, _, reply in transport.published] == ["3", "3"]


async def test_nothing_is_handed_over_while_the_transport_is_behind(
    coalescer: Coalescer, transport: FakeTransport
) -> None:
    told: list[str] = []
    coalescer.watch(lambda: told.append("blocked"), lambda: told.append("free"))
    transport.is_behind = True
    lane = coalescer.lane("s", seal)
    lane.add(b"a")
    await asyncio.sleep(0)
    assert coalescer.is_blocked
    assert not coalescer.is_full
    for _ in range(20):
        lane.add(b"bb")
    await asyncio.sleep(0)
    assert transport.published == []
    assert coalescer.is_full
    assert coalescer.statistics().held_frames == 21
    waiter = asyncio.create_task(coalescer.wait_room())
    transport.writable.set()
    await asyncio.wait_for(waiter, 5)
    assert b"|".join(payload for _, payload in payloads(transport)) == b"a|" + b"|".join([b"bb"] * 20)
    assert told == ["blocked", "free"]
    assert not coalescer.is_blocked


async def test_what_is_held_without_a_connection_leaves_after_it_is_back(
    coalescer: Coalescer, transport: FakeTransport
) -> None:
    transport.is_connected = False
    coalescer.lane("s", seal).add(b"a")
    await eventually(lambda: coalescer.is_blocked)
    await asyncio.sleep(0)
    transport.is_connected = True
    coalescer.reconnected()
    await eventually(lambda: payloads(transport) == [("s", b"a")])


async def test_dropping_forgets_what_is_held(coalescer: Coalescer, transport: FakeTransport) -> None:
    transport.is_connected = False
    lane = coalescer.lane("s", seal)
    for _ in range(6):
        lane.add(b"a")
    await asyncio.sleep(0)
    coalescer.drop()
    transport.is_connected = True
    await asyncio.sleep(0)
    coalescer.reconnected()
    lane.add(b"new")
    await eventually(lambda: payloads(transport) == [("s", b"new")])
    assert coalescer.statistics().lost_frames == 6


class FakeOwner:
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.held: list[set[int]] = []
        self.refused: list[int] = []
        self.rooms = 0

    def on_held(self, numbers: set[int]) -> None:
        self.held.append(numbers)

    def on_refused(self, number: int, error: CatgaError) -> None:
        self.refused.append(number)

    def on_room(self) -> None:
        self.rooms += 1


async def test_frames_of_returnable_lanes_are_given_back_and_others_held(
    coalescer: Coalescer, transport: FakeTransport
) -> None:
    owner = coalescer.owner = FakeOwner()
    requests, events = coalescer.lane("r", seal, returnable=True), coalescer.lane("e", seal)
    transport.is_behind = True
    numbers = {requests.add(b"a") for _ in range(6)}
    events.add(b"x")
    await eventually(lambda: coalescer.is_blocked)
    assert owner.held == [numbers]
    assert coalescer.statistics().held_frames == 1
    transport.writable.set()
    await eventually(lambda: owner.rooms == 1)
    assert payloads(transport) == [("e", b"x")]


async def test_a_flush_stops_when_the_transport_gets_behind_and_goes_on_later(transport: FakeTransport) -> None:
    coalescer = Coalescer(transport, max_frames=1, max_bytes=300_000, max_held_bytes=10)  # type: ignore[arg-type]
    owner = coalescer.owner = FakeOwner()
    transport.room = 2
    lane, large = coalescer.lane("e", seal), bytes(300_000)
    for _ in range(5):
        lane.add(large)
    await eventually(lambda: coalescer.is_blocked)
    assert len(transport.published) == 2
    assert coalescer.is_full
    for sent in (4, 5):
        transport.room = 2
        transport.writable.set()
        await eventually(lambda wanted=sent: len(transport.published) == wanted)
        transport.writable.clear()
    transport.writable.set()
    await eventually(lambda: not coalescer.is_blocked)
    assert owner.rooms == 1
    assert coalescer.queued_bytes == 0


async def test_a_batch_that_the_transport_refuses_is_told_to_its_owner(
    coalescer: Coalescer, transport: FakeTransport
) -> None:
    owner = coalescer.owner = FakeOwner()
    number = coalescer.lane("r", seal, returnable=True).add(b"a")

    def refuse(*_: object, **__: object) -> None:
        raise DisconnectedError("no")

    transport.publish = refuse  # type: ignore[method-assign]
    await eventually(lambda: owner.refused == [number])


async def test_a_server_that_takes_less_makes_smaller_batches(coalescer: Coalescer, transport: FakeTransport) -> None:
    transport.max_payload = 40
    coalescer.reconnected()
    lane = coalescer.lane("s", seal)
    for _ in range(4):
        lane.add(b"x" * 10)
    await asyncio.sleep(0)
    assert [len(payload) for _, payload in payloads(transport)] == [21, 21]


async def test_closing_sends_what_waits(coalescer: Coalescer, transport: FakeTransport) -> None:
    coalescer.lane("s", seal).add(b"a")
    await coalescer.close()
    assert payloads(transport) == [("s", b"a")]
