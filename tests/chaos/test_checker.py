"""The oracle is tested like any other code: each check passes a clean history, and fails one with its fault planted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.checker import CHECKS, Allowed, Expect, check
from tests.chaos.evidence import INSTANT, against
from tests.chaos.history import (
    Done,
    End,
    Fault,
    HistoryError,
    Invoke,
    Record,
    Recorder,
    Start,
    View,
    Witness,
    read_history,
    read_tail,
)
from tests.chaos.report import lines, percentile, tabulate
from tests.chaos.story import tell

TIMEOUT = 2.0
PIDS = {"n1": 11, "n2": 12, "n3": 13}


def called(op: str, t: float, request: str = "Quick") -> Invoke:
    return Invoke(t, op, op.partition("-")[0], request, TIMEOUT)


def done(
    op: str, t: float, node: str | None = "n1", code: str = "ok", outcome: str = "ok", latency: float = 0.1
) -> Done:
    return Done(t, op, code, outcome, latency, node)


def started(op: str, t: float, node: str = "n1", attempt: int = 1, message_id: str = "") -> Start:
    return Start(t, op, message_id or f"id-{op}", node, PIDS[node], attempt, 1.0)


def ended(op: str, t: float, node: str = "n1") -> End:
    return End(t, op, node, PIDS[node])


def call(op: str, t: float, node: str = "n1", took: float = 0.1) -> list[Record]:
    return [
        called(op, t),
        started(op, t + 0.01, node),
        ended(op, t + took - 0.01, node),
        done(op, t + took, node, latency=took),
    ]


SIGNS = {
    "freeze": {"stopped": 1},
    "cut": {"reset": 1},
    "half_open": {"lost up": 400},
    "one_way": {"held up": 400, "passed down": 400},
    "unplug": {"unplugged": 1},
    "restart_server": {"refused": 1},
    "freeze_server": {"stopped": 1},
    "delay": {"delayed up": 400, "passed up": 400},
    "overload": {},
    "roll": {"left": 1},
    "kill": {"killed": 1},
    "poison": {"killed": 1},
}
"""What the rig sees of a fault that bites."""


def fault(
    kind: str, target: str, begin: float, end: float, *, delay: float = 0.0, saw: dict[str, int] | None = None
) -> list[Record]:
    pid = PIDS.get(target) if kind in ("kill", "freeze", "roll", "poison") else None
    name = f"{kind} of {target} at {begin}"
    return [
        Fault(begin, name, kind, target, "begin", pid, delay),
        Witness(end, name, SIGNS[kind] if saw is None else saw),
        Fault(end, name, kind, target, "end", pid, delay),
    ]


KILL = Expect(faults=("kill",))


def clean() -> list[Record]:
    """A node is killed with a call in hand; another node does it again; everybody learns of it."""
    return [
        *call("c1-1", 0.0, "n1"),
        *call("c1-2", 0.5, "n2"),
        called("c1-3", 1.0),
        started("c1-3", 1.01, "n1"),
        *fault("kill", "n1", 1.2, 1.21),
        started("c1-3", 1.6, "n2", attempt=2),
        ended("c1-3", 1.7, "n2"),
        done("c1-3", 1.71, "n2", latency=0.71),
        View(1.7, "c1", "n1", "faulted"),
        *call("c1-4", 4.0, "n2"),
    ]


def broken(records: list[Record], expect: Expect = KILL) -> set[str]:
    return set(check(tell(records), expect))


def test_a_clean_history_passes_every_check() -> None:
    assert check(tell(clean()), KILL) == {}


def without(kind: type, op: str) -> list[Record]:
    return [one for one in clean() if not (isinstance(one, kind) and getattr(one, "op", None) == op)]


def without_views(records: list[Record]) -> list[Record]:
    return [one for one in records if not isinstance(one, View)]


FLOOD = Expect(
    faults=("overload",),
    may_fail=(Allowed(requests=frozenset({"Quick"}), codes=frozenset({"OVERLOADED"}), under="overload", most=0.5),),
)


def refused(op: str, t: float, code: str = "OVERLOADED") -> Done:
    return done(op, t, None, code, "not_run")


def flooded(failed: int) -> list[Record]:
    """An overload under which so many of five calls fail."""
    return [
        *call("c1-1", 0.0),
        *fault("overload", "load", 1.0, 3.0),
        *(record for count in range(failed) for record in (called(f"c1-x{count}", 1.5), refused(f"c1-x{count}", 1.6))),
        *(record for count in range(4 - failed) for record in call(f"c1-y{count}", 4.0)),
    ]


PLANTED: dict[str, tuple[str, Callable[[], list[Record]], Expect]] = {
    "a call without an outcome": ("every_call_ends_once", lambda: without(Done, "c1-2"), KILL),
    "a call with two outcomes": ("every_call_ends_once", lambda: [*clean(), done("c1-2", 0.7, "n2")], KILL),
    "an outcome of a call that nobody made": ("every_call_ends_once", lambda: without(Invoke, "c1-2"), KILL),
    "a call that ends long after its deadline": (
        "every_call_ends_once",
        lambda: [*without(Done, "c1-2"), done("c1-2", 9.0, "n2")],
        KILL,
    ),
    "an ok that nobody executed": (
        "ok_was_executed",
        lambda: [one for one in without(Start, "c1-2") if not (isinstance(one, End) and one.op == "c1-2")],
        KILL,
    ),
    "an ok whose execution never ended": ("ok_was_executed", lambda: without(End, "c1-2"), KILL),
    "an ok before its execution": (
        "ok_was_executed",
        lambda: [*without(Done, "c1-2"), done("c1-2", 0.55, "n2")],
        KILL,
    ),
    "an ok of a node that did not execute it": (
        "ok_was_executed",
        lambda: [*without(Done, "c1-2"), done("c1-2", 0.6, "n3")],
        KILL,
    ),
    "a not_run that ran": (
        "not_run_did_not_run",
        lambda: [*without(Done, "c1-2"), done("c1-2", 0.6, None, "OVERLOADED", "not_run")],
        KILL,
    ),
    "a thawed node that starts what has expired": (
        "nothing_starts_late",
        lambda: [
            *call("c1-1", 0.0),
            called("c1-2", 1.0),
            *fault("freeze", "n1", 1.1, 4.1),
            done("c1-2", 3.0, None, "TIMEOUT", "unknown"),
            started("c1-2", 4.11),
        ],
        Expect(faults=("freeze",), failed=1),
    ),
    "an execution under another id": (
        "attempts_are_told_apart",
        lambda: [*without(Start, "c1-3"), started("c1-3", 1.01), started("c1-3", 1.6, "n2", 2, "other")],
        KILL,
    ),
    "an attempt that ran twice": (
        "attempts_are_told_apart",
        lambda: [*without(Start, "c1-3"), started("c1-3", 1.01), started("c1-3", 1.6, "n2", 1)],
        KILL,
    ),
    "a second execution of what was answered before the fault": (
        "second_executions_are_excused",
        lambda: [*clean(), started("c1-1", 1.5, "n2", 2)],
        KILL,
    ),
    "a second execution of what a healthy node had run": (
        "second_executions_are_excused",
        lambda: [
            *clean(),
            called("c1-5", 1.0),
            started("c1-5", 1.1, "n2"),
            started("c1-5", 1.5, "n3", 2),
            ended("c1-5", 1.55, "n3"),
            done("c1-5", 1.6, "n3"),
        ],
        KILL,
    ),
    "a thawed node that repeats what another has done": (
        "second_executions_are_excused",
        lambda: [
            *call("c1-1", 0.0, "n1"),
            called("c1-2", 1.0),
            *fault("freeze", "n1", 1.05, 2.05),
            started("c1-2", 1.3, "n2", 2),
            ended("c1-2", 1.4, "n2"),
            done("c1-2", 1.41, "n2"),
            started("c1-2", 2.1, "n1", 1),
        ],
        Expect(faults=("freeze",)),
    ),
    "a second execution in a rolling restart": (
        "second_executions_are_excused",
        lambda: [
            *call("c1-1", 0.0, "n1"),
            called("c1-2", 1.0),
            started("c1-2", 1.01, "n1"),
            *fault("roll", "n1", 1.05, 2.05),
            started("c1-2", 1.3, "n2", 2),
            ended("c1-2", 1.4, "n2"),
            done("c1-2", 1.41, "n2"),
        ],
        Expect(faults=("roll",)),
    ),
    "more second executions than may be": (
        "second_executions_are_excused",
        clean,
        Expect(faults=("kill",), ran_twice=0),
    ),
    "a request that kills a third node": (
        "second_executions_are_excused",
        lambda: [
            *(record for t, node in ((0.0, "n1"), (0.1, "n2"), (0.2, "n3")) for record in call(f"c1-{node}", t, node)),
            called("c2-1", 1.0, "Poison"),
            *(
                record
                for attempt, node in enumerate(("n1", "n2", "n3"), start=1)
                for record in (
                    started("c2-1", 1.0 + attempt / 10, node, attempt),
                    *fault("poison", node, 1.02 + attempt / 10, 1.03 + attempt / 10),
                )
            ),
            done("c2-1", 2.0, None, "HANDLER_ERROR", "unknown"),
        ],
        Expect(faults=("poison",), runs_per_call=2, failed=1),
    ),
    "a call that fails": (
        "only_expected_failures",
        lambda: [*without(Done, "c1-2"), done("c1-2", 2.5, None, "TIMEOUT", "unknown")],
        KILL,
    ),
    "an answer that is somebody else's": (
        "only_expected_failures",
        lambda: [*without(Done, "c1-2"), done("c1-2", 0.6, "n2", "answer of c1-9", "failed")],
        KILL,
    ),
    "more failures than may be": ("only_expected_failures", lambda: flooded(failed=3), FLOOD),
    "a failure of a request that may not fail": (
        "only_expected_failures",
        lambda: [*flooded(failed=1), called("c1-5", 1.5, "Slow"), refused("c1-5", 1.6)],
        FLOOD,
    ),
    "a failure with another code": (
        "only_expected_failures",
        lambda: [*flooded(failed=1), called("c1-5", 1.5), refused("c1-5", 1.6, "NO_HANDLER")],
        FLOOD,
    ),
    "a failure long after the fault that it was allowed for": (
        "only_expected_failures",
        lambda: [*flooded(failed=1), called("c1-5", 6.0), refused("c1-5", 6.1)],
        FLOOD,
    ),
    "a failure before it": (
        "only_expected_failures",
        lambda: [*flooded(failed=1), called("c1-5", 0.2), refused("c1-5", 0.3)],
        FLOOD,
    ),
    "a node called dead because the server is down": (
        "no_false_death",
        lambda: [
            *call("c1-1", 0.0),
            *fault("restart_server", "server", 1.0, 2.0),
            View(2.5, "c1", "n1", "faulted"),
            *call("c1-2", 3.0),
        ],
        Expect(faults=("restart_server",)),
    ),
    "a node called dead because the link of its observer is down": (
        "no_false_death",
        lambda: [
            *call("c1-1", 0.0),
            *fault("half_open", "c1", 1.0, 3.0),
            View(2.5, "c1", "n1", "faulted"),
            *call("c1-2", 4.0),
        ],
        Expect(faults=("half_open",)),
    ),
    "a node called dead long after it thawed": (
        "no_false_death",
        lambda: [
            *call("c1-1", 0.0),
            *fault("freeze", "n1", 1.0, 2.0),
            View(4.9, "c1", "n1", "faulted"),
            *call("c1-2", 5.0),
        ],
        Expect(faults=("freeze",)),
    ),
    "a killed node that nobody calls dead": ("deaths_are_noticed", lambda: without_views(clean()), KILL),
    "a killed node that is called dead late": (
        "deaths_are_noticed",
        lambda: [*without_views(clean()), View(3.75, "c1", "n1", "faulted")],
        KILL,
    ),
    "a killed node that one of two callers does not call dead": (
        "deaths_are_noticed",
        lambda: [*clean(), *call("c2-1", 0.5, "n2"), *call("c2-2", 4.0, "n2")],
        KILL,
    ),
    "a frozen node that nobody calls dead": (
        "deaths_are_noticed",
        lambda: [*call("c1-1", 0.0), *fault("freeze", "n1", 1.0, 4.0), *call("c1-2", 4.5)],
        Expect(faults=("freeze",)),
    ),
    "a kill at the end of the run, which nobody could notice": (
        "deaths_are_noticed",
        lambda: [*call("c1-1", 0.0), *fault("kill", "n1", 1.0, 1.1), *call("c1-2", 1.5, "n2")],
        KILL,
    ),
    "a node called dead that lives": ("no_false_death", lambda: [*clean(), View(2.0, "c1", "n2", "faulted")], KILL),
    "a node called dead for an overload": (
        "no_false_death",
        lambda: [*clean(), *fault("overload", "load", 1.9, 3.0), View(2.0, "c1", "n2", "faulted")],
        KILL,
    ),
    "a long time without a success": (
        "successes_go_on",
        clean,
        Expect(faults=("kill",), longest_gap=0.7),
    ),
    "no success from a fault to the end of the run": (
        "successes_go_on",
        lambda: [
            *call("c1-1", 0.0),
            *fault("overload", "load", 1.0, 2.0),
            *(record for t in range(2, 9) for record in (called(f"c1-x{t}", t), refused(f"c1-x{t}", t + 0.1))),
        ],
        Expect(faults=("overload",), longest_gap=5.0),
    ),
    "no success that was asked for after the fault": (
        "successes_go_on",
        lambda: [*call("c1-1", 0.0), *fault("freeze", "n1", 1.0, 2.0), *call("c1-2", 1.9, "n2")],
        Expect(faults=("freeze",)),
    ),
    "one fault where two were meant": ("faults_happened", clean, Expect(faults=("kill", "kill"))),
    "no fault at all": ("faults_happened", lambda: call("c1-1", 0.0), KILL),
    "a fault of another kind": ("faults_happened", clean, Expect(faults=("kill", "freeze"))),
    "a killed process that goes on": ("faults_happened", lambda: [*clean(), started("c1-4", 2.6, "n1", 2)], KILL),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found_by_its_check(name: str) -> None:
    check_name, records, expect = PLANTED[name]
    assert check_name in broken(records(), expect)


def test_every_check_has_a_planted_violation() -> None:
    assert {check_name for check_name, _, _ in PLANTED.values()} == {one.__name__ for one in CHECKS}


SHAM = {
    "freeze": (fault("freeze", "n1", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "cut": (fault("cut", "c1", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "half_open": (fault("half_open", "n1", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "one_way": (fault("one_way", "n1", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "unplug": (fault("unplug", "n1", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "restart_server": (fault("restart_server", "server", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "freeze_server": (fault("freeze_server", "server", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "delay": (fault("delay", "n1", 1.0, 3.0, delay=0.2), call("c1-2", 1.5, "n1", took=0.1)),
    "overload": (fault("overload", "load", 1.0, 3.0), call("c1-2", 1.5, "n1")),
    "roll": (fault("roll", "n1", 1.0, 3.0), call("c1-2", 3.5, "n1")),
    "kill": (fault("kill", "n1", 1.0, 1.1), call("c1-2", 1.5, "n1")),
    "poison": (fault("poison", "n1", 1.0, 1.1), call("c1-2", 1.5, "n1")),
}


@pytest.mark.parametrize("kind", SHAM)
def test_a_fault_that_did_not_bite_is_no_fault(kind: str) -> None:
    windows, contradiction = SHAM[kind]
    story = tell([*call("c1-1", 0.0, "n1"), *windows, *contradiction])
    assert against(story.windows[0], story)


def objection(*records: Record) -> str | None:
    story = tell([*call("c1-1", 0.0, "n1"), *records, *call("c1-2", 3.5, "n2")])
    return against(story.windows[0], story)


@pytest.mark.parametrize("kind", sorted(set(SIGNS) - {"overload"}))
def test_a_fault_of_which_the_rig_saw_nothing_or_something_else_is_no_fault(kind: str) -> None:
    begin, _, end = fault(kind, "n1", 1.0, 3.0)
    assert "the rig saw nothing" in (objection(begin, end) or "")
    other = {"going": 1, "answered": 1, "plugged": 1, "passed up": 400, "passed down": 400}
    assert "the rig saw" in (objection(*fault(kind, "n1", 1.0, 3.0, saw=other)) or "")


def test_a_link_that_is_bad_in_one_direction_is_good_in_the_other() -> None:
    assert objection(*fault("one_way", "n1", 1.0, 3.0, saw={"held down": 9, "passed up": 9})) is None
    for saw in ({"held up": 9, "passed up": 9, "passed down": 9}, {"held up": 9, "held down": 9}, {"held up": 9}):
        assert "the rig saw" in (objection(*fault("one_way", "n1", 1.0, 3.0, saw=saw)) or "")


@pytest.mark.parametrize("kind", sorted(set(SIGNS) - INSTANT))
def test_a_fault_in_which_nothing_could_contradict_it_is_no_fault(kind: str) -> None:
    assert "it lasted 0.590 s" in (objection(*fault(kind, "n1", 1.0, 1.59)) or "")


def test_a_fault_that_bit_is_believed() -> None:
    story = tell([*call("c1-1", 0.0, "n1"), *fault("freeze", "n1", 1.0, 3.0), *call("c1-2", 1.5, "n2")])
    assert against(story.windows[0], story) is None


def test_a_second_execution_is_excused_by_a_cut_link_of_its_caller_or_its_node_and_by_the_server() -> None:
    for kind, target in (("cut", "c1"), ("half_open", "n1"), ("restart_server", "server")):
        records = [
            called("c1-1", 1.0),
            started("c1-1", 1.01, "n1"),
            ended("c1-1", 1.4, "n1"),
            *fault(kind, target, 1.2, 2.0),
            started("c1-1", 2.1, "n2", 2),
            ended("c1-1", 2.2, "n2"),
            done("c1-1", 2.3, "n2"),
            *call("c1-2", 2.5, "n2"),
        ]
        assert broken(records, Expect(faults=(kind,))) == set(), kind


def test_failures_within_their_bounds_are_allowed() -> None:
    assert broken(flooded(failed=2), FLOOD) == set()


def test_a_bound_in_calls_counts_for_each_fault() -> None:
    expect = Expect(faults=("overload",), may_fail=(replace(FLOOD.may_fail[0], most=1),))
    assert broken(flooded(failed=1), expect) == set()
    assert "only_expected_failures" in broken(flooded(failed=2), expect)
    assert broken([*flooded(failed=2), *fault("overload", "load", 1.1, 3.0)], expect) == set()


def test_a_node_may_be_called_dead_for_a_freeze_or_a_cut_and_need_not_for_a_short_one() -> None:
    for kind in ("freeze", "cut"):
        records = [*call("c1-1", 0.0), *fault(kind, "n1", 1.0, 2.0), *call("c1-2", 4.5)]
        assert broken(records, Expect(faults=(kind,))) == set(), kind
        assert broken([*records, View(2.2, "c1", "n1", "faulted")], Expect(faults=(kind,))) == set(), kind


def test_what_lay_in_a_link_may_be_executed_when_the_link_gives_it_back() -> None:
    records = [
        *call("c1-0", 0.5, "n1"),
        called("c1-1", 1.0),
        *fault("one_way", "n1", 0.9, 2.0),
        started("c1-1", 1.4, "n2", 2),
        ended("c1-1", 1.5, "n2"),
        done("c1-1", 1.6, "n2"),
        started("c1-1", 2.1, "n1", 1),
        *call("c1-2", 2.5, "n2"),
    ]
    assert broken(records, Expect(faults=("one_way",))) == set()


def test_figures_go_to_the_kind_and_phase_of_the_latest_fault() -> None:
    records = [
        *call("c1-1", 0.0),
        *fault("freeze", "n3", 1.0, 4.0),
        *call("c1-2", 1.5),
        View(1.9, "c1", "n3", "faulted"),
        *call("c1-3", 2.5),
        *call("c1-4", 4.5),
    ]
    table = tabulate(tell(records))
    assert {key: figures.calls for key, figures in table.items()} == {
        ("none", "before"): 1,
        ("freeze", "first second"): 1,
        ("freeze", "during"): 1,
        ("freeze", "after"): 1,
    }
    assert table["freeze", "first second"].longest_gap == pytest.approx(1.5)
    assert table["freeze", "first second"].detections == [pytest.approx(0.9)]
    assert len(lines(table)) == 5


def test_a_percentile_is_the_nearest_rank() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([float(value) for value in range(100)], 0.5) == 50.0


# -- the file ----------------------------------------------------------------------------------------------


def test_a_history_comes_back_in_the_order_of_its_instants(tmp_path: Path) -> None:
    one, other = Recorder(tmp_path, "one"), Recorder(tmp_path, "other")
    records = clean()
    for place, record in enumerate(records):
        (one, other)[place % 2].write(record)
    one.close()
    other.close()
    assert [record.t for record in read_history(tmp_path)] == sorted(record.t for record in records)
    assert set(map(repr, read_history(tmp_path))) == set(map(repr, records))


def test_only_the_torn_last_line_of_a_killed_writer_is_lost(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "one")
    recorder.write(called("c1-1", 0.0))
    recorder.close()
    with recorder.path.open("ab") as file:
        file.write(b'{"type":"invoke","t":1.')
    assert read_history(tmp_path) == [called("c1-1", 0.0)]


def test_the_tail_of_a_history_begins_with_a_whole_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "one")
    records = [called(f"c1-{count}", float(count)) for count in range(100)]
    for record in records:
        recorder.write(record)
    recorder.close()
    tail = read_tail(recorder.path, 1_000)
    assert 1 <= len(tail) < 20
    assert tail == records[-len(tail) :]
    assert read_tail(recorder.path) == records


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "x-1.jsonl").write_text('{"type":"invoke"}\n')
    with pytest.raises(HistoryError, match=r"x-1\.jsonl, line 1: .*missing"):
        read_history(tmp_path)
