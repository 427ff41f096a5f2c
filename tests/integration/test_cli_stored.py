"""What is stored, seen and mended from the shell: real nodes, a real server, the commands as they are."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from catga_bus import Bus, Command, Context, Event
from catga_bus.cli import main
from catga_bus.clock import monotonic, utc_now
from catga_bus.durability.letters.dead_letters import DeadLetters
from catga_bus.durability.streams.streams import Streams
from catga_bus.testing import eventually
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import StreamConfig
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.wire import Names
from tests.commands import Catga, end_all
from tests.servers import NatsServer, free_port
from tests.unit.test_dead_letters import letter

pytestmark = pytest.mark.nats

leftovers = pytest.fixture(autouse=True)(end_all)

NAMES = Names()
P = 8

MakeTransport = Callable[..., tuple[NatsTransport, Any]]
Shell = Callable[..., Any]


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int = 0


class Debited(Event, partition_by="account"):
    account: str
    number: int = 0


class Service:
    """A node whose handlers fail while they are told to, and note what they do."""

    def __init__(self, name: str, url: str, **options: Any) -> None:
        self.is_broken = False
        self.done: list[tuple[str, str, int]] = []
        self.bus = Bus(name, url=url, partitions=P, **options)

        @self.bus.handler(max_attempts=1)
        async def debit(command: Debit, ctx: Context) -> int:
            self.note(ctx.message_id, command.account, command.cents)
            return command.cents

        @self.bus.handler(max_attempts=1)
        async def debited(event: Debited, ctx: Context) -> None:
            self.note(ctx.message_id, event.account, event.number)

        del debit, debited

    def note(self, message_id: str, account: str, number: int) -> None:
        if self.is_broken:
            raise ValueError(f"no such account: {account}")
        self.done.append((message_id, account, number))

    def numbers(self, account: str) -> list[int]:
        return [number for _, its, number in self.done if its == account]


@pytest.fixture
def server(start_server: Callable[..., NatsServer]) -> NatsServer:
    return start_server(jetstream=True)


@pytest.fixture
def shell(server: NatsServer, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Run a command in a thread, beside the nodes of the test; returns its document, or its code and texts."""

    async def shell(*arguments: str, code: int | None = 0, url: str = server.url) -> Any:
        ended = await asyncio.to_thread(main, [*arguments, "--url", url])
        output = capsys.readouterr()
        assert code in (None, ended), output.err
        return json.loads(output.out) if "--json" in arguments else (ended, output.out, output.err)

    return shell


@pytest.fixture
async def shop(server: NatsServer) -> AsyncIterator[Service]:
    shop = Service("shop", server.url)
    async with shop.bus:
        yield shop


async def given_up(shell: Shell, count: int) -> list[dict[str, Any]]:
    """Wait until a number of letters is there, and return them, the oldest first."""
    letters: list[dict[str, Any]] = []
    async with asyncio.timeout(30.0):
        while len(letters) != count:
            letters = (await shell("dlq", "ls", "shop", "--oldest", "--json"))["letters"]
    return letters


# -- dead letters ------------------------------------------------------------------------------------------


async def test_what_failed_is_seen_and_succeeds_when_it_is_retried(shop: Service, shell: Shell) -> None:
    shop.is_broken = True
    for number in range(6):
        await shell("enqueue", "Debit", json.dumps({"account": f"a-{number % 2}", "cents": number}))
    letters = await given_up(shell, 6)
    assert {one["reason"] for one in letters} == {"attempts"}
    assert {one["error"].rpartition(": ")[2] for one in letters} == {"a-0", "a-1"}
    first = next(one for one in letters if one["error"].endswith("a-0"))  # of two accounts, which have no order
    [shown] = (await shell("dlq", "show", "shop", first["id"], "--json"))["letters"]
    assert shown["body"] == {"account": "a-0", "cents": 0}
    assert [one["service"] for one in (await shell("dlq", "ls", "--json"))["services"]] == ["shop"]
    shop.is_broken = False
    assert await shell("dlq", "retry", "shop", "--all", "--json") == {
        "ok": True, "service": "shop", "retried": 6, "left": 0, "behind": 0,
    }  # fmt: skip
    await eventually(lambda: len(shop.done) == 6)
    assert (shop.numbers("a-0"), shop.numbers("a-1")) == ([0, 2, 4], [1, 3, 5])
    assert {one for one, _, _ in shop.done} == {one["id"] for one in letters}
    assert (await shell("dlq", "ls", "shop"))[1] == "no such dead letters of shop\n"


async def test_what_fails_again_is_a_new_letter_and_can_be_dropped(shop: Service, shell: Shell) -> None:
    shop.is_broken = True
    await shop.bus.enqueue(Debit("a-1", 1))
    [first] = await given_up(shell, 1)
    await shell("dlq", "retry", "shop", str(first["number"]))
    [second] = await given_up(shell, 1)
    while second["number"] == first["number"]:
        [second] = await given_up(shell, 1)
    assert (second["id"], second["sequence"]) == (first["id"], 2)
    assert (await shell("dlq", "drop", "shop", first["id"], "--yes", "--json"))["dropped"] == 1
    assert await given_up(shell, 0) == []


async def test_an_event_is_retried_by_the_service_that_gave_it_up_and_no_other(
    server: NatsServer, shop: Service, shell: Shell
) -> None:
    other = Service("mail", server.url)
    async with other.bus:
        shop.is_broken = True
        await shell("publish", "Debited", '{"account": "a-1", "number": 7}')
        await eventually(lambda: other.done)
        await given_up(shell, 1)
        shop.is_broken = False
        await shell("dlq", "retry", "shop", "--type", "Debited")
        await eventually(lambda: shop.done)
        await shell("publish", "Debited", '{"account": "a-1", "number": 8}')
        await eventually(lambda: len(other.done) >= 2 and len(shop.done) >= 2)
        assert (shop.numbers("a-1"), other.numbers("a-1")) == ([7, 8], [7, 8])


async def test_a_service_of_events_alone_can_retry_and_replay_them(server: NatsServer, shell: Shell) -> None:
    mail, broken, done = Bus("mail", url=server.url, partitions=P), [True], list[tuple[int, str]]()

    @mail.handler(max_attempts=1)
    async def debited(event: Debited, ctx: Context) -> None:
        if broken:
            raise ValueError("no address")
        done.append((event.number, ctx.message_id))

    async with mail:
        await mail.publish(Debited("a-1", 1))
        await mail.publish(Debited("a-1", 2))
        async with asyncio.timeout(30.0):
            while (await shell("dlq", "ls", "--json"))["services"][0:1] == []:
                pass
            while len((await shell("dlq", "ls", "mail", "--json"))["letters"]) < 2:
                pass
        broken.clear()
        await shell("dlq", "retry", "mail", "--all")
        await eventually(lambda: len(done) == 2)
        assert [number for number, _ in done] == [1, 2]
        await shell("events", "replay", "--service", "mail", "--from", "0", "--again", "--name", "n")
        await eventually(lambda: len(done) == 4)
        assert done[2:] == [(number, f"{message_id}~n") for number, message_id in done[:2]]
        await mail.publish(Debited("a-1", 3))
        await eventually(lambda: done[4:] != [])
        assert done[4][0] == 3


async def test_letters_are_the_same_on_a_server_as_in_the_model(
    server: NatsServer, make_transport: MakeTransport
) -> None:
    transport, _ = make_transport(server.url)
    await transport.connect()
    jetstream = make_jetstream(transport, monotonic)
    await jetstream.create_stream(StreamConfig(name="catga-dlq-shop", subjects=(NAMES.dead_letters("shop"),)))
    letters = DeadLetters(jetstream, NAMES, "shop")
    for number in range(1, 201):
        assert (await letters.bury(letter(number))).sequence == number
    again = await letters.bury(letter(7, node="other"))
    assert (again.sequence, again.duplicate) == (7, True)
    server.stop()  # what the server remembers of ids lies in its streams; what lies on a subject does, too
    server.start()
    await eventually(lambda: transport.is_connected)
    assert (await letters.bury(letter(8))).duplicate
    for number in range(20, 181):
        await letters.remove(number)
    kept = [*range(1, 20), *range(181, 201)]
    assert [one.number async for one in letters.oldest_first()] == kept
    assert [one.number async for one in letters.newest_first()] == kept[::-1]
    assert [one.number for one in await letters.of("m181")] == [181]
    big = await letters.bury(letter(900, body=b"x" * 3_000_000))
    buried = await letters.at(big.sequence)
    assert buried is not None
    assert buried.letter is not None
    assert buried.letter.missing > 0
    assert buried.letter.missing + len(buried.letter.body) == 3_000_000
    await jetstream.close()


# -- events ------------------------------------------------------------------------------------------------


async def test_a_range_of_events_is_replayed_to_one_service(server: NatsServer, shop: Service, shell: Shell) -> None:
    other = Service("mail", server.url)
    async with other.bus:
        for number in range(20):
            await shop.bus.publish(Debited(f"a-{number % 3}", number))
        await eventually(lambda: len(shop.done) == len(other.done) == 20)
        shop.done.clear()
        document = await shell(
            "events", "replay", "--service", "shop", "--from", "0", "--again", "--name", "n1", "--json"
        )
        assert (document["events"], document["unreadable"], document["name"]) == (20, 0, "n1")
        await eventually(lambda: len(shop.done) == 20)
        for key in range(3):
            assert shop.numbers(f"a-{key}") == list(range(key, 20, 3))
        assert all(message_id.endswith("~n1") for message_id, _, _ in shop.done)
        assert len(other.done) == 20
        later = f"{utc_now().timestamp() + 5.0}"
        assert (await shell("events", "replay", "--service", "shop", "--from", "0", "--to", "1", "--json"))[
            "events"
        ] == 0
        code, _, err = await shell(
            "events", "replay", "--service", "shop", "--from", "0", "--to", later, "--type", "X", code=2
        )
        assert (code, "service 'shop' handles no X: its nodes handle Debited" in err) == (2, True)


async def test_an_inbox_skips_what_it_has_done_unless_it_is_to_be_done_again(
    server: NatsServer, shell: Shell, tmp_path: Path
) -> None:
    shop = Service("shop", server.url, inbox=f"sqlite:///{tmp_path / 'inbox.db'}")
    async with shop.bus:
        await shop.bus.publish(Debited("a-1", 1))
        await eventually(lambda: shop.done)
        await shell("events", "replay", "--service", "shop", "--from", "0")
        await shell("events", "replay", "--service", "shop", "--from", "0", "--again")
        await eventually(lambda: len(shop.done) >= 2)
        first, second = (message_id for message_id, _, _ in shop.done)
        assert second.startswith(f"{first}~")
        await shop.bus.send(Debit("a-1", 2))  # behind all of them, by the same queue
        assert len(shop.done) == 3


# -- streams and partitions --------------------------------------------------------------------------------

SHOP = """
from catga_bus import Bus, Command

bus = Bus("shop", partitions={partitions}, command_max_bytes={size})

class Debit(Command[int], partition_by="account"):
    account: str

@bus.handler
async def debit(command: Debit) -> int:
    return 1
"""


async def test_streams_are_made_shown_changed_and_refused(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))

    def module(name: str, partitions: int, size: int) -> str:
        (tmp_path / f"{name}.py").write_text(SHOP.format(partitions=partitions, size=size))
        return f"{name}:bus"

    first = module("shop_one", 8, 1_000_000)
    planned = await shell("streams", "apply", first, "--dry-run", "--json")
    assert {one["kind"] for one in planned["changes"]} == {"create"}
    assert (await shell("streams"))[1].startswith("nothing is stored in namespace catga")
    await shell("streams", "apply", first)
    rows = {one["name"]: one for one in (await shell("streams", "--json"))["streams"]}
    assert (rows["catga-cmd-shop"]["partitions"], rows["catga-cmd-shop"]["max_bytes"]) == (8, 1_000_000)
    assert rows["catga-dlq-shop"]["what"] == "dead letters"
    changed = (await shell("streams", "apply", module("shop_two", 8, 2_000_000)))[1]
    assert "changed  catga-cmd-shop" in changed
    assert "max_bytes: 1000000 -> 2000000" in changed
    _, _, err = await shell("streams", "apply", module("shop_three", 16, 3_000_000), code=2)
    assert "the number of partitions never changes" in err
    rows = {one["name"]: one for one in (await shell("streams", "--json"))["streams"]}
    assert (rows["catga-cmd-shop"]["partitions"], rows["catga-cmd-shop"]["max_bytes"]) == (8, 2_000_000)


async def test_partitions_are_shown_and_watched_as_they_move(server: NatsServer, shell: Shell, tmp_path: Path) -> None:
    first, second = (Service("shop", server.url, node_id=f"shop-{number}") for number in (1, 2))
    async with first.bus, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(second.bus)

        async def owners() -> dict[tuple[str, str], int]:
            rows = (await shell("partitions", "--owners", "--json"))["owners"]
            return {(row["domain"], row["owner"]): len(row["partitions"]) for row in rows}

        half = {(domain, f"shop-{number}"): P // 2 for domain in ("cmd", "evt") for number in (1, 2)}
        async with asyncio.timeout(30.0):
            while await owners() != half:
                pass
        rows = (await shell("partitions", "--service", "shop", "--json"))["partitions"]
        assert len(rows) == 2 * P
        assert {tuple(row["troubles"]) for row in rows} == {()}
        assert all(row["is_announced"] and row["pending"] == 0 and row["owner_status"] == "online" for row in rows)
        watching = Catga(tmp_path, "partitions", "--watch", "--json", "--url", server.url)
        seen = [json.loads(await asyncio.to_thread(watching.line)) for _ in range(2 * P)]
        assert {one["from"] for one in seen} == {None}
        await stack.aclose()
        moved: set[tuple[str, int]] = set()
        async with asyncio.timeout(30.0):
            while len(moved) < P:
                change = json.loads(await asyncio.to_thread(watching.line))
                if change["owner"] == "shop-1":
                    moved.add((change["domain"], change["partition"]))
        code, _, err = await asyncio.to_thread(watching.end, signal.SIGINT)
        assert code == 0, err
    _, _, err = await shell("partitions", "--service", "nix", code=2)
    assert "service 'nix' has no partitions" in err


async def test_what_waits_for_a_service_that_is_down_is_seen(server: NatsServer, shell: Shell) -> None:
    shop = Service("shop", server.url)
    async with shop.bus:
        pass
    await shell("enqueue", "Debit", '{"account": "a-1"}', code=None)
    rows = (await shell("partitions", "--json"))["partitions"]
    assert len(rows) >= P
    assert {row["owner_status"] for row in rows} == {None}
    assert all(row["troubles"] for row in rows)


# -- doctor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sync", "grade"), [('sync_interval: "2m"', "one copy"), ("sync_interval: always", "fsynced")])
async def test_doctor_names_the_durability_grade(
    start_server: Callable[..., NatsServer],
    shell: Shell,
    make_transport: MakeTransport,
    tmp_path: Path,
    sync: str,
    grade: str,
) -> None:
    port = free_port()
    config = f'http: "127.0.0.1:{port}"\njetstream {{ store_dir: "{tmp_path / "store"}", {sync} }}\n'
    server = start_server(config)
    transport, _ = make_transport(server.url)
    await transport.connect()
    jetstream = make_jetstream(transport, monotonic)
    shop = Service("shop", server.url)
    await Streams(jetstream, NAMES, "shop", shop.bus.config, monotonic).ensure(commands=True, events=True)
    await DeadLetters(jetstream, NAMES, "shop").bury(letter(1))
    await jetstream.close()
    document = await shell("doctor", "--json", "--monitor", f"http://127.0.0.1:{port}", url=server.url, code=None)
    found = {one["check"]: one for one in document["findings"]}
    assert f"durability grade: {grade}" in found["grade"]["what"]
    assert found["jetstream"]["level"] == "ok"
    assert "all that the bus can use is there" in found["features"]["what"]
    assert found["dead letters"]["what"] == "service shop has given up 1 message"
    assert ("before it acknowledges" if "always" in sync else "every 2 min") in found["sync"]["what"]


async def test_doctor_finds_jetstream_off(start_server: Callable[..., NatsServer], shell: Shell) -> None:
    server = start_server()
    found = {one["check"]: one for one in (await shell("doctor", "--json", url=server.url))["findings"]}
    assert found["jetstream"]["level"] == "ok"
    assert "commands and durable events do not" in found["jetstream"]["what"]
    code, _, err = await shell("streams", url=server.url, code=2)
    assert (code, "JetStream is off" in err) == (2, True)
