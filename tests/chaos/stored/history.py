"""The history of a run over what is stored: what producers, nodes and the rig saw. See `tests.chaos.history`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from tests.chaos.history import Fault, Witness, read_file, read_tail


class Sent(msgspec.Struct, tag="sent", frozen=True):
    """A producer has something stored."""

    t: float
    op: str
    """`<producer>-<count>`: which message of a run this is. It travels in the message."""

    producer: str
    service: str
    """That handles it; empty for an event, which all do."""

    key: str
    value: int
    """Rises by one for each message of a key, from 1."""

    work: "Work"
    waits: bool
    """Whether the producer waits for the result (`send`), and not only until it is stored."""

    timeout: float


class Work(msgspec.Struct, frozen=True):
    """What a message does to its handler."""

    seconds: float = 0.0
    """For which it runs."""

    fails: int = 0
    """Attempts that fail before one does not."""

    kills: bool = False
    """Whether it kills its process."""


class Settled(msgspec.Struct, tag="settled", frozen=True):
    """The producer knows what became of it."""

    t: float
    op: str
    outcome: str
    """`ok`, `refused`, `failed`, `not_run`, `unknown`, as errors tell it."""

    code: str
    """`ok`, or the code of the error."""

    answer: str = ""
    """Which execution had its effect, if the producer waited for the result."""

    sequence: int = 0
    """Of its record, if it is known."""


class Begun(msgspec.Struct, tag="begun", frozen=True):
    """A node starts an execution: the first line of the handler."""

    t: float
    op: str
    message_id: str
    service: str
    key: str
    value: int
    node: str
    pid: int
    attempt: int
    domain: str
    partition: int
    epoch: int


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """The handler has come to its end."""

    t: float
    op: str
    service: str
    node: str
    pid: int
    how: Literal["ok", "raised", "cancelled"]


class Kept(msgspec.Struct, tag="kept", frozen=True):
    """What the inbox said about a message."""

    t: float
    message_id: str
    service: str
    node: str
    pid: int
    how: Literal["committed", "repeated", "known", "fenced", "failed"]
    """`committed`: with its effects; `repeated`: its effects are forgotten, another execution was faster; `known`: it
    is not run, because it is done; `fenced`: refused, the epoch is stale; `failed`: the store could not."""

    domain: str = ""
    partition: int = -1
    epoch: int = 0
    """Of the execution; nothing of these where it was not run."""


class Owned(msgspec.Struct, tag="owned", frozen=True):
    """A step of the ownership of a partition."""

    t: float
    service: str
    domain: str
    partition: int
    epoch: int
    node: str
    pid: int
    step: Literal["written", "granted", "draining", "released"]
    """`written`: the compare-and-set of a claim was done; `granted`: it is confirmed, and work may begin."""

    read_at: float = 0.0
    """`granted`: the instant before the read that confirms it."""

    takes_over: bool = False
    """`granted`: from whom had not released it."""

    consumer: str = ""
    """`granted`: the consumer of this epoch."""


class Hit(msgspec.Struct, tag="hit", frozen=True):
    """A process has come to a point at which the rig wants it killed or frozen, and does it to itself."""

    t: float
    node: str
    pid: int
    point: str
    action: Literal["kill", "freeze"]
    what: str
    """The operation, or the partition, with which it came there."""


class Counts(msgspec.Struct, tag="counts", frozen=True):
    """The statistics of a node, which count from the start of its process."""

    t: float
    node: str
    pid: int
    counts: dict[str, int]


Record: TypeAlias = Sent | Settled | Begun | Ended | Kept | Owned | Hit | Counts | Fault | Witness

_decoder = msgspec.json.Decoder(Record)


def read_stored(directory: Path) -> list[Record]:
    """Return the records of all processes in the order of their instants; raises as `tests.chaos.history`."""
    return in_order(record for path in sorted(directory.glob("*.jsonl")) for record in read_file(path, _decoder))


def tail_of(path: Path) -> list[Record]:
    """Return the last records of one process."""
    return read_tail(path, decoder=_decoder)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Return the records in the order of their instants; equal ones as they came."""
    return sorted(records, key=lambda record: record.t)
