"""FastStream: the same typed request and handler, with pydantic models, its default.

What was tried for its sake (2 cores, Python 3.11, FastStream 0.7.8): msgspec in place of pydantic
makes no difference that could be told from noise; `max_workers` of 64 or 256 in place of the
default of 1 costs half of the throughput, as every message then passes a memory stream, a semaphore
and a task. The default handles one message at a time, so that a handler that waits holds up all
others; with `max_workers` they run side by side, as in a node of catga_bus. Both are measured.
"""

from types import TracebackType
from typing import Any, Self

from faststream.nats import NatsBroker
from pydantic import BaseModel

from benchmarks.load import (
    PRICE_CENTS,
    QUANTITY,
    REQUEST_TIMEOUT,
    SKU,
    TOTAL_CENTS,
    LoadClient,
    WrongAnswerError,
)


class Priced(BaseModel):
    """What a quote is answered with."""

    order: int
    cents: int


class Quote(BaseModel):
    """Ask for the price of an order."""

    order: int
    sku: str
    quantity: int


class _Connected:
    """Holds a started broker while it is entered."""

    def __init__(self, url: str, namespace: str) -> None:
        # Without a logger nothing is logged per message: the fastest way to run it.
        self._broker = NatsBroker(url.split(","), logger=None)
        self._subject = f"{namespace}.faststream.quote"

    async def __aenter__(self) -> Self:
        """Connect and start."""
        await self._broker.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the broker."""
        await self._broker.stop(kind, error, traceback)


class Worker(_Connected):
    """A subscriber in a queue group that answers quotes.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        max_workers: How many messages it handles side by side; None for FastStream's default.
    """

    def __init__(self, url: str, namespace: str, max_workers: int | None = None) -> None:
        super().__init__(url, namespace)
        options: dict[str, Any] = {} if max_workers is None else {"max_workers": max_workers}

        @self._broker.subscriber(self._subject, queue="bench", **options)
        async def quote(request: Quote) -> Priced:
            return Priced(order=request.order, cents=request.quantity * PRICE_CENTS)


class Client(_Connected, LoadClient):
    """Asks with `request`.

    Args:
        url: Where the server is.
        namespace: The worker's.
    """

    def __init__(self, url: str, namespace: str) -> None:
        _Connected.__init__(self, url, namespace)
        LoadClient.__init__(self)

    async def call(self) -> None:
        """Ask for one quote."""
        order = next(self.orders)
        answer = await self._broker.request(
            Quote(order=order, sku=SKU, quantity=QUANTITY), self._subject, timeout=REQUEST_TIMEOUT
        )
        # Straight from the bytes: decoding the message first would parse the JSON twice.
        priced = Priced.model_validate_json(answer.body)
        if priced.order != order or priced.cents != TOTAL_CENTS:
            raise WrongAnswerError(f"order {order} was answered with {priced!r}")
