"""What the effects of a stored message are tied to: the fence of its partition, and the transaction of the inbox."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec


class Fence(NamedTuple):
    """What a handler's effects carry: whoever checks it refuses an epoch below the highest that it has seen.

    Epochs are compared within one service, domain and partition: the owner of a partition of the work queue and the
    owner of the same number on the event log are granted apart, so their epochs say nothing about each other.
    """

    partition: int
    epoch: int
    domain: str = "cmd"
    """`cmd` for the service's work queue, `evt` for its position in the event log, as in the keys of the owners."""


class Outbound(msgspec.Struct, frozen=True):
    """A message that a handler sent in its transaction: stored with its effects, published after the commit."""

    subject: str
    message_id: str
    frame: bytes
    """The encoded `MessageFrame`."""

    service: str = ""
    """Commands: the service that handles it. Empty for events."""


class Transaction(Protocol):
    """What a handler writes through: its statements are committed with the inbox's own.

    Transactions of one store run one after another, across all processes that share it: keep them short, and await
    nothing slow between two statements. What a statement raises is the database's own exception (`sqlite3.Error`); the
    statement has then done nothing, and the transaction goes on.

    All three raise `InboxError` when the transaction is over: it was open for longer than the store's
    `transaction_timeout`, or the store failed.
    """

    async def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> int:
        """Run a statement that writes; return the number of rows it changed, 0 if it changes none by its nature."""
        ...

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement once for each row; return the number of rows changed."""
        ...

    async def fetch(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query, which sees what this transaction has written, and return its rows."""
        ...


class Effects(Protocol):
    """What an execution may have committed together with the mark that its message is done."""

    async def transaction(self) -> Transaction:
        """Return the transaction of this execution, always the same one; it begins with its first statement."""
        ...

    def send(self, outbound: Outbound) -> None:
        """Send a message with the commit."""


class Stake(NamedTuple):
    """What the execution of a stored message has and that of a request has not."""

    fence: Fence
    """Of the partition, when the execution began."""

    effects: Effects | None
    """Its unit in the inbox; None if the bus has no inbox."""
