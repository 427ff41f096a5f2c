"""Two that claim one partition: every order of what they ask of the broker, and every place at which one may die."""

import pytest

from catga_bus.partition.records import Domain
from tests.ownership.mutants import planted
from tests.ownership.orders import all_deaths, all_orders
from tests.ownership.world import LOG, QUEUE


@pytest.mark.parametrize("is_owned", [False, True], ids=["nobody's", "a dead owner's"])
@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
def test_in_every_order_who_goes_on_has_the_last_word_and_the_only_consumer(domain: Domain, is_owned: bool) -> None:
    outcomes = list(all_orders(domain, is_owned=is_owned))
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert len(outcomes) > 900
    assert {outcome.granted for outcome in outcomes} == {1, 2}  # the second may claim from the first


@pytest.mark.parametrize("domain", [QUEUE, LOG], ids=["queue", "log"])
def test_wherever_a_claimant_dies_whoever_claims_next_goes_on_alone(domain: Domain) -> None:
    outcomes = list(all_deaths(domain))
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert len(outcomes) > 1_000


def test_without_the_confirming_read_many_orders_go_wrong() -> None:
    with planted("no-confirming-read"):
        faults = [outcome.fault for outcome in all_orders(QUEUE, is_owned=True)]
    assert sum("goes on although the record is" in fault for fault in faults) > len(faults) // 5
