"""The messages of the rig over what is stored, and what processes are told."""

import msgspec

from catga_bus import Command, Event
from tests.chaos.stored.history import Work

SERVICE = "ledger"
"""The service that handles commands."""

MAX_ATTEMPTS = 3


class Post(Command[str], partition_by="key"):
    """A numbered value of a key; answers which execution had its effect."""

    op: str
    key: str
    value: int
    work: Work


class Amend(Command[str], partition_by="key"):
    """The same as another type: keys are in order across types."""

    op: str
    key: str
    value: int
    work: Work


class Told(Event, partition_by="key"):
    """A numbered value of a key, for every service."""

    op: str
    key: str
    value: int
    work: Work


class NodePlan(msgspec.Struct, frozen=True):
    """What a node process is told."""

    url: str
    namespace: str
    node_id: str
    service: str
    history: str
    """Directory of the history, and of the points at which the rig waits for this process (`<node>.point`)."""

    inbox: str
    """File of the service's inbox."""

    partitions: int = 16
    takes_commands: bool = True
    takes_events: bool = False
    replicas: int = 1
    concurrency: int = 64


STEADY = {"quick": 0.9, "slow": 0.07, "flaky": 0.03}


class ProducerPlan(msgspec.Struct, frozen=True):
    """What a producer process is told."""

    url: str
    namespace: str
    name: str
    history: str
    seed: str
    keys: int = 100
    rate: float = 100.0
    """Messages per second, whether or not those before are stored."""

    timeout: float = 15.0
    """Seconds until acceptance, or the result, is given up."""

    events: float = 0.0
    """Share of events among the messages; the others are commands."""

    waits: float = 0.1
    """Share of commands whose result is waited for."""

    mix: dict[str, float] = msgspec.field(default_factory=lambda: dict(STEADY))
    """Shares of the kinds of `WORK`."""

    opening: list[str] = []
    """The kinds of the first messages."""

    limit: int | None = None
    partitions: int = 16
    replicas: int = 1


WORK: dict[str, Work] = {
    "quick": Work(),
    "slow": Work(seconds=0.15),
    "long": Work(seconds=1.0),
    "flaky": Work(fails=1),
    "doomed": Work(fails=MAX_ATTEMPTS),
    "killer": Work(seconds=0.1, kills=True),
}
"""What the kinds of messages do to their handler. A doomed one becomes a dead letter."""
