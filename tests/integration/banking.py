"""The service `bank` of `deploy/nats`, for `catga streams apply` and for buses that are its nodes."""

from typing import Any

from catga_bus import Bus, Command, Context, Event, RetryOptions

SERVICE = "bank"
OPTIONS: dict[str, Any] = {"partitions": 4, "heartbeat_interval": 0.1, "heartbeat_timeout": 0.5}


class Debit(Command[int], partition_by="account"):
    account: str
    cents: int


class Debited(Event, partition_by="account"):
    account: str
    cents: int


class Bank:
    """What its handlers did.

    Attributes:
        told: The amounts that it has heard of again as events.
        is_closed: Whether every debit fails.
    """

    def __init__(self) -> None:
        self.told: list[int] = []
        self.is_closed = False

    def on(self, bus: Bus) -> Bus:
        """Give a bus its handlers."""

        @bus.handler(max_attempts=2, retry=RetryOptions(first=0.05, longest=0.1))
        async def debit(command: Debit, ctx: Context) -> int:
            if self.is_closed:
                raise RuntimeError("the bank is closed")
            await ctx.publish(Debited(command.account, command.cents))
            return command.cents

        @bus.handler
        async def debited(event: Debited) -> None:
            self.told.append(event.cents)

        return bus


bus = Bank().on(Bus(SERVICE, url="nats://127.0.0.1:4222", **OPTIONS))
