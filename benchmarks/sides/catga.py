"""catga_bus: typed requests and an async handler, every option at its default."""

from types import TracebackType
from typing import Any, Self

import msgspec

from benchmarks.load import (
    PRICE_CENTS,
    QUANTITY,
    REQUEST_TIMEOUT,
    SKU,
    TOTAL_CENTS,
    LoadClient,
    WrongAnswerError,
)
from catga_bus import Bus, Request


class Priced(msgspec.Struct):
    """What a quote is answered with."""

    order: int
    cents: int


class Quote(Request[Priced]):
    """Ask for the price of an order."""

    order: int
    sku: str
    quantity: int


async def quote(request: Quote) -> Priced:
    """Answer a quote."""
    return Priced(request.order, request.quantity * PRICE_CENTS)


class Worker:
    """A node with one handler.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        options: Of the bus, beside these.
    """

    def __init__(self, url: str, namespace: str, **options: Any) -> None:
        self._bus = Bus("bench", url=url, namespace=namespace, **options)
        self._bus.handler(quote)

    async def __aenter__(self) -> Self:
        """Start the node."""
        await self._bus.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain the node."""
        await self._bus.__aexit__(kind, error, traceback)


class Client(LoadClient):
    """A bus without handlers, which asks.

    Args:
        url: Where the server is.
        namespace: The worker's.
        options: Of the bus, beside these.
    """

    def __init__(self, url: str, namespace: str, **options: Any) -> None:
        super().__init__()
        self._bus = Bus("bench-caller", url=url, namespace=namespace, **options)

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

    async def call(self) -> None:
        """Ask for one quote."""
        order = next(self.orders)
        result = await self._bus.send(Quote(order, SKU, QUANTITY), timeout=REQUEST_TIMEOUT)
        priced = result.unwrap()
        if priced.order != order or priced.cents != TOTAL_CENTS:
            raise WrongAnswerError(f"order {order} was answered with {priced}")
