"""Dead letters: stored once each, read in both orders, and put back on the work queue in the order of their keys."""

import random
from typing import Any

import msgspec
import pytest

from catga_bus.codec import Gate, GateError
from catga_bus.durability.letters import work_queue
from catga_bus.durability.letters.dead_letters import DeadLetters
from catga_bus.durability.letters.letters import MAX_ERROR, DeadLetter, Reason, decode_letter, encode_letter, shorten
from catga_bus.durability.letters.retrying import CannotRetryError, drop_many, queued_of, retry_many, retry_one
from catga_bus.durability.letters.work_queue import WorkQueue
from catga_bus.errors import InvalidMessageError, TooLargeError
from catga_bus.partition.hashing import partition_of
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.wire import MessageFrame, Names
from tests.model_jetstream import ModelJetStream

P = 16
NAMES = Names()
DLQ, QUEUE = NAMES.dead_letter_stream("shop"), NAMES.command_stream("shop")
UNKNOWN = JetStreamUnknownError("no answer")


def letter(number: int = 1, **changes: Any) -> DeadLetter:
    facts: dict[str, Any] = {
        "id": f"m{number}", "type": "Debit", "key": "a-1", "service": "shop", "reason": Reason.ATTEMPTS,
        "error": "ValueError: no", "attempts": 5, "first_utc": 1.0, "last_utc": 2.0, "node": "shop-1",
        "subject": NAMES.command("shop", partition_of("a-1", P)), "stream": QUEUE, "sequence": number, "index": 0,
        "sender": "web-1", "trace": None, "body": msgspec.msgpack.encode({"cents": number}),
    }  # fmt: skip
    return DeadLetter(**(facts | changes))


@pytest.fixture
async def jetstream() -> ModelJetStream:
    made = ModelJetStream()
    await made.create_stream(StreamConfig(name=DLQ, subjects=(NAMES.dead_letters("shop"),)))
    await made.create_stream(StreamConfig(name=QUEUE, subjects=(NAMES.commands("shop"),), retention="workqueue"))
    return made


@pytest.fixture
def letters(jetstream: ModelJetStream) -> DeadLetters:
    return DeadLetters(jetstream, NAMES, "shop", rng=random.Random(1), first_pause=0.001)


@pytest.fixture
def queue(jetstream: ModelJetStream) -> WorkQueue:
    return WorkQueue(jetstream, NAMES, "shop", P, rng=random.Random(1))


async def numbers(letters: DeadLetters) -> list[int]:
    return [buried.number async for buried in letters.oldest_first()]


def frames(jetstream: ModelJetStream) -> list[tuple[str, MessageFrame]]:
    """What lies in the work queue: subject and frame."""
    gate = Gate()
    return [(one.subject, frame) for one in jetstream.stored(QUEUE) for frame in gate.messages(one.payload).frames]


# -- bytes ------------------------------------------------------------------------------------------------


def test_a_letter_is_what_was_written() -> None:
    one = letter(key=None, trace="00-1", missing=3)
    assert decode_letter(encode_letter(one)) == one


def test_a_letter_may_have_additions_and_lack_what_was_added() -> None:
    known = msgspec.structs.asdict(letter())
    del known["missing"]
    payload = b"\xc1\x01" + msgspec.msgpack.encode([7, ["n", None, 0, 0, "new"], [known | {"new": 1}], "new"])
    assert decode_letter(payload) == letter()


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1\x01", b"\xc1\x02\x93\x07\x91\xa1n\x90", b"\xc1\x01\x93\x00\x91\xa1n\x90",
        b"\xc1\x01\x93\x07\x91\xa1n\x90",
        b"{}", b"\xc1\x01\x93\x07" + b"\x91" * 5_000, b"\xc1\x01\x93\x07\x91\xa1n\x91\x81\xa2id\xa1x",
    ],
)  # fmt: skip
def test_what_is_no_letter_is_refused(payload: bytes) -> None:
    with pytest.raises(GateError):
        decode_letter(payload)


def test_an_error_as_long_as_a_book_is_cut() -> None:
    read = decode_letter(encode_letter(letter(error="x" * 1_000_000)))
    assert len(read.error) == MAX_ERROR
    assert read.error.endswith("x…")


def test_every_place_and_every_content_has_a_mark_of_its_own() -> None:
    others = [
        letter(), letter(sequence=2), letter(index=1), letter(id="m2"), letter(body=b"\xc0"),
        letter(stream="catga-evt"),
    ]  # fmt: skip
    assert len({one.mark for one in others}) == len(others)
    assert letter(node="shop-2", attempts=7, last_utc=9.0).mark == letter().mark


def test_shortening_ends_and_counts_what_is_lost() -> None:
    one: DeadLetter | None = letter(body=b"x" * 1_000, key="ü" * 100)
    seen = 0
    while one is not None:
        assert len(one.body) + len((one.key or "").encode()) + one.missing == 1_200
        shorter = shorten(one)
        assert shorter is None or shorter.missing > one.missing
        one, seen = shorter, seen + 1
    assert seen < 30


# -- burying ----------------------------------------------------------------------------------------------


async def test_a_letter_is_stored_once_however_often_it_is_buried(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    first = await letters.bury(letter())
    jetstream.now += 3_600.0  # far beyond what the server remembers of ids
    second = await letters.bury(letter(node="shop-2", attempts=10))
    assert (first.sequence, first.duplicate) == (1, False)
    assert (second.stream, second.sequence, second.duplicate) == (DLQ, 1, True)
    [buried] = [one async for one in letters.oldest_first()]
    assert buried.letter == letter()


async def test_a_message_that_fails_again_after_a_retry_is_a_second_letter(letters: DeadLetters) -> None:
    await letters.bury(letter(1))
    await letters.bury(letter(1, sequence=9))
    assert [one.number for one in await letters.of("m1")] == [1, 2]
    assert await letters.of("m2") == []


async def test_it_is_buried_again_until_the_outcome_is_known(jetstream: ModelJetStream, letters: DeadLetters) -> None:
    jetstream.fail("publish", UNKNOWN, UNKNOWN)
    jetstream.lose_answers("publish")
    ack = await letters.bury(letter())
    assert (ack.sequence, ack.duplicate) == (1, True)
    assert jetstream.calls["publish"] == 4
    assert len(jetstream.stored(DLQ)) == 1


async def test_a_stream_that_is_full_or_stays_silent_is_an_error(
    jetstream: ModelJetStream, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    jetstream.fail("publish", JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded"))
    with pytest.raises(JetStreamRefusedError):
        await letters.bury(letter())
    monkeypatch.setattr("catga_bus.durability.letters.dead_letters.PATIENCE", 0.05)
    jetstream.fail("publish", *[UNKNOWN] * 1_000)
    with pytest.raises(JetStreamUnknownError):
        await letters.bury(letter())
    assert 3 <= jetstream.calls["publish"] < 100


async def test_an_attempt_that_is_on_its_way_through_the_cluster_is_waited_for(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    jetstream.fail("publish", JetStreamRefusedError(ApiError.WRONG_LAST_SEQUENCE, "wrong last sequence"))
    ack = await letters.bury(letter())
    assert (ack.sequence, ack.duplicate) == (1, False)
    assert jetstream.calls["last_message"] == 1


async def test_a_stream_made_again_takes_what_lies_at_the_same_place(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    place = {"id": f"{QUEUE}.7", "sequence": 7, "reason": Reason.UNDECODABLE}
    await letters.bury(letter(body=b"old", **place))
    await letters.bury(letter(body=b"new", **place))
    assert await numbers(letters) == [1, 2]


async def test_what_the_server_will_not_take_is_shortened_and_says_so(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    jetstream.max_payload = 10_000
    one = letter(body=b"x" * 30_000)
    await letters.bury(one)
    [buried] = [each async for each in letters.oldest_first()]
    assert buried.letter is not None
    assert len(buried.letter.body) + buried.letter.missing == 30_000
    assert len(buried.letter.body) == 7_500
    await letters.bury(one)
    assert len(jetstream.stored(DLQ)) == 1


async def test_a_letter_that_never_fits_is_an_error(jetstream: ModelJetStream, letters: DeadLetters) -> None:
    jetstream.max_payload = 10
    with pytest.raises(TooLargeError):
        await letters.bury(letter())


# -- reading ----------------------------------------------------------------------------------------------


async def test_letters_are_read_in_both_orders_around_what_was_dropped(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    kept = [*range(1, 40), 300, 301, *range(700, 900), 1_500]
    for number in range(1, 1_501):
        await letters.bury(letter(number))
    for number in set(range(1, 1_501)) - set(kept):
        await letters.remove(number)
    assert await numbers(letters) == kept
    before = jetstream.calls["next_message"]
    assert [buried.number async for buried in letters.newest_first()] == kept[::-1]
    assert jetstream.calls["next_message"] - before < 2 * len(kept)


@pytest.mark.parametrize("seed", range(20))
async def test_newest_first_is_the_reverse_whatever_was_dropped(letters: DeadLetters, seed: int) -> None:
    rng = random.Random(seed)
    total = rng.randrange(1, 400)
    for number in range(1, total + 1):
        await letters.bury(letter(number))
    for number in rng.sample(range(1, total + 1), rng.randrange(total + 1)):
        await letters.remove(number)
    assert [one.number async for one in letters.newest_first()] == (await numbers(letters))[::-1]


async def test_reading_ends_with_the_number_that_is_given(letters: DeadLetters) -> None:
    for number in range(1, 6):
        await letters.bury(letter(number))
    for number in (2, 3, 4):
        await letters.remove(number)
    assert [one.number async for one in letters.oldest_first(through=3)] == [1]


async def test_a_gap_of_dropped_letters_is_jumped_over(jetstream: ModelJetStream, letters: DeadLetters) -> None:
    for number in range(1, 4_001):
        await letters.bury(letter(number))
    for number in range(2, 4_000):
        await letters.remove(number)
    before = jetstream.calls["next_message"]
    assert [one.number async for one in letters.newest_first()] == [4_000, 1]
    assert jetstream.calls["next_message"] - before < 40


async def test_a_letter_on_the_subject_of_another_message_is_not_taken_for_it(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    await jetstream.publish(NAMES.dead_letter("shop", "m1", "x"), encode_letter(letter(2)))
    assert await letters.of("m1") == []


async def test_reading_ends_while_letters_are_buried(letters: DeadLetters) -> None:
    await letters.bury(letter(1))
    await letters.bury(letter(2))
    seen = []
    async for buried in letters.oldest_first():
        seen.append(buried.number)
        await letters.bury(letter(100 + buried.number))
    assert seen == [1, 2]


async def test_a_service_that_never_ran_has_no_letters(jetstream: ModelJetStream) -> None:
    other = DeadLetters(jetstream, NAMES, "other")
    assert await other.info() is None
    assert await numbers(other) == []
    assert [one async for one in other.newest_first()] == []


async def test_what_is_no_letter_is_shown_as_such(jetstream: ModelJetStream, letters: DeadLetters) -> None:
    await jetstream.publish(NAMES.dead_letter("shop", "x", "y"), b"hello")
    buried = await letters.at(1)
    assert buried is not None
    assert buried.letter is None
    assert "68 65 6c 6c" in buried.fault
    assert await letters.at(2) is None


async def test_reading_goes_on_when_a_leader_is_gone_for_a_moment(
    jetstream: ModelJetStream, letters: DeadLetters
) -> None:
    await letters.bury(letter(1))
    jetstream.fail("next_message", UNKNOWN, UNKNOWN)
    assert await numbers(letters) == [1]


async def test_those_that_stand_before_a_letter_are_found(letters: DeadLetters) -> None:
    for number, key in enumerate(["a", "b", "a", None, "a", "a"], start=1):
        await letters.bury(letter(number, key=key))
    last = await letters.at(6)
    assert last is not None
    assert await letters.earlier_of_lane(last, 10) == [1, 3, 5]
    assert await letters.earlier_of_lane(last, 2) == [1, 3]
    keyless = await letters.at(4)
    assert keyless is not None
    assert await letters.earlier_of_lane(keyless, 10) == []


# -- retrying ---------------------------------------------------------------------------------------------


async def test_a_command_goes_back_where_it_lay_as_it_was(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    await letters.bury(letter(trace="00-t"))
    buried = await letters.at(1)
    assert buried is not None
    await retry_one(letters, queue, buried)
    [(subject, frame)] = frames(jetstream)
    assert subject == NAMES.command("shop", partition_of("a-1", P))
    assert (frame.id, frame.type, frame.key, frame.remaining_ms, frame.attempt, frame.trace) == (
        "m1", "Debit", "a-1", None, 1, "00-t",
    )  # fmt: skip
    assert msgspec.msgpack.decode(frame.body) == {"cents": 1}
    [record] = jetstream.stored(QUEUE)
    head = Gate().messages(record.payload).head
    assert (head.sender, head.reply) == ("web-1", None)
    assert jetstream.stored(DLQ) == []


async def test_an_event_goes_to_the_work_queue_by_its_key(jetstream: ModelJetStream, queue: WorkQueue) -> None:
    letters = DeadLetters(jetstream, NAMES, "shop")
    await letters.bury(letter(1, type="Debited", stream=NAMES.event_stream(), subject=NAMES.event("Debited", 63)))
    await letters.bury(
        letter(2, type="Debited", stream=NAMES.event_stream(), subject=NAMES.event("Debited", 63), key=None)
    )
    await retry_many(letters, queue, lambda _: True)
    assert [(subject, frame.type) for subject, frame in frames(jetstream)] == [
        (NAMES.command("shop", partition_of("a-1", P)), "Debited"),
        (NAMES.command("shop", partition_of("m2", P)), "Debited"),
    ]


async def test_a_record_that_could_not_be_read_goes_back_as_it_is(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    subject = NAMES.command("shop", 5)
    await letters.bury(letter(reason=Reason.UNDECODABLE, body=b"\xc1\x02news", subject=subject, key=None))
    assert (await retry_many(letters, queue, lambda _: True)).done == 1
    [record] = jetstream.stored(QUEUE)
    assert (record.subject, record.payload) == (subject, b"\xc1\x02news")


async def test_a_poisoned_key_goes_back_where_it_lay(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    await letters.bury(letter(key="", subject=NAMES.command("shop", 3)))
    await retry_many(letters, queue, lambda _: True)
    assert [subject for subject, _ in frames(jetstream)] == [NAMES.command("shop", 3)]


async def test_letters_that_are_not_whole_are_left(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    await letters.bury(letter(1, missing=9))
    await letters.bury(letter(2, key="b"))
    event = {"stream": NAMES.event_stream(), "subject": NAMES.event("Debited", 1)}
    await letters.bury(letter(3, key="", **event))
    await jetstream.publish(NAMES.dead_letter("shop", "x", "y"), b"hello")
    tally = await retry_many(letters, queue, lambda _: True)
    assert (tally.done, tally.left) == (1, 2)
    assert await numbers(letters) == [1, 3, 4]
    for number, error in ((1, CannotRetryError), (3, InvalidMessageError), (4, CannotRetryError)):
        buried = await letters.at(number)
        assert buried is not None
        with pytest.raises(error):
            queued_of(buried, letters.stream, queue)


async def test_what_stays_keeps_those_behind_it(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [("a", 0), ("b", 0), ("a", 9), ("a", 0), (None, 9), (None, 0), ("c", 0), ("b", 0)]
    for number, (key, missing) in enumerate(facts, start=1):
        await letters.bury(letter(number, key=key, missing=missing))
    tally = await retry_many(letters, queue, lambda one: one.key != "c")
    assert (tally.done, tally.left, tally.behind) == (4, 2, 1)
    assert await numbers(letters) == [3, 4, 5, 7]
    tally = await retry_many(letters, queue, lambda one: one.id == "m4")
    assert (tally.done, tally.behind) == (0, 1)
    tally = await retry_many(letters, queue, lambda one: one.id == "m4", in_order=False)
    assert (tally.done, tally.behind) == (1, 0)
    monkeypatch.setattr("catga_bus.durability.letters.retrying.MAX_LANES", 1)
    with pytest.raises(CannotRetryError, match="more than 1 keys"):
        await retry_many(letters, queue, lambda _: False)


async def test_letters_of_one_key_are_retried_in_their_order(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    rng = random.Random(3)
    keys = [f"k{rng.randrange(7)}" for _ in range(300)]
    for number, key in enumerate(keys, start=1):
        await letters.bury(letter(number, key=key, subject=NAMES.command("shop", partition_of(key, P))))
    jetstream.fail("publish", *[UNKNOWN] * 3)
    jetstream.lose_answers("publish", 3)
    told: list[int] = []
    tally = await retry_many(letters, queue, lambda one: one.key != "k0", told.append)
    assert (tally.done, tally.left) == (300 - keys.count("k0"), 0)
    assert told == sorted(told)
    for key in sorted(set(keys) - {"k0"}):
        ids = [frame.id for _, frame in frames(jetstream) if frame.key == key]
        assert ids == [f"m{number}" for number, its in enumerate(keys, start=1) if its == key]
    assert await numbers(letters) == [number for number, key in enumerate(keys, start=1) if key == "k0"]


async def test_a_few_letters_at_a_time_are_in_memory(
    letters: DeadLetters, queue: WorkQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 201):
        await letters.bury(letter(number, body=msgspec.msgpack.encode(b"x" * (100 if number < 150 else 900_000))))
    sizes: list[tuple[int, int]] = []
    put_all = queue.put_all

    async def put(records: Any) -> None:
        sizes.append((len(records), sum(len(one.payload) for one in records)))
        await put_all(records)

    monkeypatch.setattr(queue, "put_all", put)
    assert (await retry_many(letters, queue, lambda _: True)).done == 200
    assert max(count for count, _ in sizes) == work_queue.BATCH_RECORDS
    assert max(size for _, size in sizes) < work_queue.BATCH_BYTES + 1_000_000


async def test_those_that_fail_again_meanwhile_are_not_retried_for_ever(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    await letters.bury(letter(1))
    await letters.bury(letter(2))
    place = iter(range(100, 200))
    real = letters.remove

    async def remove(number: int) -> bool:
        await letters.bury(letter(number, sequence=next(place)))
        return await real(number)

    letters.remove = remove  # type: ignore[method-assign]
    assert (await retry_many(letters, queue, lambda _: True)).done == 2
    assert await numbers(letters) == [3, 4]


async def test_a_full_queue_leaves_those_behind_where_they_are(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    for number in range(1, 6):
        key = "a" if number != 2 else "b"
        await letters.bury(letter(number, key=key, subject=NAMES.command("shop", partition_of(key, P))))
    full = JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded")
    room = {NAMES.command("shop", partition_of("a", P)): 2, NAMES.command("shop", partition_of("b", P)): 9}
    assert len(room) == 2
    store = jetstream.publish

    async def publish(subject: str, payload: bytes, **options: Any) -> Any:
        if not room[subject]:
            raise full
        room[subject] -= 1
        return await store(subject, payload, **options)

    jetstream.publish = publish  # type: ignore[method-assign]
    with pytest.raises(JetStreamRefusedError):
        await retry_many(letters, queue, lambda _: True)
    assert await numbers(letters) == [4, 5]
    assert sorted(frame.id for _, frame in frames(jetstream)) == ["m1", "m2", "m3"]


async def test_a_retry_that_was_cut_off_stores_nothing_twice(
    jetstream: ModelJetStream, letters: DeadLetters, queue: WorkQueue
) -> None:
    await letters.bury(letter(1))
    buried = await letters.at(1)
    assert buried is not None
    record = queued_of(buried, letters.stream, queue)
    await queue.put(record.partition, record.payload, record.message_id)  # and there it ended
    await retry_many(letters, queue, lambda _: True)
    assert len(jetstream.stored(QUEUE)) == 1
    assert await numbers(letters) == []


# -- dropping ---------------------------------------------------------------------------------------------


async def test_dropped_letters_are_gone(jetstream: ModelJetStream, letters: DeadLetters) -> None:
    for number in range(1, 5):
        await letters.bury(letter(number, type="Debit" if number % 2 else "Credit"))
    await jetstream.publish(NAMES.dead_letter("shop", "x", "y"), b"hello")
    tally = await drop_many(letters, lambda buried: buried.letter is None or buried.letter.type == "Debit")
    assert (tally.done, tally.left) == (3, 0)
    assert await numbers(letters) == [2, 4]
    assert not await letters.remove(1)
