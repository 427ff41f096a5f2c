"""Every order of the broker's operations of two that claim one partition: the conversations alone, without a shell."""

from collections.abc import Iterator, Sequence

import msgspec

from catga_bus.partition.protocol import Claimed, Ownership, Party
from catga_bus.partition.records import Domain, StaleError, consumer_of
from tests.ownership.broker import SimulatedBroker


class Claimant:
    """One that claims.

    Attributes:
        claimed: What it was granted; None before, and if it was not.
        is_over: Whether it has come to an end.
    """

    def __init__(self, broker: SimulatedBroker, node: str) -> None:
        self._broker = broker
        self._count = 0
        party = Party(node, (1, 1), self._nonce, lambda: 1)
        self._node = node
        self._steps = Ownership(party, broker.domain, 0).claim(lambda _: True)
        self._operation = next(self._steps)
        self.claimed: Claimed | None = None
        self.is_over = False

    def _nonce(self) -> str:
        self._count += 1
        return f"{self._node}-{self._count}"

    def step(self) -> None:
        """Have the next operation carried out."""
        outcome = self._broker.perform(0.0, 0, self._operation)
        try:
            self._operation = self._steps.send(outcome)
        except StopIteration as end:
            self.claimed, self.is_over = end.value, True
        except StaleError:
            self.is_over = True


class Outcome(msgspec.Struct, frozen=True):
    """What has come of one order."""

    order: tuple[int, ...]
    granted: int
    fault: str
    """What is wrong with it; empty: nothing."""


def all_orders(domain: Domain, nodes: Sequence[str] = ("a", "b"), *, is_owned: bool = False) -> Iterator[Outcome]:
    """Try every order.

    Args:
        domain: Of the partition.
        nodes: Who claims.
        is_owned: Whether somebody has owned it before, and died.
    """
    prefix: list[int] = []
    while True:
        order, widths, outcome = _run(domain, nodes, prefix, is_owned)
        yield outcome
        place = next((at for at in reversed(range(len(order))) if order[at] + 1 < widths[at]), None)
        if place is None:
            return
        prefix = [*order[:place], order[place] + 1]


def all_deaths(domain: Domain) -> Iterator[Outcome]:
    """Try every order in which one claimant may die before both have come to an end; then somebody else claims."""
    prefix: list[int] = []
    while True:
        order, widths, outcome = _run(domain, ("a", "b"), prefix, is_owned=not domain.is_log, may_die=True)
        yield outcome
        place = next((at for at in reversed(range(len(order))) if order[at] + 1 < widths[at]), None)
        if place is None:
            return
        prefix = [*order[:place], order[place] + 1]


def _run(
    domain: Domain, nodes: Sequence[str], prefix: Sequence[int], is_owned: bool, may_die: bool = False
) -> tuple[list[int], list[int], Outcome]:
    broker = SimulatedBroker(domain)
    if is_owned:
        dead = Claimant(broker, "dead")
        while not dead.is_over:
            dead.step()
    claimants = [Claimant(broker, node) for node in nodes]
    order: list[int] = []
    widths: list[int] = []
    fault = ""
    while waiting := [each for each in claimants if not each.is_over]:
        choice = prefix[len(order)] if len(order) < len(prefix) else 0
        order.append(choice)
        is_dying = may_die and len(waiting) == len(claimants)
        widths.append(len(waiting) + is_dying)
        if choice == len(waiting):
            claimants[0].is_over = True
            continue
        one = waiting[choice]
        one.step()
        if one.claimed is not None and not fault:
            fault = _is_wrong(broker, one.claimed)
    if may_die:
        claimants.append(heir := Claimant(broker, "heir"))
        while not heir.is_over:
            heir.step()
    fault = fault or _ends_wrong(broker, claimants)
    return order, widths, Outcome(tuple(order), sum(each.claimed is not None for each in claimants), fault)


def _is_wrong(broker: SimulatedBroker, claimed: Claimed) -> str:
    record = broker.held(0.0, 0).record
    if record is None or record.nonce != claimed.record.nonce:
        return f"{claimed.record.node} goes on although the record is {record}"
    return ""


def _ends_wrong(broker: SimulatedBroker, claimants: Sequence[Claimant]) -> str:
    held = broker.held(0.0, 0)
    last = consumer_of(broker.domain.service, 0, held)
    if broker.consumers(0.0) != [last]:
        return f"the consumers are {broker.consumers(0.0)}, the last word has {last}"
    if not any(each.claimed is not None and each.claimed.consumer == last for each in claimants):
        return "nobody owns it"
    return ""
