"""Two nodes, one partition, three messages: a process is killed or stopped at every point to which it comes."""

import pytest

from catga_bus.partition.records import Domain
from tests.ownership import scope
from tests.ownership.checker import ViolationError
from tests.ownership.world import LOG, QUEUE


@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
def test_without_a_fault_nothing_is_repeated_and_the_other_node_takes_over(domain: Domain) -> None:
    world = scope.run(domain)
    assert len(world.checker.effects) == 3
    assert sum(world.checker.executions.values()) == 3
    assert sum(node.statistics.hand_overs for node in world.lives) == 1
    assert world.points > 50


@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
def test_wherever_one_fault_strikes_every_law_holds(domain: Domain) -> None:
    runs = repeated = fenced = 0
    for point, fault in scope.all_faults(domain):
        try:
            world = scope.run(domain, point=point, fault=fault)
        except ViolationError as error:
            raise AssertionError(f"{fault} at point {point}") from error
        runs += 1
        assert len(world.checker.effects) == 3
        repeated += sum(world.checker.executions.values()) - 3
        fenced += world.checker.fenced
    assert runs > 200
    assert repeated > 0  # otherwise no fault struck where it hurts
    assert fenced > 0
