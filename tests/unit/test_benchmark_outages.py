"""What a fault did to calls, from records that are made up."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.executions import ExecutionLog, read_executions
from benchmarks.failover_report import FailoverFigures, ServerRestart, markdown
from benchmarks.outages import (
    OK,
    Call,
    Execution,
    Fault,
    Kind,
    Sight,
    by_order,
    outage,
    seen_in_every_view,
    share_failed_of_frozen,
    toll,
)
from benchmarks.steady import HANGING, SteadyCaller
from catga_bus.testing import eventually

FAULT = Fault(Kind.FREEZE, "n1", at=10.0, until=13.0, over=15.0)


def answered(order, sent, took, end=OK):
    return Call(order, sent, sent + took, end)


def test_a_fault_is_seen_when_the_last_live_view_has_seen_it():
    views = {
        "a": [Sight(9.0, "n1", "faulted"), Sight(10.3, "n1", "suspect"), Sight(11.0, "n1", "faulted")],
        "b": [Sight(10.1, "n2", "faulted"), Sight(10.5, "n1", "suspect"), Sight(11.25, "n1", "faulted")],
    }

    assert seen_in_every_view(views, FAULT, ("suspect",), views) == pytest.approx(0.5)
    assert seen_in_every_view(views, FAULT, ("faulted",), views) == pytest.approx(1.25)
    assert seen_in_every_view(views, FAULT, ("faulted",), ["a"]) == pytest.approx(1.0)


def test_a_view_that_saw_nothing_or_saw_it_too_late_leaves_no_figure():
    views = {"a": [Sight(10.3, "n1", "faulted")], "b": [Sight(13.5, "n1", "faulted")], "c": []}

    assert seen_in_every_view(views, FAULT, ("faulted",), ["a", "b"]) is None
    assert seen_in_every_view(views, FAULT, ("faulted",), ["a", "c"]) is None


def test_calls_are_told_apart_by_when_they_were_sent():
    calls = [
        answered(1, 9.0, 0.5),  # over before the fault
        answered(2, 9.9, 0.3),  # in flight at it
        answered(3, 10.5, 0.2),  # in the first second
        answered(4, 12.0, 0.01),  # after that
        answered(5, 13.5, 0.02),  # after the thaw
        answered(6, 15.5, 9.0),  # of the next fault
    ]

    result = outage(FAULT, calls, [], {"a": []}, ["a"], timeout=2.0)

    assert result.calls == 4
    assert result.slowest_in_flight == pytest.approx(0.3)
    assert result.p99_first == result.slowest_first == pytest.approx(0.3)
    assert result.p99_after == pytest.approx(0.01)
    assert result.p99_thawed == pytest.approx(0.02)


def test_the_calls_that_a_node_was_executing_at_its_fault_are_counted_by_themselves():
    fault = replace(FAULT, process=7)
    calls = [
        answered(1, 9.9, 1.3),  # running on it
        answered(2, 9.9, 2.0, "maybe_run TIMEOUT"),
        answered(3, 9.9, 0.2),  # on another node
        answered(4, 9.0, 0.1),  # over before the fault
        answered(5, 9.9, 0.9),  # started after its thaw
    ]
    executions = [Execution(1, 9.95, 7), Execution(1, 11.1, 8), Execution(2, 9.95, 7), Execution(3, 9.95, 8)]
    executions += [Execution(4, 9.05, 7), Execution(5, 13.1, 7)]

    result = outage(fault, calls, executions, {"a": []}, ["a"], timeout=2.0)

    assert (list(result.on_node), result.on_node_failed) == ([pytest.approx(1.3), pytest.approx(2.0)], 1)
    figures = FailoverFigures(rate=100.0)
    figures.outages = {"kill": [result], "kill, busy": [result, result]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(figures).splitlines()]
    assert ["kill", "1", "2", "1", "1.300", "2.000", "2.000"] in rows
    assert ["kill, busy", "2", "4", "2", "1.300", "2.000", "2.000"] in rows


async def test_a_crowd_has_so_many_calls_in_flight_and_no_more():
    class Caller(SteadyCaller):
        most = now = 0

        async def call(self, order, timeout):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1
            return OK

    caller = Caller()
    await caller.begin_crowd(8, seconds=1.0)
    await eventually(lambda: caller.now == 8 or caller.most == 8)
    calls = await caller.end_load(1.0)
    assert caller.most == 8
    assert len(calls) >= 8
    assert {call.end for call in calls} == {OK}


def test_failures_second_executions_and_late_starts_are_counted():
    calls = [answered(1, 1.0, 0.1), answered(2, 1.0, 2.0, "maybe_run TIMEOUT"), answered(3, 1.0, 0.1)]
    executions = by_order(
        [Execution(1, 1.1), Execution(2, 3.5), Execution(3, 1.1), Execution(3, 1.4), Execution(9, 0.0)]
    )

    result = toll(calls, executions, timeout=2.0)

    assert (result.calls, result.failed, result.executed_twice, result.started_late) == (3, 1, 1, 1)
    assert result.ends == {OK: 2, "maybe_run TIMEOUT": 1}
    assert result.slowest == pytest.approx(2.0)


def test_the_share_that_a_freeze_fails_is_of_calls_whose_time_was_over_before_the_thaw():
    calls = [answered(1, 10.1, 2.0, "timeout"), answered(2, 10.2, 0.1), answered(3, 12.0, 2.0, "timeout")]

    assert share_failed_of_frozen(calls, FAULT, timeout=2.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"no call had to be answered in the 3\.0 s"):
        share_failed_of_frozen([], FAULT, timeout=2.0)


@pytest.mark.parametrize("end", [HANGING, "wrong answer"])
def test_a_call_without_its_answer_makes_the_run_unsound(end):
    figures = FailoverFigures(rate=100.0)
    figures.tolls["kill"] = toll([answered(1, 0.0, 1.0, "not_run TIMEOUT")], {}, 2.0)
    assert figures.is_sound

    figures.tolls["freeze"] = toll([answered(2, 0.0, 9.0, end)], {}, 2.0)
    assert not figures.is_sound


def test_a_fault_that_nobody_noticed_and_a_server_that_never_answered_miss_their_targets():
    figures = FailoverFigures(rate=100.0)
    unseen = Fault(Kind.KILL, "n1", at=0.0, until=2.5, over=3.0)
    figures.outages["kill"] = [outage(unseen, [answered(1, 0.5, 0.1)], [], {"a": []}, ["a"], 2.0)]
    figures.server = ServerRestart(3, [0.2, None], 0)

    lines = markdown(figures).splitlines()

    for title in ("kill: out of every live view", "server killed: first answer"):
        assert [line.split("|")[-2].strip() for line in lines if line.startswith(f"| {title}")] == ["not reached"]


def test_what_a_process_noted_outlives_its_kill(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from benchmarks.executions import ExecutionLog\n"
        "ExecutionLog(sys.argv[1]).note(7)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=os.getcwd(), timeout=30)
    assert child.returncode == -9
    own = ExecutionLog(str(tmp_path))
    own.note(8)
    own.close()
    with next(tmp_path.glob(f"{os.getpid()}.*")).open("ab") as torn:
        torn.write(b"\x01\x02")

    entries = {one.order: one.process for one in read_executions(tmp_path)}
    assert sorted(entries) == [7, 8]
    assert entries[8] == os.getpid() != entries[7]
