"""What must hold over a history. Pure: records in, violations out; linear in the records (the faults are few).

`story.tell` joins the records; each check looks at the story and says what is wrong with it, in words. A check for
every promise, a planted violation for every check (`test_checker.py`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from catga_bus.errors import Code, Outcome
from tests.chaos import evidence
from tests.chaos.history import Start
from tests.chaos.story import EVERYBODY, Call, Story, Window

LATE_TOLERANCE = 0.3
"""Seconds after its deadline at which an execution may still start. The time left travels as a duration, so what a
message spends in sockets is not taken off it, and a node ignores gaps of its own loop of up to 0.25 s."""

END_SLACK = 5.0
"""Seconds after its deadline within which a call must have ended: an order of magnitude, not a promise."""

DETECTION = 5.0
"""Seconds after its fault within which a node may be called dead."""

ANY_CODE = frozenset(str(code) for code in Code)

HARMLESS = frozenset({"roll", "overload", "delay"})
"""Kinds of faults that are no excuse for a second execution."""


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What a scenario promises. Checks without a field here hold always."""

    faults: tuple[str, ...]
    """Kinds that must have happened, and must have bitten."""

    may_fail: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Codes with which calls of a request class may end; all other calls end `ok`."""

    failed: int = 0
    """How many calls may end otherwise."""

    ran_twice: int | None = None
    """How many calls may be executed more than once; None leaves it to what the faults excuse."""

    runs_per_call: int | None = None
    """How often one call may be executed at most."""

    late_tolerance: float = LATE_TOLERANCE
    longest_gap: float | None = None
    """Seconds between two successes at most: an order of magnitude above the figure aimed at."""


Check: TypeAlias = Callable[[Story, Expect], Iterator[str]]


def every_call_ends_once(story: Story, _: Expect) -> Iterator[str]:
    """Every call has exactly one outcome, and has it soon after its deadline; nothing else has one."""
    yield from story.strays
    for call in story.calls.values():
        if len(call.ends) != 1:
            yield f"{call.op} has {len(call.ends)} outcomes: {[end.code for end in call.ends]}"
        elif call.ended > call.deadline + END_SLACK:
            yield f"{call.op} ended {call.ended - call.deadline:.1f} s after its deadline"


def ok_was_executed(story: Story, _: Expect) -> Iterator[str]:
    """No `ok` before the node that answers has come to the end of an execution."""
    for call in story.calls.values():
        done = call.ends[0] if call.is_ok else None
        if done and not any(end.node == done.node and end.t <= done.t for end in call.finishes):
            ran = [(end.node, end.t) for end in call.finishes]
            yield f"{call.op} is ok at {done.t:.3f} by {done.node}, which had not ended one of {ran}"


def not_run_did_not_run(story: Story, _: Expect) -> Iterator[str]:
    """What is called `not_run` never ran, neither before nor after."""
    for call in story.calls.values():
        if call.starts and any(end.outcome == Outcome.NOT_RUN for end in call.ends):
            start = call.starts[0]
            yield f"{call.op} ended as not_run ({call.ends[0].code}), and {start.node} started it at {start.t:.3f}"


def nothing_starts_late(story: Story, expect: Expect) -> Iterator[str]:
    """No execution starts after the deadline of its call; not even in a node that thaws."""
    for call in story.calls.values():
        for start in call.starts:
            late = start.t - call.deadline
            if late > expect.late_tolerance:
                yield f"{call.op} was started by {start.node} {late:.3f} s after its deadline (attempt {start.attempt})"


def attempts_are_told_apart(story: Story, _: Expect) -> Iterator[str]:
    """All executions of a call have its one message id, and each is an attempt of its own."""
    for call in story.calls.values():
        if len({start.message_id for start in call.starts}) > 1:
            yield f"{call.op} ran under several ids: {sorted({start.message_id for start in call.starts})}"
        attempts = [start.attempt for start in call.starts]
        if len(set(attempts)) < len(attempts):
            yield f"{call.op}: an attempt ran twice: {[(start.node, start.attempt) for start in call.starts]}"


def second_executions_are_excused(story: Story, expect: Expect) -> Iterator[str]:
    """A call runs again only if a fault hit the node (or a link) while the run before had not been answered."""
    by_target: dict[str, list[Window]] = defaultdict(list)
    for window in story.windows:
        if window.kind not in HARMLESS:
            by_target[window.target].append(window)
    twice = [call for call in story.calls.values() if len(call.starts) > 1]
    for call in twice:
        for first, second in pairwise(call.starts):
            if not _is_excused(call, first, second, by_target):
                yield (
                    f"{call.op} ran on {first.node} at {first.t:.3f} and again on {second.node} at {second.t:.3f}, "
                    f"and nothing had happened to the first"
                )
        if expect.runs_per_call is not None and len(call.starts) > expect.runs_per_call:
            yield f"{call.op} ran {len(call.starts)} times, on {[start.node for start in call.starts]}"
    if expect.ran_twice is not None and len(twice) > expect.ran_twice:
        yield f"{len(twice)} calls ran more than once, {expect.ran_twice} may"


def _is_excused(call: Call, first: Start, second: Start, by_target: Mapping[str, Sequence[Window]]) -> bool:
    return any(
        window.hits(call, first, second)
        for target in {first.node, second.node, call.invoke.caller, EVERYBODY}
        for window in by_target.get(target, ())
    )


def only_expected_failures(story: Story, expect: Expect) -> Iterator[str]:
    """Calls end `ok`, or with a code that the scenario allows their class."""
    failed = [
        call
        for call in story.calls.values()
        if call.ends
        and not call.is_ok
        and call.ends[0].code not in expect.may_fail.get(call.invoke.request, frozenset())
    ]
    if len(failed) > expect.failed:
        for call in failed:
            end = call.ends[0]
            yield f"{call.op} ({call.invoke.request}) ended with {end.code} {end.outcome} after {end.latency:.3f} s"


def no_false_death(story: Story, _: Expect) -> Iterator[str]:
    """Nobody calls a node dead to which, and to whose view, nothing has happened."""
    for view in story.views:
        if view.change == "faulted" and not any(
            window.kind not in HARMLESS
            and window.target in (view.node, view.observer, EVERYBODY)
            and window.begin <= view.t <= window.end + DETECTION
            for window in story.windows
        ):
            yield f"{view.observer} called {view.node} dead at {view.t:.3f}, and nothing had happened to it"


def successes_go_on(story: Story, expect: Expect) -> Iterator[str]:
    """The longest time without a success is bounded."""
    if expect.longest_gap is not None:
        times = sorted(call.ended for call in story.calls.values() if call.is_ok)
        for before, after in pairwise(times):
            if after - before > expect.longest_gap:
                yield f"no success for {after - before:.3f} s, from {before:.3f}"


def faults_happened(story: Story, expect: Expect) -> Iterator[str]:
    """A run in which nothing happened proves nothing: each fault took place, and the history shows that it bit."""
    for kind in expect.faults:
        if not any(window.kind == kind for window in story.windows):
            yield f"there was no {kind}"
    for window in story.windows:
        if doubt := evidence.against(window, story):
            yield f"{window.kind} of {window.target} ({window.name}): {doubt}"


CHECKS: tuple[Check, ...] = (
    every_call_ends_once,
    ok_was_executed,
    not_run_did_not_run,
    nothing_starts_late,
    attempts_are_told_apart,
    second_executions_are_excused,
    only_expected_failures,
    no_false_death,
    successes_go_on,
    faults_happened,
)


def check(story: Story, expect: Expect) -> dict[str, list[str]]:
    """Return the violations by the name of their check; empty if all is well."""
    found = {one.__name__: list(one(story, expect)) for one in CHECKS}
    return {name: texts for name, texts in found.items() if texts}
