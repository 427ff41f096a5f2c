"""What others write into the work queue, and handlers that fail, on a real server: each ends where it can be seen."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from catga_bus import Bus, Err, Ok
from catga_bus.durability.letters.dead_letters import Buried, DeadLetters
from catga_bus.durability.letters.letters import Reason
from catga_bus.partition.hashing import partition_of
from catga_bus.testing import eventually
from catga_bus.wire import Kind, join_batch
from tests.integration.nodes import NodeProcess
from tests.integration.till import NAMES, SERVICE, Customer, Debit, Effects, MakeBus, Till, jetstream_of
from tests.servers import NatsServer

pytestmark = pytest.mark.nats

StartServer = Callable[..., NatsServer]

PATIENCE = 30.0
ACCOUNT = "a-0"
PARTITION = partition_of(ACCOUNT, 4)
BODY = {"account": ACCOUNT, "cents": 7, "ballast": ""}


def frame(
    body: object = BODY, *, message_id: object = "bad", type_name: object = "Debit", key: object = ACCOUNT
) -> bytes:
    return msgspec.msgpack.encode((message_id, type_name, key, None, 1, None, body))


def record(*frames: bytes) -> bytes:
    return join_batch(Kind.MESSAGES, ("stranger", None, 0), frames)


async def letters_of(bus: Bus) -> list[Buried]:
    return [buried async for buried in DeadLetters(jetstream_of(bus), NAMES, SERVICE).oldest_first()]


async def buried(bus: Bus, count: int = 1) -> list[Buried]:
    """Wait for so many letters."""
    async with asyncio.timeout(PATIENCE):
        while len(found := await letters_of(bus)) < count:
            await asyncio.sleep(0.02)
    return found


NEWER = b"\xc1\xfe" + record(frame())[2:]

STRANGE: dict[str, tuple[bytes, Reason, str]] = {
    "of an unknown type": (record(frame(type_name="Unheard")), Reason.UNROUTABLE, "Unheard"),
    "of a newer version": (NEWER, Reason.UNROUTABLE, "no node reads this wire version"),
    "no record": (b"hello", Reason.UNDECODABLE, ""),
    "an empty payload": (b"", Reason.UNDECODABLE, ""),
    "of the wrong shape": (record(frame({"account": ACCOUNT, "cents": "many"})), Reason.INVALID, "cents"),
    "without a field": (record(frame({"account": ACCOUNT})), Reason.INVALID, "cents"),
    "no object": (record(frame([1, 2, 3])), Reason.INVALID, ""),
    "with a key that is no text": (record(frame(key=7)), Reason.UNDECODABLE, "str"),
    "with a key that is no UTF-8": (
        record(frame().replace(msgspec.msgpack.encode(ACCOUNT), b"\xa3a\xff0", 1)),
        Reason.UNDECODABLE,
        "",
    ),
    "with an id that is no text": (record(frame(message_id=None)), Reason.UNDECODABLE, "str"),
}


@pytest.mark.parametrize("name", STRANGE)
async def test_what_cannot_be_handled_is_a_dead_letter_and_what_is_behind_it_goes_on(
    start_server: StartServer, make_bus: MakeBus, name: str
) -> None:
    payload, reason, words = STRANGE[name]
    till = Till()
    async with till.on(make_bus(start_server(jetstream=True).url, unroutable_after=1.0)) as bus:
        customer = Customer(bus)
        assert await customer.debit()
        await jetstream_of(bus).publish(NAMES.command(SERVICE, PARTITION), payload)
        assert await customer.debit(PATIENCE)
        (letter,) = await buried(bus)
        await eventually(lambda: till.count == customer.count, PATIENCE)

        assert letter.letter is not None
        assert letter.letter.reason is reason, letter.letter.error
        assert words in letter.letter.error
    till.check(customer.accepted)


@pytest.mark.parametrize("key", [None, "", "x" * 100_000, "a.*.>\r\n", "\u0000", "another partition's"])
async def test_a_poisoned_key_holds_up_nobody_and_is_handled_or_buried(
    start_server: StartServer, make_bus: MakeBus, key: str | None
) -> None:
    """The bus sends no such key to this partition; whoever does gets the order that the key asks for, or a letter."""
    till = Till()
    async with till.on(make_bus(start_server(jetstream=True).url)) as bus:
        customer = Customer(bus)
        assert await customer.debit()
        await jetstream_of(bus).publish(NAMES.command(SERVICE, PARTITION), record(frame(key=key)))
        assert await customer.debit()
        await eventually(lambda: till.count >= customer.count, PATIENCE)
        async with asyncio.timeout(PATIENCE):
            while till.count + len(await letters_of(bus)) < customer.count + 1:
                await asyncio.sleep(0.02)
    assert Counter(till.entries[ACCOUNT])[7] <= 1
    till.entries[ACCOUNT] = [cents for cents in till.entries[ACCOUNT] if cents != 7]
    till.check(customer.accepted)


# -- handlers ----------------------------------------------------------------------------------------------


async def test_a_handler_that_fails_always_or_sometimes_loses_no_order(
    start_server: StartServer, make_bus: MakeBus
) -> None:
    attempts: Counter[tuple[str, int]] = Counter()
    till = Till()

    async def fails(message: Any, ctx: Any, call_next: Any) -> Any:
        attempts[message.account, message.cents] += 1
        if message.account == "always" or (message.cents % 3 == 0 and ctx.attempt < 3):
            raise RuntimeError(f"no {message.cents} yet")
        return await call_next(message)

    bus = make_bus(start_server(jetstream=True).url)
    bus.middleware(fails)
    async with till.on(bus, max_attempts=3):
        sent = [bus.send(Debit(account, n), timeout=PATIENCE) for n in range(9) for account in ("always", "sometimes")]
        results = await asyncio.gather(*sent)
        letters = await buried(bus, 9)

    assert till.entries == {"sometimes": list(range(9))}
    assert list(results[1::2]) == [Ok(n) for n in range(9)]
    assert {result.code for result in results[::2] if isinstance(result, Err)} == {"DEAD_LETTERED"}
    assert {letter.letter.reason for letter in letters if letter.letter is not None} == {Reason.ATTEMPTS}
    assert {attempts["always", n] for n in range(9)} == {3}


async def test_a_message_that_ends_its_process_is_buried_and_its_batch_mates_are_not(
    start_server: StartServer, make_bus: MakeBus, tmp_path: Path
) -> None:
    server = start_server(jetstream=True)
    effects = Effects(tmp_path / "inbox.db")
    await effects.make()
    environment = {"SERVER": server.url, "INBOX": effects.address}
    ends: list[int] = []
    async with make_bus(server.url, "client") as client:
        node = NodeProcess(tmp_path / "node-0", "tests.integration.skewed:bus", **environment)
        try:
            await node.is_ready()
            calls = [client.enqueue(Debit(account, cents)) for cents in range(10, 17) for account in ("a", "b")]
            await asyncio.gather(*calls[:6], client.enqueue(Debit("killer", 13)), *calls[6:])
            async with asyncio.timeout(60.0):
                while not await letters_of(client):
                    if node.process.poll() is not None:
                        ends.append(node.process.returncode)
                        place = tmp_path / f"node-{len(ends)}"
                        node = NodeProcess(place, "tests.integration.skewed:bus", **environment)
                    await asyncio.sleep(0.02)
            await eventually(lambda: effects.count >= 14, PATIENCE)
            (letter,) = await letters_of(client)
        finally:
            node.kill()
    assert letter.letter is not None
    assert (letter.letter.reason, letter.letter.key) == (Reason.KILLER, "killer")
    assert 2 <= len(ends) <= 6
    assert set(ends) == {99}
    effects.check({account: list(range(10, 17)) for account in ("a", "b")})


async def test_a_dead_letter_whose_node_dies_is_not_run_behind_what_came_after_it(
    start_server: StartServer, make_bus: MakeBus, tmp_path: Path
) -> None:
    """Its record is not acknowledged, because of a mate that kills the process; by then its handler is mended."""
    server = start_server(jetstream=True)
    effects = Effects(tmp_path / "inbox.db")
    await effects.make()
    partition = partition_of("stumbles", 4)
    killer = next(name for name in (f"killer-{n}" for n in range(100)) if partition_of(name, 4) == partition)
    mended = tmp_path / "mended"
    environment = {"SERVER": server.url, "INBOX": effects.address, "KILLER": killer, "MENDED": str(mended)}
    ends: list[int] = []
    async with make_bus(server.url, "client") as client:
        node = NodeProcess(tmp_path / "node-0", "tests.integration.fatal:bus", **environment)
        try:
            await node.is_ready()
            await client.send(Debit("stumbles", 0), timeout=PATIENCE)
            first = asyncio.ensure_future(client.send(Debit("stumbles", 1), timeout=2 * PATIENCE))
            mates = [Debit("stumbles", 2), Debit(killer, 0), Debit("stumbles", 3)]
            stored = await asyncio.gather(*map(client.enqueue, mates))
            async with asyncio.timeout(60.0):
                while len(await letters_of(client)) < 2:
                    if node.process.poll() is not None:
                        ends.append(node.process.returncode)
                        node = NodeProcess(tmp_path / f"node-{len(ends)}", "tests.integration.fatal:bus", **environment)
                    await asyncio.sleep(0.02)
            result = await first
            letters = await letters_of(client)
            await eventually(lambda: effects.count >= 3, PATIENCE)
        finally:
            node.kill()
    assert len({one.sequence for one in stored}) == 1, "they lie in one record"
    assert set(ends) == {99}
    assert isinstance(result, Err)
    assert (result.code, result.details["sequence"]) == ("DEAD_LETTERED", stored[0].sequence)
    assert {(one.letter.key, one.letter.reason) for one in letters if one.letter is not None} == {
        ("stumbles", Reason.ATTEMPTS),
        (killer, Reason.KILLER),
    }
    assert [cents for account, cents, _, _ in effects.rows() if account == "stumbles"] == [0, 2, 3]


# -- the inbox ---------------------------------------------------------------------------------------------


async def test_an_inbox_whose_file_is_deleted_loses_no_message_and_buries_none(
    start_server: StartServer, make_bus: MakeBus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "inbox.db"
    till = Till()
    url = start_server(jetstream=True).url
    bus = till.on(make_bus(url, inbox=f"sqlite://{path}"), max_attempts=1)
    await bus.start()
    async with make_bus(url, "client") as client:
        customer = Customer(client)
        assert await customer.debit()
        await eventually(lambda: till.count == customer.count)

        away = path.rename(tmp_path / "away.db")
        assert await customer.debit()
        await eventually(lambda: "the file was deleted or replaced" in caplog.text, PATIENCE)
        await bus.close()
        away.rename(path)
        async with till.on(make_bus(url, inbox=f"sqlite://{path}"), max_attempts=1) as successor:
            assert await customer.debit()
            await eventually(lambda: all(2 in till.entries[account] for account in customer.accepted), PATIENCE)
            assert await letters_of(successor) == []
    till.check(customer.accepted, may_repeat=True)
