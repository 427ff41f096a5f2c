"""What a node says of itself to whoever asks, and how the service of a node is found."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from catga_bus import Bus, Err, Ok, PermissionDeniedError, Request
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


def count_pings(bus: Bus) -> list[str]:
    """Note every question that a bus asks all nodes."""
    asked: list[str] = []
    transport: Any = inside(bus).transport
    publish = transport.publish

    def noting(subject: str, *args: Any, **options: Any) -> None:
        if subject == PING:
            asked.append(subject)
        publish(subject, *args, **options)

    transport.publish = noting
    return asked


# -- finding nodes -----------------------------------------------------------------------------------------


async def test_a_node_that_comes_up_while_it_is_looked_for_is_found(url: str, client: Bus) -> None:
    asked = count_pings(client)
    call = asyncio.create_task(client.send(Where(), node="late"))
    await eventually(lambda: asked)
    async with node(url, "late"):
        assert await call == Ok("late")


async def test_five_hundred_who_look_for_one_node_ask_once(url: str, client: Bus) -> None:
    async with node(url, "one"):
        asked = count_pings(client)
        results = await asyncio.gather(*(client.send(Where(), node="one") for _ in range(500)))
    assert results == [Ok("one")] * 500
    assert len(asked) == 1


async def test_who_joins_a_search_keeps_it_when_the_first_one_leaves(url: str, client: Bus) -> None:
    asked = count_pings(client)
    first = asyncio.create_task(client.send(Where(), node="late"))
    await eventually(lambda: asked)
    second = asyncio.create_task(client.send(Where(), node="late"))
    finder = inside(client).finder
    await eventually(lambda: finder._searches["late"].waiting == 2)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    async with node(url, "late"):
        assert await second == Ok("late")
    assert not finder._searches


async def test_a_search_that_nobody_waits_for_leaves_nothing_behind(client: Bus) -> None:
    asked = count_pings(client)
    call = asyncio.create_task(client.send(Where(), node="nobody"))
    await eventually(lambda: asked)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert not inside(client).finder._searches


async def test_the_node_learnt_first_is_forgotten_for_the_next(
    url: str, client: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = inside(client).finder
    monkeypatch.setattr(finder, "_MAX_KNOWN", 2)
    for name in ("a", "b", "c"):
        async with node(url, name):
            assert await client.send(Where(), node=name) == Ok(name)
    assert list(finder._known) == ["b", "c"]


async def test_a_search_that_is_not_permitted_says_so_at_once(client: Bus) -> None:
    asked = count_pings(client)
    call = asyncio.create_task(client.send(Where(), node="nobody", timeout=60))
    await eventually(lambda: asked)
    client._connection.on_denied(PING, "Permissions Violation")
    with pytest.raises(PermissionDeniedError, match=r"\$SRV\.PING") as caught:
        await call
    assert caught.value.subject == PING


async def test_closing_ends_a_search(url: str) -> None:
    client = Bus("client", url=url)
    await client.start()
    asked = count_pings(client)
    call = asyncio.create_task(client.send(Where(), node="nobody", timeout=60))
    await eventually(lambda: asked)
    await client.close()
    result = await call
    assert isinstance(result, Err)
    assert (result.code, result.outcome, result.retryable) == ("DISCONNECTED", "not_run", True)


async def test_a_search_survives_a_connection_that_comes_back(url: str, client: Bus) -> None:
    asked = count_pings(client)
    call = asyncio.create_task(client.send(Where(), node="late", timeout=30))
    await eventually(lambda: asked)
    async with node(url, "late") as late:
        broker_of(url).cut()
        broker_of(url).heal()
        await eventually(lambda: late.statistics().reconnects)
        assert await call == Ok("late")


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


async def test_a_node_that_is_not_there_may_be_asked_for_again(client: Bus) -> None:
    result = await client.send(Where(), node="nobody", timeout=0.05)
    assert isinstance(result, Err)
    assert (result.code, result.outcome, result.retryable) == ("NO_HANDLER", "not_run", True)
