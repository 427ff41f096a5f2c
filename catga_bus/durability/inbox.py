"""The seam of the inbox, which makes effects happen exactly once.

What a handler writes, the mark that its message is done, its result and what it sends are committed in one transaction,
which also checks the fence.

    recorded = await inbox.find(service, message_id)         # done before: answer again, run nothing
    unit = inbox.unit(service, message_id, fence)            # one execution
    transaction = await unit.transaction()                   # only if the handler asks: ctx.transaction()
    await unit.commit(result)                                # after the handler; FencedError: drop it all
    await unit.rollback()                                    # the handler failed

Stores are SQLite and memory; `catga_bus.testing` has the contract suite that both pass.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from catga_bus.effects import Effects, Fence
from catga_bus.effects import Outbound as Outbound
from catga_bus.effects import Transaction as Transaction
from catga_bus.errors import CatgaError


class FencedError(CatgaError):
    """The effect carries an epoch below the highest that the store has seen: another node owns the partition."""


class Recorded(msgspec.Struct, frozen=True):
    """The result of a message that is done."""

    status: int
    """`catga_bus.wire.Status`: OK or REFUSED."""

    body: bytes
    """MessagePack of the value or of the `Fault`."""


class Unit(Effects, Protocol):
    """One execution of a handler, and what is to be committed for it."""

    async def commit(self, result: Recorded) -> Recorded:
        """Commit everything, with the result; return it, or the recorded one if the message was done meanwhile.

        Raises:
            FencedError: The epoch is stale; everything was rolled back.
            CatgaError: The store cannot be written; everything was rolled back.
        """
        ...

    async def rollback(self) -> None:
        """Forget everything."""


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
        """Open the store, making it if it is not there."""

    async def find(self, service: str, message_id: str) -> Recorded | None:
        """Return the recorded result of a message, or None if it is not done."""
        ...

    def unit(self, service: str, message_id: str, fence: Fence) -> Unit:
        """Begin one execution."""
        ...

    async def unsent(self, service: str, partition: int, limit: int) -> list[Outbound]:
        """Return what was committed for sending by executions in a partition and is not known to be stored yet."""
        ...

    async def sent(self, service: str, message_ids: Sequence[str]) -> None:
        """Forget what is stored by now."""

    async def sweep(self, now_utc: float) -> int:
        """Forget results that are older than the retention; return how many."""
        ...

    async def close(self) -> None:
        """Close the store."""
