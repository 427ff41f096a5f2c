"""`catga enqueue`, `publish` of stored events, and `events replay`: on a JetStream of the test's own."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from catga_bus.cli import calls, main, stored
from catga_bus.cli.events import Replay, _instant, types_of
from catga_bus.cli.stored import Opened
from catga_bus.codec import Gate
from catga_bus.durability.letters.replay import ReplayPlan, ReplayProgress
from catga_bus.durability.routes.routes import PARTITIONS_KEY, Route
from catga_bus.errors import ConfigurationError
from catga_bus.partition.hashing import partition_of
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.wire import MessageFrame, Names, token
from tests.model_jetstream import ModelJetStream

P, LOG_P = 16, 4
NAMES = Names()
QUEUE, LOG = NAMES.command_stream("shop"), NAMES.event_stream()

MODULE = """
from datetime import date
from catga_bus import Command, Event, Request

class Debit(Command[str], partition_by="account"):
    account: int
    day: date = date(2026, 1, 2)

class Debited(Event, partition_by="account"):
    account: str

class Tick(Event, durable=False):
    pass
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def jetstream(monkeypatch: pytest.MonkeyPatch) -> ModelJetStream:
    made = ModelJetStream()

    @asynccontextmanager
    async def open_jetstream(url: str | None, namespace: str, name: str) -> AsyncIterator[Opened]:
        yield Opened(made, Names(namespace), tuple, asyncio.Event())

    for module in (stored, calls):
        monkeypatch.setattr(module, "open_jetstream", open_jetstream)
    bucket = NAMES.routes_bucket()

    async def fill() -> None:
        await made.create_stream(
            StreamConfig(name=QUEUE, subjects=(NAMES.commands("shop"),), metadata={PARTITIONS_KEY: str(P)})
        )
        await made.create_stream(
            StreamConfig(name=LOG, subjects=(NAMES.events(),), metadata={PARTITIONS_KEY: str(LOG_P)})
        )
        await made.create_stream(StreamConfig(name=f"KV_{bucket}", subjects=(f"$KV.{bucket}.>",)))
        for route in (
            Route("Debit", "command", "shop", P, "account"),
            Route("Anything", "command", "shop", P, None),
            Route("Debited", "event", "", LOG_P, "account"),
            Route("Tick", "event", "", LOG_P, None, durable=False),
        ):
            await made.publish(f"$KV.{bucket}.{token(route.type)}", msgspec.json.encode(route))

    do(fill())
    return made


@pytest.fixture
def run(jetstream: ModelJetStream, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "letters_of_a_shop.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "letters_of_a_shop"
    sys.modules.pop("letters_of_a_shop", None)


def do(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(call)


def frames(jetstream: ModelJetStream, stream: str) -> list[tuple[str, MessageFrame]]:
    gate = Gate()
    return [(one.subject, frame) for one in jetstream.stored(stream) for frame in gate.messages(one.payload).frames]


# -- enqueue -----------------------------------------------------------------------------------------------


def test_a_command_goes_to_the_partition_of_its_key(run: Run, jetstream: ModelJetStream) -> None:
    code, out, err = run("enqueue", "Debit", '{"account": "a-1", "cents": 5}')
    assert (code, out, err) == (0, f"stored Debit: {QUEUE} has it as number 1\n", "")
    [(subject, frame)] = frames(jetstream, QUEUE)
    assert subject == NAMES.command("shop", partition_of("a-1", P))
    assert (frame.type, frame.key, frame.remaining_ms, frame.attempt) == ("Debit", "a-1", None, 1)
    assert msgspec.msgpack.decode(frame.body) == {"account": "a-1", "cents": 5}


def test_a_command_without_a_key_is_its_own(run: Run, jetstream: ModelJetStream) -> None:
    assert json.loads(run("enqueue", "Anything", "--id", "x-1", "--json")[1]) == {
        "ok": True, "type": "Anything", "id": "x-1", "stream": QUEUE, "sequence": 1, "index": 0, "duplicate": False,
    }  # fmt: skip
    [(subject, frame)] = frames(jetstream, QUEUE)
    assert (subject, frame.key, frame.id) == (NAMES.command("shop", partition_of("x-1", P)), None, "x-1")


def test_the_same_id_is_stored_once(run: Run, jetstream: ModelJetStream) -> None:
    for _ in range(2):
        code, out, _ = run("enqueue", "Anything", "--id", "x-1")
        assert code == 0
    assert out == f"stored Anything before: {QUEUE} has it as number 1\n"
    assert len(frames(jetstream, QUEUE)) == 1


def test_a_key_may_be_given(run: Run, jetstream: ModelJetStream) -> None:
    run("enqueue", "Debit", "{}", "--key", "b")
    run("enqueue", "Debit", '{"account": null}')
    run("enqueue", "Debit", '{"account": 17}')
    assert [frame.key for _, frame in frames(jetstream, QUEUE)] == ["b", None, "17"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("Nope",), 1, "NO_HANDLER: Nope is handled by no service"),
        (("Debited", '{"account": "a"}'), 1, "Debited is an event; `catga publish` publishes it"),
        (("Debit", "{}"), 1, "Debit is partitioned by 'account', which it does not have"),
        (("Debit", '{"account": ""}'), 1, "must not be empty"),
        (("Debit", '{"account": []}'), 1, "a key must be a str"),
        (("Debit", "[1]"), 1, "a message is a JSON object"),
        (("Debit", "{"), 2, "bad JSON"),
    ],
)
def test_what_cannot_be_stored_is_said(run: Run, arguments: tuple[str, ...], code: int, text: str) -> None:
    ended, out, err = run("enqueue", *arguments)
    assert (ended, out) == (code, "")
    assert text in err
    assert err.count("\n") == 1


def test_a_full_queue_is_an_honest_error(run: Run, jetstream: ModelJetStream) -> None:
    jetstream.fail("publish", JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded"))
    code, _, err = run("enqueue", "Anything")
    assert code == 1
    assert "maximum bytes exceeded" in err


def test_an_unknown_outcome_is_tried_again(run: Run, jetstream: ModelJetStream) -> None:
    jetstream.fail("publish", JetStreamUnknownError("no answer"))
    jetstream.lose_answers("publish")
    assert run("enqueue", "Anything")[:2] == (0, f"stored Anything before: {QUEUE} has it as number 1\n")
    assert len(frames(jetstream, QUEUE)) == 1


def test_with_a_module_the_command_is_checked(run: Run, jetstream: ModelJetStream, module: str) -> None:
    assert run("enqueue", "Debit", '{"account": 7}', "-m", module)[0] == 0
    [(_, frame)] = frames(jetstream, QUEUE)
    assert (frame.key, msgspec.msgpack.decode(frame.body)) == ("7", {"account": 7, "day": "2026-01-02"})
    code, _, err = run("enqueue", "Debit", '{"account": "x"}', "-m", module)
    assert code == 2
    assert "the JSON is no Debit: field `account`: expected `int`, got `str`" in err


# -- publish -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [False, True])
def test_a_stored_event_goes_to_the_log(run: Run, jetstream: ModelJetStream, module: str, typed: bool) -> None:
    options = ("-m", module) if typed else ()
    code, out, err = run("publish", "Debited", '{"account": "a-1"}', *options)
    assert (code, out, err) == (0, f"published Debited: {LOG} has it as number 1\n", "")
    [(subject, frame)] = frames(jetstream, LOG)
    assert (subject, frame.key) == (NAMES.event("Debited", partition_of("a-1", LOG_P)), "a-1")


@pytest.mark.parametrize("type_name", ["Tick", "Unheard"])
def test_an_event_that_nobody_stores_is_sent_to_those_who_are_up(
    run: Run, jetstream: ModelJetStream, monkeypatch: pytest.MonkeyPatch, type_name: str
) -> None:
    sent: list[tuple[str, bytes]] = []

    class FakeDoor:
        async def tick(self, name: str, body: bytes) -> str:
            sent.append((name, body))
            return NAMES.tick(name)

    @asynccontextmanager
    async def open_door(url: str | None, namespace: str) -> AsyncIterator[FakeDoor]:
        yield FakeDoor()

    monkeypatch.setattr(calls, "open_door", open_door)
    code, out, _ = run("publish", type_name, '{"a": 1}')
    assert (code, sent) == (0, [(type_name, b'{"a": 1}')])
    assert f"published {type_name} on catga.tick.{type_name}" in out
    assert jetstream.stored(LOG) == []


def test_without_a_log_a_durable_event_is_refused(run: Run, jetstream: ModelJetStream) -> None:
    do(jetstream.delete_stream(LOG))
    code, _, err = run("publish", "Debited", '{"account": "a"}')
    assert code == 1
    assert "there is no event log for Debited" in err


# -- events replay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1764072000", 1764072000.0),
        ("1764072000.25", 1764072000.25),
        ("2025-11-25T12:00", 1764072000.0),
        ("2025-11-25 12:00:00", 1764072000.0),
        ("2025-11-25T13:00+01:00", 1764072000.0),
        ("2025-11-25", 1764028800.0),
    ],
)
def test_times_are_utc_unless_they_say_otherwise(text: str, seconds: float) -> None:
    assert _instant(None, None, text) == seconds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--from", "yesterday"), "'yesterday' is no time; write 2026-03-01T09:30"),
        (("--from", "2026-01-02", "--to", "2026-01-01"), "--to 2026-01-01 00:00:00 is before --from"),
        (("--from", "0", "--name", "a b"), "without blanks"),
        (("--from", "0", "--name", "x" * 33), "1 to 32 printable characters"),
        ((), "Missing option '--from'"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused(run: Run, arguments: tuple[str, ...], text: str) -> None:
    code, _, err = run("events", "replay", "--service", "shop", *arguments)
    assert code == 2
    assert text in " ".join(err.split())


def bus_with(**events_of: tuple[str, ...]) -> Any:
    nodes = [SimpleNamespace(service=service, events=events) for service, events in events_of.items()]
    return SimpleNamespace(nodes=lambda: nodes)


def test_what_the_service_does_not_handle_is_not_replayed() -> None:
    bus = bus_with(shop=("B", "A"), bank=("C",))
    assert types_of(bus, "shop", ()) == ("A", "B")
    assert types_of(bus, "shop", ("B",)) == ("B",)
    with pytest.raises(ConfigurationError, match="service 'shop' handles no C: its nodes handle A, B"):
        types_of(bus, "shop", ("C", "A"))
    with pytest.raises(ConfigurationError, match="no live node of service 'web' handles durable events"):
        types_of(bus, "web", ())


def test_an_interrupted_replay_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ReplayPlan(name="n1", types=("A", "B c"), start_utc=0.0, until_utc=1764072000.5, again=True)
    replay = Replay(plan, "shop", "nats://user:secret@host", "team")
    replay.tell_how_to_go_on()
    assert capsys.readouterr().err == ""  # nothing has been done yet
    replay._on_progress(ReplayProgress(1_700, 20, 0, 20, 1764071000.0))
    replay.tell_how_to_go_on()
    said = capsys.readouterr().err
    assert said.startswith("1,700 events are on the queue")
    assert said.splitlines()[1] == (
        "  catga events replay --service shop --from 0.0 --to 1764072000.5 --type A --type 'B c' --again "
        "--name n1 --sequence 21 --namespace team"
    )
    assert "secret" not in said


def test_what_was_replayed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ReplayPlan(name="n1", types=("A",), start_utc=0.0, until_utc=1764072000.0)
    replay = Replay(plan, "shop", None, "catga")
    replay._on_progress(ReplayProgress(7, 3, 1, 20, 1764072000.0))
    replay.show(as_json=False)
    output = capsys.readouterr()
    assert output.out == "replayed 7 events to shop; the last one was stored at 2025-11-25 12:00:00 UTC\n"
    assert "1 could not be read" in output.err
    replay.show(as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "ok": True, "service": "shop", "name": "n1", "events": 7, "records": 3, "unreadable": 1, "sequence": 20,
        "utc": 1764072000.0,
    }  # fmt: skip
