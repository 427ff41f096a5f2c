"""The breakers of a caller: what counts for and against a request type and a node, and whose answer closes what."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from catga_bus import Bus, Ok, Request
from catga_bus.clock import monotonic
from catga_bus.testing import eventually


class Quote(Request[str]):
    """Answered at once."""


class Bill(Request[str]):
    """Handled by another service."""


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


def shop(url: str, node_id: str, zone: str | None = None) -> Bus:
    bus = Bus("shop", url=url, node_id=node_id, zone=zone)

    @bus.handler
    async def quote(request: Quote) -> str:
        return node_id

    return bus


def billing(url: str, node_id: str) -> Bus:
    bus = Bus("billing", url=url, node_id=node_id)

    @bus.handler
    async def bill(request: Bill) -> str:
        return node_id

    return bus


@pytest.fixture
async def client(url: str) -> AsyncIterator[Bus]:
    async with Bus("client", url=url, node_id="client") as client:
        yield client


def trip(client: Bus, node: str) -> None:
    """Open the breaker of a node, and let its time be over at once."""
    guard = client._open().caller.guard
    guard._breakers.failed((None, node), monotonic() - 100.0, 25)
    assert guard.held_nodes() == (node,)


# -- which calls probe a node ----------------------------------------------------------------------------------


async def test_a_held_node_is_tried_only_with_types_that_it_handles(url: str, client: Bus) -> None:
    async with shop(url, "s1"), billing(url, "b1"):
        await eventually(lambda: len(client.nodes()) == 3)
        trip(client, "b1")
        assert [await client.send(Quote(), timeout=2.0) for _ in range(10)] == [Ok("s1")] * 10
        assert client._open().caller.guard.held_nodes() == ("b1",)
        assert [await client.send(Bill(), timeout=2.0) for _ in range(3)] == [Ok("b1")] * 3
        assert client._open().caller.guard.held_nodes() == ()


async def test_a_held_node_is_tried_only_with_calls_that_it_fits(url: str, client: Bus) -> None:
    async with shop(url, "good", zone="eu"), shop(url, "bad", zone="us"):
        await eventually(lambda: len(client.nodes()) == 3)
        trip(client, "bad")
        for _ in range(5):
            assert await client.send(Quote(), timeout=2.0, where=lambda node: node.zone == "eu") == Ok("good")
        assert client._open().caller.guard.held_nodes() == ("bad",)
        for _ in range(3):
            assert await client.send(Quote(), timeout=2.0, where=lambda node: node.zone == "us") == Ok("bad")
        assert client._open().caller.guard.held_nodes() == ()
