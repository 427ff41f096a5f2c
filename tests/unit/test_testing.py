"""The helpers that users test with."""

import asyncio
import subprocess
import sys

import pytest

from catga_bus import testing
from catga_bus.testing import eventually


async def test_eventually_returns_what_the_condition_returned_once_it_holds() -> None:
    seen: list[int] = []
    asyncio.get_running_loop().call_later(0.01, seen.append, 7)
    assert await eventually(lambda: seen) == [7]
    assert await eventually(lambda: "at once", 0.0) == "at once"


async def test_eventually_sees_what_the_next_turns_of_the_loop_bring() -> None:
    seen: list[int] = []
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, seen.append, 7)
    turns = 0

    def condition() -> bool:
        nonlocal turns
        turns += 1
        return bool(seen)

    await eventually(condition)
    assert turns <= 4


async def test_eventually_fails_with_what_was_missing_and_the_last_value() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: three nodes; last value \[\]"):
        await eventually(list, 0.01, what="three nodes")
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: list"):
        await eventually(list, 0.01)


async def test_eventually_passes_on_what_the_condition_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        await eventually(lambda: 1 // 0)


def test_only_the_contract_needs_pytest() -> None:
    program = """
import sys
sys.modules["pytest"] = None
import catga_bus.testing
catga_bus.testing.eventually, catga_bus.testing.broker_of, catga_bus.testing.Carrier
try:
    catga_bus.testing.TransportContract
except ImportError as error:
    assert error.name == "pytest", error
else:
    raise AssertionError("pytest is hidden")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_public_names_are_there_and_others_are_refused() -> None:
    assert all(getattr(testing, name) is not None for name in testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Contract'"):
        _ = testing.Contract
