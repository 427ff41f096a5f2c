"""What must hold over a history. Pure: records in, violations out; linear in the records (the faults are few).

`story.tell` joins the records; each check looks at the story and says what is wrong with it, in words. A check for
every promise, a planted violation for every check (`test_checker.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

DETECTION = 2.5
"""Seconds within which a dead or frozen node is called dead by every caller, and after its fault may be: it takes 1.0 s
of silence, as many again for a listener that has to be proven live, and time for a probe."""

RECOVERY = 2.0
"""Seconds after a fault within which calls may still fail for it, where they may at all."""

ANY_CODE = frozenset(str(code) for code in Code)

HARMLESS = frozenset({"roll", "overload", "delay"})
"""Kinds of faults that are no excuse for a second execution, nor for a node that is called dead."""

DEADLY = frozenset({"kill", "poison", "freeze"})
"""Kinds of faults that every caller must notice, if they last for longer than `DETECTION`."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Failures that a scenario allows: of these requests, with these codes, under faults of one kind, not too many."""

    requests: frozenset[str]
    codes: frozenset[str]
    under: str
    """The kind of fault: a call may fail that was under way between its beginning and `RECOVERY` after its end."""

    most: float
    """How many may: from 1 on for each such fault, below 1 which share of those that were under way."""


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What a scenario promises. Checks without a field here hold always."""

    faults: tuple[str, ...]
    """Kinds that must have happened, each as often as it is here, and must have bitten."""

    may_fail: tuple[Allowed, ...] = ()
    """All other calls end `ok`."""

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
    """Calls end `ok`, or fail as the scenario allows, and not more of them than it allows."""
    failed = [call for call in story.calls.values() if call.ends and not call.is_ok]
    for allowed in expect.may_fail:
        windows = [window for window in story.windows if window.kind == allowed.under]
        excused = [call for call in failed if _is_allowed(call, allowed, windows)]
        failed = [call for call in failed if not _is_allowed(call, allowed, windows)]
        made = sum(
            call.invoke.request in allowed.requests and _is_under(call, windows) for call in story.calls.values()
        )
        most = allowed.most * (len(windows) if allowed.most >= 1 else made)
        if len(excused) > most:
            how = dict(Counter(call.ends[0].code for call in excused))
            yield f"of {made} {sorted(allowed.requests)} {how} failed under {allowed.under}, {most:g} may"
    if len(failed) > expect.failed:
        for call in failed:
            end = call.ends[0]
            yield f"{call.op} ({call.invoke.request}) ended with {end.code} {end.outcome} after {end.latency:.3f} s"


def _is_allowed(call: Call, allowed: Allowed, windows: Sequence[Window]) -> bool:
    return call.invoke.request in allowed.requests and call.ends[0].code in allowed.codes and _is_under(call, windows)


def _is_under(call: Call, windows: Sequence[Window]) -> bool:
    return any(window.begin <= call.ended and call.invoke.t <= window.end + RECOVERY for window in windows)


def no_false_death(story: Story, _: Expect) -> Iterator[str]:
    """Nobody calls a node dead to which nothing has happened: neither when the server nor when its own link is down."""
    for view in story.views:
        if view.change == "faulted" and not any(
            window.kind not in HARMLESS
            and window.target == view.node
            and window.begin <= view.t <= window.end + DETECTION
            for window in story.windows
        ):
            yield f"{view.observer} called {view.node} dead at {view.t:.3f}, and nothing had happened to it"


def deaths_are_noticed(story: Story, _: Expect) -> Iterator[str]:
    """Every caller that makes calls meanwhile calls a node dead that is killed, or frozen for long enough."""
    calling: dict[str, list[float]] = defaultdict(list)
    for call in story.calls.values():
        calling[call.invoke.caller].append(call.invoke.t)
    for window in story.windows:
        if window.kind not in DEADLY or (window.kind == "freeze" and window.end - window.begin <= DETECTION):
            continue
        due = window.begin + DETECTION
        told = {
            view.observer
            for view in story.views
            if view.node == window.target and view.change == "faulted" and window.begin <= view.t <= due
        }
        observers = {name for name, times in calling.items() if times[0] < window.begin and times[-1] > due}
        if missing := observers - told:
            yield f"{sorted(missing)} did not call {window.target} dead within {DETECTION} s of {window.name}"
        if not observers:
            yield f"nobody made calls long enough to notice {window.name} of {window.target}"


def successes_go_on(story: Story, expect: Expect) -> Iterator[str]:
    """The longest time without a success is bounded up to the last call, and calls succeed after the last fault."""
    ended = sorted(call.ended for call in story.calls.values() if call.is_ok)
    made = [call.invoke.t for call in story.calls.values()]
    if expect.longest_gap is not None and made:
        for before, after in pairwise([min(made), *ended, max(made)]):
            if after - before > expect.longest_gap:
                yield f"no success for {after - before:.3f} s, from {before:.3f}"
    over = max((window.end for window in story.windows), default=0.0)
    if not any(call.is_ok and call.invoke.t > over for call in story.calls.values()):
        yield f"no call succeeded that was made after the last fault, which was over at {over:.3f}"


def faults_happened(story: Story, expect: Expect) -> Iterator[str]:
    """A run in which nothing happened proves nothing: each fault took place, and the history shows that it bit."""
    happened = Counter(window.kind for window in story.windows)
    for kind, times in Counter(expect.faults).items():
        if happened[kind] < times:
            yield f"there was {happened[kind] or 'no'} {kind}, and {times} were meant"
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
    deaths_are_noticed,
    successes_go_on,
    faults_happened,
)


def check(story: Story, expect: Expect) -> dict[str, list[str]]:
    """Return the violations by the name of their check; empty if all is well."""
    found = {one.__name__: list(one(story, expect)) for one in CHECKS}
    return {name: texts for name, texts in found.items() if texts}
