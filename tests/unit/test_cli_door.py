import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from catga_bus.cli.door import Door, DoorEvents
from catga_bus.errors import (
    DeadlineExceededError,
    DisconnectedError,
    HandlerError,
    NoHandlerError,
    Outcome,
    OverloadedError,
    PermissionDeniedError,
    Refused,
)
from catga_bus.testing import eventually
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.memory import MemoryTransport
from catga_bus.wire import Names

URL = "memory://cli-door"
CODE, TEXT = "Nats-Service-Error-Code", "Nats-Service-Error"


class Bench:
    """A door, and a service on the other side of the broker that answers what it is told to."""

    def __init__(self) -> None:
        self.events = DoorEvents()
        self.transport = MemoryTransport(ConnectionOptions(urls=(URL,)), self.events)
        self.service = MemoryTransport(ConnectionOptions(urls=(URL,)), DoorEvents())
        self.door = Door(self.transport, Names("ns"), self.events)
        self.seen: list[tuple[str, bytes]] = []
        self.answer: tuple[bytes, Mapping[str, str] | None] | None = (b'{"cents":120}', None)

    async def serve(self, subject: str) -> None:
        def take(subject: str, payload: bytes, reply: str, _: Mapping[str, str] | None) -> None:
            self.seen.append((subject, payload))
            if reply and self.answer is not None:
                self.service.publish(reply, self.answer[0], headers=self.answer[1])

        await self.service.subscribe(subject, take)
        await self.service.flush()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.transport.connect()
    await made.service.connect()
    yield made
    await made.transport.close()
    await made.service.close()


async def test_a_request_brings_back_the_decoded_answer(bench: Bench) -> None:
    await bench.serve("ns.rpc.Quote")
    assert await bench.door.request("Quote", b'{"sku":"x"}', 5.0) == {"cents": 120}
    assert bench.seen == [("ns.rpc.Quote", b'{"sku":"x"}')]


async def test_nobody_there_is_said_at_once(bench: Bench) -> None:
    with pytest.raises(NoHandlerError, match="nobody handles Quote") as caught:
        await bench.door.request("Quote", b"{}", 60.0)
    assert caught.value.outcome is Outcome.NOT_RUN


async def test_a_refusal_carries_what_the_handler_said(bench: Bench) -> None:
    body = b'{"code":"OUT_OF_STOCK","message":"none left","details":[1],"retryable":true}'
    bench.answer = (body, {CODE: "OUT_OF_STOCK", TEXT: "none left"})
    await bench.serve("ns.rpc.Quote")
    with pytest.raises(Refused, match="none left") as caught:
        await bench.door.request("Quote", b"{}", 5.0)
    assert caught.value.code == "OUT_OF_STOCK"
    assert caught.value.details == [1]
    assert caught.value.retryable
    assert caught.value.outcome is Outcome.REFUSED


@pytest.mark.parametrize(
    ("code", "error", "outcome"),
    [
        ("OVERLOADED", OverloadedError, Outcome.NOT_RUN),
        ("HANDLER_ERROR", HandlerError, Outcome.FAILED),
        ("TIMEOUT", DeadlineExceededError, Outcome.UNKNOWN),
    ],
)
async def test_a_code_of_the_bus_is_its_error(
    bench: Bench, code: str, error: type[Exception], outcome: Outcome
) -> None:
    bench.answer = (b'{"code":"%b","message":"so"}' % code.encode(), {CODE: code, TEXT: "so"})
    await bench.serve("ns.rpc.Quote")
    with pytest.raises(error) as caught:
        await bench.door.request("Quote", b"{}", 5.0)
    assert caught.value.outcome is outcome  # type: ignore[attr-defined]


async def test_a_failure_of_a_service_that_is_no_bus_is_read_from_its_headers(bench: Bench) -> None:
    bench.answer = (b"not json", {CODE: "500", TEXT: "it broke"})
    await bench.serve("ns.rpc.Quote")
    with pytest.raises(Refused, match="500: it broke"):
        await bench.door.request("Quote", b"{}", 5.0)


async def test_an_answer_that_is_not_json_is_a_failure(bench: Bench) -> None:
    bench.answer = (b"\xc1\x01\x93", None)
    await bench.serve("ns.rpc.Quote")
    with pytest.raises(HandlerError, match="the answer to Quote is not JSON"):
        await bench.door.request("Quote", b"{}", 5.0)


async def test_no_answer_in_time_leaves_the_outcome_unknown(bench: Bench) -> None:
    bench.answer = None
    await bench.serve("ns.rpc.Quote")
    with pytest.raises(DeadlineExceededError, match=r"no answer to Quote within 0\.05 s") as caught:
        await bench.door.request("Quote", b"{}", 0.05)
    assert caught.value.outcome is Outcome.UNKNOWN


async def test_a_lost_connection_ends_the_wait(bench: Bench) -> None:
    bench.answer = None
    await bench.serve("ns.rpc.Quote")
    asking = asyncio.create_task(bench.door.request("Quote", b"{}", 60.0))
    await eventually(lambda: bench.seen)
    bench.events.on_disconnected("the server went away")
    with pytest.raises(DisconnectedError, match="the server went away"):
        await asking


async def test_a_denied_subject_is_said_instead_of_waiting(bench: Bench) -> None:
    bench.answer = None
    await bench.serve("ns.rpc.Quote")
    asking = asyncio.create_task(bench.door.request("Quote", b"{}", 60.0))
    await eventually(lambda: bench.seen)
    bench.events.on_denied("ns.rpc.Quote", "permissions violation for publish")
    with pytest.raises(PermissionDeniedError, match="permissions violation"):
        await asking


async def test_a_type_with_odd_characters_is_sent_to_its_token(bench: Bench) -> None:
    await bench.serve("ns.rpc.>")
    await bench.door.request("a.b *", b"{}", 5.0)
    assert bench.seen[0][0] == "ns.rpc.a=2Eb=20=2A"


async def test_ticks_and_broadcasts_go_to_their_subjects(bench: Bench) -> None:
    await bench.serve("ns.tick.*")
    await bench.serve("ns.all.*")
    assert await bench.door.tick("Tick", b'{"n":1}') == "ns.tick.Tick"
    assert await bench.door.broadcast("Tick", b"{}") == "ns.all.Tick"
    await eventually(lambda: len(bench.seen) == 2)
    assert bench.seen == [("ns.tick.Tick", b'{"n":1}'), ("ns.all.Tick", b"{}")]


async def test_a_denied_tick_is_an_error(bench: Bench) -> None:
    bench.events.on_denied("ns.tick.Tick", "permissions violation")
    with pytest.raises(PermissionDeniedError):
        await bench.door.tick("Tick", b"{}")
