"""A service whose wall clock is wrong, in a process of its own, which the account `killer` ends.

    catga run tests.integration.skewed:bus

Every room of the package that reads the wall clock reads a wrong one; the environment says by how much.
"""

import os
import sys
from datetime import UTC, datetime, timedelta

from catga_bus import Bus, Context
from catga_bus.durability.durable import Durable
from tests.integration.till import OPTIONS, SERVICE, Debit

SKEW = timedelta(seconds=float(os.environ.get("SKEW", "0")))


def wrong_now() -> datetime:
    """The wall clock of this process."""
    return datetime.now(UTC) + SKEW


def spoil_clocks() -> int:
    """Give every room the wrong clock; return how many have one."""
    readers = [
        module for name, module in sys.modules.items() if name.startswith("catga_bus.") and "utc_now" in vars(module)
    ]
    for module in readers:
        vars(module)["utc_now"] = wrong_now
    return len(readers)


assert spoil_clocks() > 5
assert Durable.__module__ in sys.modules

bus = Bus(SERVICE, url=os.environ["SERVER"], inbox=os.environ["INBOX"], **OPTIONS)


@bus.handler
async def debit(command: Debit, ctx: Context) -> int:
    if command.account == "killer":
        os._exit(99)
    transaction = await ctx.transaction()
    assert ctx.fence is not None
    await transaction.execute(
        "INSERT INTO debits VALUES (?, ?, ?, ?)",
        (command.account, command.cents, ctx.fence.partition, ctx.fence.epoch),
    )
    return command.cents
