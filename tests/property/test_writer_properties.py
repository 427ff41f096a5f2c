"""Whatever the server does with what is written: order is kept, nothing is stored twice, every caller has one end."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from catga_bus.durability.sending.postings import (
    WINDOW_MARGIN,
    Bounds,
    Line,
    Next,
    Posting,
    Record,
    after_failure,
    pause_after,
)
from catga_bus.durability.sending.room import Room
from catga_bus.durability.sending.writer import Writer
from catga_bus.errors import CallError, Outcome
from catga_bus.result import Err, Stored
from catga_bus.transport.jetstream import (
    ApiError,
    JetStreamRefusedError,
    JetStreamUnknownError,
    JetStreamUnreachedError,
    PubAck,
)
from tests.unit.fake_streams import batch
from tests.virtual_time import clock, run

WINDOW = 30.0

ACTS = ("ack", "ack", "lost_before", "lost_after", "late", "unreached", "full", "refused", "slow")


class Server:
    """Stores records as a script says, however late, and knows the ids of what it has stored."""

    def __init__(self, script: Sequence[str]) -> None:
        self.script = list(script)
        self.stored: list[tuple[str, str]] = []  # subject and message id
        self.sequences: dict[str, int] = {}
        self.in_flight: dict[str, str] = {}
        self.late: list[asyncio.Task[None]] = []

    async def publish(self, subject: str, payload: bytes, *, message_id: str, timeout: float) -> PubAck:
        act = self.script.pop(0) if self.script else "ack"
        partition = subject.rpartition(".")[2]
        assert self.in_flight.setdefault(partition, message_id) == message_id, "a second record is on its way"
        try:
            await asyncio.sleep(0.001)
            self._refuse(act, message_id)
            if act == "lost_before":
                await asyncio.sleep(timeout)
                raise JetStreamUnknownError("no answer")
            if act == "late":
                self.late.append(asyncio.ensure_future(self._store_later(subject, payload, message_id, timeout)))
                await asyncio.sleep(timeout)
                raise JetStreamUnknownError("no answer")
            if act == "slow":
                await asyncio.sleep(timeout / 2)
            is_duplicate = message_id in self.sequences
            self._store(subject, payload, message_id)
            if act == "lost_after":
                await asyncio.sleep(timeout)
                raise JetStreamUnknownError("no answer")
            return PubAck("s", self.sequences[message_id], is_duplicate)
        except JetStreamUnreachedError:
            if message_id not in self.sequences:
                self.in_flight.pop(partition, None)  # it may come again under another id
            raise
        finally:
            if self.in_flight.get(partition) == message_id and message_id in self.sequences:
                del self.in_flight[partition]
            elif act in ("full", "refused"):
                self.in_flight.pop(partition, None)

    def _refuse(self, act: str, message_id: str) -> None:
        if act == "unreached":
            raise JetStreamUnreachedError("no leader")
        if act == "refused":
            raise JetStreamRefusedError(1, "no")
        if act == "full" and message_id not in self.sequences:
            raise JetStreamRefusedError(ApiError.STREAM_STORE_FAILED, "maximum bytes exceeded")

    def _store(self, subject: str, payload: bytes, message_id: str) -> None:
        if message_id in self.sequences:
            return
        self.sequences[message_id] = len(self.sequences) + 1
        partition = subject.rpartition(".")[2]
        self.stored += [(partition, frame.id) for frame in batch(payload).frames]

    async def _store_later(self, subject: str, payload: bytes, message_id: str, timeout: float) -> None:
        await asyncio.sleep(timeout * 1.5)
        self._store(subject, payload, message_id)

    async def stream(self, name: str) -> Any:
        return name


class Wire:
    """A transport that comes and goes."""

    def __init__(self) -> None:
        self.is_connected = True
        self.is_behind = False
        self.max_payload = 1 << 20


async def end_of(posting: Posting) -> Any:
    """Return the acceptance of a message, whether its caller waits for that or for the result."""
    while posting.decode is not None and posting.stored is None and not posting.future.done():
        await asyncio.sleep(0.001)
    if posting.stored is not None:
        return posting.stored
    end = await posting.future
    return end.error() if isinstance(end, Err) else end


call = st.tuples(
    st.integers(0, 2),  # partition
    st.sampled_from((0.0, 0.0, 0.0, 0.02, 0.3, 3.0)),  # pause before it
    st.sampled_from((0.05, 1.0, 5.0, 60.0)),  # its time-out
    st.booleans(),  # whether its caller gives up after half of it
)


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(call, min_size=1, max_size=40),
    script=st.lists(st.sampled_from(ACTS), max_size=40),
    frames=st.integers(1, 5),
    outages=st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.01, 3.0)), max_size=3),
    unanswered=st.sampled_from((0, 24, 1_000)),
)
def test_order_is_kept_nothing_comes_twice_and_every_caller_has_one_end(
    calls: list[tuple[int, float, float, bool]],
    script: list[str],
    frames: int,
    outages: list[tuple[float, float]],
    unanswered: int,
) -> None:
    run(scenario(calls, script, frames, outages, unanswered))


async def scenario(
    calls: list[tuple[int, float, float, bool]],
    script: list[str],
    frames: int,
    outages: list[tuple[float, float]],
    unanswered: int,
) -> None:
    server, wire, room = Server(script), Wire(), Room()
    rng = random.Random(0)
    writer = Writer(
        wire,  # type: ignore[arg-type]
        server,  # type: ignore[arg-type]
        room,
        unanswered=lambda: unanswered,
        sender="s",
        reply="r",
        window=WINDOW,
        draw_id=lambda: f"{rng.getrandbits(64):x}",
        clock=clock,
        rng=rng,
    )
    writer._bounds.frames = frames
    ends: dict[str, Any] = {}

    async def one(number: int, partition: int, timeout: float, gives_up: bool) -> None:
        loop = asyncio.get_running_loop()
        message_id = f"m{number}"
        frame = msgspec.msgpack.encode((message_id, "T", None, None, 1, None, None))
        decode = None if number % 2 else bytes  # every other one waits for a result, which nobody gives here
        posting = Posting(message_id, "T", f"cmd.{partition}", frame, clock() + timeout, loop.create_future(), decode)
        line = writer.line("s", partition)
        writer.post(line, posting)
        try:
            async with asyncio.timeout(timeout / 2 if gives_up else None):
                ends[message_id] = await end_of(posting)
        except TimeoutError as error:
            if not isinstance(error, CallError):
                writer.cancel(posting)
                ends[message_id] = "gave up"
            else:
                ends[message_id] = error
        except CallError as error:
            ends[message_id] = error

    async def outage(after: float, length: float) -> None:
        await asyncio.sleep(after)
        wire.is_connected = False
        await asyncio.sleep(length)
        wire.is_connected = True
        writer.reconnected()

    tasks = [asyncio.ensure_future(outage(*times)) for times in outages]
    for number, (partition, pause, timeout, gives_up) in enumerate(calls):
        await asyncio.sleep(pause)
        tasks.append(asyncio.ensure_future(one(number, partition, timeout, gives_up)))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    await writer.wait_idle()
    await asyncio.gather(*server.late)

    assert len(ends) == len(calls)
    numbers: dict[str, list[int]] = defaultdict(list)
    for partition_text, message_id in server.stored:
        numbers[partition_text].append(int(message_id[1:]))
    for stored in numbers.values():
        assert stored == sorted(set(stored)), "overtaken, or stored twice"
    there = {message_id for _, message_id in server.stored}
    for message_id, end in ends.items():
        if isinstance(end, Stored):
            assert message_id in there, "accepted and lost"
        elif isinstance(end, CallError) and end.outcome is Outcome.NOT_RUN:
            assert message_id not in there, "told that it has not run, and stored"
    assert (room.frames, room.bytes) == (0, 0)


# -- the parts ---------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 50), max_size=60), frames=st.integers(1, 9), size=st.integers(1, 120))
def test_records_hold_all_messages_in_order_within_their_bounds(sizes: list[int], frames: int, size: int) -> None:
    line = Line("s", Bounds(frames, size))
    postings = [Posting(str(n), "T", f"x.{n // 7 % 2}", b"x" * one, 1.0, None) for n, one in enumerate(sizes)]
    for posting in postings:
        line.add(posting)

    seen: list[Posting] = []
    while record := line.take(lambda: "r"):
        assert len(record.postings) <= frames
        assert len(record.postings) == 1 or record.size <= size
        assert len({posting.subject for posting in record.postings}) == 1
        seen += line.settle().postings

    assert seen == postings
    assert (len(line), line.bytes) == (0, 0)


@given(
    kinds=st.lists(st.sampled_from(["add", "take", "settle", "put_back", "cancel", "expire"]), max_size=80),
    rng=st.randoms(use_true_random=False),
)
def test_a_line_counts_what_it_holds(kinds: list[str], rng: random.Random) -> None:
    line, alive = Line("s", Bounds(3, 40)), []
    for step, kind in enumerate(kinds):
        if kind == "add":
            alive.append(Posting(str(step), "T", "x", b"x" * rng.randint(1, 30), rng.random() * 80, None))
            line.add(alive[-1])
        elif kind == "take" and line.record is None:
            line.take(lambda: "r")
        elif kind == "settle" and line.record is not None:
            for posting in line.settle().postings:
                posting.is_over = True
        elif kind == "put_back" and line.record is not None:
            line.put_back()
        elif kind == "cancel" and alive:
            line.cancel(rng.choice(alive))
        elif kind == "expire":
            line.expire(float(step))
        held = [] if line.record is None else line.record.postings
        waiting = [posting for posting in line.waiting if not posting.is_over]
        assert len(line) == len(held) + len(waiting)
        assert line.bytes == sum(len(posting.frame) for posting in [*held, *waiting])
        assert len(line.waiting) <= 2 * len(waiting) + 1, "dead entries pile up"


def test_a_record_is_not_written_again_when_the_server_may_have_forgotten_it() -> None:
    record, unknown = Record("r", 1, "x", [], 0), JetStreamUnknownError("?")
    last = WINDOW - WINDOW_MARGIN

    assert after_failure(record, JetStreamUnreachedError("!"), 0.0, 0.5, WINDOW) is Next.ANEW
    assert after_failure(record, unknown, 1.0, 1.5, WINDOW) is Next.AGAIN
    assert after_failure(record, JetStreamUnreachedError("!"), 2.0, 2.5, WINDOW) is Next.AGAIN
    assert after_failure(record, unknown, last, last + 0.9, WINDOW) is Next.AGAIN
    assert after_failure(record, unknown, last, last + 1.0, WINDOW) is Next.GIVE_UP


@given(failures=st.integers(1, 10_000), seed=st.integers())
def test_pauses_grow_and_are_bounded(failures: int, seed: int) -> None:
    assert 0.025 <= pause_after(failures, random.Random(seed)) <= 0.5
