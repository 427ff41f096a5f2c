"""What a node says of itself to whoever asks."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import Bus, Request
from catga_bus.node import Node
from catga_bus.testing import broker_of, eventually

PING = "$SRV.PING"


class Where(Request[str]):
    pass


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[Bus]:
    async with Bus("client", url=url) as bus:
        yield bus


def node(url: str, node_id: str, **options: Any) -> Bus:
    bus = Bus("shop", url=url, node_id=node_id, **options)

    @bus.handler
    async def where(request: Where) -> str:
        return bus.node_id

    return bus


def inside(bus: Bus) -> Node:
    assert bus._node is not None
    return bus._node


# -- answering ---------------------------------------------------------------------------------------------


async def test_a_node_that_is_behind_does_not_say_who_it_is(url: str, client: Bus) -> None:
    answers: list[bytes] = []
    asking = inside(client).transport
    inbox = asking.new_inbox()
    await asking.subscribe(inbox, lambda _, payload, *__: answers.append(payload))
    async with node(url, "busy", write_limit_bytes=65_536) as busy:
        carrier = inside(busy).transport
        asking.publish(PING, b"", reply=inbox)  # on its way to the node before the broker stalls
        broker_of(url).stall()
        carrier.publish("filler", bytes(65_537))
        assert carrier.is_behind
        # The question is delivered on the next turns, while the node is behind.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        broker_of(url).resume()
        await eventually(lambda: not carrier.is_behind)
        asking.publish(PING, b"", reply=inbox)
        await eventually(lambda: answers)
        await client._node.transport.flush()  # type: ignore[union-attr]
    assert [msgspec.json.decode(one)["id"] for one in answers] == ["busy"]
