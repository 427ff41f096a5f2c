"""The decisions about a call that was not answered."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from catga_bus.errors import Code, Outcome
from catga_bus.requests import attempts
from catga_bus.requests.attempts import Phase, Progress, Step, Verdict
from catga_bus.requests.budget import RetryBudget


def sent(**facts: object) -> Progress:
    return Progress(**({"phase": Phase.SENT, "attempt": 1} | facts))  # type: ignore[arg-type]


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


def test_a_subject_without_listeners_is_tried_again_for_a_second_and_then_given_up(rng: random.Random) -> None:
    call = sent()
    assert attempts.after_no_responders(call, 10.0, -math.inf, rng) is None
    assert call.phase is Phase.WAITING
    assert 10.05 <= call.due <= 10.15
    assert attempts.after_no_responders(call, 10.99, -math.inf, rng) is None
    verdict = attempts.after_no_responders(call, 11.0, -math.inf, rng)
    assert verdict is not None
    assert (verdict.code, verdict.outcome) == (Code.NO_HANDLER, Outcome.NOT_RUN)


def test_patience_is_longer_after_the_callers_own_reconnect(rng: random.Random) -> None:
    call = sent()
    assert attempts.after_no_responders(call, 10.0, 9.0, rng) is None
    assert attempts.after_no_responders(call, 11.9, 9.0, rng) is None
    assert attempts.after_no_responders(call, 12.0, 9.0, rng) is not None


def test_a_busy_call_is_retried_twice_and_then_overloaded(rng: random.Random) -> None:
    call, budget = sent(), RetryBudget(0.0)
    assert attempts.after_busy(call, 1.0, "a", budget, rng) is None
    assert attempts.after_busy(call, 2.0, "b", budget, rng) is None
    verdict = attempts.after_busy(call, 3.0, "c", budget, rng)
    assert verdict is not None
    assert (verdict.code, verdict.outcome) == (Code.OVERLOADED, Outcome.NOT_RUN)


def test_a_busy_call_is_not_retried_without_budget(rng: random.Random) -> None:
    budget = RetryBudget(0.0)
    while budget.take(0.0):
        pass
    verdict = attempts.after_busy(sent(), 0.0, "a", budget, rng)
    assert verdict is not None
    assert verdict.code is Code.OVERLOADED


def test_what_was_written_before_a_disconnect_may_have_run() -> None:
    call = sent()
    attempts.after_disconnect(call)
    verdict = attempts.after_deadline(call, connected=True)
    assert (verdict.code, verdict.outcome) == (Code.TIMEOUT, Outcome.UNKNOWN)


def test_a_waiting_call_has_not_run_when_the_connection_goes(rng: random.Random) -> None:
    call = sent()
    attempts.after_no_responders(call, 1.0, -math.inf, rng)
    attempts.after_disconnect(call)
    assert call.phase is Phase.UNSENT
    assert call.due == math.inf
    verdict = attempts.after_deadline(call, connected=False)
    assert (verdict.code, verdict.outcome) == (Code.DISCONNECTED, Outcome.NOT_RUN)


@pytest.mark.parametrize(
    ("phase", "idempotent", "after"),
    [
        (Phase.UNSENT, False, Phase.UNSENT),
        (Phase.UNSENT, True, Phase.UNSENT),
        (Phase.SENT, True, Phase.UNSENT),
        (Phase.SENT, False, Phase.SENT),
        (Phase.WAITING, False, Phase.UNSENT),
    ],
)
def test_after_a_disconnect_only_what_may_run_twice_or_never_left_is_unsent(
    phase: Phase, idempotent: bool, after: Phase
) -> None:
    call = sent(phase=phase, idempotent=idempotent)
    attempts.after_disconnect(call)
    assert call.phase is after
    assert call.maybe_ran is (phase is Phase.SENT)


def test_what_was_held_and_never_left_has_not_run() -> None:
    call = sent()
    attempts.after_held(call)
    assert (call.phase, call.attempt) == (Phase.UNSENT, 0)
    attempts.after_disconnect(call)
    assert attempts.after_deadline(call, connected=False).outcome is Outcome.NOT_RUN
    assert attempts.after_deadline(call, connected=True).outcome is Outcome.NOT_RUN


def test_a_node_that_cannot_read_it_says_nothing_about_earlier_attempts() -> None:
    assert attempts.after_invalid(sent()) is Outcome.NOT_RUN
    assert attempts.after_invalid(sent(maybe_ran=True)) is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("facts", "connected", "code", "outcome"),
    [
        ({}, True, Code.TIMEOUT, Outcome.UNKNOWN),
        ({}, False, Code.DISCONNECTED, Outcome.UNKNOWN),
        ({"phase": Phase.UNSENT}, False, Code.DISCONNECTED, Outcome.NOT_RUN),
        ({"phase": Phase.UNSENT, "maybe_ran": True}, False, Code.DISCONNECTED, Outcome.UNKNOWN),
        ({"phase": Phase.WAITING}, True, Code.OVERLOADED, Outcome.NOT_RUN),
        ({"phase": Phase.WAITING, "unheard_since": 3.0}, True, Code.NO_HANDLER, Outcome.NOT_RUN),
        ({"phase": Phase.WAITING, "maybe_ran": True}, True, Code.TIMEOUT, Outcome.UNKNOWN),
    ],
)
def test_the_deadline_says_what_is_known(facts: dict, connected: bool, code: Code, outcome: Outcome) -> None:
    verdict = attempts.after_deadline(sent(**facts), connected=connected)
    assert (verdict.code, verdict.outcome) == (code, outcome)


def test_an_expired_call_did_not_run_unless_an_earlier_attempt_may_have() -> None:
    for facts, outcome in (({}, Outcome.NOT_RUN), ({"maybe_ran": True}, Outcome.UNKNOWN)):
        verdict = attempts.after_expired(sent(deadline=1.0, **facts), 1.0, "a")
        assert verdict is not None
        assert (verdict.code, verdict.outcome) == (Code.TIMEOUT, outcome)


def test_a_call_that_expired_early_because_its_node_stood_still_goes_elsewhere_at_once() -> None:
    call = sent(deadline=2.0)
    assert attempts.after_expired(call, 1.0, "a") is None
    assert (call.phase, call.due, call.avoid) == (Phase.WAITING, 1.0, ("a",))


# -- silence, acceptance and death -----------------------------------------------------------------------------


def silence(call: Progress, now: float, *, budget: RetryBudget | None = None, deaths: int = 0) -> Step:
    return attempts.after_silence(call, now, budget or RetryBudget(0.0), deaths)


def test_a_silent_attempt_is_given_up_twice_and_then_waited_for() -> None:
    call = sent(deadline=10.0)
    for attempt, node in ((2, "b"), (3, "c")):
        assert silence(call, attempt * 0.25) is Step.WRITE
        attempts.after_write(call, attempt * 0.25, 0.25, node)
        assert (call.attempt, call.node, call.due) == (attempt, node, attempt * 0.25 + 0.25)
    assert silence(call, 1.0) is Step.STAY
    assert call.due == math.inf
    assert call.avoid == ("b",)  # who had the first attempt is not known


def test_silence_is_charged_to_the_budget() -> None:
    budget = RetryBudget(0.0)
    while budget.take(0.0):
        pass
    call = sent(deadline=10.0)
    assert silence(call, 0.0, budget=budget) is Step.STAY
    assert (call.maybe_ran, call.due) == (False, attempts.RETRY_DELAY)
    assert silence(call, 11.0, budget=budget) is Step.WRITE


@pytest.mark.parametrize("facts", [{"idempotent": False}, {"is_bound": True, "node": "a"}])
def test_what_must_not_run_twice_or_elsewhere_is_never_sent_again_for_silence(facts: dict) -> None:
    call = sent(deadline=10.0, **facts)
    assert silence(call, 0.25) is Step.STAY
    assert call.due == math.inf


def test_a_call_that_a_node_has_is_asked_after_for_as_long_as_it_takes() -> None:
    call = sent(deadline=100.0)
    attempts.after_accepted(call, 0.01, "a")
    for second in range(1, 60):
        assert call.due == pytest.approx(second + 0.01)
        assert silence(call, second + 0.01) is Step.ASK
        attempts.after_accepted(call, second + 0.01, "a")  # it says that it has it
    assert (call.attempt, call.retries) == (1, 0)


def test_a_node_that_leaves_questions_unanswered_is_left() -> None:
    call = sent(deadline=100.0)
    attempts.after_accepted(call, 0.0, "a")
    assert [silence(call, now) for now in (1.0, 2.0, 3.0)] == [Step.ASK, Step.ASK, Step.WRITE]
    assert (call.avoid, call.maybe_ran, call.retries) == (("a",), True, 1)


def test_a_node_that_says_that_it_stands_still_is_waited_for() -> None:
    call, budget = sent(deadline=100.0), RetryBudget(0.0)
    attempts.after_accepted(call, 0.0, "a")
    for second in range(1, 9):
        assert attempts.after_silence(call, float(second), budget, 0, stalled=True) is Step.ASK


@pytest.mark.parametrize("facts", [{"idempotent": False}, {"is_bound": True}])
def test_what_must_not_run_twice_or_elsewhere_is_asked_after_to_the_end(facts: dict) -> None:
    call = sent(deadline=100.0, **facts)
    attempts.after_accepted(call, 0.0, "a")
    assert {silence(call, float(second)) for second in range(1, 9)} == {Step.ASK}


def test_a_node_that_was_left_is_not_believed_to_have_the_call() -> None:
    call = sent(deadline=10.0)
    attempts.after_accepted(call, 0.0, "a")
    attempts.after_death(call, 0.5, "a")
    attempts.after_write(call, 0.5, 0.25, "b")
    attempts.after_accepted(call, 0.6, "a")
    assert (call.phase, call.node) == (Phase.SENT, "b")
    assert attempts.is_old(call, "a")
    assert not attempts.is_old(call, "b")


def test_in_the_queue_group_again_any_node_is_heard_again(rng: random.Random) -> None:
    call = sent()
    attempts.after_busy(call, 0.0, "a", RetryBudget(0.0), rng)
    attempts.after_write(call, 0.1, 0.25, None)
    assert not attempts.is_old(call, "a")


def test_a_call_whose_node_dies_is_tried_once_more_and_never_a_third_time() -> None:
    call = sent(deadline=10.0)
    attempts.after_accepted(call, 0.0, "a")
    assert attempts.after_death(call, 0.5, "a") is None
    assert (call.phase, call.due, call.retries) == (Phase.WAITING, 0.5, 0)
    attempts.after_write(call, 0.5, 0.25, "b")
    attempts.after_accepted(call, 0.5, "b")
    verdict = attempts.after_death(call, 1.0, "b")
    assert verdict is not None
    assert (verdict.code, verdict.outcome) == (Code.HANDLER_ERROR, Outcome.UNKNOWN)


def test_a_call_that_killed_a_node_before_it_could_say_so_costs_no_third_one() -> None:
    call = sent(deadline=10.0)
    assert silence(call, 0.25) is Step.WRITE
    attempts.after_write(call, 0.25, 0.25, "b")
    attempts.after_accepted(call, 0.25, "b")
    assert attempts.after_death(call, 0.6, "b") is None
    assert call.due == pytest.approx(0.6 + attempts.DEATHS_SETTLE)
    assert silence(call, 1.0, deaths=2) is Step.GIVE_UP


def test_a_call_that_met_a_frozen_node_and_then_a_dying_one_is_tried_again() -> None:
    call = sent(deadline=10.0)
    assert silence(call, 0.25) is Step.WRITE
    attempts.after_write(call, 0.25, 0.25, "b")
    assert attempts.after_death(call, 0.6, "b") is None
    assert silence(call, 1.0, deaths=1) is Step.WRITE


def test_a_call_that_must_not_run_twice_waits_for_its_dead_node_until_the_deadline() -> None:
    call = sent(deadline=10.0, idempotent=False)
    attempts.after_accepted(call, 0.0, "a")
    assert attempts.after_death(call, 0.5, "a") is None
    assert (call.phase, call.due) == (Phase.ACCEPTED, math.inf)
    assert attempts.after_deadline(call, connected=True).outcome is Outcome.UNKNOWN


def test_a_call_to_one_node_ends_with_that_node() -> None:
    verdict = attempts.after_death(sent(node="a", is_bound=True), 1.0, "a")
    assert verdict is not None
    assert (verdict.code, verdict.outcome) == (Code.NO_HANDLER, Outcome.UNKNOWN)


def test_a_lost_answer_is_asked_for_elsewhere_unless_the_call_must_not_run_twice() -> None:
    call = sent(deadline=10.0)
    attempts.after_accepted(call, 0.0, "a")
    assert attempts.after_lost(call, 1.0, "a", RetryBudget(0.0)) is None
    assert (call.phase, call.due, call.avoid) == (Phase.WAITING, 1.0, ("a",))
    once = sent(deadline=10.0, idempotent=False)
    verdict = attempts.after_lost(once, 1.0, "a", RetryBudget(0.0))
    assert verdict is not None
    assert verdict.outcome is Outcome.UNKNOWN


def test_a_node_that_is_gone_is_left_at_once_and_its_type_is_given_patience(rng: random.Random) -> None:
    call = sent(node="a")
    assert attempts.after_no_responders(call, 1.0, -math.inf, rng) is None
    assert (call.due, call.avoid, call.unheard_since) == (1.0, ("a",), math.inf)


def test_time_without_a_connection_is_nobodys_silence() -> None:
    call = sent(deadline=100.0)
    attempts.after_accepted(call, 0.0, "a")
    attempts.after_disconnect(call)
    assert (call.phase, call.due) == (Phase.ACCEPTED, math.inf)
    assert attempts.after_reconnect(call, 20.0, 0.25) is Step.ASK
    assert (call.attempt, call.retries) == (1, 0)


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 50), st.booleans()), max_size=200))
def test_retries_stay_within_a_fifth_of_the_calls_and_the_floor(steps: list[tuple[float, int, bool]]) -> None:
    budget, now, calls, taken = RetryBudget(0.0), 0.0, 0, 0
    for passed, made, wanted in steps:
        now += passed
        budget.calls(made, now)
        calls += made
        taken += wanted and budget.take(now)
    assert taken <= 100 + 0.2 * calls + 10.0 * now + 1e-6


def test_the_budget_is_a_share_of_the_calls_of_ten_seconds() -> None:
    budget = RetryBudget(100.0)
    for step in range(1_000):
        budget.calls(100, 100.0 + step * 0.01)
    taken = 0
    while budget.take(109.99):
        taken += 1
    assert taken == 20_100
    assert not budget.take(109.99)
    assert [budget.take(110.0) for _ in range(11)] == [True] * 10 + [False]  # the floor of a second
    assert sum(budget.take(120.0) for _ in range(1_000)) == 100  # those calls are long ago


_EVENTS = ("503", "busy", "expired", "lost", "accepted", "silence", "death", "down", "up", "held")


class _Run:
    """One call driven through events, with the truth kept beside it."""

    def __init__(self, *, idempotent: bool, is_bound: bool, seed: int) -> None:
        self.rng = random.Random(seed)
        self.budget = RetryBudget(0.0)
        self.call = sent(deadline=2.0, idempotent=idempotent, is_bound=is_bound, node="n1" if is_bound else None)
        self.now = 0.0
        self.is_connected = True
        self.writes = 1
        self.unaccounted = False  # an attempt was written of which nobody has said that it did not run
        self.died = 0

    def step(self, event: str) -> Verdict | None:
        """Let one thing happen, if it can happen now."""
        call, now = self.call, self.now
        node = call.node or f"n{self.rng.randrange(5)}"
        if event == "down":
            self.unaccounted |= call.phase in (Phase.SENT, Phase.ACCEPTED)
            self.is_connected = False
            attempts.after_disconnect(call)
            return None
        if event == "up":
            self.is_connected = True
            if attempts.after_reconnect(call, now, 0.25) is Step.WRITE:
                self.write()
            return None
        if event == "death" and call.phase in (Phase.SENT, Phase.ACCEPTED) and call.node is not None:
            self.unaccounted = True
            self.died += 1
            return attempts.after_death(call, now, node)
        if not self.is_connected:
            return None
        if call.phase is Phase.SENT:
            return self.when_sent(event, node)
        if event == "lost" and call.phase is Phase.ACCEPTED:
            self.unaccounted = True
            return attempts.after_lost(call, now, node, self.budget)
        if event == "silence":
            return self.silence()
        return None

    def when_sent(self, event: str, node: str) -> Verdict | None:
        call, now = self.call, self.now
        if event in ("503", "busy", "expired") and not call.idempotent:
            self.unaccounted = False  # it was written once only, and that did not run
        if event == "503":
            return attempts.after_no_responders(call, now, -math.inf, self.rng)
        if event == "busy" and not attempts.is_old(call, node):
            return attempts.after_busy(call, now, node, self.budget, self.rng)
        if event == "expired" and not attempts.is_old(call, node):
            return attempts.after_expired(call, now, node)
        if event == "accepted":
            attempts.after_accepted(call, now, node)
        elif event == "held":
            attempts.after_held(call)
            self.writes -= 1
            self.write()
        elif event == "silence":
            return self.silence()
        return None

    def silence(self) -> Verdict | None:
        was_sent = self.call.phase is Phase.SENT
        step = attempts.after_silence(self.call, self.now, self.budget, self.died)
        if step is Step.GIVE_UP:
            return attempts.after_deaths(self.call)
        if step is Step.WRITE:
            self.unaccounted |= was_sent
            self.write()
        return None

    def write(self) -> None:
        target = self.rng.choice([None, "n1", "n2", "n3"])
        attempts.after_write(self.call, self.now, 0.25, "n1" if self.call.is_bound else target)
        self.writes += 1


@given(st.lists(st.sampled_from(_EVENTS), max_size=60), st.booleans(), st.booleans(), st.integers(0, 2**32))
@example(events=["down", "up", "503", "silence"], idempotent=False, is_bound=False, seed=0)
def test_whatever_happens_a_call_is_never_called_not_run_when_it_may_have(
    events: list[str], idempotent: bool, is_bound: bool, seed: int
) -> None:
    """NOT_RUN is said only when every write was answered as not run; what must not run twice is written once then."""
    run = _Run(idempotent=idempotent, is_bound=is_bound, seed=seed)
    for event in events:
        run.now += 0.05
        before = run.writes
        verdict = run.step(event)
        assert not (run.writes > before and run.unaccounted and not idempotent)
        if verdict is None and run.now > 1.9:
            verdict = attempts.after_deadline(run.call, connected=run.is_connected)
            run.unaccounted |= run.call.phase in (Phase.SENT, Phase.ACCEPTED)
        if verdict is not None:
            assert not (run.unaccounted and verdict.outcome is Outcome.NOT_RUN)
            break
    assert run.call.retries <= attempts.MAX_RETRIES
    assert run.call.deaths <= attempts.MAX_DEATHS
