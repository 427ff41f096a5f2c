"""The report: what it says of a good run, and that nothing wrong is left unsaid."""

import json

import msgspec
import pytest

from catga_bus.demo.data import SHIPPED, Flight, in_schedule_order, read_flights
from catga_bus.demo.effects import Effect
from catga_bus.demo.faults import FaultPlan, FaultRecord, Moment, What
from catga_bus.demo.ledger import Execution
from catga_bus.demo.messages import NodeTotals
from catga_bus.demo.progress import Progress, ReplayResult
from catga_bus.demo.report import Report, make_report
from catga_bus.demo.report_text import json_of, text_of

BEGAN = 1_000.0
FAULTS = FaultRecord(
    plan=FaultPlan(
        killed="desk-2", replacement="desk-4", frozen="desk-3", rolled="desk-1", successor="desk-5", spares=1
    ),
    moments=(
        Moment(2.0, "desk-2", What.KILLED),
        Moment(2.25, "desk-2", What.SUSPECT),
        Moment(2.5, "desk-2", What.FAULTED),
        Moment(3.0, "desk-4", What.STARTED),
        Moment(3.5, "desk-4", What.READY),
        Moment(6.0, "desk-3", What.FROZEN),
        Moment(6.25, "desk-3", What.SUSPECT),
        Moment(9.0, "desk-3", What.THAWED),
        Moment(10.0, "desk-1", What.ROLLED),
        Moment(10.0, "desk-1", What.DRAINING),
        Moment(10.25, "desk-1", What.LEFT),
        Moment(10.5, "desk-1", What.ENDED),
        Moment(10.5, "desk-5", What.STARTED),
        Moment(11.0, "desk-5", What.READY),
    ),
    exit_code=-9,
    was_stopped=True,
    rolled_exit_code=0,
)


@pytest.fixture(scope="module")
def flights() -> list[Flight]:
    return in_schedule_order(read_flights(SHIPPED))[:1_500]


def effected(flights: list[Flight]) -> list[Effect]:
    """One effect every 10 ms, on three partitions, each of which a node owns."""
    return [
        Effect(
            row + 1,
            row,
            one.aircraft,
            one.dep_delay,
            one.distance,
            f"desk-{row % 3 + 1}",
            row % 3,
            7,
            BEGAN + row / 100,
        )
        for row, one in enumerate(flights)
    ]


def executed(effects: list[Effect]) -> list[Execution]:
    return [Execution(f"id-{one.row}", one.node, one.row, one.partition, one.epoch) for one in effects]


def late(flights: list[Flight]) -> list[tuple[int, str]]:
    return [(row, flight.aircraft) for row, flight in enumerate(flights) if flight.is_late]


def result_of(flights: list[Flight], **changes) -> ReplayResult:
    nodes = ("desk-1", "desk-2", "desk-3")
    progress = Progress(
        total=1_500,
        stored=1_500,
        failed=0,
        in_flight=0,
        effects=1_500,
        seconds=15.0,
        p50_ms=0.51,
        p99_ms=None,
        per_node=dict.fromkeys(nodes, 500),
        owners=nodes,
    )
    result = ReplayResult(
        progress=progress,
        began=BEGAN,
        called=[row / 100 - 0.002 for row in range(1_500)],
        stored_seconds=14.99,
        failures={},
        shown=late(flights),
        totals={node: NodeTotals(node, 500, 0, 0, closed=True) for node in nodes},
    )
    return msgspec.structs.replace(result, **changes)


def judged(flights: list[Flight], effects: list[Effect] | None = None, **changes) -> Report:
    effects = effected(flights) if effects is None else effects
    return make_report(result_of(flights, **changes), effects, executed(effects), flights)


def test_a_good_run_is_a_success_and_reads_like_one(flights):
    report = judged(flights)
    assert report.is_success
    assert text_of(report).splitlines() == [
        "1,500 of 1,500 flights stored in 14.99 s, p50 0.51 ms, p99 -",
        "1,500 effects in 14.99 s, 100/s; from call to effect p50 1.99 ms, p99 1.99 ms, longest 2.00 ms",
        "",
        "node    effects  share  executions  duplicates  fenced",
        "desk-1      500  33.3%         500           0       0",
        "desk-2      500  33.3%         500           0       0",
        "desk-3      500  33.3%         500           0       0",
        "partitions 123, after 0 moves",
        "",
        "            flights  cancelled  delay minutes      miles",
        "effect log    1,500         12         17,657  1,587,584",
        "file          1,500         12         17,657  1,587,584",
        "",
        "executions: 1,500; 0 flights ran more than once",
        "late flights on the departures board: 98 of 98, 0 out of order per aircraft, 0 doubled",
        "closing heard: by 3 of 3 nodes (at most once)",
        "verdict: 1,500 effects, 0 lost, 0 out of order per aircraft, 0 doubled",
    ]


def test_the_json_says_what_the_text_says(flights):
    report = json.loads(json_of(judged(flights)))
    assert report["success"] is True
    assert report["verdict"]["effects"] == {
        "written": 1_500, "lost": 0, "out_of_order": 0, "doubled": 0, "foreign": 0,
    }  # fmt: skip
    assert report["verdict"]["counted"] == report["verdict"]["expected"]
    assert report["effects_per_second"] == pytest.approx(1_500 / 14.99)
    assert report["owners"] == ["desk-1", "desk-2", "desk-3"]
    assert report["problems"] == []


def test_a_lost_effect_is_a_failure(flights):
    report = judged(flights, effected(flights)[:-2])
    assert not report.is_success
    assert report.problems == ["2 flights have no effect", "the effect log does not add up to the file"]
    assert text_of(report).endswith("1,498 effects, 2 lost, 0 out of order per aircraft, 0 doubled: WRONG")


def test_a_doubled_effect_is_a_failure(flights):
    effects = effected(flights)
    report = judged(flights, [*effects, effects[7]._replace(id=1_501)])
    assert report.problems == [
        "1 effects are of flights that had one",
        "the effect log does not add up to the file",
    ]
    assert text_of(report).endswith("1,501 effects, 0 lost, 0 out of order per aircraft, 1 doubled: WRONG")


def test_an_effect_out_of_order_is_a_failure(flights):
    effects = effected(flights)
    first, second = [row for row, flight in enumerate(flights) if flight.aircraft == "N711MQ"][:2]
    effects[first], effects[second] = effects[second], effects[first]
    report = judged(flights, effects)
    assert report.problems == ["1 effects came after a later one of the same aircraft"]
    assert text_of(report).endswith("1,500 effects, 0 lost, 1 out of order per aircraft, 0 doubled: WRONG")


def test_a_tampered_effect_is_a_failure(flights):
    effects = effected(flights)
    effects[7] = effects[7]._replace(dep_delay=9_999)
    assert judged(flights, effects).problems == [
        "1 effects have other values than their flights",
        "the effect log does not add up to the file",
    ]


def test_an_effect_of_a_node_that_had_lost_its_partition_is_a_failure(flights):
    effects = effected(flights)
    effects[-4] = effects[-4]._replace(epoch=8)
    assert judged(flights, effects).problems == ["1 effects were committed by a node that had lost the partition"]


def test_an_effect_without_a_line_of_its_execution_is_a_failure(flights):
    effects = effected(flights)
    report = make_report(result_of(flights), effects, executed(effects)[1:], flights)
    assert report.problems == ["1 flights have an effect, but no line in the execution log"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda shown: shown[1:], "1 are missing, 0 out of order, 0 doubled and 0 not late"),
        (lambda shown: [*shown, shown[0]], "0 are missing, 0 out of order, 1 doubled and 0 not late"),
        (lambda shown: [*shown, (0, "N14228")], "0 are missing, 0 out of order, 0 doubled and 1 not late"),
        (lambda shown: [(row, "N0") for row, _ in reversed(shown)], "0 are missing, 97 out of order, 0 doubled"),
    ],
)
def test_a_departures_board_that_is_wrong_is_a_failure(flights, change, problem):
    report = judged(flights, shown=change(late(flights)))
    assert report.verdict.is_good
    (found,) = report.problems
    assert problem in found


def test_a_flight_that_could_not_be_stored_is_a_failure_even_if_all_effects_are_there(flights):
    report = judged(flights, failures={"TIMEOUT": 3})
    assert report.verdict.is_good
    assert report.problems == ["3 flights could not be stored: TIMEOUT"]
    assert text_of(report).endswith("0 lost, 0 out of order per aircraft, 0 doubled: see the problems")


def test_a_node_without_totals_is_a_failure(flights):
    totals = result_of(flights).totals | {"desk-3": None}
    report = judged(flights, totals=totals)
    assert report.problems == ["node desk-3 did not tell its totals"]
    assert "closing heard: by 2 of 3 nodes" in text_of(report)


def test_a_flight_that_ran_twice_is_told_but_is_no_problem(flights):
    effects = effected(flights)
    report = make_report(result_of(flights), effects, [*executed(effects), executed(effects)[0]], flights)
    assert report.is_success
    assert "executions: 1,501; 1 flights ran more than once" in text_of(report)


def moved(flights: list[Flight]) -> list[Effect]:
    """The same effects, as the faults would have them."""
    owners = {2: [("desk-2", 2.0), ("desk-1", 10.25), ("desk-4", 99.0)], 3: [("desk-3", 6.0), ("desk-4", 99.0)]}
    owners[1] = [("desk-1", 10.25), ("desk-3", 99.0)]
    found = []
    for effect in effected(flights):
        at = effect.at - BEGAN
        epoch, node = next(
            (epoch, node) for epoch, (node, until) in enumerate(owners[effect.partition + 1]) if at < until
        )
        found.append(effect._replace(node=node, epoch=epoch))
    return found


def test_a_run_with_faults_tells_what_they_cost_and_is_a_success(flights):
    effects = moved(flights)
    executions = executed(effects)
    executions += [Execution("id-199", "desk-1", 199, 1, 1)]  # desk-2 died before it could acknowledge
    executions += [Execution("id-1499", "desk-4", 1_499, 2, 1)]  # no fault explains this one
    told = {node: NodeTotals(node, 1, 2, 3, closed=True) for node in ("desk-3", "desk-4", "desk-5")}
    totals = {"desk-1": None, "desk-2": None} | told
    report = make_report(result_of(flights, totals=totals, faults=FAULTS), effects, executions, flights)
    assert report.problems == []
    lines = text_of(report).splitlines()
    assert lines[3:19] == [
        "node    effects  share  executions  duplicates  fenced",
        "desk-1      617  41.1%         618       ended   ended",
        "desk-2       67   4.5%          67       ended   ended",
        "desk-3      358  23.9%         358           2       3",
        "desk-4      458  30.5%         459           2       3",
        "desk-5        0   0.0%           0           2       3",
        "partitions 123, after 4 moves",
        "",
        "fault               at  noticed    gone  mended  partitions   first  median    last  standstill",
        "desk-2 killed   2.00 s   0.25 s  0.50 s  1.50 s           1  0.02 s  0.02 s  0.02 s      0.01 s",
        "desk-3 frozen   6.00 s   0.25 s       -  3.00 s           1  0.02 s  0.02 s  0.02 s      0.01 s",
        "desk-1 rolled  10.00 s   0.00 s  0.25 s  1.00 s           2  0.03 s  0.03 s  0.03 s      0.01 s",
        "noticed, gone, mended: after the fault. first to last: of its partitions, from the fault to the first effect",
        "of the next owner; of a rolled node, the pause in between. standstill: no effect on any partition",
        "desk-4 took the place of desk-2, ready 0.50 s after its start",
        "desk-5 took the place of desk-1, ready 0.50 s after its start",
    ]
    repeats = "2 flights ran more than once, 1 of them on a node that was killed, frozen or rolled"
    assert f"executions: 1,502; {repeats}" in lines
    assert "closing heard: by 3 of 3 nodes (at most once)" in lines
    assert json.loads(json_of(report))["faults"][0]["noticed_after"] == 0.25


def test_a_fault_that_nobody_noticed_is_a_problem(flights):
    unnoticed = msgspec.structs.replace(FAULTS, moments=FAULTS.moments[:1] + FAULTS.moments[3:])
    report = judged(flights, moved(flights), faults=unnoticed)
    assert report.verdict.is_good
    assert report.problems == ["nobody noticed that node desk-2 was killed"]
