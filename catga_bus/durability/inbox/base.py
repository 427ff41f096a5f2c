"""The seam of the inbox, which makes effects happen exactly once.

What a handler writes, the mark that its message is done, its result and what it sends are committed in one transaction,
which also checks the fence.

    done = await inbox.find_many(service, message_ids)       # done before: answer again, run nothing
    unit = inbox.unit(service, message_id, fence)            # one execution
    transaction = await unit.transaction()                   # only if the handler asks: ctx.transaction()
    await unit.commit(result)                                # after the handler; FencedError: drop it all
    await unit.rollback()                                    # the handler failed

Stores are SQLite and memory; `catga_bus.testing` has the contract suite that both pass. `inboxes.make_inbox` makes one
from an address.

Decided: `find` saves an execution and `commit` is the judge. A message that another node did after it was looked for is
recognised by the commit, which rolls back and returns what is recorded.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from catga_bus.effects import Effects, Fence
from catga_bus.effects import Outbound as Outbound
from catga_bus.effects import Transaction as Transaction
from catga_bus.errors import CatgaError


class FencedError(CatgaError):
    """The effect carries an epoch below the highest that the store has seen: another node owns the partition.

    Attributes:
        highest: That epoch; 0 if it is not known.
    """

    def __init__(self, message: str, highest: int = 0) -> None:
        super().__init__(message)
        self.highest = highest


class InboxError(CatgaError):
    """The store cannot be read or written; the text names it, what is wrong, and the fix. Nothing was committed."""


class SlowTransactionError(InboxError):
    """A handler had the transaction for longer than `transaction_timeout`: the handler is to blame, not the store."""


class Recorded(msgspec.Struct, frozen=True):
    """The result of a message that is done."""

    status: int
    """`catga_bus.wire.Status`: OK or REFUSED; FAILED of a dead letter, which a later result replaces."""

    body: bytes
    """MessagePack of the value or of the `Fault`."""


class Unit(Effects, Protocol):
    """One execution of a handler, and what is to be committed for it. Ended once, by `commit` or by `rollback`."""

    @property
    def outbound(self) -> Sequence[Outbound]:
        """What was given to `send`, in order: to be published once it is committed."""
        ...

    @property
    def failure(self) -> InboxError | None:
        """Why it failed, if the store is to blame: the handler's attempt does not count then."""
        ...

    async def commit(self, result: Recorded) -> Recorded:
        """Commit everything, with the result; return it, or the recorded one if the message was done meanwhile.

        It returns when the commit has happened. Cancelled, it may happen all the same: the inbox knows. A recorded
        `FAILED` is no obstacle: the message was a dead letter, and was retried.

        Raises:
            FencedError: The epoch is stale; everything was rolled back.
            InboxError: The store cannot be written; everything was rolled back.
        """
        ...

    async def rollback(self) -> None:
        """Forget everything; does nothing once the unit has ended."""


class Inbox(Protocol):
    """A store of what is done, shared by the nodes of a service."""

    @property
    def store_id(self) -> str:
        """Random, made with the store; two live nodes of a service with different ones are an error."""
        ...

    @property
    def retention(self) -> float:
        """Seconds for which results are kept, at least."""
        ...

    async def open(self) -> None:
        """Open the store, making it if it is not there. Opened n times it is closed by the n-th `close`.

        Raises:
            ConfigurationError: The store is not one, or not of a version that can be read; the text names the fix.
            InboxError: It cannot be reached.
        """

    async def find(self, service: str, message_id: str) -> Recorded | None:
        """Return the recorded result of a message, or None if it is not done.

        Raises:
            InboxError: The store cannot be read.
        """
        ...

    async def find_many(self, service: str, message_ids: Sequence[str]) -> dict[str, Recorded]:
        """Return the recorded results of those messages that are done: one look for all frames of a record.

        Raises:
            InboxError: The store cannot be read.
        """
        ...

    def unit(self, service: str, message_id: str, fence: Fence) -> Unit:
        """Begin one execution; touches nothing until it commits or its transaction runs a statement."""
        ...

    async def unsent(self, service: str, fence: Fence, limit: int) -> list[Outbound]:
        """Return what was committed for sending in a partition and is not known to be stored, in order of commits.

        Raises the fence first, so that nothing that a former owner commits later is missed.

        Raises:
            FencedError: Another node owns the partition.
            InboxError: The store cannot be read or written.
        """
        ...

    async def sent(self, service: str, message_ids: Sequence[str]) -> None:
        """Forget what is stored by now.

        Raises:
            InboxError: The store cannot be written: it will be found unsent again.
        """

    async def sweep(self, now_utc: float) -> int:
        """Forget results that are older than the retention; return how many.

        Raises:
            InboxError: The store cannot be written.
        """
        ...

    async def close(self) -> None:
        """Close the store: what was handed to it is committed first."""
