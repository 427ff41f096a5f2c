"""`catga dlq` on a JetStream of the test's own: what it prints, what it does, and how it ends."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from catga_bus.cli import main, stored
from catga_bus.cli.dlq_view import Wanted, letter_object, size_text, utc_text
from catga_bus.cli.stored import Opened
from catga_bus.durability.letters.dead_letters import Buried, DeadLetters
from catga_bus.durability.letters.letters import DeadLetter, Reason
from catga_bus.durability.routes.routes import PARTITIONS_KEY
from catga_bus.partition.hashing import partition_of
from catga_bus.transport.jetstream import ApiError, JetStreamRefusedError, StreamConfig
from catga_bus.wire import Names
from tests.model_jetstream import ModelJetStream

P = 16
NAMES = Names()
DLQ, QUEUE = NAMES.dead_letter_stream("shop"), NAMES.command_stream("shop")

Run = Callable[..., tuple[int, str, str]]


def letter(number: int, **changes: Any) -> DeadLetter:
    facts: dict[str, Any] = {
        "id": f"m{number}", "type": "Debit", "key": f"k{number}", "service": "shop", "reason": Reason.ATTEMPTS,
        "error": "ValueError: no\nsecond line", "attempts": 5, "first_utc": 1764072000.0, "last_utc": 1764072031.0,
        "node": "shop-1", "subject": NAMES.command("shop", 3), "stream": QUEUE, "sequence": number, "index": 0,
        "sender": "web-1", "trace": None, "body": msgspec.msgpack.encode({"cents": number}),
    }  # fmt: skip
    return DeadLetter(**(facts | changes))


@pytest.fixture
def jetstream(monkeypatch: pytest.MonkeyPatch) -> ModelJetStream:
    """A server with a service that has three dead letters; commands connect to it."""
    made = ModelJetStream()

    @asynccontextmanager
    async def open_jetstream(url: str | None, namespace: str, name: str) -> AsyncIterator[Opened]:
        yield Opened(made, Names(namespace), tuple, asyncio.Event())

    monkeypatch.setattr(stored, "open_jetstream", open_jetstream)

    async def fill() -> None:
        await made.create_stream(StreamConfig(name=DLQ, subjects=(NAMES.dead_letters("shop"),)))
        await made.create_stream(
            StreamConfig(
                name=QUEUE,
                subjects=(NAMES.commands("shop"),),
                retention="workqueue",
                metadata={PARTITIONS_KEY: str(P)},
            )
        )
        letters = DeadLetters(made, NAMES, "shop")
        await letters.bury(letter(1))
        await letters.bury(letter(2, type="Credit", reason=Reason.INVALID))
        await letters.bury(letter(3, key="k1", id="the-id"))

    asyncio.run(fill())
    return made


@pytest.fixture
def run(jetstream: ModelJetStream, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["dlq", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def do(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(call)


def numbers(run: Run, *arguments: str) -> list[int]:
    code, out, _ = run("ls", "shop", "--json", *arguments)
    assert code == 0
    return [one["number"] for one in json.loads(out)["letters"]]


def test_services_with_dead_letters_are_listed(run: Run, jetstream: ModelJetStream) -> None:
    code, out, _ = run("ls")
    header, line = out.splitlines()
    assert code == 0
    assert header.split() == ["service", "letters", "size", "oldest", "(UTC)", "newest", "(UTC)", "last"]
    assert line.split()[:2] == ["shop", "3"]
    assert "Debit: ValueError: no" in line
    document = json.loads(run("ls", "--json")[1])
    assert [(one["service"], one["letters"], one["stream"]) for one in document["services"]] == [("shop", 3, DLQ)]


def test_services_without_dead_letters_are_not_listed(run: Run) -> None:
    assert run("ls", "--namespace", "other") == (0, "no service of namespace other has dead letters\n", "")


def test_letters_are_listed_the_newest_first(run: Run) -> None:
    code, out, _ = run("ls", "shop")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:]] == ["3", "2", "1"]
    assert "2025-11-25 12:00:31" in lines[1]
    assert "second line" not in out
    assert numbers(run, "--oldest") == [1, 2, 3]


def test_letters_are_chosen(run: Run) -> None:
    assert numbers(run, "--type", "Debit") == [3, 1]
    assert numbers(run, "--reason", "invalid") == [2]
    assert numbers(run, "--key", "k1", "--oldest") == [1, 3]
    assert numbers(run, "--key", "k1", "--type", "Credit") == []
    assert run("ls", "shop", "--type", "Nix")[1] == "no such dead letters of shop\n"


def test_a_limit_says_that_there_are_more(run: Run) -> None:
    assert run("ls", "shop", "--limit", "2")[1].endswith("there are more: --limit\n")
    assert "more" not in run("ls", "shop", "--limit", "3")[1]
    assert json.loads(run("ls", "shop", "--limit", "2", "--json")[1])["has_more"] is True


def test_a_service_that_is_not_known_is_an_error_that_names_the_others(run: Run) -> None:
    code, out, err = run("ls", "shpo")
    assert (code, out) == (2, "")
    assert "service 'shpo' is not known: there is no stream catga-dlq-shpo; services with dead letters: shop" in err


def test_what_could_move_the_cursor_is_not_printed(run: Run, jetstream: ModelJetStream) -> None:
    do(DeadLetters(jetstream, NAMES, "shop").bury(letter(9, error="\x1b[2J", key="\r", type="[red]x")))
    out = run("ls", "shop")[1]
    assert "\x1b" not in out
    assert "\r" not in out
    assert "[red]x" in out


def test_what_is_no_letter_is_listed_and_shown(run: Run, jetstream: ModelJetStream) -> None:
    do(jetstream.publish(NAMES.dead_letter("shop", "x", "y"), b"rubbish"))
    assert "no letter" in run("ls", "shop")[1]
    [one] = json.loads(run("show", "shop", "4", "--json")[1])["letters"]
    assert "starts with" in one["fault"]


def test_a_letter_is_shown_with_its_body(run: Run) -> None:
    code, out, _ = run("show", "shop", "1")
    assert code == 0
    shown = json.loads(out)
    assert (shown["number"], shown["id"], shown["body"]) == (1, "m1", {"cents": 1})
    assert shown["error"] == "ValueError: no\nsecond line"


def test_letters_are_found_by_number_and_by_id(run: Run) -> None:
    document = json.loads(run("show", "shop", "the-id", "1", "3", "--json")[1])
    assert [one["number"] for one in document["letters"]] == [1, 3]
    code, _, err = run("show", "shop", "17")
    assert code == 1
    assert "shop has no dead letter '17': it may have been retried or dropped" in err
    assert run("show", "shop", "9" * 40)[0] == 1


@pytest.mark.parametrize(
    ("reason", "body"),
    [
        (Reason.INVALID, b"\xc1"), (Reason.INVALID, b"\x91" * 200_000), (Reason.INVALID, b""),
        (Reason.UNDECODABLE, msgspec.msgpack.encode({"a": 1})), (Reason.INVALID, b"\xa1\xff"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_shown_is_base64(reason: Reason, body: bytes) -> None:
    shown = letter_object(Buried(1, 1.0, 9, letter(1, reason=reason, body=body)), with_body=True)
    assert "body" not in shown
    assert "body_base64" in shown
    json.dumps(shown)


def test_named_letters_are_retried_and_gone(run: Run, jetstream: ModelJetStream) -> None:
    assert run("retry", "shop", "2") == (0, "retried 1 dead letter of shop\n", "")
    assert numbers(run) == [3, 1]
    [record] = jetstream.stored(QUEUE)
    assert record.subject == NAMES.command("shop", 3)
    assert partition_of("k2", P) != 3  # a command goes back where it lay
    assert json.loads(run("retry", "shop", "3", "1", "--json")[1]) == {
        "ok": True, "service": "shop", "retried": 2, "left": 0, "behind": 0,
    }  # fmt: skip
    assert numbers(run) == []


def test_a_letter_is_not_retried_before_an_earlier_one_with_its_key(run: Run, jetstream: ModelJetStream) -> None:
    code, _, err = run("retry", "shop", "the-id", "2")
    assert code == 2
    assert "letter 3 comes after 1 with the same key 'k1'" in err
    assert numbers(run) == [3, 2, 1]
    assert jetstream.stored(QUEUE) == []
    assert run("retry", "shop", "the-id", "--out-of-order")[0] == 0
    assert numbers(run) == [2, 1]


def test_chosen_letters_are_retried_unless_an_earlier_one_of_their_key_stays(
    run: Run, jetstream: ModelJetStream
) -> None:
    do(DeadLetters(jetstream, NAMES, "shop").bury(letter(4, key="k2")))
    code, out, err = run("retry", "shop", "--type", "Debit")
    assert (code, out) == (1, "retried 2 dead letters of shop\n")
    assert "1 stay behind an earlier one with their key" in err
    assert numbers(run) == [4, 2]
    assert run("retry", "shop", "--type", "Debit", "--out-of-order")[0] == 0
    assert numbers(run) == [2]


def test_letters_that_are_not_whole_are_left_and_named(run: Run, jetstream: ModelJetStream) -> None:
    do(DeadLetters(jetstream, NAMES, "shop").bury(letter(4, missing=7)))
    code, out, err = run("retry", "shop", "--all")
    assert (code, out) == (1, "retried 3 dead letters of shop\n")
    assert "1 cannot be retried" in err
    code, _, err = run("retry", "shop", "4")
    assert code == 1
    assert "letter 4 lacks 7 bytes" in err


def test_a_queue_that_is_full_is_an_error(run: Run, jetstream: ModelJetStream) -> None:
    jetstream.fail("publish", JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded"))
    code, _, err = run("retry", "shop", "1")
    assert code == 1
    assert "maximum bytes exceeded" in err
    assert numbers(run) == [3, 2, 1]


def test_a_service_without_a_queue_retries_nothing(run: Run, jetstream: ModelJetStream) -> None:
    do(jetstream.delete_stream(QUEUE))
    code, _, err = run("retry", "shop", "--all")
    assert code == 2
    assert "service 'shop' has no work queue: there is no stream catga-cmd-shop" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("retry", "shop"), "which ones?"),
        (("drop", "shop"), "which ones?"),
        (("drop", "shop", "1", "--all"), "either name letters"),
        (("retry", "shop", "1", "--type", "Debit"), "either name letters"),
        (("drop", "shop", "--all", "--type", "Debit"), "--all is all"),
        (("ls", "--type", "Debit"), "name it"),
        (("ls", "shop", "--reason", "bad"), "'bad' is not one of"),
    ],
)
def test_what_could_mean_more_than_was_meant_is_refused(run: Run, arguments: tuple[str, ...], text: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert text in err


def test_drop_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return True

    monkeypatch.setattr("click.confirm", confirm)
    assert run("drop", "shop", "--type", "Debit")[:2] == (0, "dropped 2 dead letters of shop\n")
    assert asked == ["drop 2 dead letters of shop for good?"]
    assert numbers(run) == [2]
    assert run("drop", "shop", "--type", "Debit")[:2] == (0, "dropped 0 dead letters of shop\n")
    assert len(asked) == 1


@pytest.mark.parametrize("answer", ["", "n\n", "\n"])
def test_nothing_is_dropped_without_a_yes(run: Run, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    code, out, err = run("drop", "shop", "--all")
    assert (code, out) == (130, "")
    assert "drop 3 dead letters of shop for good? [y/N]" in err
    assert numbers(run) == [3, 2, 1]


def test_what_is_buried_while_somebody_thinks_is_not_dropped(
    run: Run, jetstream: ModelJetStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confirm(text: str, **_: Any) -> bool:
        do(DeadLetters(jetstream, NAMES, "shop").bury(letter(4)))
        return True

    monkeypatch.setattr("click.confirm", confirm)
    assert run("drop", "shop", "--all")[0] == 0
    assert numbers(run) == [4]


def test_named_letters_are_dropped_without_a_question_if_so_said(run: Run) -> None:
    assert json.loads(run("drop", "shop", "the-id", "1", "--yes", "--json")[1]) == {
        "ok": True, "service": "shop", "dropped": 2,
    }  # fmt: skip
    assert numbers(run) == [2]


def test_a_choice_fits_what_is_given() -> None:
    assert Wanted().is_all
    assert not Wanted(key="").is_all
    assert Wanted(key="").fits(letter(1, key=""))
    assert not Wanted(key="").fits(letter(1, key=None))


def test_sizes_and_times_are_short() -> None:
    assert [size_text(size) for size in (0, 999, 1_000, 123_456, 10**9, 10**15)] == [
        "0 B", "999 B", "1.0 kB", "123 kB", "1.0 GB", "1,000 TB",
    ]  # fmt: skip
    assert utc_text(1764072000.25) == "2025-11-25 12:00:00"
    assert utc_text(1e300) == "1e+300"
