"""Two keepers of one partition on one server: the broker in memory, and nats-server."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import pytest

from catga_bus.clock import monotonic
from catga_bus.partition.keeper import Keeper
from catga_bus.partition.owners_bucket import OwnersBucket
from catga_bus.partition.protocol import Party
from catga_bus.partition.records import Domain, Mark, OwnerRecord, StaleError, Standing, read_record
from catga_bus.partition.work import Keeping
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_jetstream, make_transport
from catga_bus.transport.jetstream import (
    ApiError,
    ConsumerConfig,
    DeliveredMessage,
    JetStreamRefusedError,
    StreamConfig,
)
from catga_bus.wire import Names

P = 3
_lives = itertools.count(1)


class Hands:
    """Work that runs a record when the test lets it, and says then that it is done."""

    def __init__(self, keeping: Keeping) -> None:
        self.keeping = keeping
        self.taken: list[int] = []
        self.killers: dict[int, int] = {}
        self.begun: list[int] = []
        self.done: list[int] = []
        self.is_open = False
        self.lets = True
        self.drops = 0
        self._emptied = asyncio.Event()

    @property
    def wanted(self) -> int:
        return 8

    @property
    def highest(self) -> int:
        return max(self.begun, default=0)

    def holds(self, sequence: int) -> bool:
        return sequence in self.taken

    def take(self, record: DeliveredMessage, *, killer: int | None = None) -> None:
        self.taken.append(record.sequence)
        if killer is not None:
            self.killers[record.sequence] = killer
        self.go()

    def go(self) -> None:
        """Run what may run."""
        if self.is_open:
            self.begun += [sequence for sequence in self.taken if sequence not in self.begun]
        for sequence in [sequence for sequence in self.taken if sequence in self.begun and self.lets]:
            self.taken.remove(sequence)
            self.done.append(sequence)
            self.keeping.done(sequence)
        if not self.taken:
            self._emptied.set()

    def let(self) -> None:
        """Let everything run to its end."""
        self.lets = True
        self.go()

    def pause(self) -> None:
        self.is_open = False

    def resume(self) -> None:
        self.is_open = True
        self.go()

    async def finish(self, *, below: bool) -> None:
        self.taken = [sequence for sequence in self.taken if sequence in self.begun]
        while self.taken:
            self._emptied.clear()
            await self._emptied.wait()
        self.pause()

    def drop(self) -> None:
        self.drops += 1
        self.pause()
        self.taken.clear()
        self._emptied.set()


class Place:
    """A server with the streams of one domain, and nodes that are connected to it."""

    def __init__(self, url: str, domain: Domain) -> None:
        self.domain = domain
        self._url = url
        self._keepers: list[Keeper] = []
        self._ends: list[Any] = []

    async def open(self) -> "Place":
        self.js = await self.connect()
        domain = self.domain
        await OwnersBucket(self.js, domain.names).create(1_000)
        await self.js.create_stream(
            StreamConfig(
                name=domain.stream,
                subjects=(domain.names.events() if domain.is_log else domain.names.commands(domain.service),),
                retention="limits" if domain.is_log else "workqueue",
            )
        )
        return self

    async def connect(self) -> Any:
        transport = make_transport(ConnectionOptions(urls=(self._url,)), RecordedEvents())
        await transport.connect()
        js = make_jetstream(transport, monotonic)
        self._ends += [js, transport]
        return js

    async def close(self) -> None:
        for keeper in self._keepers:
            await keeper.close()
        for end in self._ends:
            await end.close()

    async def keeper(self, node: str, *, lets: bool = True, **options: Any) -> tuple[Keeper, Hands]:
        """A keeper on a connection of its own, which has claimed nothing yet."""
        nonces = itertools.count(1)
        life = next(_lives)
        js = await self.connect()
        keeper = Keeper(
            js,
            OwnersBucket(js, self.domain.names),
            self.domain,
            P,
            Party(node, (1, life), lambda: f"{node}-{life}-{next(nonces)}", lambda: 5_000),
            Hands,
            clock=monotonic,
            **options,
        )
        self._keepers.append(keeper)
        hands = keeper.work
        assert isinstance(hands, Hands)
        hands.lets = lets
        return keeper, hands

    async def store(self, count: int = 1) -> None:
        for _ in range(count):
            await self.js.publish(self.domain.filters(P)[0], b"record")

    async def left(self) -> int:
        """Records that are not acknowledged."""
        if not self.domain.is_log:
            info = await self.js.stream(self.domain.stream)
            return int(info.messages)
        names = await self.js.consumer_names(self.domain.stream)
        infos = [await self.js.consumer(self.domain.stream, name) for name in names]
        return sum(info.pending + info.ack_pending for info in infos if info is not None)

    async def is_empty(self) -> bool:
        return await self.left() == 0

    async def record(self) -> OwnerRecord | None:
        value, _ = await OwnersBucket(self.js, self.domain.names).read(self.domain.key(P))
        return read_record(value)


async def wait_for(condition: Callable[[], Any], what: str = "") -> None:
    """Wait until an awaitable condition holds."""
    async with asyncio.timeout(10.0):
        while not await condition():
            await asyncio.sleep(0.01)


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.nats)])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return f"memory://{uuid4().hex}"
    found: str = request.getfixturevalue("server_url")
    return found


@pytest.fixture(params=["queue", "log"])
async def place(request: pytest.FixtureRequest, url: str) -> AsyncIterator[Place]:
    names = Names(f"t{uuid4().hex[:8]}")
    domain = Domain(names=names, service="shop", types=("Debited",) if request.param == "log" else (), window=8)
    made = await Place(url, domain).open()
    yield made
    await made.close()


async def test_what_is_stored_is_run_in_order_and_acknowledged(place: Place) -> None:
    await place.store(2)
    keeper, hands = await place.keeper("a")
    await keeper.take()
    await place.store(20)
    await eventually(lambda: hands.done == list(range(1, 23)))
    await wait_for(place.is_empty)
    assert (keeper.standing, keeper.statistics.claims, keeper.statistics.takeovers) == (Standing.ACTIVE, 1, 0)
    assert (keeper.fence.partition, keeper.fence.epoch) == (P, keeper.epoch)


async def test_a_hand_over_finishes_what_has_begun_and_repeats_nothing(place: Place) -> None:
    old, its = await place.keeper("a", lets=False)
    new, hands = await place.keeper("b")
    await old.take()
    await place.store(3)
    await eventually(lambda: its.begun == [1, 2, 3])
    handing = asyncio.create_task(old.hand_over())
    await eventually(lambda: old.standing is Standing.DRAINING)
    await place.store(2)
    its.let()
    await handing
    record = await place.record()
    assert record is not None
    assert (record.state, old.standing, old.statistics.hand_overs) == ("released", Standing.GONE, 1)
    await new.take()
    await eventually(lambda: hands.done == [4, 5])
    assert its.done == [1, 2, 3]
    assert (new.statistics.claims, new.statistics.takeovers) == (1, 0)
    assert new.epoch > old.epoch


async def test_what_does_not_end_in_time_is_left_to_the_successor(place: Place) -> None:
    old, its = await place.keeper("a", lets=False)
    await old.take()
    await place.store()
    await eventually(lambda: its.begun == [1])
    await old.hand_over(timeout=0.01)
    new, hands = await place.keeper("b")
    await new.take()
    await eventually(lambda: hands.done == [1])
    assert (its.done, its.drops > 0) == ([], True)


async def test_an_owner_that_was_robbed_learns_of_it_and_its_acknowledgements_reach_nobody(place: Place) -> None:
    old, its = await place.keeper("a", lets=False)
    await old.take()
    await place.store(2)
    await eventually(lambda: its.begun == [1, 2])
    new, hands = await place.keeper("b", lets=False)
    await new.take()
    await eventually(lambda: hands.begun == [1, 2])
    its.let()  # it may have heard already, and then nothing happens
    await eventually(lambda: old.standing is Standing.GONE)
    assert await place.left() == 2
    hands.let()
    await wait_for(place.is_empty)
    assert new.statistics.takeovers == 1
    assert old.statistics.stale == 1
    assert await place.js.consumer_names(place.domain.stream) == [new.tenure.claimed.consumer]  # type: ignore[union-attr]


async def test_of_two_that_claim_at_once_one_stays(place: Place) -> None:
    keepers = [await place.keeper(node) for node in "abcd"]
    await asyncio.gather(*(keeper.take() for keeper, _ in keepers), return_exceptions=True)
    await eventually(lambda: sum(keeper.standing is Standing.ACTIVE for keeper, _ in keepers) == 1)
    await place.store(5)
    owner, hands = next((keeper, hands) for keeper, hands in keepers if keeper.standing is Standing.ACTIVE)
    await eventually(lambda: hands.done == [1, 2, 3, 4, 5])
    record = await place.record()
    assert record is not None
    assert owner.held is not None
    assert record == owner.held.record


async def test_whom_it_may_not_rob_it_does_not(place: Place) -> None:
    old, _ = await place.keeper("a")
    await old.take()
    new, _ = await place.keeper("b", may_claim=lambda record: record.node != "a")
    with pytest.raises(StaleError):
        await new.take()
    assert (new.standing, old.standing) == (Standing.GONE, Standing.ACTIVE)


async def test_a_consumer_that_somebody_deletes_is_made_again_and_nothing_runs_twice(place: Place) -> None:
    keeper, hands = await place.keeper("a", lets=False)
    await keeper.take()
    await place.store(3)
    await eventually(lambda: hands.begun == [1, 2, 3])
    before = keeper.epoch
    await place.js.delete_consumer(place.domain.stream, keeper.tenure.claimed.consumer)  # type: ignore[union-attr]
    await eventually(lambda: keeper.epoch > before and keeper.standing is Standing.ACTIVE)
    await place.store(2)
    await eventually(lambda: hands.begun == [1, 2, 3, 4, 5])
    hands.let()
    await wait_for(place.is_empty)
    assert hands.done == [1, 2, 3, 4, 5]
    assert keeper.fence.epoch == before  # what had been begun ends under the fence with which it began
    assert keeper.statistics.reclaims == 1
    assert keeper.statistics.repeated >= 3


async def test_a_bucket_that_somebody_deletes_is_made_again_and_epochs_rise(place: Place) -> None:
    keeper, hands = await place.keeper("a")
    await keeper.take()
    before = keeper.epoch
    await place.js.delete_stream(f"KV_{place.domain.names.owners_bucket()}")
    keeper.doubt("told")
    await eventually(lambda: keeper.epoch > before and keeper.standing is Standing.ACTIVE)
    await place.store()
    await eventually(lambda: hands.done == [1])


async def test_after_a_pause_it_goes_on_if_it_is_still_the_owner(place: Place) -> None:
    keeper, hands = await place.keeper("a")
    await keeper.take()
    keeper.suspend()
    await place.store()
    await eventually(lambda: hands.taken == [1])
    assert hands.begun == []
    await keeper.revalidate()
    await eventually(lambda: hands.done == [1])


async def test_after_a_pause_it_lets_go_if_it_is_not(place: Place) -> None:
    old, its = await place.keeper("a")
    await old.take()
    old.suspend()
    await place.store()
    new, hands = await place.keeper("b")
    await new.take()
    await old.revalidate()
    await eventually(lambda: old.standing is Standing.GONE)  # in doubt, if it heard of its consumer first
    await old.revalidate()
    await eventually(lambda: hands.done == [1])
    assert its.begun == []


async def test_a_reconnect_and_a_higher_epoch_are_doubts_that_end_well(place: Place) -> None:
    keeper, hands = await place.keeper("a")
    await keeper.take()
    for happen in (keeper.reconnected, lambda: keeper.heard(keeper.epoch + 50), keeper.lost):
        before = keeper.epoch
        happen()
        assert keeper.standing is Standing.DOUBT
        assert not hands.is_open
        await eventually(lambda before=before: keeper.epoch > before and keeper.standing is Standing.ACTIVE)
    assert keeper.epoch > 1_050
    assert keeper.statistics.doubts == {
        "the connection was lost": 1, "a higher epoch was heard": 1, "the store refused an effect": 1,
    }  # fmt: skip


async def test_a_hand_over_waits_for_the_end_of_a_doubt(place: Place) -> None:
    keeper, _ = await place.keeper("a")
    await keeper.take()
    keeper.doubt("told")
    await asyncio.gather(keeper.hand_over(), keeper.hand_over())
    record = await place.record()
    assert record is not None
    assert (record.state, keeper.statistics.hand_overs) == ("released", 1)
    await keeper.hand_over()  # nothing is left of it


async def test_marks_are_written_and_a_stale_owner_writes_none(place: Place) -> None:
    old, _ = await place.keeper("a")
    await old.take()
    await old.mark(7, 2)
    record = await place.record()
    assert record is not None
    assert record.mark == Mark(7, 2)
    await old.unmark()
    record = await place.record()
    assert record is not None
    assert record.mark is None
    await old.mark(7, 3)
    new, _ = await place.keeper("b")
    await new.take()
    with pytest.raises(StaleError):
        await old.unmark()
    assert new.tenure.killer(7) == 3


async def test_the_frame_that_killed_the_owner_before_is_named_to_the_work(place: Place) -> None:
    old, its = await place.keeper("a", lets=False)
    await old.take()
    await place.store()
    await eventually(lambda: its.begun == [1])
    await old.mark(1, 0)
    new, hands = await place.keeper("b")
    await new.take()
    await eventually(lambda: hands.killers == {1: 0})
    assert new.statistics.killers == 1


async def test_work_that_has_lost_a_record_loses_the_partition(place: Place) -> None:
    keeper, hands = await place.keeper("a", lets=False)
    await keeper.take()
    await place.store()
    await eventually(lambda: hands.begun == [1])
    hands.taken.clear()
    keeper.doubt("told")
    await eventually(lambda: keeper.standing is Standing.GONE)
    assert keeper.tenure.reason == "the work has lost a record"


async def test_it_is_closed_without_a_release_and_twice(place: Place) -> None:
    keeper, _ = await place.keeper("a")
    await keeper.take()
    await keeper.close()
    await keeper.close()
    record = await place.record()
    assert record is not None
    assert (record.state, keeper.standing) == ("owned", Standing.GONE)


async def test_a_consumer_that_is_not_the_buss_keeps_a_queue_closed_and_is_nothing_to_a_log(place: Place) -> None:
    stream = place.domain.stream
    await place.js.create_consumer(stream, ConsumerConfig(name="somebody", filters=place.domain.filters(P)))
    keeper, _ = await place.keeper("a")
    if place.domain.is_log:
        await keeper.take()
    else:
        with pytest.raises(JetStreamRefusedError) as caught:
            await keeper.take()
        assert caught.value.code == ApiError.CONSUMER_FILTER_NOT_UNIQUE
        assert keeper.standing is Standing.GONE
    assert "somebody" in await place.js.consumer_names(stream)
    await place.js.delete_consumer(stream, "somebody")
    again, hands = await place.keeper("a")
    await again.take()
    await place.store()
    await eventually(lambda: hands.done == [1])
