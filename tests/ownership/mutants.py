"""Bugs that the product could have, each planted for the length of a block, to test that the simulation finds them.

Those that can also be planted in a process of the chaos rig are the rig's own (`tests.chaos.stored.bugs`); the others
replace one step of the bus, or of the simulation's work, by a plausible wrong one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from catga_bus.durability.inbox.sqlite_store import SqliteStore
from catga_bus.partition import records
from catga_bus.partition.broker import Broker
from catga_bus.partition.keeper import Keeper
from catga_bus.partition.lanes import Lanes
from catga_bus.partition.planner import Planner
from catga_bus.partition.protocol import Ownership
from catga_bus.partition.records import Held
from catga_bus.partition.table import Table
from catga_bus.partition.tenure import Do, Tenure
from catga_bus.pulse import Pulse
from catga_bus.transport.jetstream import DeliveredMessage
from tests.chaos.stored.bugs import BUGS
from tests.ownership.working import Job, Work
from tests.ownership.world import Sender

SHARED = (
    "no-fence-check",
    "mark-outside-the-transaction",
    "keys-side-by-side",
    "no-confirming-read",
    "epoch-not-raised",
    "consumer-reused-across-epochs",
    "deaths-not-counted",
    "log-goes-on-behind-what-was-delivered",
)
"""What the rig has as well, and plants in the product."""

RIG_ONLY = {
    "inbox-not-asked": "the simulated work asks the store itself",
    "dead-letter-after-acknowledgement": "dead letters of the simulation are stored at once",
    "dead-letter-without-an-identity": "the simulation has no stream of dead letters",
}
"""What only the rig finds, and why."""

_PLACES: tuple[tuple[Any, str], ...] = (
    (SqliteStore, "_check"), (SqliteStore, "_mark"), (Lanes, "take"), (Ownership, "_confirm"),
    (Ownership, "_next_record"), (Ownership, "_deaths"), (Held, "epoch"), (records, "consumer_name"),
    (Broker, "_position"), (Broker, "_value"), (Tenure, "delivered"), (Tenure, "status"), (Pulse, "beat"),
    (Keeper, "_listen"),
    (Planner, "_note"), (Table, "_failed"), (Work, "_commit"), (Work, "_put_off"), (Work, "finish"),
    (Sender, "is_patient"), (Ownership, "_install_on_log"),
)  # fmt: skip
"""What is put back when the block ends."""

OWN: dict[str, Callable[[], None]] = {}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Have a bug within the block."""
    before = [(owner, attribute, vars(owner)[attribute]) for owner, attribute in _PLACES]
    try:
        (BUGS[name] if name in SHARED else OWN[name])()
        yield
    finally:
        for owner, attribute, value in before:
            setattr(owner, attribute, value)


def _mutant(function: Callable[[], None]) -> Callable[[], None]:
    OWN[function.__name__.replace("_", "-")] = function
    return function


# -- the work, as the rig's bugs of the same name are in the real one --------------------------------------------------


@_mutant
def acknowledge_before_commit() -> None:
    """What is acknowledged and then not committed is lost."""
    commit = Work._commit

    async def wrong(self: Work, job: Job) -> bool:
        self.keeping.done(job.record.sequence)
        return await commit(self, job)

    Work._commit = wrong  # type: ignore[method-assign]


@_mutant
def failing_lets_others_pass() -> None:
    """What failed is tried again later, as with nak, and what comes behind it in its key does not wait."""
    put_off = Work._put_off

    async def wrong(self: Work, job: Job) -> None:
        last, following = self._lanes._last, job.next
        if following is None:
            last.pop(job.key, None)
        job.key, job.next = f"{job.key} {job.message.id}", None
        last[job.key] = job
        if following is not None:
            self._ready.append(following)
            self._go()
        await put_off(self, job)

    Work._put_off = wrong  # type: ignore[method-assign]


@_mutant
def hand_over_without_finishing() -> None:
    """What runs when a partition is given away is forgotten, and run again by the next owner."""

    async def wrong(self: Work, *, below: bool) -> None:
        self.drop()

    Work.finish = wrong  # type: ignore[method-assign]


@_mutant
def second_record_in_flight() -> None:
    """A sender does not wait until a record is stored before it sends the next of its partition."""
    Sender.is_patient = False


# -- ownership ---------------------------------------------------------------------------------------------------------


@_mutant
def no_compare_and_set() -> None:
    """A claim writes over whatever is there."""
    value_of = Broker._value

    async def wrong(self: Broker, operation: Any) -> Any:
        if hasattr(operation, "last"):
            _, revision = await self._owners.read(self._key)
            operation = msgspec.structs.replace(operation, last=revision)
        return await value_of(self, operation)

    Broker._value = wrong  # type: ignore[method-assign]


@_mutant
def unheard_owners_are_robbed() -> None:
    """An owner of whom a newcomer has not heard yet is taken for dead at once."""
    note = Planner._note

    def wrong(self: Planner, *rest: Any) -> None:
        self._timeout = 0.0
        note(self, *rest)

    Planner._note = wrong  # type: ignore[method-assign]


@_mutant
def claim_in_vain_forgotten() -> None:
    """What a claim that failed has left in the bucket is not read again."""
    failed = Table._failed

    def wrong(self: Table, partition: int) -> None:
        failed(self, partition)
        self._unread.discard(partition)

    Table._failed = wrong  # type: ignore[method-assign]


@_mutant
def gap_in_the_deliveries_ignored() -> None:
    """What was lost on the way is not missed."""
    delivered = Tenure.delivered

    def wrong(self: Tenure, record: DeliveredMessage) -> Do:
        self._next = record.consumer_sequence
        return delivered(self, record)

    Tenure.delivered = wrong  # type: ignore[method-assign]


@_mutant
def own_pauses_ignored() -> None:
    """A process that stood still goes on as if nothing had happened."""

    def wrong(self: Pulse, now: float) -> None:
        self.last, self.late_at = now, now + 1.0

    Pulse.beat = wrong  # type: ignore[method-assign]


@_mutant
def redelivery_run_again() -> None:
    """What is delivered again within a tenure is taken as new."""
    delivered = Tenure.delivered

    def wrong(self: Tenure, record: DeliveredMessage) -> Do:
        action = delivered(self, record)
        return Do.TAKE if action in (Do.KEEP, Do.ACKNOWLEDGE) else action

    Tenure.delivered = wrong  # type: ignore[method-assign]


@_mutant
def silence_ignored() -> None:
    """A server that says nothing more is waited for."""
    Keeper._listen = lambda _: None  # type: ignore[method-assign]


@_mutant
def statuses_ignored() -> None:
    """That a consumer is gone is not heard."""
    Tenure.status = lambda *_: Do.NOTHING  # type: ignore[method-assign]
    Keeper._listen = lambda _: None  # type: ignore[method-assign]
