"""The calling side of stored messages: what is written, what callers are told, and when."""

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import msgspec
import pytest

from catga_bus import Command, Err, Event, Ok, Stored
from catga_bus.clock import monotonic
from catga_bus.codec import Gate
from catga_bus.durability.routes.routes import Route, Routes, schema_hash
from catga_bus.durability.sending import inquiries, outlets
from catga_bus.durability.sending.sender import Sender
from catga_bus.errors import (
    Code,
    ConfigurationError,
    DeadlineExceededError,
    DisconnectedError,
    InvalidMessageError,
    NoHandlerError,
    Outcome,
    OverloadedError,
    PermissionDeniedError,
    TooLargeError,
)
from catga_bus.partition.hashing import MAX_KEY_BYTES, partition_of
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.carriers import make_transport
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    JetStreamUnreachedError,
    StoredMessage,
    StreamConfig,
)
from catga_bus.wire import Kind, Names, Status, join_batch
from tests.unit.fake_streams import FakeStreams, batch, lost

NAMES = Names("catga")
FULL = JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded")


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int = 0


class Credit(Command[int], partition_by="account"):
    account: str


class Ping(Command[None]):
    text: str = ""


class Debited(Event, partition_by="account"):
    account: str


class Closed(Event, partition_by="account"):
    account: str


class Bank:
    """A sender on streams that do as told, with routes for the messages above."""

    def __init__(self, url: str) -> None:
        self.streams = FakeStreams()
        self.transport = make_transport(ConnectionOptions(urls=(url,)), RecordedEvents())
        for cls in (Debit, Credit, Ping):
            self.route(cls, "billing", 16)
        self.streams.streams["catga-cmd-billing"] = StreamConfig(name="catga-cmd-billing", subjects=())
        self.streams.streams["catga-evt"] = StreamConfig(
            name="catga-evt", subjects=("catga.evt.*.*",), metadata={"catga.partitions": "16"}
        )
        self.holders: list[tuple[str, str]] = [("billing", "owner"), ("billing", "other")]
        self.routes: Routes
        self.sender: Sender

    def route(self, cls: Any, service: str, partitions: int, **changes: Any) -> None:
        """Write a route."""
        kind = cls.__catga__.kind.lower()
        route = Route(cls.__name__, kind, service, partitions, cls.__catga__.partition_by, True, schema_hash(cls))
        payload = msgspec.json.encode(msgspec.structs.replace(route, **changes))
        self.streams.kv[f"$KV.catga-routes.{cls.__name__}"] = StoredMessage("", 1, payload, {}, 0.0)

    async def start(self) -> "Bank":
        await self.transport.connect()
        self.routes = Routes(self.streams, NAMES, monotonic)
        self.sender = Sender(
            self.transport,
            self.streams,
            self.routes,
            Gate(),
            NAMES,
            sender="web-1",
            clock=monotonic,
            rng=random.Random(1),
            holders=lambda subject: self.holders,
        )
        await self.sender.start()
        return self

    async def stop(self) -> None:
        await self.sender.close()
        await self.routes.close()
        await self.transport.close()

    def answer(self, message_id: str, status: Status, body: Any) -> None:
        """Answer a command as a node would."""
        reply = next(
            one.head.reply
            for one in map(batch, [message.payload for message in self.streams.stored])
            if message_id in [frame.id for frame in one.frames]
        )
        assert reply is not None
        frame = msgspec.msgpack.encode((message_id, int(status), body, "billing-1"))
        self.transport.publish(reply, join_batch(Kind.ANSWERS, ("billing-1", None, 1, 0), [frame]))


@pytest.fixture
async def bank(url: str) -> AsyncIterator[Bank]:
    bank = await Bank(url).start()
    yield bank
    await bank.stop()


# -- what is written ---------------------------------------------------------------------------------------


async def test_a_command_is_stored_on_the_subject_of_its_partition(bank: Bank) -> None:
    stored = await bank.sender.enqueue(Debit("a-1", 5), "m1", timeout=1.0, trace="t")

    assert stored == Stored("s", 1, 0)
    (message,) = bank.streams.stored
    assert message.subject == f"catga.cmd.billing.{partition_of('a-1', 16)}"
    record = batch(message.payload)
    assert (record.head.sender, record.head.reply) == ("web-1", None)
    (frame,) = record.frames
    assert (frame.id, frame.type, frame.key, frame.remaining_ms, frame.trace) == ("m1", "Debit", "a-1", None, "t")


async def test_what_is_sent_in_one_turn_travels_together_and_in_order(bank: Bank) -> None:
    await bank.sender.enqueue(Debit("a", 0), "m", timeout=1.0)

    stored = await asyncio.gather(*(bank.sender.enqueue(Debit("a", n), f"m{n}", timeout=1.0) for n in range(300)))

    assert [frame.id for frame in bank.streams.frames()[1:]] == [f"m{n}" for n in range(300)]
    assert [(one.sequence, one.index) for one in stored] == [(2 + n // 256, n % 256) for n in range(300)]


async def test_commands_of_different_types_share_a_record(bank: Bank) -> None:
    await bank.sender.enqueue(Debit("a"), "m0", timeout=1.0)
    await bank.sender.enqueue(Credit("a"), "m1", timeout=1.0)

    await asyncio.gather(
        bank.sender.enqueue(Debit("a"), "m2", timeout=1.0), bank.sender.enqueue(Credit("a"), "m3", timeout=1.0)
    )

    assert [frame.type for frame in batch(bank.streams.stored[-1].payload).frames] == ["Debit", "Credit"]


async def test_events_keep_their_order_across_types(bank: Bank) -> None:
    await bank.sender.publish(Debited("a"), "e", timeout=1.0)
    await bank.sender.publish(Closed("a"), "f", timeout=1.0)
    events = [Debited("a"), Debited("a"), Closed("a"), Debited("a")]

    await asyncio.gather(*(bank.sender.publish(one, f"e{n}", timeout=1.0) for n, one in enumerate(events)))

    partition = partition_of("a", 16)
    subjects = [message.subject for message in bank.streams.stored[2:]]
    assert subjects == [f"catga.evt.{name}.{partition}" for name in ("Debited", "Closed", "Debited")]
    assert [frame.id for frame in bank.streams.frames()[2:]] == ["e0", "e1", "e2", "e3"]


async def test_a_record_holds_no_more_bytes_than_its_bound_and_a_larger_frame_goes_alone(bank: Bank) -> None:
    await bank.sender.enqueue(Ping(), "m", timeout=1.0, key="k")
    texts = ["x" * 200_000, "y" * 100_000, "z" * 400_000, "w"]

    await asyncio.gather(
        *(bank.sender.enqueue(Ping(text), f"m{n}", timeout=1.0, key="k") for n, text in enumerate(texts))
    )

    assert [len(batch(message.payload).frames) for message in bank.streams.stored[1:]] == [1, 1, 1, 1]


async def test_there_is_never_a_second_record_of_a_partition_on_its_way(bank: Bank) -> None:
    async def call(n: int) -> None:
        await bank.sender.enqueue(Debit("a", n), f"m{n}", timeout=5.0)

    async def slowly() -> None:
        for n in range(50):
            await call(n)

    await asyncio.gather(slowly(), *(call(100 + n) for n in range(400)))

    assert bank.streams.most_in_flight == 1


# -- keys --------------------------------------------------------------------------------------------------


async def test_without_a_key_the_id_is_the_key_and_the_frame_has_none(bank: Bank) -> None:
    await bank.sender.enqueue(Ping(), "m7", timeout=1.0)

    (message,) = bank.streams.stored
    assert message.subject == f"catga.cmd.billing.{partition_of('m7', 16)}"
    assert batch(message.payload).frames[0].key is None


async def test_a_key_at_the_call_overrides_the_field(bank: Bank) -> None:
    await bank.sender.enqueue(Debit("a-1"), "m1", timeout=1.0, key=UUID(int=5))

    (message,) = bank.streams.stored
    assert message.subject == f"catga.cmd.billing.{partition_of(str(UUID(int=5)), 16)}"
    assert batch(message.payload).frames[0].key == str(UUID(int=5))


@pytest.mark.parametrize("key", ["é", "a.b", "*", ">", "a b", "line\nbreak", "\x00", "x" * MAX_KEY_BYTES, 7])
async def test_any_text_may_be_a_key(bank: Bank, key: Any) -> None:
    await bank.sender.enqueue(Debit(key), "m1", timeout=1.0)

    (message,) = bank.streams.stored
    assert message.subject == f"catga.cmd.billing.{partition_of(str(key), 16)}"
    assert batch(message.payload).frames[0].key == str(key)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "must not be empty"),
        ("x" * (MAX_KEY_BYTES + 1), "may have 1,024"),
        ("\ud800", "surrogate"),
        (None, "the key field 'account' is None"),
        (1.5, "must be a str, int, UUID or Enum"),
    ],
)
async def test_what_cannot_be_a_key_is_refused_before_it_is_sent(bank: Bank, key: Any, words: str) -> None:
    with pytest.raises(InvalidMessageError, match=words) as caught:
        await bank.sender.enqueue(Debit(key), "m1", timeout=1.0)

    assert caught.value.outcome is Outcome.NOT_RUN
    assert not bank.streams.written


async def test_keys_that_come_again_and_those_that_do_not_go_to_their_partition(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "_MAX_KEYS", 10)
    keys = [*(f"k{n}" for n in range(25)), "x" * 500, *(f"k{n}" for n in range(25))]
    for number, key in enumerate(keys):
        await bank.sender.enqueue(Debit(key), f"m{number}", timeout=1.0)
    found = [(message.subject, frame.key) for message in bank.streams.stored for frame in batch(message.payload).frames]
    assert found == [(f"catga.cmd.billing.{partition_of(key, 16)}", key) for key in keys]
    known = bank.sender._outlets._by_class[Debit].by_key
    assert 0 < len(known) <= 10
    assert "x" * 500 not in known

    bank.route(Debit, "billing", 3)
    bank.routes.forget("Debit")
    bank.streams.stored.clear()
    await eventually_stored(bank, "k3", partition_of("k3", 3))


async def eventually_stored(bank: Bank, key: str, partition: int) -> None:
    """Send until a route that has changed is known."""
    async with asyncio.timeout(10.0):
        number = 0
        while True:
            await bank.sender.enqueue(Debit(key), f"again-{number}", timeout=1.0)
            if bank.streams.stored[-1].subject == f"catga.cmd.billing.{partition}":
                return
            number += 1
            await asyncio.sleep(0.01)


# -- routes ------------------------------------------------------------------------------------------------


async def test_a_command_that_nobody_handles_ends_at_once(bank: Bank) -> None:
    class Unheard(Command[int]):
        pass

    with pytest.raises(NoHandlerError, match="no service handles the command Unheard") as caught:
        await bank.sender.enqueue(Unheard(), "m1", timeout=60.0)

    assert (caught.value.outcome, caught.value.retryable) == (Outcome.NOT_RUN, True)


async def test_a_flood_of_calls_reads_a_route_once(bank: Bank) -> None:
    class Unheard(Command[int]):
        pass

    async def call(n: int) -> bool:
        with pytest.raises(NoHandlerError):
            await bank.sender.enqueue(Unheard(), f"m{n}", timeout=60.0)
        return True

    assert all(await asyncio.gather(*(call(n) for n in range(100))))
    await asyncio.gather(*(bank.sender.enqueue(Debit("a"), f"d{n}", timeout=1.0) for n in range(100)))

    assert bank.streams.reads == 2


async def test_a_rush_before_the_route_is_known_ends_when_it_is(bank: Bank) -> None:
    async def caller(name: int) -> None:
        for n in range(10):
            await bank.sender.enqueue(Debit("a"), f"{name}.{n}", timeout=10.0)

    await asyncio.gather(*(caller(name) for name in range(200)))

    assert bank.sender.statistics().written.messages == 2_000
    assert bank.sender.statistics().written.records < 50, "one at a time they come back as fast as they are let through"


async def test_another_partition_by_than_the_service_has_is_an_error(bank: Bank) -> None:
    bank.route(Debit, "billing", 16, partition_by="owner")

    with pytest.raises(ConfigurationError, match="partition_by is 'account' here and 'owner' in the service 'billing'"):
        await bank.sender.enqueue(Debit("a"), "m1", timeout=1.0)


async def test_other_fields_than_the_service_has_are_warned_about_once(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    bank.route(Debit, "billing", 16, schema="0123456789abcdef")

    await bank.sender.enqueue(Debit("a"), "m1", timeout=1.0)
    bank.routes.forget("Debit")
    await bank.sender.enqueue(Debit("a"), "m2", timeout=1.0)

    assert sum("other fields" in record.message for record in caplog.records) == 1


async def test_the_wrong_kind_of_message_is_named(bank: Bank) -> None:
    for _ in ("unknown", "known"):
        with pytest.raises(ConfigurationError, match="Debited is an Event and not a Command"):
            await bank.sender.enqueue(Debited("a"), "m1", timeout=1.0)  # type: ignore[arg-type]
        await bank.sender.publish(Debited("a"), "m2", timeout=1.0)


async def test_without_a_log_of_events_there_is_nobody_to_tell(bank: Bank) -> None:
    bank.streams.streams.clear()

    with pytest.raises(NoHandlerError, match="there is no log of events"):
        await bank.sender.publish(Debited("a"), "e1", timeout=1.0)


# -- ends --------------------------------------------------------------------------------------------------


async def test_a_full_stream_refuses_at_once(bank: Bank) -> None:
    async def full(_: FakeStreams, message_id: str) -> None:
        if message_id != "kv":
            raise FULL

    bank.streams.act = full
    with pytest.raises(OverloadedError, match="is full: maximum bytes exceeded") as caught:
        await bank.sender.enqueue(Debit("a"), "m1", timeout=60.0)

    assert caught.value.outcome is Outcome.NOT_RUN
    assert bank.sender.statistics().written.waiting == 0


async def test_a_record_is_written_again_under_its_id_until_it_is_known(bank: Bank) -> None:
    failures = iter([True, True, False, False])

    async def twice(streams: FakeStreams, message_id: str) -> None:
        if next(failures):
            await lost(streams, message_id)

    bank.streams.act_after = twice
    stored = await bank.sender.enqueue(Debit("a"), "m1", timeout=5.0)

    assert stored.duplicate
    assert len(set(bank.streams.written)) == 1
    assert len(bank.streams.written) == 3
    assert len(bank.streams.stored) == 1


async def test_whoever_waits_too_long_is_told_unknown_and_the_record_goes_on(bank: Bank) -> None:
    gone = asyncio.Event()

    async def until(streams: FakeStreams, message_id: str) -> None:
        if not gone.is_set():
            await lost(streams, message_id)

    bank.streams.act_after = until
    with pytest.raises(DeadlineExceededError) as caught:
        await bank.sender.enqueue(Debit("a"), "m1", timeout=0.05)
    later = asyncio.ensure_future(bank.sender.enqueue(Debit("a"), "m2", timeout=10.0))
    gone.set()

    assert caught.value.outcome is Outcome.UNKNOWN
    await later
    assert [frame.id for frame in bank.streams.frames()] == ["m1", "m2"]


async def test_what_never_reached_a_server_has_not_run(bank: Bank) -> None:
    async def no_leader(_: FakeStreams, message_id: str) -> None:
        if message_id != "kv":
            raise JetStreamUnreachedError("no leader")

    bank.streams.act = no_leader
    with pytest.raises(DeadlineExceededError) as caught:
        await bank.sender.enqueue(Debit("a"), "m1", timeout=0.2)
    bank.streams.act = None
    await bank.sender.enqueue(Debit("a"), "m2", timeout=5.0)

    assert caught.value.outcome is Outcome.NOT_RUN
    assert str(caught.value).count("the last attempt failed: no leader") == 1
    assert [frame.id for frame in bank.streams.frames()] == ["m2"], "what was said not to run was stored"


async def test_a_stream_that_is_gone_is_named(bank: Bank) -> None:
    del bank.streams.streams["catga-cmd-billing"]

    async def nobody(_: FakeStreams, message_id: str) -> None:
        if message_id != "kv":
            raise JetStreamUnreachedError("no responders")

    bank.streams.act = nobody
    with pytest.raises(NoHandlerError, match="there is no stream catga-cmd-billing"):
        await bank.sender.enqueue(Debit("a"), "m1", timeout=60.0)


async def test_a_duplicate_at_the_first_attempt_is_an_alarm_and_stored_under_another_id(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    async def forge(streams: FakeStreams, message_id: str) -> None:
        if not streams.stored and message_id != "kv":
            streams.stored.append(StoredMessage("x", 1, b"", {"id": message_id}, 0.0))

    bank.streams.act = forge
    stored = await bank.sender.enqueue(Debit("a"), "m1", timeout=5.0)

    assert stored == Stored("s", 2, 0)
    assert "somebody forges record ids" in caplog.text


async def test_a_denied_subject_is_named_at_once(bank: Bank) -> None:
    subject = NAMES.command("billing", partition_of("a", 16))

    async def denied(streams: FakeStreams, message_id: str) -> None:
        if message_id != "kv":
            bank.sender.denied(subject)
            await lost(streams, message_id)

    bank.streams.act = denied
    with pytest.raises(PermissionDeniedError, match=subject):
        await bank.sender.enqueue(Debit("a"), "m1", timeout=60.0)
    await bank.sender.wait_idle()

    assert bank.sender.statistics().written.waiting == 0


async def test_a_message_larger_than_the_server_takes_is_refused(bank: Bank) -> None:
    with pytest.raises(TooLargeError):
        await bank.sender.enqueue(Ping("x" * bank.transport.max_payload), "m1", timeout=1.0)


async def test_a_caller_that_is_cancelled_leaves_nothing_behind(bank: Bank) -> None:
    blocked = asyncio.Event()

    async def block(_: FakeStreams, message_id: str) -> None:
        if message_id != "kv":
            await blocked.wait()

    bank.streams.act = block
    first = asyncio.ensure_future(bank.sender.enqueue(Debit("a"), "m1", timeout=5.0))
    await eventually(lambda: bank.streams.written)
    second = asyncio.ensure_future(bank.sender.send(Debit("a"), "m2", timeout=5.0))
    await eventually(lambda: bank.sender.statistics().written.waiting == 2)
    second.cancel()
    await eventually(second.done)
    blocked.set()

    assert (await first).index == 0
    await bank.sender.wait_idle()
    assert [frame.id for frame in bank.streams.frames()] == ["m1"]
    assert (bank.sender.statistics().pending, bank.sender.statistics().written.waiting) == (0, 0)


async def test_closing_ends_everybody(bank: Bank) -> None:
    bank.streams.act_after = lost
    written = asyncio.ensure_future(bank.sender.enqueue(Debit("a"), "m1", timeout=60.0))
    await eventually(lambda: bank.streams.written)
    waiting = asyncio.ensure_future(bank.sender.enqueue(Debit("a"), "m2", timeout=60.0))
    asked = asyncio.ensure_future(bank.sender.send(Debit("a"), "m3", timeout=60.0))
    await eventually(lambda: bank.sender.statistics().written.waiting == 3)

    await bank.sender.close()

    errors = await asyncio.gather(written, waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [DisconnectedError, DisconnectedError]
    assert [error.outcome for error in errors] == [Outcome.UNKNOWN, Outcome.NOT_RUN]  # type: ignore[union-attr]
    result = await asked
    assert isinstance(result, Err)
    assert result.code == Code.DISCONNECTED
    with pytest.raises(DisconnectedError):
        await bank.sender.enqueue(Debit("a"), "m4", timeout=1.0)


# -- results -----------------------------------------------------------------------------------------------


async def send(bank: Bank, message_id: str, timeout: float = 5.0) -> "asyncio.Future[Any]":
    call = asyncio.ensure_future(bank.sender.send(Debit("a"), message_id, timeout=timeout))
    await eventually(lambda: message_id in [frame.id for frame in bank.streams.frames()])
    return call


async def test_send_returns_what_the_handler_returned(bank: Bank) -> None:
    call = await send(bank, "m1")
    bank.answer("m1", Status.OK, 7)

    assert await call == Ok(7)
    record = batch(bank.streams.stored[0].payload)
    assert record.head.reply is not None
    assert record.frames[0].remaining_ms is not None
    assert 4_000 < record.frames[0].remaining_ms <= 5_000


async def test_a_refusal_and_a_dead_letter_are_results(bank: Bank) -> None:
    first, second = await send(bank, "m1"), await send(bank, "m2")
    bank.answer("m1", Status.REFUSED, ("LOW", "balance too low", {"by": 3}, False))
    bank.answer("m2", Status.FAILED, (str(Code.DEAD_LETTERED), "5 attempts failed", None, False))

    low, dead = await first, await second
    assert (low.code, low.details, low.outcome, low.node) == ("LOW", {"by": 3}, Outcome.REFUSED, "billing-1")
    assert (dead.code, dead.outcome) == (Code.DEAD_LETTERED, Outcome.FAILED)


async def test_an_answer_of_another_type_is_an_error_of_the_handler(bank: Bank) -> None:
    call = await send(bank, "m1")
    bank.answer("m1", Status.OK, "seven")

    result = await call
    assert (result.code, result.outcome) == (Code.HANDLER_ERROR, Outcome.FAILED)
    assert "expected `int`" in result.message


async def test_a_result_that_does_not_come_says_where_the_command_lies(bank: Bank) -> None:
    result = await (await send(bank, "m1", timeout=0.1))

    assert (result.code, result.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)
    assert result.details == {"stream": "s", "sequence": 1, "index": 0}
    bank.answer("m1", Status.OK, 7)
    await eventually(lambda: bank.sender.statistics().late_answers == 1)


async def test_an_answer_that_overtakes_the_acknowledgement_counts(bank: Bank) -> None:
    held = asyncio.Event()

    async def hold(_: FakeStreams, __: str) -> None:
        await held.wait()

    bank.streams.act_after = hold
    call = await send(bank, "m1")
    bank.answer("m1", Status.OK, 7)

    assert await call == Ok(7)
    held.set()


# -- room --------------------------------------------------------------------------------------------------


async def test_callers_wait_for_room_in_turn(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank.sender._room, "_line_frames", 10)

    await asyncio.gather(*(bank.sender.enqueue(Debit("a", n), f"m{n}", timeout=5.0) for n in range(500)))

    assert [frame.id for frame in bank.streams.frames()] == [f"m{n}" for n in range(500)]


async def test_without_room_until_the_deadline_a_caller_is_refused(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank.sender._room, "_frames", 2)
    bank.streams.act_after = lost
    calls = [asyncio.ensure_future(bank.sender.enqueue(Debit("a"), f"m{n}", timeout=5.0)) for n in range(2)]
    await eventually(lambda: bank.sender.statistics().written.waiting == 2)

    with pytest.raises(OverloadedError, match="send more slowly") as caught:
        await bank.sender.enqueue(Debit("b"), "m9", timeout=0.05)

    assert caught.value.outcome is Outcome.NOT_RUN
    bank.streams.act_after = None
    await asyncio.gather(*calls)
    await bank.sender.enqueue(Debit("b"), "m10", timeout=1.0)


async def test_what_a_transaction_has_prepared_is_stored_as_it_was(bank: Bank) -> None:
    outbound = await bank.sender.prepare(Debit("a", 3), "p.1", timeout=1.0)
    told = await bank.sender.prepare(Debited("a"), "p.2", timeout=1.0)

    await bank.sender.store(outbound, timeout=1.0)
    await bank.sender.store(told, timeout=1.0)

    partition = partition_of("a", 16)
    assert [message.subject for message in bank.streams.stored] == [
        f"catga.cmd.billing.{partition}",
        f"catga.evt.Debited.{partition}",
    ]
    assert [frame.id for frame in bank.streams.frames()] == ["p.1", "p.2"]


# -- found by breaking it ----------------------------------------------------------------------------------


async def test_an_answer_to_an_earlier_sending_ends_one_that_is_not_written(bank: Bank) -> None:
    """A handler sends a derived command; it is run again while the answer to the first one is on its way."""
    first = asyncio.ensure_future(bank.sender.send(Debit("a"), "p.1", timeout=5.0))
    await eventually(lambda: len(bank.streams.stored) == 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate = asyncio.Event()

    async def slow(_: FakeStreams, __: str) -> None:
        await gate.wait()

    bank.streams.act = slow
    before = asyncio.ensure_future(bank.sender.enqueue(Debit("a"), "x", timeout=5.0))
    await eventually(lambda: len(bank.streams.written) == 2)
    second = asyncio.ensure_future(bank.sender.send(Debit("a"), "p.1", timeout=5.0))
    await asyncio.sleep(0)
    bank.answer("p.1", Status.OK, 1)

    assert await second == Ok(1)
    gate.set()
    await before
    await bank.sender.wait_idle()
    written = bank.sender.statistics().written
    assert (written.waiting, written.waiting_bytes) == (0, 0)


async def test_a_second_call_with_the_same_id_ends_the_first(bank: Bank) -> None:
    first = asyncio.ensure_future(bank.sender.send(Debit("a"), "p.1", timeout=5.0))
    await eventually(lambda: len(bank.streams.stored) == 1)
    second = asyncio.ensure_future(bank.sender.send(Debit("a"), "p.1", timeout=5.0))

    end = await first
    assert isinstance(end, Err)
    assert (end.outcome, "sent again under the same id" in end.message) == (Outcome.UNKNOWN, True)
    await eventually(lambda: len(bank.streams.stored) == 2)
    bank.answer("p.1", Status.OK, 2)
    assert await second == Ok(2)


async def test_a_bucket_without_a_leader_holds_up_nobody_whose_route_is_known(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bank.sender.enqueue(Debit("a"), "m", timeout=1.0)
    bank.routes.forget("Debit")

    async def leaderless(_: FakeStreams, what: str) -> None:
        if what == "kv":
            await asyncio.sleep(0.5)
            raise JetStreamUnknownError("no leader")

    bank.streams.act = leaderless
    began = monotonic()
    await asyncio.gather(*(bank.sender.enqueue(Debit("a"), f"m{n}", timeout=30.0) for n in range(50)))
    assert monotonic() - began < 10.0, "one waits for the first attempt, not each for one of its own"


async def test_an_event_that_its_handlers_have_otherwise_is_refused_each_time(bank: Bank) -> None:
    bank.route(Debited, "", 16, partition_by="owner")

    for number in range(3):
        with pytest.raises(ConfigurationError, match="partition_by is 'account' here and 'owner'"):
            await bank.sender.publish(Debited("a"), f"e{number}", timeout=1.0)


async def test_errors_of_calls_that_failed_are_collected(bank: Bank) -> None:
    async def full(_: FakeStreams, what: str) -> None:
        if what != "kv":
            raise JetStreamRefusedError(FULL.code, FULL.text)  # a new one: its traceback holds on to much

    async def refused(number: int) -> weakref.ref[OverloadedError]:
        try:
            await bank.sender.enqueue(Debit("a"), f"m{number}", timeout=1.0)
        except OverloadedError as error:
            return weakref.ref(error)
        raise AssertionError("it was stored")

    bank.streams.act = full
    errors = [await refused(number) for number in range(20)]
    await asyncio.sleep(0)
    gc.collect()
    assert [error() for error in errors] == [None] * 20


async def test_a_bus_that_closes_while_a_route_is_read_cancels_nobody(bank: Bank) -> None:
    async def never(_: FakeStreams, __: str) -> None:
        await asyncio.Event().wait()

    bank.streams.act = never
    call = asyncio.ensure_future(bank.sender.enqueue(Debit("a"), "m", timeout=30.0))
    await eventually(lambda: bank.streams.reads > 0 or bank.routes._cached)
    await bank.sender.close()
    await bank.routes.close()
    with pytest.raises(DisconnectedError, match="the bus was closed before it was sent"):
        await call


async def test_what_the_outbox_gives_in_is_stored_in_order_when_some_of_it_is_refused(bank: Bank) -> None:
    await bank.sender.enqueue(Ping(), "warm", timeout=1.0, key="k")
    made = [await bank.sender.prepare(Ping("x" * 2_000), f"m{n}", timeout=1.0, key="k") for n in range(150)]
    refusals = 1

    async def full_once(_: FakeStreams, __: str) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise FULL

    bank.streams.act = full_once
    ends = await asyncio.gather(*(bank.sender.store(one, timeout=5.0) for one in made), return_exceptions=True)
    assert all(isinstance(end, OverloadedError) for end in ends), "nothing behind what was refused is stored"
    written = bank.sender.statistics().written
    assert (written.waiting, written.waiting_bytes) == (0, 0)


# -- answers that do not come --------------------------------------------------------------------------------


class Asked:
    """A node that is asked for results, and takes down for which."""

    def __init__(self, bank: Bank, node: str) -> None:
        self.ids: list[list[str]] = []
        self.inboxes: set[str | None] = set()
        self._bank, self._node = bank, node

    async def start(self) -> "Asked":
        await self._bank.transport.subscribe(NAMES.node_results("billing", self._node), self._on_query)
        return self

    def _on_query(self, _: str, payload: bytes, __: str, ___: Any) -> None:
        gate = Gate()
        assert gate.kind(payload) == Kind.STATUS
        batch = gate.ids(payload)
        self.inboxes.add(batch.head.reply)
        self.ids.append(list(batch.frames))


@pytest.fixture
def quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiries, "ROUND_SECONDS", 0.02)


@pytest.mark.usefixtures("quick_rounds")
async def test_whoever_waits_for_an_answer_asks_the_owner_and_in_the_end_everybody(bank: Bank) -> None:
    owner, other = await Asked(bank, "owner").start(), await Asked(bank, "other").start()
    call = asyncio.ensure_future(bank.sender.send(Debit("a"), "m1", timeout=30.0))
    await eventually(lambda: other.ids)
    assert len(owner.ids) >= inquiries.OWNER_ROUNDS
    assert {id_ for ids in (*owner.ids, *other.ids) for id_ in ids} == {"m1"}
    (inbox,) = owner.inboxes
    assert inbox == batch(bank.streams.stored[0].payload).head.reply, "answers come where they would have come"
    bank.answer("m1", Status.OK, 7)
    assert await call == Ok(7)
    assert bank.sender.statistics().asked == len(owner.ids) + len(other.ids)

    asked = len(owner.ids)
    await eventually(lambda: not bank.sender._answers.inquiries.is_on)
    assert len(owner.ids) == asked, "nobody waits: nobody asks"
    second = asyncio.ensure_future(bank.sender.send(Debit("a"), "m2", timeout=30.0))
    await eventually(lambda: ["m2"] in owner.ids)
    bank.answer("m2", Status.OK, 8)
    await second


@pytest.mark.usefixtures("quick_rounds")
async def test_what_is_not_written_is_not_asked_for(bank: Bank) -> None:
    owner = await Asked(bank, "owner").start()

    async def slow(_: FakeStreams, what: str) -> None:
        if what != "kv":
            await gate.wait()

    gate = asyncio.Event()
    first = asyncio.ensure_future(bank.sender.send(Debit("a"), "m1", timeout=30.0))
    await eventually(lambda: len(bank.streams.stored) == 1)
    bank.streams.act = slow
    written = asyncio.ensure_future(bank.sender.send(Debit("a"), "m2", timeout=30.0))
    await eventually(lambda: len(bank.streams.written) == 2)
    waiting = asyncio.ensure_future(bank.sender.send(Debit("a"), "m3", timeout=30.0))
    await eventually(lambda: len(owner.ids) >= 3)
    assert {id_ for ids in owner.ids for id_ in ids} == {"m1", "m2"}, "an answer may come before the acknowledgement"
    gate.set()
    await eventually(lambda: len(bank.streams.stored) == 3)
    for name, call in (("m1", first), ("m2", written), ("m3", waiting)):
        bank.answer(name, Status.OK, 1)
        await call


async def test_a_connection_that_is_back_asks_at_once_for_all_that_waits(bank: Bank) -> None:
    owner = await Asked(bank, "owner").start()
    calls = [asyncio.ensure_future(bank.sender.send(Debit("a"), f"m{n}", timeout=30.0)) for n in range(2_500)]
    await eventually(lambda: len(list(bank.streams.frames())) == 2_500)
    bank.sender.reconnected()
    await eventually(lambda: sum(map(len, owner.ids)) == 2_500, what="asked in parts of at most 1,000")
    assert max(map(len, owner.ids)) == 1_000
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.usefixtures("quick_rounds")
async def test_where_questions_are_not_permitted_none_are_asked(bank: Bank) -> None:
    owner = await Asked(bank, "owner").start()
    call = asyncio.ensure_future(bank.sender.send(Debit("a"), "m1", timeout=30.0))
    await eventually(lambda: owner.ids)
    bank.sender.denied(NAMES.node_results("billing", "owner"))
    asked = bank.sender.statistics().asked
    rounds = bank.sender._answers._pending["m1"].rounds
    inquiry = bank.sender._answers.inquiries
    for _ in range(3):
        inquiry._round()
    assert (bank.sender.statistics().asked, bank.sender._answers._pending["m1"].rounds) == (asked, rounds)
    bank.sender.reconnected()
    await eventually(lambda: bank.sender.statistics().asked > asked)
    bank.answer("m1", Status.OK, 7)
    await call


@pytest.mark.usefixtures("quick_rounds")
async def test_many_that_wait_take_turns(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiries, "ASKED_AT_ONCE", 10)
    owner = await Asked(bank, "owner").start()
    calls = [asyncio.ensure_future(bank.sender.send(Debit("a"), f"m{n}", timeout=30.0)) for n in range(25)]
    await eventually(lambda: {id_ for ids in owner.ids for id_ in ids} == {f"m{n}" for n in range(25)})
    assert max(map(len, owner.ids)) <= 10
    for n, call in enumerate(calls):
        bank.answer(f"m{n}", Status.OK, n)
        await call
