"""The connection to NATS is proven on both event loops; everything else here runs on asyncio's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest

from catga_bus import Bus
from tests.integration.till import OPTIONS, SERVICE

ON_BOTH_LOOPS = {"test_nats_connection", "test_nats_reconnect"}


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.stem in ON_BOTH_LOOPS and find_spec("uvloop") is not None:
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture
async def make_bus() -> AsyncIterator[Callable[..., Bus]]:
    """Make buses with the options of `till`, closed at the end: `make_bus(url, service, **options)`."""
    buses: list[Bus] = []

    def make(url: str, service: str = SERVICE, **options: Any) -> Bus:
        buses.append(Bus(service, url=url, **OPTIONS | options))
        return buses[-1]

    yield make
    for bus in buses:
        await bus.close()
