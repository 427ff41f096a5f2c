"""Lanes against their model, which is one list of frames per key: order, nothing lost, the window, finish and drop."""

from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from catga_bus.partition.lanes import MAX_RECORD_BYTES, MAX_RECORD_FRAMES, Frame, Lanes, Record, State
from catga_bus.transport.jetstream import DeliveredMessage
from catga_bus.wire import MessageFrame

KEYS = "abcd"
NOTHING = msgspec.Raw(b"\xc0")


def make_record(sequence: int, keys: Sequence[str], size: int = 10) -> Record:
    message = DeliveredMessage("subject", bytes(size), None, "ack", sequence, sequence, 1, 0, 0.0)
    record = Record(message, "sender", None, [], len(keys))
    record.frames = [
        Frame(record, index, MessageFrame(f"{sequence}.{index}", "Type", key, None, 1, None, NOTHING), key)
        for index, key in enumerate(keys)
    ]
    return record


class LanesMachine(RuleBasedStateMachine):
    """Any order of taking, starting, pausing, ending, finishing and dropping."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: Lanes[Frame] = Lanes(max_frames=30, max_bytes=400)
        self.model: dict[str, list[Frame]] = {key: [] for key in KEYS}  # not done, in order
        self.records: list[Record] = []
        self.ghosts: dict[str, Frame] = {}
        self.sequence = 0
        self.highest = 0
        self.begun: list[Frame] = []  # in the order in which they started

    def may_start(self) -> list[Frame]:
        """The first of each key that is neither running nor behind a ghost."""
        return [
            frames[0]
            for key, frames in self.model.items()
            if frames and key not in self.ghosts and frames[0].state is not State.RUNNING
        ]

    def running(self) -> list[Frame]:
        return [frame for frames in self.model.values() for frame in frames if frame.state is State.RUNNING]

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=8), size=st.integers(1, 100))
    def take(self, keys: list[str], size: int) -> None:
        self.sequence += 1
        record = make_record(self.sequence, keys, size)
        expected = [key for key in dict.fromkeys(keys) if not self.model[key] and key not in self.ghosts]
        for frame in record.frames:
            self.model[frame.key].append(frame)
        self.records.append(record)
        assert [frame.key for frame in self.lanes.take(record)] == expected

    @precondition(lambda self: self.may_start())
    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        frame = data.draw(st.sampled_from(self.may_start()))
        assert frame.state in (State.READY, State.PAUSED)
        self.lanes.begin(frame)
        self.begun.append(frame)
        self.highest = max(self.highest, frame.record.sequence)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def pause(self, data: Any) -> None:
        data.draw(st.sampled_from(self.running())).state = State.PAUSED

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        frame = data.draw(st.sampled_from(self.running()))
        line = self.model[frame.key]
        assert line.pop(0) is frame
        following = self.lanes.end(frame)
        assert following is (line[0] if line else None)
        if not frame.record.left:
            self.records.remove(frame.record)

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def end_ghost(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.ghosts)))
        following = self.lanes.end(self.ghosts.pop(key))
        assert following is (self.model[key][0] if self.model[key] else None)

    def forget(self, kept: set[int], forgotten: list[Frame]) -> None:
        gone = [frame for frames in self.model.values() for frame in frames if frame.record.sequence not in kept]
        assert sorted(map(id, forgotten)) == sorted(map(id, gone))
        for frame in gone:
            assert frame.record.lost
            self.model[frame.key].remove(frame)
            if frame.state is State.RUNNING:
                self.ghosts[frame.key] = frame
            else:
                assert self.lanes.end(frame) is None  # what comes of it is of no interest
        self.records = [record for record in self.records if record.sequence in kept]

    @rule()
    def drop(self) -> None:
        self.forget(set(), self.lanes.drop())

    @rule(below=st.booleans())
    def finish(self, *, below: bool) -> None:
        kept = {record.sequence for record in self.records if record.begun}
        if below:
            kept |= {record.sequence for record in self.records if record.sequence < self.highest}
        while True:  # the definition, word by word
            needed = {
                other.record.sequence
                for frames in self.model.values()
                for place, frame in enumerate(frames)
                for other in frames[:place]
                if frame.record.sequence in kept
            }
            if needed <= kept:
                break
            kept |= needed
        self.forget(kept, self.lanes.finish(below=below))

    @invariant()
    def counts_are_right(self) -> None:
        assert len(self.lanes) == sum(map(len, self.model.values()))
        assert list(self.lanes.records) == [record.sequence for record in self.records]
        assert self.lanes.bytes == sum(len(record.message.payload) for record in self.records)
        assert self.lanes.highest == self.highest
        assert self.lanes.is_full == (len(self.lanes) >= 30 or self.lanes.bytes >= 400)
        assert (self.lanes.wanted == 0) == self.lanes.is_full

    @invariant()
    def only_the_first_of_a_key_may_start(self) -> None:
        for key, frames in self.model.items():
            states = [frame.state for frame in frames]
            assert states[1:] == [State.WAITING] * len(states[1:])
            if states:
                assert (states[0] is State.WAITING) == (key in self.ghosts)

    def teardown(self) -> None:
        """Run everything to its end: nothing is lost, and each key was begun in stream order."""
        for key in list(self.ghosts):
            self.lanes.end(self.ghosts.pop(key))
        while ready := self.may_start() + self.running():
            frame = ready[0]
            if frame.state is not State.RUNNING:
                self.lanes.begin(frame)
                self.begun.append(frame)
            self.model[frame.key].pop(0)
            self.lanes.end(frame)
        assert len(self.lanes) == self.lanes.bytes == 0
        assert not self.lanes.records
        for key in KEYS:
            order = [(frame.record.sequence, frame.index) for frame in self.begun if frame.key == key]
            assert order == sorted(order)


LanesMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLanes = LanesMachine.TestCase


@given(sizes=st.lists(st.tuples(st.integers(1, MAX_RECORD_FRAMES), st.integers(1, MAX_RECORD_BYTES)), min_size=1))
@settings(deadline=None)
def test_records_of_a_size_that_was_seen_exceed_the_window_by_less_than_one_record(
    sizes: list[tuple[int, int]],
) -> None:
    """Whoever asks for what is wanted, and gets records no larger than the last one, has at most one too many."""
    for frames, size in sizes:
        lanes: Lanes[Frame] = Lanes()
        sequence = 0
        for _ in range(100):  # until the size has been learnt, fewer are asked for than there is room for
            wanted = lanes.wanted
            if wanted == 0:
                break
            for _ in range(wanted):
                sequence += 1
                lanes.take(make_record(sequence, [str(number) for number in range(frames)], size))
            assert len(lanes) < 1_024 + frames
            assert lanes.bytes < 4_194_304 + size
        else:
            raise AssertionError("a hundred asks did not fill the window")


@given(st.lists(st.integers(1, MAX_RECORD_FRAMES), max_size=80))
@settings(deadline=None)
def test_whatever_the_sizes_no_more_than_64_records_are_asked_for(sizes: list[int]) -> None:
    lanes: Lanes[Frame] = Lanes()
    assert lanes.wanted == 4
    for sequence, frames in enumerate(sizes, 1):
        record = make_record(sequence, [f"{sequence}.{index}" for index in range(frames)])
        for frame in lanes.take(record):
            lanes.begin(frame)
            lanes.end(frame)
        assert 4 <= lanes.wanted <= 64


def test_small_records_are_soon_asked_for_by_the_dozen() -> None:
    lanes: Lanes[Frame] = Lanes()
    asked = []
    for sequence in range(1, 60):
        record = make_record(sequence, ["key"])
        for frame in lanes.take(record):
            lanes.begin(frame)
            lanes.end(frame)
        asked.append(lanes.wanted)
    assert asked[0] < 8
    assert asked[-1] == 64
    large = make_record(100, [str(number) for number in range(MAX_RECORD_FRAMES)])
    lanes.take(large)
    assert lanes.wanted == 3
