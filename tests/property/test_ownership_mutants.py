"""The simulation of ownership finds bugs: each that is planted, by the law that it breaks, within seconds."""

import logging
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.chaos.stored.bugs import BUGS
from tests.ownership import scope
from tests.ownership.checker import LAWS, ViolationError
from tests.ownership.mutants import OWN, RIG_ONLY, SHARED, planted
from tests.ownership.network import Weather
from tests.ownership.orders import all_orders
from tests.ownership.storms import Storm
from tests.ownership.world import LOG, QUEUE, Habits

SEEDS = 40
CLEAR = Weather(ack_wait=5.0)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Say nothing of what is survived."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def storms(seed: int) -> object:
    return Storm(seed).run()


def calm(seed: int) -> object:
    return Storm(seed, faults=("roll",), weather=Weather(), kills=False, is_calm=True).run()


def freezes(seed: int) -> object:
    return Storm(seed, faults=("freeze",), weather=CLEAR, habits=Habits(failing=0.4, longest=0.1), kills=False).run()


def zombies(seed: int) -> object:
    return Storm(seed, faults=("freeze",), weather=CLEAR, habits=Habits(longest=0.3), kills=False).run()


def killers(seed: int) -> object:
    return Storm(seed, faults=(), weather=CLEAR, kills=True).run()


def failures(seed: int) -> object:
    return Storm(seed, faults=(), weather=CLEAR, habits=Habits(failing=0.3), kills=False).run()


def losses(seed: int) -> object:
    return Storm(seed, faults=(), weather=Weather(lost_deliveries=0.2, ack_wait=5.0), kills=False).run()


def doubts(seed: int) -> object:
    return Storm(seed, faults=("doubt",), weather=CLEAR, kills=False).run()


def deletions(seed: int) -> object:
    return Storm(seed, faults=("consumer",), weather=CLEAR, kills=False).run()


def outages(seed: int) -> object:
    return Storm(seed, faults=("outage",), weather=CLEAR, kills=False).run()


def stale_reads(seed: int) -> object:
    weather = Weather(stale_reads=0.3, lost_words=0.2, ack_wait=5.0)
    return Storm(seed, faults=("kill", "roll", "freeze"), weather=weather, kills=False).run()


def small_scope(seed: int) -> None:
    if seed == 0:
        for domain in (QUEUE, LOG):
            for point, fault in [(-1, ""), *scope.all_faults(domain)]:
                scope.run(domain, point=point, fault=fault)


FOUND: dict[str, tuple[Callable[[int], object], str]] = {
    "no-fence-check": (zombies, "epochs_never_fall"),
    "mark-outside-the-transaction": (storms, "effects_are_never_doubled"),
    "keys-side-by-side": (storms, "keys_are_in_order"),
    "no-confirming-read": (small_scope, "grants_are_the_last_word"),
    "epoch-not-raised": (storms, "epochs_never_fall"),
    "consumer-reused-across-epochs": (storms, "a_consumer_has_one_epoch"),
    "deaths-not-counted": (killers, "everything_comes_to_rest"),
    "log-goes-on-behind-what-was-delivered": (storms, "nothing_accepted_is_lost"),
    "acknowledge-before-commit": (storms, "nothing_accepted_is_lost"),
    "failing-lets-others-pass": (failures, "keys_are_in_order"),
    "hand-over-without-finishing": (calm, "executions_are_excused"),
    "second-record-in-flight": (storms, "keys_are_in_order"),
    "no-compare-and-set": (small_scope, "epochs_never_fall"),
    "unheard-owners-are-robbed": (calm, "executions_are_excused"),
    "claim-in-vain-forgotten": (stale_reads, "everything_comes_to_rest"),
    "gap-in-the-deliveries-ignored": (losses, "keys_are_in_order"),
    "own-pauses-ignored": (freezes, "pauses_are_noticed"),
    "redelivery-run-again": (doubts, "nothing_fails"),
    "silence-ignored": (outages, "everything_comes_to_rest"),
    "statuses-ignored": (deletions, "everything_comes_to_rest"),
}
"""Of each mutant the worlds that find it, and the law that it breaks."""


@pytest.mark.parametrize("name", FOUND)
def test_it_is_found(name: str) -> None:
    run, law = FOUND[name]
    assert law in LAWS
    with planted(name):
        assert _first(run, range(SEEDS)) == law


def _first(run: Callable[[int], object], seeds: Iterable[int]) -> str:
    """Return the first law that is broken; empty if none is."""
    for seed in seeds:
        try:
            run(seed)
        except ViolationError as error:
            return error.law
    return ""


def test_every_mutant_is_among_them_and_those_of_the_rig_are_shared_or_explained() -> None:
    assert set(FOUND) == {*SHARED, *OWN}
    assert set(BUGS) <= {*FOUND, *RIG_ONLY}
    assert not set(FOUND) & set(RIG_ONLY)


def test_a_planted_bug_is_gone_afterwards() -> None:
    for name in FOUND:
        with planted(name):
            pass
    scope.run(QUEUE)
    assert not any(outcome.fault for outcome in all_orders(QUEUE))
