"""What a fault costs, computed from the times of calls."""

from catga_bus.demo.failover import CallTimes, Disturbance, disturbance


def times(*calls: tuple[float, float]) -> CallTimes:
    found = CallTimes()
    for sent, answered in sorted(calls, key=lambda call: call[1]):
        found.add(sent, answered)
    return found


def test_only_calls_that_were_under_way_during_the_fault_count():
    calls = times((0.0, 0.9), (1.5, 1.6), (1.9, 2.5), (2.2, 2.3), (3.5, 4.9), (5.0, 9.0))
    assert disturbance(calls, 2.0, 4.0) == Disturbance(calls=3, slowest=4.9 - 3.5, longest_gap=4.9 - 2.5)


def test_a_call_that_spans_the_whole_fault_counts():
    assert disturbance(times((1.0, 9.0)), 2.0, 4.0) == Disturbance(calls=1, slowest=8.0, longest_gap=None)


def test_the_gap_that_the_fault_lies_in_counts_whole():
    assert disturbance(times((0.5, 1.0), (5.5, 6.0)), 2.0, 4.0).longest_gap == 5.0


def test_gaps_before_and_after_the_fault_do_not_count():
    calls = times((0.0, 0.1), (1.8, 1.9), (2.0, 2.1), (2.9, 3.0), (3.9, 4.0), (8.0, 9.0))
    assert disturbance(calls, 2.0, 4.0).longest_gap == 1.0


def test_without_calls_there_is_nothing_to_say():
    assert disturbance(times(), 1.0, 2.0) == Disturbance(calls=0, slowest=None, longest_gap=None)
    assert disturbance(times((0.0, 0.5)), 1.0, float("inf")) == Disturbance(calls=0, slowest=None, longest_gap=None)
