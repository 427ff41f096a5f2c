"""Commands and durable events as their users see them, on the broker in memory and on a real server."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import (
    Bus,
    Command,
    ConfigurationError,
    Context,
    DeadLetteredError,
    Err,
    Event,
    InvalidMessageError,
    NoHandlerError,
    Ok,
    Request,
    Stored,
)
from catga_bus.errors import Outcome
from catga_bus.resilience.retry import RetryOptions
from catga_bus.testing import eventually

P = 8


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int


class Credit(Command[int], partition_by="account"):
    account: str
    cents: int


class Note(Command[str]):
    text: str


class Debited(Event, partition_by="account"):
    account: str
    cents: int


class Ask(Request[int]):
    account: str


MakeBus = Callable[..., Bus]


@pytest.fixture(params=["memory", "nats"])
def url(request: pytest.FixtureRequest) -> str:
    """A broker in memory, or the server of the session."""
    if request.param == "memory":
        return f"memory://{uuid4().hex}"
    return str(request.getfixturevalue("server_url"))


@pytest.fixture
async def make_bus(url: str) -> AsyncIterator[MakeBus]:
    """Make as many buses as a test needs, all in a namespace of its own; they are closed at its end."""
    namespace = f"t{uuid4().hex[:10]}"
    buses: list[Bus] = []

    def make(service: str = "billing", **options: Any) -> Bus:
        options = {
            "partitions": P,
            "command_max_bytes": 16_777_216,
            "event_max_bytes": 16_777_216,
            "dead_letter_max_bytes": 16_777_216,
            "heartbeat_interval": 0.1,
            "heartbeat_timeout": 0.5,
            "namespace": namespace,
        } | options
        buses.append(Bus(service, url=url, **options))
        return buses[-1]

    yield make
    for bus in buses:
        await bus.close()


class Ledger:
    """What handlers did, in order."""

    def __init__(self) -> None:
        self.entries: dict[str, list[int]] = defaultdict(list)
        self.contexts: list[Context] = []
        self.failures: dict[int, int] = {}
        self.gate: Awaitable[Any] | None = None

    def on(self, bus: Bus, **options: Any) -> Bus:
        """Give a bus handlers that write here."""
        quick = {"retry": RetryOptions(first=0.1, longest=0.2)} | options

        @bus.handler(**quick)
        async def debit(command: Debit, ctx: Context) -> int:
            self.contexts.append(ctx)
            if self.failures.get(command.cents, 0) > 0:
                self.failures[command.cents] -= 1
                raise RuntimeError(f"no debit of {command.cents} yet")
            self.entries[command.account].append(command.cents)
            return command.cents

        @bus.handler(**quick)
        async def credit(command: Credit) -> int:
            await asyncio.sleep(0)
            self.entries[command.account].append(-command.cents)
            return -command.cents

        return bus

    @property
    def count(self) -> int:
        return sum(map(len, self.entries.values()))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


async def test_a_command_is_stored_handled_and_answered(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()), make_bus("shop") as client:
        assert await client.send(Debit("a-1", 5)) == Ok(5)
        assert ledger.entries == {"a-1": [5]}
        (context,) = ledger.contexts
        assert (context.key, context.attempt) == ("a-1", 1)
        assert context.fence is not None
        assert 0 <= context.fence.partition < P
        assert context.fence.epoch > 0


async def test_enqueue_says_where_it_is_stored(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()) as bus:
        stored = await bus.enqueue(Debit("a-1", 5))
        assert isinstance(stored, Stored)
        assert (stored.sequence, stored.index, stored.duplicate) == (1, 0, False)
        together = await asyncio.gather(*(bus.enqueue(Debit("a-1", cents)) for cents in range(10)))
        assert len({(one.sequence, one.index) for one in together}) == 10
        assert len({one.sequence for one in together}) < 10  # they share records
        await eventually(lambda: ledger.count == 11)
        assert ledger.entries["a-1"] == [5, *range(10)]


async def test_commands_of_one_key_run_in_order_across_types(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()) as bus:
        calls = []
        for number in range(1, 201):
            command = (Debit if number % 3 else Credit)(f"a-{number % 10}", number)
            calls.append(bus.enqueue(command))
        await asyncio.gather(*calls)
        await eventually(lambda: ledger.count == 200)
        for entries in ledger.entries.values():
            assert [abs(one) for one in entries] == sorted(abs(one) for one in entries)


async def test_commands_wait_for_their_service(make_bus: MakeBus, ledger: Ledger) -> None:
    async with make_bus("shop") as client:
        async with ledger.on(make_bus()):
            pass  # so that the service is known
        for cents in range(20):
            await client.enqueue(Debit(f"a-{cents % 3}", cents))
        assert ledger.count == 0
        async with ledger.on(make_bus()):
            await eventually(lambda: ledger.count == 20)
    assert ledger.entries == {f"a-{n}": list(range(n, 20, 3)) for n in range(3)}


async def test_nobody_handles_it(make_bus: MakeBus) -> None:
    async with make_bus("shop") as client:
        with pytest.raises(NoHandlerError) as caught:
            await client.enqueue(Debit("a-1", 5))
        assert caught.value.outcome is Outcome.NOT_RUN
        result = await client.send(Debit("a-1", 5))
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("NO_HANDLER", Outcome.NOT_RUN)


async def test_a_refusal_is_a_result_and_is_not_tried_again(make_bus: MakeBus) -> None:
    bus = make_bus()
    runs = 0

    @bus.handler
    async def note(command: Note) -> str | Err:
        nonlocal runs
        runs += 1
        return Err("TOO_DULL", command.text)

    async with bus:
        result = await bus.send(Note("x"))
        assert isinstance(result, Err)
        assert (result.code, result.outcome, result.message) == ("TOO_DULL", Outcome.REFUSED, "x")
    assert runs == 1


async def test_a_failing_command_is_tried_again_and_holds_back_its_key_alone(make_bus: MakeBus, ledger: Ledger) -> None:
    ledger.failures = {1: 2}
    async with ledger.on(make_bus()) as bus:
        failing = asyncio.create_task(bus.send(Debit("a", 1), timeout=20.0))
        await eventually(lambda: len(ledger.contexts) >= 1)
        await bus.enqueue(Debit("a", 2))
        assert await bus.send(Debit("b", 3)) == Ok(3)
        assert ledger.entries["a"] == []
        assert await failing == Ok(1)
        await eventually(lambda: ledger.entries["a"] == [1, 2])
    assert [one.attempt for one in ledger.contexts if one.key == "a"] == [1, 2, 3, 1]


async def test_what_fails_every_time_becomes_a_dead_letter(make_bus: MakeBus, ledger: Ledger) -> None:
    ledger.failures = {1: 99}
    async with ledger.on(make_bus(), max_attempts=3) as bus:
        failed = asyncio.create_task(bus.send(Debit("a", 1), timeout=20.0))
        await eventually(lambda: len(ledger.contexts) >= 1)
        await bus.enqueue(Debit("a", 2))
        result = await failed
        assert isinstance(result, Err)
        assert (result.code, result.outcome) == ("DEAD_LETTERED", Outcome.FAILED)
        with pytest.raises(DeadLetteredError):
            result.unwrap()
        await eventually(lambda: ledger.entries["a"] == [2])
    assert [one.attempt for one in ledger.contexts if one.key == "a"] == [1, 2, 3, 1]


async def test_a_key_at_the_call_goes_over_that_of_the_message(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()) as bus:
        assert await bus.send(Debit("a", 1), key="other") == Ok(1)
        assert [one.key for one in ledger.contexts] == ["other"]


@pytest.mark.parametrize("key", ["é😀", "a.b.*.>", "line\nbreak", " ", "x" * 1_000, "0"])
async def test_any_text_can_be_a_key(make_bus: MakeBus, ledger: Ledger, key: str) -> None:
    async with ledger.on(make_bus()) as bus:
        assert await bus.send(Debit(key, 1)) == Ok(1)
        assert [one.key for one in ledger.contexts] == [key]


@pytest.mark.parametrize("key", ["", "x" * 2_000, "\ud800"])
async def test_what_cannot_be_a_key_is_refused_before_anything_is_sent(
    make_bus: MakeBus, ledger: Ledger, key: str
) -> None:
    async with ledger.on(make_bus()) as bus:
        with pytest.raises(InvalidMessageError, match="key"):
            await bus.enqueue(Debit(key, 1))
        with pytest.raises(InvalidMessageError):
            await bus.enqueue(Debit("a", 1), key=1.5)  # type: ignore[arg-type]
    assert ledger.count == 0


async def test_a_command_takes_no_node(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()) as bus:
        with pytest.raises(ConfigurationError, match="node= and where="):
            await bus.send(Debit("a", 1), node=bus.node_id)


async def test_nodes_share_the_partitions_and_nothing_is_lost_when_one_dies(make_bus: MakeBus, ledger: Ledger) -> None:
    first, second = ledger.on(make_bus()), ledger.on(make_bus())
    await first.start()
    await second.start()

    def shares() -> list[int]:
        return sorted(len(node.partitions) for node in first.nodes("billing"))

    await eventually(lambda: shares() == [P // 2, P // 2], timeout=20.0)
    async with make_bus("shop") as client:
        numbers = iter(range(10_000))
        sent: list[int] = []

        async def send_some(count: int) -> None:
            for _ in range(count):
                number = next(numbers)
                await client.enqueue(Debit(f"a-{number % 16}", number))
                sent.append(number)

        await send_some(100)
        await second.close()  # no drain: what it had is found by the other
        await send_some(100)
        await eventually(lambda: {one for ones in ledger.entries.values() for one in ones} >= set(sent), timeout=30.0)
    for account, entries in ledger.entries.items():
        unique = list(dict.fromkeys(entries))
        assert unique == sorted(unique), account
    await first.close()


async def test_a_node_that_leaves_hands_over_without_a_repeat(make_bus: MakeBus, ledger: Ledger) -> None:
    first, second = ledger.on(make_bus()), ledger.on(make_bus())
    await first.start()
    await second.start()
    await eventually(
        lambda: sorted(len(node.partitions) for node in first.nodes("billing")) == [P // 2, P // 2], timeout=20.0
    )
    async with make_bus("shop") as client:
        for number in range(50):
            await client.enqueue(Debit(f"a-{number % 16}", number))
        await second.drain()
        for number in range(50, 100):
            await client.enqueue(Debit(f"a-{number % 16}", number))
        await eventually(lambda: ledger.count >= 100, timeout=30.0)
    assert sorted(one for ones in ledger.entries.values() for one in ones) == list(range(100))
    for entries in ledger.entries.values():
        assert entries == sorted(entries)
    await first.close()


# -- events ------------------------------------------------------------------------------------------------------


def hear(bus: Bus, heard: list[int], **options: Any) -> Bus:
    """Give a bus a handler of the event."""

    @bus.handler(**options)
    async def on_debited(event: Debited, ctx: Context) -> None:
        assert ctx.fence is not None
        heard.append(event.cents)

    return bus


async def test_every_service_gets_every_event_in_order(make_bus: MakeBus) -> None:
    mail: list[int] = []
    stock: list[int] = []
    async with hear(make_bus("mail"), mail), hear(make_bus("stock"), stock), make_bus("shop") as client:
        for cents in range(30):
            stored = await client.publish(Debited("a", cents))
            assert stored is not None
            assert stored.stream.endswith("-evt")
        await eventually(lambda: len(mail) == len(stock) == 30)
        assert mail == stock == list(range(30))


async def test_a_service_that_was_down_catches_up(make_bus: MakeBus) -> None:
    heard: list[int] = []
    async with make_bus("shop") as client:
        async with hear(make_bus("mail"), heard):
            await client.publish(Debited("a", 1))
            await eventually(lambda: heard == [1])
        await client.publish(Debited("a", 2))
        await client.publish(Debited("a", 3))
        async with hear(make_bus("mail"), heard):
            await client.publish(Debited("a", 4))
            await eventually(lambda: heard == [1, 2, 3, 4])


@pytest.mark.parametrize(("start", "expected"), [("new", [3]), ("all", [1, 2, 3])])
async def test_a_new_service_starts_now_or_at_the_beginning(make_bus: MakeBus, start: str, expected: list[int]) -> None:
    heard: list[int] = []
    async with make_bus("shop") as client:
        await client.publish(Debited("a", 1))
        await client.publish(Debited("a", 2))
        async with hear(make_bus("mail"), heard, start=start):
            await client.publish(Debited("a", 3))
            await eventually(lambda: heard == expected)


async def test_events_without_a_service_are_stored_all_the_same(make_bus: MakeBus) -> None:
    async with make_bus("shop") as client:
        stored = await client.publish(Debited("a", 1))
        assert isinstance(stored, Stored)


# -- what handlers send ------------------------------------------------------------------------------------------


async def test_what_a_handler_sends_has_an_id_derived_from_its_own(make_bus: MakeBus) -> None:
    billing, mail = make_bus(), make_bus("mail")
    ids: list[str] = []
    parents: list[str] = []
    failures = iter((True, False))

    @billing.handler(retry=RetryOptions(first=0.1, longest=0.1))
    async def note(command: Note, ctx: Context) -> str:
        parents.append(ctx.message_id)
        await ctx.publish(Debited("a", 1))
        await ctx.publish(Debited("a", 2))
        if next(failures):
            raise RuntimeError("once more")
        return "done"

    @mail.handler
    async def on_debited(event: Debited, ctx: Context) -> None:
        ids.append(ctx.message_id)

    async with billing, mail:
        assert await billing.send(Note("x"), timeout=20.0) == Ok("done")
        await eventually(lambda: len(ids) >= 2)
    assert len(set(parents)) == 1
    assert set(ids) == {f"{parents[0]}.1", f"{parents[0]}.2"}


async def test_a_delayed_command_comes_at_its_time(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()) as bus:
        began = asyncio.get_running_loop().time()
        await bus.enqueue(Debit("a", 1), delay=1.0)
        await bus.enqueue(Debit("a", 2))
        await bus.enqueue(Debit("a", 3), at=datetime.now(UTC) + timedelta(seconds=1.5))
        await eventually(lambda: ledger.entries["a"] == [2, 1, 3], timeout=20.0)
        assert asyncio.get_running_loop().time() - began >= 1.0


async def test_a_time_without_a_zone_is_refused(make_bus: MakeBus, ledger: Ledger) -> None:
    async with ledger.on(make_bus()) as bus:
        with pytest.raises(ConfigurationError, match="time zone"):
            await bus.enqueue(Debit("a", 1), at=datetime.now())  # noqa: DTZ005
        with pytest.raises(ConfigurationError, match="not both"):
            await bus.enqueue(Debit("a", 1), at=datetime.now(UTC), delay=1.0)
        with pytest.raises(ConfigurationError, match="delay must be"):
            await bus.enqueue(Debit("a", 1), delay=-1.0)


# -- effects -----------------------------------------------------------------------------------------------------


async def test_effects_happen_once_however_often_a_handler_runs(make_bus: MakeBus, tmp_path: Any) -> None:
    store = f"sqlite://{tmp_path}/billing.db"
    bus = make_bus(inbox=store)
    runs = 0

    @bus.handler(retry=RetryOptions(first=0.1, longest=0.1))
    async def note(command: Note, ctx: Context) -> str:
        nonlocal runs
        runs += 1
        tx = await ctx.transaction()
        await tx.execute("CREATE TABLE IF NOT EXISTS notes (text TEXT)")
        await tx.execute("INSERT INTO notes VALUES (?)", (command.text,))
        if runs == 1:
            raise RuntimeError("after the write")
        rows = await tx.fetch("SELECT count(*) FROM notes")
        return f"{command.text} {rows[0][0]}"

    async with bus:
        assert await bus.send(Note("x"), timeout=20.0) == Ok("x 1")
        assert await bus.send(Note("y"), timeout=20.0) == Ok("y 2")
    assert runs == 3
