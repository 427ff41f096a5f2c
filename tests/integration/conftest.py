"""The connection to NATS is proven on both event loops; everything else here runs on asyncio's."""

import asyncio
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import pytest

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
