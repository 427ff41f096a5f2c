"""A service that fails until its process has died once, in a process of its own.

    catga run tests.integration.fatal:bus

The account `stumbles` fails for its cent 1 until the file MENDED is there. The account of the environment's KILLER
makes that file and ends the process, as soon as the cent 2 of the other is committed.
"""

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from catga_bus import Bus, Context, RetryOptions
from tests.integration.till import OPTIONS, SERVICE, Debit

MENDED = Path(os.environ["MENDED"])
INBOX = os.environ["INBOX"]

bus = Bus(SERVICE, url=os.environ["SERVER"], inbox=INBOX, **OPTIONS)


@bus.handler(max_attempts=2, retry=RetryOptions(first=0.01, longest=0.01))
async def debit(command: Debit, ctx: Context) -> int:
    if command.account == os.environ["KILLER"]:
        while not is_committed():
            await asyncio.sleep(0.01)
        MENDED.touch()
        os._exit(99)
    if (command.account, command.cents) == ("stumbles", 1) and not MENDED.exists():
        raise RuntimeError("not yet")
    transaction = await ctx.transaction()
    assert ctx.fence is not None
    await transaction.execute(
        "INSERT INTO debits VALUES (?, ?, ?, ?)",
        (command.account, command.cents, ctx.fence.partition, ctx.fence.epoch),
    )
    return command.cents


def is_committed() -> bool:
    """Whether the follower of the message that fails is done."""
    with closing(sqlite3.connect(INBOX.removeprefix("sqlite://"))) as connection:
        return bool(
            connection.execute("SELECT COUNT(*) FROM debits WHERE account = 'stumbles' AND cents = 2").fetchone()[0]
        )
