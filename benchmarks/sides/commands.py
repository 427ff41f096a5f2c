"""catga_bus: typed commands, stored and handled in order per account, every option at its default but for sizes."""

import asyncio
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from benchmarks.load import REQUEST_TIMEOUT, LoadClient, Run, WrongAnswerError
from benchmarks.sides.stores import wait_empty
from catga_bus import Bus, Command

ACCOUNTS = 1_000
"""How many keys there are: commands of one are handled one after another."""

_NAMES = [f"account-{number:03}" for number in range(ACCOUNTS)]
BUS_OPTIONS = {"command_max_bytes": 1 << 30, "event_max_bytes": 1 << 28, "dead_letter_max_bytes": 1 << 26}
"""So that many sides fit into one server."""

PARTITIONS = 16
"""Of the sides that are compared with others."""


class Debit(Command[int], partition_by="account"):
    """Take money from an account; answered with the amount."""

    account: str
    cents: int
    memo: str


_MEMO = "m" * 25  # brings the command to 64 bytes of MessagePack, the size of the bare side's payload


async def debit(command: Debit) -> int:
    """Answer with the amount."""
    return command.cents


class Entered:
    """Holds a bus while it is entered."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def __aenter__(self) -> Self:
        """Start the bus."""
        await self._bus.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the bus."""
        await self._bus.__aexit__(kind, error, traceback)


class Worker(Entered):
    """A node with one handler.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        is_away: Whether it only makes the stream and its route, and leaves: then what is stored waits.
        options: Of the bus, beside these.
    """

    def __init__(self, url: str, namespace: str, *, is_away: bool = False, **options: Any) -> None:
        super().__init__(Bus("bench", url=url, namespace=namespace, **{**BUS_OPTIONS, **options}))
        self._bus.handler(debit)
        self._is_away = is_away

    async def __aenter__(self) -> Self:
        """Start the node, and end it again if it is to be away."""
        await super().__aenter__()
        if self._is_away:
            await self._bus.drain()
        return self


class Client(Entered, LoadClient):
    """A bus without handlers.

    Args:
        url: Where the server is.
        namespace: The worker's.
        how: "send": every call waits for its result. "enqueue": until it is stored. "handled": the same, and the
            measurement ends when the last command is handled.
    """

    def __init__(self, url: str, namespace: str, how: Literal["send", "enqueue", "handled"]) -> None:
        LoadClient.__init__(self)
        super().__init__(Bus("bench-caller", url=url, namespace=namespace))
        self._where = (url, f"{namespace}-cmd-bench")
        self._how = how

    async def call(self) -> None:
        """Hand in one command."""
        order = next(self.orders)
        command = Debit(_NAMES[order % ACCOUNTS], order, _MEMO)
        if self._how != "send":
            await self._bus.enqueue(command, timeout=REQUEST_TIMEOUT)
            return
        result = await self._bus.send(command, timeout=REQUEST_TIMEOUT)
        if result.unwrap() != order:
            raise WrongAnswerError(f"order {order} was answered with {result}")

    async def measure(self, in_flight: int, requests: int) -> Run:
        """Measure; where handling counts, until all is handled."""
        if self._how != "handled":
            return await super().measure(in_flight, requests)
        await wait_empty(*self._where)
        started = asyncio.get_running_loop().time()
        run = await super().measure(in_flight, requests)
        await wait_empty(*self._where)
        return replace(run, seconds=asyncio.get_running_loop().time() - started)
