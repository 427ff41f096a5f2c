"""What callers know of routes, and what nodes do about them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catga_bus import Command
from catga_bus.durability.routes.announcing import route_changes
from catga_bus.durability.routes.routes import (
    ABSENT_SECONDS,
    EVENT_LOG,
    FRESH_SECONDS,
    STALE_SECONDS,
    Route,
    Routes,
    partitions_in,
    schema_hash,
)
from catga_bus.errors import ConfigurationError
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StoredMessage,
    StreamConfig,
)
from catga_bus.wire import Names, token
from tests.unit.fake_streams import FakeStreams

DEBIT = Route("Debit", "command", "billing", 8, "account", schema="1")
CREDIT = Route("Credit", "command", "billing", 8, "account", schema="1")
PAID = Route("Paid", "event", "", 8, None, schema="1")


class Desk:
    """Routes with a clock and a bucket under the test's control."""

    def __init__(self) -> None:
        self.now = 100.0
        self.streams = FakeStreams()
        self.routes = Routes(self.streams, Names("t"), lambda: self.now)  # type: ignore[arg-type]

    def write(self, route: Route | None, name: str = "") -> None:
        key = f"$KV.t-routes.{token(route.type if route is not None else name)}"
        payload = b"" if route is None else msgspec.json.encode(route)
        self.streams.kv[key] = StoredMessage(key, 1, payload, {}, 0.0)

    async def find(self, name: str = "Debit", timeout: float = 1.0) -> Route | None:
        return await self.routes.find(name, timeout)

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    await desk.routes.close()


async def test_a_fresh_route_is_used_without_reading(desk: Desk) -> None:
    desk.write(DEBIT)

    assert await desk.find() == DEBIT
    desk.now += FRESH_SECONDS
    assert desk.routes.known("Debit", desk.now) == DEBIT
    assert await desk.find() == DEBIT
    assert desk.streams.reads == 1


async def test_a_route_that_is_not_fresh_is_used_while_it_is_read_again(desk: Desk) -> None:
    desk.write(DEBIT)
    await desk.find()
    desk.write(msgspec.structs.replace(DEBIT, service="other"))
    desk.now += FRESH_SECONDS + 0.1

    assert desk.routes.known("Debit", desk.now) is None
    assert await desk.find() == DEBIT
    await desk.settle()

    found = await desk.find()
    assert found is not None
    assert (found.service, desk.streams.reads) == ("other", 2)


async def test_a_stale_route_is_read_before_it_is_used(desk: Desk) -> None:
    desk.write(DEBIT)
    await desk.find()
    desk.write(None, "Debit")
    desk.now += STALE_SECONDS + 0.1

    assert await desk.find() is None


async def test_a_stale_route_is_used_when_the_bucket_has_no_leader(desk: Desk) -> None:
    desk.write(DEBIT)
    await desk.find()
    desk.now += 1_000.0

    async def leaderless(*_: Any) -> None:
        raise JetStreamUnknownError("no leader")

    desk.streams.act = leaderless
    assert await desk.find() == DEBIT


async def test_a_route_that_was_never_read_is_waited_for(desk: Desk) -> None:
    desk.write(DEBIT)
    failures = iter([True, False])

    async def leaderless_once(*_: Any) -> None:
        if next(failures):
            raise JetStreamUnknownError("no leader")

    desk.streams.act = leaderless_once
    assert await desk.find() == DEBIT


async def test_a_route_that_cannot_be_read_in_time_is_an_error(desk: Desk) -> None:
    async def leaderless(*_: Any) -> None:
        raise JetStreamUnknownError("no leader")

    desk.streams.act = leaderless
    with pytest.raises(JetStreamUnknownError, match=r"the route of Debit could not be read for 0\.01 s: no leader"):
        await desk.find(timeout=0.01)


async def test_that_there_is_no_route_is_believed_for_a_moment(desk: Desk) -> None:
    assert await desk.find() is None
    desk.write(DEBIT)
    desk.now += ABSENT_SECONDS / 2
    assert await desk.find() is None
    desk.now += ABSENT_SECONDS

    assert await desk.find() == DEBIT


async def test_many_callers_share_one_reading(desk: Desk) -> None:
    desk.write(DEBIT)

    assert await asyncio.gather(*(desk.find() for _ in range(50))) == [DEBIT] * 50
    assert desk.streams.reads == 1


async def test_without_a_bucket_nobody_handles_anything(desk: Desk) -> None:
    async def gone(*_: Any) -> None:
        raise JetStreamRefusedError(ApiError.STREAM_NOT_FOUND, "stream not found")

    desk.streams.act = gone
    assert await desk.find() is None


@pytest.mark.parametrize("payload", [b"{", b'{"type": "Debit"}', b"\xff", b'{"type": 1}'])
async def test_an_entry_that_cannot_be_read_is_no_route(desk: Desk, payload: bytes) -> None:
    desk.streams.kv["$KV.t-routes.Debit"] = StoredMessage("", 1, payload, {}, 0.0)

    assert await desk.find() is None


async def test_a_hashed_name_is_compared_in_full(desk: Desk) -> None:
    long = "x" * 65
    desk.write(msgspec.structs.replace(DEBIT, type=long))
    assert (await desk.find(long)) is not None

    desk.routes.forget(long)
    desk.streams.kv[f"$KV.t-routes.{token(long)}"] = StoredMessage("", 2, msgspec.json.encode(DEBIT), {}, 0.0)
    assert await desk.find(long) is None


async def test_the_log_of_events_says_how_many_partitions_it_has(desk: Desk) -> None:
    assert await desk.routes.find_log(1.0) is None
    desk.streams.streams["t-evt"] = StreamConfig(name="t-evt", subjects=(), metadata={"catga.partitions": "12"})
    desk.now += 1.0

    found = await desk.find(EVENT_LOG)
    assert found is not None
    assert found.partitions == 12


@pytest.mark.parametrize("text", [None, "", "0", "-1", "x", "1025", "1.0"])
def test_a_stream_that_the_bus_did_not_make_is_named(text: str | None) -> None:
    metadata = {} if text is None else {"catga.partitions": text}

    with pytest.raises(ConfigurationError, match="stream s says"):
        partitions_in(StreamConfig(name="s", subjects=(), metadata=metadata))


async def test_closing_ends_what_is_being_read(desk: Desk) -> None:
    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    desk.streams.act = never
    finding = asyncio.ensure_future(desk.find(timeout=60.0))
    await desk.settle()

    await desk.routes.close()
    with pytest.raises((JetStreamUnknownError, asyncio.CancelledError)):
        await finding


class Transfer(Command[int]):
    """Move money."""

    account: str
    parent: "Transfer | None" = None


class SameAgain(Command[int], type_name="Transfer"):
    """Other words."""

    account: str
    parent: "SameAgain | None" = None


class Wider(Command[int], type_name="Transfer"):
    account: str
    parent: "Wider | None" = None
    cents: int = 0


class Other(Command[int], type_name="Transfer"):
    account: int
    parent: "Other | None" = None


def test_the_hash_of_a_schema_sees_fields_and_not_names() -> None:
    assert schema_hash(Transfer) == schema_hash(SameAgain)
    assert len({schema_hash(cls) for cls in (Transfer, Wider, Other)}) == 3


# -- what nodes do -----------------------------------------------------------------------------------------


def changes(there: list[Route], live: list[set[str]], mine: list[Route] | None = None) -> Any:
    return route_changes(
        "billing", [DEBIT, CREDIT] if mine is None else mine, {route.type: route for route in there}, live
    )


def test_a_command_is_routed_when_all_announce_it() -> None:
    assert changes([], [{"Debit", "Credit"}]).write == (DEBIT, CREDIT)
    assert changes([], [{"Debit", "Credit"}, {"Credit"}]).write == (CREDIT,)
    assert changes([DEBIT, CREDIT], [{"Debit", "Credit"}] * 3) == changes([DEBIT, CREDIT], [{"Debit", "Credit"}])


def test_a_command_is_not_routed_once_somebody_lacks_it_whoever_looks() -> None:
    assert changes([DEBIT, CREDIT], [{"Debit", "Credit"}, {"Credit"}]).retire == (DEBIT,)
    assert changes([DEBIT, CREDIT], [{"Credit"}, {"Debit", "Credit"}], mine=[CREDIT]).retire == (DEBIT,)
    assert changes([DEBIT, CREDIT], [{"Credit"}], mine=[CREDIT]).delete == (DEBIT,)


def test_a_retired_route_is_written_again_when_all_announce_it_and_deleted_when_nobody_does() -> None:
    retired = msgspec.structs.replace(DEBIT, retired=True)

    assert changes([retired], [{"Debit"}], mine=[DEBIT]).write == (DEBIT,)
    assert changes([retired], [{"Debit"}, {"Credit"}], mine=[DEBIT]) == changes([retired], [{"Debit"}, set()], mine=[])
    assert changes([retired], [{"Credit"}], mine=[]).delete == (retired,)


async def test_a_retired_route_is_none_for_callers(desk: Desk) -> None:
    desk.write(msgspec.structs.replace(DEBIT, retired=True))

    assert await desk.find() is None


def test_routes_of_other_services_and_of_events_are_left_alone() -> None:
    foreign = Route("Ship", "command", "shipping", 8, None)

    found = changes([foreign, PAID], [{"Debit", "Credit"}])
    assert (found.delete, found.retire) == ((), ())


def test_an_event_is_routed_at_once_and_by_anybody() -> None:
    assert changes([], [set(), set()], mine=[PAID]).write == (PAID,)
    assert changes([PAID], [set()], mine=[msgspec.structs.replace(PAID, partitions=99)]).problems == ()


@pytest.mark.parametrize("fields", [{"schema": "2"}, {"partitions": 9}])
def test_other_fields_and_a_stream_made_anew_are_no_problem(fields: dict[str, Any]) -> None:
    newer = msgspec.structs.replace(DEBIT, **fields)

    found = changes([DEBIT], [{"Debit"}], mine=[newer])
    assert (found.differing, found.problems, found.write) == ((newer,), (), ())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"service": "shipping"},
            "is a command of the service 'billing' and already a command of the service 'shipping'",
        ),
        ({"kind": "event", "service": ""}, "already an event"),
        ({"partition_by": None}, "partition_by 'account' here and None on its route"),
    ],
)
def test_a_clash_names_both(other: dict[str, Any], words: str) -> None:
    found = changes([msgspec.structs.replace(DEBIT, **other)], [{"Debit"}], mine=[DEBIT])

    (problem,) = found.problems
    assert words in problem
    assert "Debit" in problem
    assert found.write == ()


def test_an_event_that_is_durable_here_and_not_there_is_a_clash() -> None:
    found = changes([msgspec.structs.replace(PAID, durable=False)], [], mine=[PAID])

    assert "durable True here and False on its route" in found.problems[0]


NAMES = ("A", "B", "C")


@given(
    there=st.sets(st.sampled_from(NAMES)),
    nodes=st.lists(st.sets(st.sampled_from(NAMES)), min_size=1, max_size=4),
)
def test_nodes_with_one_view_agree_and_come_to_rest(there: set[str], nodes: list[set[str]]) -> None:
    """Whatever the order in which nodes act, a route is there in the end exactly if all handle its type."""
    board = {name: Route(name, "command", "s", 8, None) for name in there}
    for _ in range(2):
        for types in nodes:
            mine = [Route(name, "command", "s", 8, None) for name in types]
            found = route_changes("s", mine, board, nodes)
            assert not found.problems
            board |= {route.type: route for route in found.write}
            board |= {route.type: msgspec.structs.replace(route, retired=True) for route in found.retire}
            for route in found.delete:
                del board[route.type]

    assert {name for name, route in board.items() if not route.retired} == set.intersection(*nodes)
    assert set(board) <= set.union(*nodes)
