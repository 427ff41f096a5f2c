"""Any NATS client in any language is a client: JSON in, JSON out, and the service discovery of ADR-32."""

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import uuid4

import nats
import pytest
from nats.aio.client import Client

from catga_bus import Bus, Err, Event, Request
from catga_bus.testing import eventually

pytestmark = pytest.mark.nats


class Quote(Request[dict[str, int]]):
    sku: str


class Note(Event, durable=False):
    text: str


class Shout(Event, durable=False):
    text: str


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.fixture
async def stock(server_url: str) -> AsyncIterator[Client]:
    client = await nats.connect(server_url)
    yield client
    await client.close()


@pytest.fixture
async def bus(server_url: str, namespace: str) -> AsyncIterator[Bus]:
    bus = Bus("shop", url=server_url, namespace=namespace, version="1.2.3", zone="eu-1")
    bus.seen = []  # type: ignore[attr-defined]

    @bus.handler
    async def quote(request: Quote) -> dict[str, int] | Err:
        if request.sku == "none":
            return Err("OUT_OF_STOCK", "none left\nat all", {"sku": "none"})
        if request.sku == "odd":
            return Err("two\nlines", "half \ud800 of a pair", "x" * 2_000_000)
        if request.sku == "boom":
            raise ValueError("no such shelf")
        return {"cents": len(request.sku)}

    @bus.handler
    async def note(event: Note) -> None:
        bus.seen.append(event)  # type: ignore[attr-defined]

    @bus.handler
    async def shout(event: Shout) -> None:
        bus.seen.append(event)  # type: ignore[attr-defined]

    async with bus:
        yield bus


async def test_a_json_request_is_answered_with_json(bus: Bus, stock: Client, namespace: str) -> None:
    answer = await stock.request(f"{namespace}.rpc.Quote", b'{"sku":"sku-9"}', timeout=5)
    assert json.loads(answer.data) == {"cents": 5}
    assert not answer.headers


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (b'{"sku":"none"}', "OUT_OF_STOCK", "none left at all"),
        (b'{"sku":"boom"}', "HANDLER_ERROR", "raised ValueError: no such shelf"),
        (b'{"sku":"odd"}', "two lines", "too large"),
        (b'{"sku":3}', "INVALID_MESSAGE", "expected `str`, got `int`"),
        (b"{}", "INVALID_MESSAGE", "sku"),
        (b'{"sku":', "INVALID_MESSAGE", ""),
        (b"[" * 50_000, "INVALID_MESSAGE", ""),
        (b"hello", "INVALID_MESSAGE", ""),
        (b"", "INVALID_MESSAGE", ""),
        (b"\xc1\x09\x90", "INVALID_MESSAGE", "version"),
    ],
)
async def test_failures_carry_the_error_headers_of_adr_32(
    bus: Bus, stock: Client, namespace: str, body: bytes, code: str, text: str
) -> None:
    answer = await stock.request(f"{namespace}.rpc.Quote", body, timeout=5)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == code
    assert text in answer.headers["Nats-Service-Error"]
    assert json.loads(answer.data)["code"] == code


async def test_details_reach_the_foreign_client(bus: Bus, stock: Client, namespace: str) -> None:
    answer = await stock.request(f"{namespace}.rpc.Quote", b'{"sku":"none"}', timeout=5)
    assert json.loads(answer.data) == {
        "code": "OUT_OF_STOCK",
        "message": "none left\nat all",
        "details": {"sku": "none"},
        "retryable": False,
    }


async def test_json_reaches_one_named_node(bus: Bus, stock: Client, namespace: str) -> None:
    answer = await stock.request(f"{namespace}.to.shop.{bus.node_id}.rpc.Quote", b'{"sku":"a"}', timeout=5)
    assert json.loads(answer.data) == {"cents": 1}
    answer = await stock.request(f"{namespace}.to.shop.{bus.node_id}.rpc.Other", b"{}", timeout=5)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == "NO_HANDLER"


async def test_json_events_are_handled(bus: Bus, stock: Client, namespace: str) -> None:
    await stock.publish(f"{namespace}.tick.Note", b'{"text":"one"}')
    await stock.publish(f"{namespace}.all.Shout", b'{"text":"two"}')
    await stock.publish(f"{namespace}.all.Shout", b'{"text":3}')
    await eventually(lambda: len(bus.seen) == 2)  # type: ignore[attr-defined]
    assert {event.text for event in bus.seen} == {"one", "two"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("reply", ["$JS.API.STREAM.LIST", "{namespace}.rpc.Quote", "$SRV.PING", "elsewhere.x", ""])
async def test_no_request_makes_a_node_write_outside_the_inboxes(
    bus: Bus, stock: Client, namespace: str, reply: str
) -> None:
    target = reply.format(namespace=namespace)
    heard: list[bytes] = []

    async def hear(message: object) -> None:
        heard.append(message.data)  # type: ignore[attr-defined]

    if target and "rpc" not in target:
        await stock.subscribe(target, cb=hear)
    before = bus.statistics().requests.rejected
    await stock.publish(f"{namespace}.rpc.Quote", b'{"sku":"a"}', reply=target)
    await eventually(lambda: bus.statistics().requests.rejected == before + 1)
    answer = await stock.request(f"{namespace}.rpc.Quote", b'{"sku":"abc"}', timeout=5)
    assert json.loads(answer.data) == {"cents": 3}
    assert heard == []
    assert bus.statistics().handlers.handlers[0].ok == 1


async def test_the_services_are_seen_by_the_discovery_of_nats(bus: Bus, stock: Client, namespace: str) -> None:
    await stock.request(f"{namespace}.rpc.Quote", b'{"sku":"a"}', timeout=5)
    await stock.request(f"{namespace}.rpc.Quote", b'{"sku":"boom"}', timeout=5)
    ping = json.loads((await stock.request(f"$SRV.PING.shop.{bus.node_id}", b"", timeout=5)).data)
    assert ping["type"] == "io.nats.micro.v1.ping_response"
    assert (ping["name"], ping["id"], ping["version"]) == ("shop", bus.node_id, "1.2.3")
    assert ping["metadata"]["catga.zone"] == "eu-1"
    info = json.loads((await stock.request(f"$SRV.INFO.shop.{bus.node_id}", b"", timeout=5)).data)
    assert [(one["name"], one["subject"]) for one in info["endpoints"]] == [("Quote", f"{namespace}.rpc.Quote")]
    stats = json.loads((await stock.request(f"$SRV.STATS.shop.{bus.node_id}", b"", timeout=5)).data)
    (endpoint,) = stats["endpoints"]
    assert (endpoint["num_requests"], endpoint["num_errors"]) == (2, 1)
    assert endpoint["processing_time"] > 0


async def test_a_stream_that_captures_requests_is_warned_about(
    server_url: str, namespace: str, stock: Client, caplog: pytest.LogCaptureFixture
) -> None:
    jetstream = stock.jetstream()
    await jetstream.add_stream(name=f"S{namespace}", subjects=[f"{namespace}.rpc.>"])
    try:
        bus = Bus("shop", url=server_url, namespace=namespace)

        @bus.handler
        async def quote(request: Quote) -> dict[str, int]:
            await asyncio.sleep(0.01)  # the stream's acknowledgement comes first
            return {"cents": 1}

        async with bus, Bus("client", url=server_url, namespace=namespace) as client:
            assert f"S{namespace} captures requests" in caplog.text
            assert (await client.send(Quote("a"))).unwrap() == {"cents": 1}
            assert client.statistics().calls.rejected == 1
    finally:
        await jetstream.delete_stream(f"S{namespace}")
