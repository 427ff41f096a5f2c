"""The writing side of streams in virtual time: what happens when nothing is known for minutes."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from catga_bus.durability.sending.deadlines import Deadlines
from catga_bus.durability.sending.holds import SECONDS, worth_waiting_for
from catga_bus.durability.sending.postings import Line, Posting
from catga_bus.durability.sending.room import Room
from catga_bus.durability.sending.writer import Writer
from catga_bus.errors import CallError, Outcome, OverloadedError
from catga_bus.transport.jetstream import JetStreamUnknownError, PubAck
from tests.unit.fake_streams import FakeStreams, batch
from tests.virtual_time import clock, run

WINDOW = 120.0


class Wire:
    """A transport that comes and goes, and may be behind."""

    def __init__(self) -> None:
        self.is_connected = True
        self.is_behind = False
        self.max_payload = 1 << 20
        self.writable = asyncio.Event()

    async def wait_writable(self) -> None:
        await self.writable.wait()
        self.is_behind = False


class Desk:
    """A writer on streams that do as told."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.streams = FakeStreams()
        self.room = Room()
        self.unanswered = 0
        rng = random.Random(1)
        self.writer = Writer(
            self.wire,  # type: ignore[arg-type]
            self.streams,  # type: ignore[arg-type]
            self.room,
            unanswered=lambda: self.unanswered,
            sender="s",
            reply="r",
            window=WINDOW,
            draw_id=lambda: f"{rng.getrandbits(64):x}",
            clock=clock,
            rng=rng,
        )

    def post(
        self, message_id: str, timeout: float = 5.0, size: int = 0, partition: int = 0, decode: Any = None
    ) -> Posting:
        """Send a message and return it."""
        frame = msgspec.msgpack.encode((message_id, "T", None, None, 1, None, "x" * size))
        future = asyncio.get_running_loop().create_future()
        posting = Posting(message_id, "T", f"cmd.{partition}", frame, clock() + timeout, future, decode)
        self.writer.post(self.writer.line("s", partition), posting)
        return posting

    def sizes(self) -> list[int]:
        """Return how many messages each record has."""
        return [len(batch(message.payload).frames) for message in self.streams.stored]

    def stored(self) -> list[str]:
        return [frame.id for message in self.streams.stored for frame in batch(message.payload).frames]


async def end_of(posting: Posting) -> Any:
    """Return what a message came to."""
    try:
        return await posting.future
    except CallError as error:
        return error


def test_a_record_is_given_up_before_the_server_forgets_it_and_what_waited_with_it() -> None:
    async def main() -> None:
        desk = Desk()

        async def lose(*_: Any) -> None:
            await asyncio.sleep(2.0)
            raise JetStreamUnknownError("no answer")

        desk.streams.act = lose
        began = clock()
        first = desk.post("m1", timeout=600.0)
        await asyncio.sleep(1.0)
        second = desk.post("m2", timeout=600.0)

        errors = [await end_of(first), await end_of(second)]

        assert [error.outcome for error in errors] == [Outcome.UNKNOWN, Outcome.NOT_RUN]
        assert WINDOW - 8.0 < clock() - began < WINDOW
        assert len(set(desk.streams.written)) == 1
        desk.streams.act = None
        assert (await end_of(desk.post("m3"))).sequence == 1
        assert desk.writer.statistics().abandoned == 1
        assert (desk.room.frames, desk.room.bytes) == (0, 0)

    run(main())


def test_without_a_connection_nothing_is_written_and_nothing_is_unknown() -> None:
    async def main() -> None:
        desk = Desk()
        desk.wire.is_connected = False
        late, patient = desk.post("m1", timeout=1.0), desk.post("m2", timeout=60.0)

        error = await end_of(late)
        assert (error.outcome, error.retryable, error.attempts) == (Outcome.NOT_RUN, True, 0)
        assert "there was no connection" in str(error)
        desk.wire.is_connected = True
        desk.writer.reconnected()

        await patient.future
        assert desk.stored() == ["m2"]

    run(main())


def test_a_reconnect_ends_the_pause_between_attempts() -> None:
    async def main() -> None:
        desk = Desk()
        desk.wire.is_connected = False
        posting = desk.post("m1", timeout=60.0)
        await asyncio.sleep(20.0)  # pauses are at their longest
        desk.wire.is_connected = True
        began = clock()
        desk.writer.reconnected()

        await posting.future
        assert clock() - began < 0.01

    run(main())


def test_nothing_is_written_while_the_connection_is_behind() -> None:
    async def main() -> None:
        desk = Desk()
        desk.wire.is_behind = True
        posting = desk.post("m1", timeout=600.0)
        await asyncio.sleep(60.0)
        assert not desk.streams.written
        desk.wire.writable.set()

        await posting.future
        assert desk.stored() == ["m1"]

    run(main())


def test_a_server_that_takes_less_makes_smaller_records() -> None:
    async def main() -> None:
        desk = Desk()
        desk.wire.max_payload = 4_000
        desk.writer.reconnected()

        postings = [desk.post(f"m{n}", size=900) for n in range(8)]
        for posting in postings:
            await posting.future

        sizes = [len(batch(message.payload).frames) for message in desk.streams.stored]
        assert sizes == [2, 2, 2, 2]

    run(main())


def test_a_stream_that_stands_still_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        desk = Desk()
        stuck = asyncio.Event()

        async def hold(streams: FakeStreams, _: str) -> None:
            if streams.in_flight.get("cmd.0"):
                await stuck.wait()

        desk.streams.act = hold
        first = desk.post("m1", partition=1)
        await first.future
        held = desk.post("m0", timeout=600.0, partition=0)
        await asyncio.sleep(0.1)
        desk.streams.act = None
        await asyncio.gather(*(desk.post(f"n{n}", partition=1).future for n in range(10)))
        assert not held.future.done()
        stuck.set()
        await held.future

    run(main())


def test_what_breaks_the_writing_of_a_line_ends_its_callers_and_not_the_line(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        desk = Desk()

        async def broken(*_: Any) -> None:
            raise ZeroDivisionError

        desk.streams.act = broken
        first, second = desk.post("m1", timeout=600.0), desk.post("m2", timeout=600.0)
        for posting in (first, second):
            assert isinstance(await end_of(posting), CallError)
        desk.streams.act = None
        await desk.post("m3").future
        assert desk.stored() == ["m3"]

    with caplog.at_level(logging.ERROR):
        run(main())
    assert "cannot be written any more" in caplog.text


def test_many_deadlines_cost_one_timer() -> None:
    async def main() -> None:
        desk = Desk()
        desk.wire.is_connected = False
        postings = [desk.post(f"m{n}", timeout=1.0 + n * 0.001, partition=n % 4) for n in range(2_000)]
        began = clock()

        for posting in postings:
            assert (await end_of(posting)).outcome is Outcome.NOT_RUN
        assert 2.9 < clock() - began < 3.2
        assert (desk.room.frames, desk.room.bytes) == (0, 0)

    run(main())


# -- deadlines ---------------------------------------------------------------------------------------------


def test_a_blocked_loop_reads_before_it_ends_calls_but_not_twice_in_a_row() -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        swept: list[float] = []
        deadlines = Deadlines(lambda now: swept.append(now) or float("inf"), clock)  # type: ignore[func-returns-value]
        deadlines.watch(clock() + 1.0)
        loop.now += 5.0  # the loop was blocked

        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not swept
        loop.now += 5.0  # and again
        await asyncio.sleep(0.1)
        assert len(swept) == 1

    run(main())


def test_no_timer_is_left_when_nothing_is_watched() -> None:
    async def main() -> None:
        desk = Desk()
        await desk.post("m1").future
        await asyncio.sleep(60.0)
        handles: Callable[[], list[Any]] = lambda: list(asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]  # noqa: E731
        assert not [handle for handle in handles() if not handle.cancelled()]

    run(main())


# -- room --------------------------------------------------------------------------------------------------


def waiting_line(count: int = 0) -> Line:
    line = Desk().writer.line("s", 0)
    for number in range(count):
        line.add(Posting(str(number), "T", "x", b"x", 1.0, None))
    return line


def test_callers_are_let_in_as_they_came_however_often_room_comes_and_goes() -> None:
    async def main() -> None:
        room, line = Room(frames=3), waiting_line()
        order: list[int] = []

        async def enter(number: int) -> None:
            if not room.has(line):
                await room.wait(line, 60.0)
            order.append(number)
            room.take(1)

        tasks = []
        for number in range(40):
            tasks.append(asyncio.ensure_future(enter(number)))
            await asyncio.sleep(0)
            if number % 5 == 0:
                room.give(min(2, room.frames), min(2, room.bytes))
        while len(order) < 40:
            room.give(room.frames, room.bytes)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert order == list(range(40))

    run(main())


def test_a_caller_that_gives_up_makes_room_for_the_next() -> None:
    async def main() -> None:
        room, line = Room(frames=1), waiting_line()
        room.take(1)
        first = asyncio.ensure_future(room.wait(line, 60.0))
        second = asyncio.ensure_future(room.wait(line, 60.0))
        await asyncio.sleep(0)
        room.give(1, 1)  # lets both in: what they take is not known yet
        first.cancel()
        await asyncio.wait({first, second})
        assert second.result() is None
        third = asyncio.ensure_future(room.wait(line, 60.0))
        await third
        assert room.has(line)

    run(main())


def test_too_many_callers_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("catga_bus.durability.sending.room.MAX_CALLERS", 2)
        room, line = Room(frames=1), waiting_line()
        room.take(1)
        waiting = [asyncio.ensure_future(room.wait(line, 1.0)) for _ in range(2)]
        await asyncio.sleep(0)
        began = clock()
        with pytest.raises(OverloadedError, match="2 callers wait already"):
            await room.wait(line, 60.0)
        assert clock() == began
        for ended in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(ended, OverloadedError)

    run(main())


def test_an_acknowledgement_says_where_each_message_lies() -> None:
    async def main() -> None:
        desk = Desk()

        async def publish(*_: Any, **__: Any) -> PubAck:
            return PubAck("catga-cmd-x", 77)

        desk.streams.publish = publish  # type: ignore[method-assign]
        stored = [await posting.future for posting in [desk.post("a"), desk.post("b")]]
        assert [(one.stream, one.sequence, one.index) for one in stored] == [
            ("catga-cmd-x", 77, 0),
            ("catga-cmd-x", 77, 1),
        ]

    run(main())


# -- larger records ----------------------------------------------------------------------------------------


def test_a_line_with_many_on_their_way_gathers_half_as_many_for_its_next_record() -> None:
    async def main() -> None:
        desk = Desk()
        desk.unanswered = 64
        desk.post("m0", decode=bytes)
        await until_stored(desk, 1)
        for number in range(1, 32):
            desk.post(f"m{number}", decode=bytes)
        await turns(20)
        assert desk.sizes() == [1], "there are 31, and 32 are worth waiting for"
        desk.post("m32", decode=bytes)
        await turns(20)
        assert desk.sizes() == [1, 32]

    run(main())


def test_what_is_gathered_is_written_after_two_milliseconds_at_most() -> None:
    async def main() -> None:
        desk = Desk()
        desk.unanswered = 64
        desk.post("m0", decode=bytes)
        await until_stored(desk, 1)
        desk.post("m1", decode=bytes)
        began = clock()
        await until_stored(desk, 2)
        assert 0.0 < clock() - began <= 2 * SECONDS
        await asyncio.sleep(10 * SECONDS)
        desk.post("m2", decode=bytes)
        await turns(20)
        assert desk.sizes() == [1, 1, 1], "nothing waits for long after the last record"

    run(main())


@pytest.mark.parametrize(("unanswered", "decode"), [(7, bytes), (0, None)])
def test_nothing_is_gathered_by_who_has_few_on_their_way(unanswered: int, decode: Any) -> None:
    async def main() -> None:
        desk = Desk()
        desk.unanswered = unanswered
        for number in range(3):
            desk.post(f"m{number}", decode=decode)
            await turns(20)
        assert desk.sizes() == [1, 1, 1]

    run(main())


def test_who_waits_until_all_is_written_does_not_wait_for_more() -> None:
    async def main() -> None:
        desk = Desk()
        desk.unanswered = 64
        desk.post("m0", decode=bytes)
        await until_stored(desk, 1)
        last = desk.post("m1", decode=bytes)
        began = clock()
        await desk.writer.wait_idle()
        assert last.stored is not None
        assert clock() - began < SECONDS

    run(main())


def test_who_waits_until_all_is_written_waits_for_what_is_gathered_meanwhile_too() -> None:
    async def main() -> None:
        desk = Desk()
        desk.unanswered = 64
        written = asyncio.Event()

        async def slow(_: FakeStreams, __: str) -> None:
            await written.wait()

        desk.streams.act = slow
        desk.post("m0", decode=bytes)
        await turns(5)
        last = desk.post("m1", decode=bytes)
        waiting = asyncio.ensure_future(desk.writer.wait_idle())
        await turns(5)
        written.set()
        await waiting
        assert last.stored is not None

    run(main())


@pytest.mark.parametrize("decode", [None, bytes])
def test_what_waits_for_a_connection_that_is_behind_is_not_written_after_its_deadline(decode: Any) -> None:
    async def main() -> None:
        desk = Desk()
        desk.wire.is_behind = True
        posting = desk.post("m0", timeout=1.0, decode=decode)
        given_up = desk.post("m1", timeout=60.0, decode=decode)
        end = await end_of(posting)
        assert (end.code, end.outcome) == ("TIMEOUT", Outcome.NOT_RUN)
        desk.writer.cancel(given_up)
        desk.wire.writable.set()
        await desk.writer.wait_idle()
        assert desk.stored() == []
        assert (desk.room.frames, desk.room.bytes) == (0, 0)

    run(main())


def test_what_is_gathered_ends_with_the_bus_and_at_its_deadline() -> None:
    async def main() -> None:
        desk = Desk()
        desk.unanswered = 64
        desk.post("m0", decode=bytes)
        await until_stored(desk, 1)
        held = desk.post("m1", decode=bytes)
        await desk.writer.close()
        end = await end_of(held)
        assert (end.code, end.outcome) == ("DISCONNECTED", Outcome.NOT_RUN)
        assert (desk.room.frames, desk.room.bytes) == (0, 0)

    run(main())


@pytest.mark.parametrize(
    ("on_way", "lines", "wanted"),
    [(0, 1, 0), (7, 1, 0), (8, 1, 4), (1_024, 16, 32), (1_024, 256, 0), (65_536, 16, 128)],
)
def test_half_of_what_a_line_has_on_its_way_is_worth_waiting_for(on_way: int, lines: int, wanted: int) -> None:
    assert worth_waiting_for(on_way, lines) == wanted


async def turns(count: int) -> None:
    """Let the loop turn without letting time pass."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until_stored(desk: Desk, records: int) -> None:
    """Wait until so many records are stored, and their acknowledgements have been taken."""
    while len(desk.streams.stored) < records:
        await asyncio.sleep(0.0001)
    await turns(5)
