"""The report: what it says of a good run, and that nothing wrong is left unsaid."""

import json

import msgspec
import pytest

from catga_bus.demo.data import SHIPPED, Figures, Flight, read_flights
from catga_bus.demo.failover import CallTimes
from catga_bus.demo.faults import FaultPlan, FaultRecord, Moment, What
from catga_bus.demo.ledger import Execution
from catga_bus.demo.messages import NodeTotals
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.report import json_of, make_report, text_of


@pytest.fixture(scope="module")
def flights() -> list[Flight]:
    return read_flights(SHIPPED)[:1_500]


def executed(flights: list[Flight]) -> list[Execution]:
    return [
        Execution(f"id-{row}", f"desk-{row % 3 + 1}", row, flight.dep_delay, flight.distance)
        for row, flight in enumerate(flights)
    ]


def remembered(executions: list[Execution]) -> dict[str, NodeTotals | None]:
    figures: dict[str, Figures] = {}
    for execution in executions:
        before = figures.get(execution.node, Figures())
        figures[execution.node] = before.plus(execution.dep_delay, execution.distance)
    return {
        node: NodeTotals(node=node, figures=total, announced=0, closed=True) for node, total in sorted(figures.items())
    }


def result_of(executions: list[Execution], **changes) -> ReplayResult:
    progress = Progress(
        total=1_500,
        answered=1_500,
        failed=0,
        in_flight=0,
        seconds=0.75,
        p50_ms=0.51,
        p99_ms=None,
        per_node={"desk-1": 500, "desk-2": 500, "desk-3": 500},
    )
    times = CallTimes()
    for call in range(1_500):
        times.add(call / 2_000, call / 2_000 + 0.0005)
    result = ReplayResult(progress=progress, failures={}, announcements=98, totals=remembered(executions), times=times)
    return msgspec.structs.replace(result, **changes)


def test_a_good_run_is_a_success_and_reads_like_one(flights):
    executions = executed(flights)
    report = make_report(result_of(executions), executions, flights)
    assert report.is_success
    assert text_of(report).splitlines() == [
        "1,500 of 1,500 requests answered in 0.75 s",
        "2,000 requests/s, p50 0.51 ms, p99 -",
        "",
        "node    answered  share  logged  remembered",
        "desk-1       500  33.3%     500         500",
        "desk-2       500  33.3%     500         500",
        "desk-3       500  33.3%     500         500",
        "",
        "               flights  cancelled  delay minutes      miles",
        "execution log    1,500         12         17,657  1,587,584",
        "file             1,500         12         17,657  1,587,584",
        "",
        "ran twice: 0 requests",
        "late flights announced: 98 of 98 (at most once)",
        "closing heard: by 3 of 3 nodes (at most once)",
        "verdict: equal",
    ]


def test_the_json_says_what_the_text_says(flights):
    executions = executed(flights)
    report = json.loads(json_of(make_report(result_of(executions), executions, flights)))
    assert report["success"] is True
    assert report["equal"] is True
    assert report["executions"] == report["file"]
    assert report["requests_per_second"] == 2_000
    assert [node["node"] for node in report["nodes"]] == ["desk-1", "desk-2", "desk-3"]
    assert report["problems"] == []


def test_a_tampered_line_makes_the_verdict_not_equal(flights):
    executions = executed(flights)
    honest = result_of(executions)
    executions[7] = msgspec.structs.replace(executions[7], dep_delay=9_999)
    report = make_report(honest, executions, flights)
    assert not report.is_success
    assert "verdict: NOT EQUAL" in text_of(report)
    assert "problem: the execution log does not add up to the file" in text_of(report)
    assert "problem: node desk-2 remembers" in text_of(report)


def test_a_lost_line_is_a_flight_that_was_not_executed(flights):
    executions = executed(flights)
    report = make_report(result_of(executions), executions[:-2], flights)
    assert "2 flights were not executed" in report.problems


def test_a_flight_under_two_ids_is_a_problem(flights):
    executions = executed(flights)
    executions.append(msgspec.structs.replace(executions[0], message_id="other"))
    report = make_report(result_of(executions), executions, flights)
    assert "1 flights were executed under more than one message id" in report.problems


def test_a_flight_that_ran_twice_is_told_but_is_no_problem(flights):
    executions = executed(flights)
    executions.append(executions[0])
    report = make_report(result_of(executions), executions, flights)
    assert report.is_success
    assert "ran twice: 1 requests" in text_of(report)


def test_lost_announcements_are_told_but_are_no_problem(flights):
    executions = executed(flights)
    report = make_report(result_of(executions, announcements=90), executions, flights)
    assert report.is_success
    assert "late flights announced: 90 of 98 (at most once)" in text_of(report)


def test_a_failed_request_is_a_problem_even_if_the_totals_are_equal(flights):
    executions = executed(flights)
    report = make_report(result_of(executions, failures={"TIMEOUT": 3}), executions, flights)
    assert report.equal
    assert not report.is_success
    assert "problem: 3 requests failed with TIMEOUT" in text_of(report)
    assert text_of(report).endswith("verdict: equal, but see the problems")


def test_a_node_without_totals_is_a_problem(flights):
    executions = executed(flights)
    totals = remembered(executions) | {"desk-3": None}
    report = make_report(result_of(executions, totals=totals), executions, flights)
    assert not report.is_success
    assert "node desk-3 did not tell its totals" in report.problems
    assert "closing heard: by 2 of 3 nodes" in text_of(report)


FAULTS = FaultRecord(
    plan=FaultPlan(killed="desk-2", replacement="desk-4", frozen="desk-3", spares=1),
    moments=(
        Moment(0.2, "desk-2", What.KILLED),
        Moment(0.25, "desk-2", What.FAULTED),
        Moment(0.26, "desk-2", What.UNANIMOUS),
        Moment(0.3, "desk-4", What.STARTED),
        Moment(0.4, "desk-4", What.READY),
        Moment(0.45, "desk-3", What.FROZEN),
        Moment(0.5, "desk-3", What.SUSPECT),
        Moment(0.7, "desk-3", What.THAWED),
    ),
    exit_code=-9,
    was_stopped=True,
)


def test_a_run_with_faults_tells_what_they_cost_and_is_a_success(flights):
    executions = executed(flights)
    executions.append(msgspec.structs.replace(executions[1], node="desk-1"))  # desk-2 died before it could answer
    executions.append(msgspec.structs.replace(executions[0], node="desk-4"))  # no fault explains this one
    totals = remembered(executions) | {"desk-2": None}
    per_node = {"desk-1": 501, "desk-2": 499, "desk-3": 500}
    progress = msgspec.structs.replace(result_of(executions).progress, per_node=per_node)
    report = make_report(result_of(executions, progress=progress, totals=totals, faults=FAULTS), executions, flights)
    assert report.problems == []
    lines = text_of(report).splitlines()
    assert lines[3:14] == [
        "node    answered  share  logged  remembered",
        "desk-1       501  33.4%     501         501",
        "desk-2       499  33.3%     500      killed",
        "desk-3       500  33.3%     500         500",
        "desk-4         0   0.0%       1           1",
        "",
        "fault              at  mended after  noticed after  faulted after  in all views  failover  longest gap",
        "desk-2 killed  0.20 s        0.20 s         0.05 s         0.05 s        0.06 s    0.00 s       0.00 s",
        "desk-3 frozen  0.45 s        0.25 s         0.05 s              -             -    0.00 s       0.00 s",
        "desk-4 took the place of the killed node, ready after 0.10 s",
        "",
    ]
    assert "ran twice: 2 requests, 1 of them on a node that was killed or frozen" in lines
    assert "closing heard: by 3 of 3 nodes (at most once)" in lines
    assert json.loads(json_of(report))["faults"][0]["noticed_after"] == pytest.approx(0.05)


def test_a_fault_that_nobody_noticed_is_a_problem(flights):
    executions = executed(flights)
    unnoticed = msgspec.structs.replace(FAULTS, moments=FAULTS.moments[:1] + FAULTS.moments[3:])
    report = make_report(result_of(executions, faults=unnoticed), executions, flights)
    assert report.equal
    assert report.problems == ["nobody noticed that node desk-2 was killed"]


def test_an_answer_without_a_line_is_a_problem_even_of_a_killed_node(flights):
    executions = executed(flights)
    totals = remembered(executions) | {"desk-2": None}
    del executions[1]  # of desk-2, and desk-1 runs it again
    executions.append(Execution("id-1", "desk-1", 1, flights[1].dep_delay, flights[1].distance))
    totals["desk-1"] = remembered(executions)["desk-1"]
    report = make_report(result_of(executions, totals=totals, faults=FAULTS), executions, flights)
    assert report.equal
    assert report.problems == ["node desk-2 answered 500 requests, but logged 499"]
