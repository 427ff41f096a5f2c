"""Breaker, token bucket and bulkhead against models that are too simple to be wrong."""

import asyncio
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from catga_bus.resilience.breakers import Breakers
from catga_bus.resilience.bulkhead import Bulkhead, Places
from catga_bus.resilience.circuit_breaker import ORDINARY, BreakerChange, BreakerOptions, BreakerState, CircuitBreaker
from catga_bus.resilience.rate_limiter import TokenBucket
from catga_bus.result import Ok

relaxed = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no failure
)

# Steps of quarter seconds and a bucket of one second: floats add them up without loss, so that a model may compare.
steps = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 20.0])
counts = st.integers(0, 6)

ALLOWED = {("closed", "open"), ("open", "half_open"), ("half_open", "open"), ("half_open", "closed")}


class BreakerMachine(RuleBasedStateMachine):
    """A breaker under calls whose results come early, late and never."""

    @initialize(
        rate=st.sampled_from([0.25, 0.5, 1.0]),
        min_calls=st.integers(1, 6),
        probes=st.integers(1, 3),
        successes=st.integers(1, 4),
        buckets=st.sampled_from([1, 2, 5]),
    )
    def begin(self, rate: float, min_calls: int, probes: int, successes: int, buckets: int) -> None:
        self.options = BreakerOptions(
            failure_rate=rate, min_calls=min_calls, window=float(buckets), buckets=buckets,
            open_seconds=2.0, max_open_seconds=8.0, probes=probes, successes=successes,
        )  # fmt: skip
        self.now = 1_000.0
        self.changes: list[BreakerChange] = []
        self.breaker = CircuitBreaker(self.options, self.now, on_change=self._changed)
        self.results: list[tuple[float, int, int]] = []  # all that was recorded since the window was last cleared
        self.calls: list[float] = []  # in flight: when each was let through
        self.probes: dict[int, float] = {}  # in flight in this phase
        self.old_probes: list[int] = []  # in flight, of phases that are over
        self.good = 0
        self.closed_at = float("-inf")

    def _changed(self, change: BreakerChange) -> None:
        self.changes.append(change)
        self.old_probes += self.probes
        self.probes, self.good = {}, 0
        if change.after is BreakerState.CLOSED:
            self.results.clear()
            self.closed_at = change.at

    def _bucket(self, instant: float) -> int:
        return int(instant - 1_000.0)

    def _in_window(self) -> tuple[int, int]:
        oldest = self._bucket(self.now) - self.options.buckets
        inside = [result for result in self.results if self._bucket(result[0]) > oldest]
        return sum(one[1] for one in inside), sum(one[2] for one in inside)

    @rule(seconds=steps)
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def call(self) -> None:
        before, free = self.breaker.state, self._free_slots()
        allowed = self.breaker.allow(self.now)
        if before is BreakerState.CLOSED:
            assert allowed == ORDINARY
            self.calls.append(self.now)
            return
        if before is BreakerState.OPEN:
            opened = self.changes[-1] if self.breaker.state is BreakerState.OPEN else self.changes[-2]
            assert (allowed is None) == (self.now < opened.at + opened.open_seconds)
        else:
            assert (allowed is None) == (free == 0)
        if allowed is not None:
            assert allowed not in self.probes
            assert allowed not in self.old_probes
            self.probes[allowed] = self.now

    def _free_slots(self) -> int:
        young = [at for at in self.probes.values() if self.now < at + self.options.open_seconds]
        return self.options.probes - len(young)

    @rule(successes=counts, failures=counts)
    def record(self, successes: int, failures: int) -> None:
        before = self.breaker.state
        self.results.append((self.now, successes, failures))
        ok, failed = self._in_window()
        self.breaker.record(self.now, successes, failures)
        is_bad = ok + failed >= self.options.min_calls and failed >= (ok + failed) * self.options.failure_rate
        trips = before is BreakerState.CLOSED and failures > 0 and is_bad
        assert self.breaker.state is (BreakerState.OPEN if trips else before)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), succeeded=st.booleans())
    def end_a_call(self, data: Any, *, succeeded: bool) -> None:
        """A call that was let through ends, however long ago that was: a trip has dropped none."""
        admitted = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        before = self.breaker.state
        if admitted >= self.closed_at:
            self.results.append((self.now, int(succeeded), int(not succeeded)))
        self.breaker.record(self.now, int(succeeded), int(not succeeded), admitted=admitted)
        assert self.breaker.state in (before, BreakerState.OPEN)

    @precondition(lambda self: self.probes)
    @rule(data=st.data(), succeeded=st.sampled_from([True, True, False, None]))
    def end_a_probe(self, data: Any, succeeded: bool | None) -> None:
        probe = data.draw(st.sampled_from(sorted(self.probes)))
        good = self.good + (succeeded is True)
        expected = BreakerState.HALF_OPEN
        if succeeded is False:
            expected = BreakerState.OPEN
        elif good >= self.options.successes:
            expected = BreakerState.CLOSED
        del self.probes[probe]
        self.breaker.end_probe(probe, self.now, succeeded=succeeded)
        if expected is BreakerState.HALF_OPEN:
            self.good = good
        assert self.breaker.state is expected

    @precondition(lambda self: self.old_probes)
    @rule(succeeded=st.sampled_from([True, False, None]))
    def end_a_probe_of_an_earlier_phase(self, succeeded: bool | None) -> None:
        before = self.breaker.snapshot(self.now)
        self.breaker.end_probe(self.old_probes.pop(), self.now, succeeded=succeeded)
        assert self.breaker.snapshot(self.now) == before

    @invariant()
    def only_the_four_changes_happen_and_each_begins_where_the_last_one_ended(self) -> None:
        path = [(str(change.before), str(change.after)) for change in self.changes]
        assert set(path) <= ALLOWED
        assert [before for before, _ in path[1:]] == [after for _, after in path[:-1]]
        assert self.breaker.is_closed == (self.breaker.state is BreakerState.CLOSED)

    @invariant()
    def the_window_is_that_of_the_model(self) -> None:
        seen = self.breaker.snapshot(self.now)
        assert (seen.successes, seen.failures) == self._in_window()
        assert seen.trips == sum(change.after is BreakerState.OPEN for change in self.changes)

    @invariant()
    def no_more_probes_hold_a_slot_than_there_are(self) -> None:
        young = [at for at in self.probes.values() if self.now < at + self.options.open_seconds]
        assert len(young) <= self.options.probes


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = relaxed


class BreakersMachine(RuleBasedStateMachine):
    """The table under more keys than it holds."""

    keys = st.tuples(st.sampled_from("ABCDE"), st.none())

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.now = 0.0
        self.breakers = Breakers(BreakerOptions(min_calls=2, open_seconds=2.0, probes=1, successes=1), limit=limit)
        self.must_stay_open: dict[tuple[str, None], float] = {}
        self.probes: dict[tuple[str, None], int] = {}

    @rule(seconds=steps)
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=keys, count=st.integers(1, 3))
    def fail(self, key: tuple[str, None], count: int) -> None:
        self.breakers.failed(key, self.now, count)
        self._note(key)

    @rule(key=keys, count=st.integers(1, 3))
    def succeed(self, key: tuple[str, None], count: int) -> None:
        self.breakers.succeeded(key, self.now, count)

    @rule(key=keys)
    def call(self, key: tuple[str, None]) -> None:
        allowed = self.breakers.allow(key, self.now)
        if self.must_stay_open.get(key, 0.0) > self.now:
            assert allowed is None
        if allowed:
            self.probes[key] = allowed

    @precondition(lambda self: self.probes)
    @rule(succeeded=st.sampled_from([True, False, None]))
    def end_a_probe(self, succeeded: bool | None) -> None:
        key, probe = self.probes.popitem()
        self.breakers.end_probe(key, probe, self.now, succeeded=succeeded)
        self._note(key)

    @rule()
    def forget(self) -> None:
        self.breakers.forget_quiet(self.now)

    def _note(self, key: tuple[str, None]) -> None:
        breaker = self.breakers.by_key.get(key)
        if breaker is not None and breaker.state is BreakerState.OPEN:
            self.must_stay_open.setdefault(key, breaker.half_open_at)
            self.must_stay_open[key] = max(self.must_stay_open[key], breaker.half_open_at)

    @invariant()
    def it_is_bounded_and_knows_what_is_open(self) -> None:
        by_key = self.breakers.by_key
        assert len(by_key) <= self.limit
        assert len(self.breakers._calm) <= self.limit
        assert not by_key.keys() & self.breakers._calm.keys()
        assert self.breakers.open_keys == {key for key, breaker in by_key.items() if not breaker.is_closed}

    @invariant()
    def what_has_to_stay_open_is_open(self) -> None:
        for key, until in self.must_stay_open.items():
            if until > self.now:
                assert key in self.breakers.open_keys


TestBreakers = BreakersMachine.TestCase
TestBreakers.settings = relaxed


@relaxed
@given(
    rate=st.floats(0.1, 1_000.0),
    burst=st.integers(1, 20),
    gaps=st.lists(st.floats(0.0, 0.5) | st.just(0.0), max_size=150),
    returned=st.sets(st.integers(0, 149), max_size=20),
)
def test_in_any_stretch_of_time_no_more_is_taken_than_burst_and_rate_allow(
    rate: float, burst: int, gaps: list[float], returned: set[int]
) -> None:
    now = 0.0
    bucket = TokenBucket(rate, burst, now)
    used: list[float] = []
    for index, gap in enumerate(gaps):
        now += gap
        if not bucket.take(now):
            assert bucket.seconds_until(1, now) > 0.0
        elif index in returned:
            bucket.give_back()
        else:
            used.append(now)
    for first in range(len(used)):
        for last in range(first, len(used)):
            allowed = burst + rate * (used[last] - used[first])
            assert last - first + 1 <= allowed * (1 + 1e-9) + 1e-6


@relaxed
@given(rate=st.floats(0.1, 1_000.0), burst=st.integers(1, 5), ahead=st.integers(1, 30))
def test_who_waits_as_long_as_it_is_told_gets_its_token_and_not_before(rate: float, burst: int, ahead: int) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    while bucket.take(0.0):
        pass
    for place in range(1, ahead + 1):
        due = bucket.seconds_until(1, (place - 1) / rate)
        assert abs(due - 1 / rate) < 1e-6
        assert not bucket.take((place - 0.01) / rate)
        assert bucket.take(place / rate)


class PlacesMachine(RuleBasedStateMachine):
    """The places of a bulkhead."""

    @initialize(running=st.integers(1, 3), waiting=st.integers(0, 4))
    def begin(self, running: int, waiting: int) -> None:
        self.limits = (running, waiting)
        self.places: Places[int] = Places(running, waiting)
        self.inside: set[int] = set()
        self.line: list[int] = []
        self.count = 0

    @rule()
    def come(self) -> None:
        self.count += 1
        if self.places.enter():
            assert not self.line  # nobody is overtaken
            self.inside.add(self.count)
        elif self.places.queue(self.count):
            assert len(self.inside) == self.limits[0]
            self.line.append(self.count)
        else:
            assert len(self.line) == self.limits[1]

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        self.inside.remove(data.draw(st.sampled_from(sorted(self.inside))))
        heir = self.places.leave()
        assert heir == (self.line.pop(0) if self.line else None)
        if heir is not None:
            self.inside.add(heir)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def give_up(self, data: Any) -> None:
        who = data.draw(st.sampled_from(self.line))
        self.line.remove(who)
        self.places.give_up(who)
        self.places.give_up(who)

    @invariant()
    def it_is_as_full_as_the_model(self) -> None:
        assert self.places.running == len(self.inside) <= self.limits[0]
        assert list(self.places.waiting) == self.line
        assert len(self.line) <= self.limits[1]


TestPlaces = PlacesMachine.TestCase
TestPlaces.settings = relaxed


class Endless:
    """A context without a deadline."""

    remaining = float("inf")


@relaxed
@given(
    running=st.integers(1, 3),
    waiting=st.integers(0, 4),
    moves=st.lists(
        st.tuples(st.sampled_from(["come", "come", "end", "cancel", "turn"]), st.integers(0, 20)), max_size=40
    ),
)
def test_whatever_ends_or_is_cancelled_a_bulkhead_keeps_its_bounds_and_its_order_and_leaks_nothing(
    running: int, waiting: int, moves: list[tuple[str, int]]
) -> None:
    asyncio.run(_bulkhead_keeps_its_promises(running, waiting, moves))


async def _bulkhead_keeps_its_promises(running: int, waiting: int, moves: list[tuple[str, int]]) -> None:
    bulkhead = Bulkhead(max_running=running, max_waiting=waiting)
    inside: dict[int, asyncio.Future[Any]] = {}
    begun: list[int] = []

    async def work(number: int) -> Any:
        begun.append(number)
        inside[number] = asyncio.get_running_loop().create_future()
        assert len(inside) <= running
        try:
            return await inside[number]
        finally:
            del inside[number]

    tasks: list[asyncio.Task[Any]] = []
    for move, which in moves:
        if move == "come":
            tasks.append(asyncio.create_task(bulkhead(len(tasks), Endless(), work)))  # type: ignore[arg-type]
        elif move == "end" and inside:
            future = list(inside.values())[which % len(inside)]
            if not future.done():
                future.set_result(Ok(1))
        elif move == "cancel" and tasks:
            tasks[which % len(tasks)].cancel()
        else:
            for _ in range(which % 3):
                await asyncio.sleep(0)
        statistics = bulkhead.statistics()
        assert statistics.running <= running
        assert statistics.waiting <= waiting
    assert begun == sorted(begun)
    for _ in range(20 * len(tasks)):
        for future in inside.values():
            if not future.done():
                future.set_result(Ok(1))
        await asyncio.sleep(0)
    assert all(task.done() for task in tasks)
    statistics = bulkhead.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
