"""Processes that write to an inbox and are killed: run by `test_inbox_crashes.py`.

    inbox_crasher.py steps FILE          forks; the n-th child kills itself before the n-th statement that SQLite runs
    inbox_crasher.py load FILE SEED      does messages until it is killed
    inbox_crasher.py zombie FILE EPOCH   writes an effect, waits for a line, commits

Every message `m-<n>` has the effect `n`, sends the message `m-<n>.1` and has the result `n`; every third has no effect
of its own.
"""

import asyncio
import os
import random
import signal
import sys

from catga_bus.durability.inbox.base import FencedError, Outbound, Recorded
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.effects import Fence

FENCE = Fence(3, 100)


async def do(inbox: SqliteInbox, number: int, fence: Fence = FENCE) -> Recorded:
    unit = inbox.unit("billing", f"m-{number}", fence)
    if number % 3:
        await (await unit.transaction()).execute("INSERT INTO effects VALUES (?)", (number,))
    unit.send(Outbound("catga.evt.Done.1", f"m-{number}.1", b"%d" % number))
    return await unit.commit(Recorded(0, b"%d" % number))


async def step(path: str, kill_before: int) -> None:
    inbox = SqliteInbox(path)
    await inbox.open()
    left = kill_before

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    assert inbox._writer is not None
    inbox._writer._store._connection.set_trace_callback(count)
    for number in range(4):
        await do(inbox, number)
    await asyncio.gather(*(do(inbox, number) for number in range(4, 9)))
    inbox._writer._store._connection.set_trace_callback(None)
    await inbox.close()


def steps(path: str) -> None:
    """Print how many children were killed, then the end of the first that was not."""
    kill_before = 1
    while True:
        child = os.fork()
        if not child:
            asyncio.run(step(path, kill_before))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(kill_before, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
        if not os.WIFSIGNALED(status):
            return
        sys.stdin.readline()  # the test looks at the file
        kill_before += 1


async def load(path: str, seed: int) -> None:
    inbox = SqliteInbox(path)
    await inbox.open()
    rng = random.Random(seed)
    numbers = iter(range(1, 1_000_000_000))

    async def lane() -> None:
        for number in numbers:
            # Others do the same numbers, so most of them race and some are done.
            if await inbox.find("billing", f"m-{number}") is None:
                result = await do(inbox, number)
                assert result == Recorded(0, b"%d" % number)
            if rng.random() < 0.1:
                await asyncio.sleep(0.001)

    print("running", flush=True)
    await asyncio.gather(*(lane() for _ in range(16)))


async def zombie(path: str, epoch: int) -> None:
    inbox = SqliteInbox(path, transaction_timeout=60.0)
    await inbox.open()
    unit = inbox.unit("billing", "m-1", Fence(3, epoch))
    unit.send(Outbound("catga.evt.Done.1", "m-1.1", b"zombie"))
    print("ready", flush=True)
    sys.stdin.readline()
    await (await unit.transaction()).execute("INSERT INTO effects VALUES (-1)")
    try:
        await unit.commit(Recorded(0, b"zombie"))
    except FencedError as error:
        print(f"fenced: {error}", flush=True)
    else:
        print("committed", flush=True)


if __name__ == "__main__":
    what, path = sys.argv[1:3]
    if what == "steps":
        steps(path)
    elif what == "load":
        asyncio.run(load(path, int(sys.argv[3])))
    else:
        asyncio.run(zombie(path, int(sys.argv[3])))
