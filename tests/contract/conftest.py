"""Every contract is proven on both event loops."""

import asyncio
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import pytest

# So that a failed assertion of the suite shows its values.
pytest.register_assert_rewrite(
    "catga_bus.testing.transport_contract",
    "catga_bus.testing.discovery_contract",
    "catga_bus.testing.jetstream_consumers",
    "catga_bus.testing.jetstream_scripts",
    "catga_bus.testing.jetstream_streams",
    "catga_bus.testing.jetstream_trials",
)


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if find_spec("uvloop") is not None:
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories
