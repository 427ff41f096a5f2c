"""The decisions about a call that was not answered."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catga_bus.errors import Code, Outcome
from catga_bus.requests import attempts
from catga_bus.requests.attempts import Phase, Progress, RetryBudget


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
    assert attempts.after_busy(call, 1.0, budget, rng) is None
    assert attempts.after_busy(call, 2.0, budget, rng) is None
    verdict = attempts.after_busy(call, 3.0, budget, rng)
    assert verdict is not None
    assert (verdict.code, verdict.outcome) == (Code.OVERLOADED, Outcome.NOT_RUN)


def test_a_busy_call_is_not_retried_without_budget(rng: random.Random) -> None:
    budget = RetryBudget(0.0)
    while budget.take(0.0):
        pass
    verdict = attempts.after_busy(sent(), 0.0, budget, rng)
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
    assert attempts.after_expired(sent()).outcome is Outcome.NOT_RUN
    assert attempts.after_expired(sent(maybe_ran=True)).outcome is Outcome.UNKNOWN


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 50), st.booleans()), max_size=200))
def test_retries_stay_within_a_fifth_of_the_calls_and_the_floor(steps: list[tuple[float, int, bool]]) -> None:
    budget, now, calls, taken = RetryBudget(0.0), 0.0, 0, 0
    for passed, made, wanted in steps:
        now += passed
        budget.calls(made)
        calls += made
        taken += wanted and budget.take(now)
    assert taken <= 100 + 0.2 * calls + 10.0 * now + 1e-6


@given(
    st.lists(st.sampled_from(["503", "busy", "down", "up", "held"]), max_size=40), st.booleans(), st.integers(0, 2**32)
)
def test_a_call_that_may_have_run_is_never_called_not_run(steps: list[str], idempotent: bool, seed: int) -> None:
    """Whatever happens in whatever order, NOT_RUN is said only when every write was answered as not run."""
    rng, budget = random.Random(seed), RetryBudget(0.0)
    call, now, unaccounted = sent(idempotent=idempotent), 0.0, False
    for step in steps:
        now += 0.05
        verdict = None
        if step == "503" and call.phase is Phase.SENT:
            verdict = attempts.after_no_responders(call, now, -math.inf, rng)
        elif step == "busy" and call.phase is Phase.SENT:
            verdict = attempts.after_busy(call, now, budget, rng)
        elif step == "down":
            unaccounted = unaccounted or call.phase is Phase.SENT
            attempts.after_disconnect(call)
        elif step == "up" and call.phase is Phase.UNSENT:
            call.attempt += 1
            call.phase = Phase.SENT
        elif step == "held" and call.phase is Phase.SENT and not unaccounted:
            attempts.after_held(call)
        if verdict is None and now > 1.9:
            verdict = attempts.after_deadline(call, connected=step != "down")
            unaccounted = unaccounted or call.phase is Phase.SENT
        if verdict is not None:
            assert not (unaccounted and verdict.outcome is Outcome.NOT_RUN)
            return
