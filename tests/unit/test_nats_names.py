"""Names of servers: looked up once at a time, in a thread that keeps nobody."""

import asyncio
import socket
import threading
from typing import Any

import pytest

from catga_bus.testing import eventually
from catga_bus.transport.nats_names import NameLookup


class _Service:
    """A name service that answers when it is told to."""

    def __init__(self, answer: list[str] | Exception) -> None:
        self.answer = answer
        self.open = threading.Event()
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, **options: Any) -> list[Any]:
        self.asked.append(host)
        assert self.open.wait(20.0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.answer]


def serve(monkeypatch: pytest.MonkeyPatch, answer: list[str] | Exception) -> _Service:
    service = _Service(answer)
    monkeypatch.setattr(socket, "getaddrinfo", service)
    return service


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_an_address_is_not_looked_up(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(monkeypatch, [])
    assert await NameLookup().addresses(host, 4222) == [host]
    assert service.asked == []


async def test_every_address_is_told_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, ["10.0.0.2", "10.0.0.1", "10.0.0.2"]).open.set()
    assert await NameLookup().addresses("nats-1", 4222) == ["10.0.0.2", "10.0.0.1"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (UnicodeError("label too long"), "is no host name: label too long"),
        ([], "no address"),
    ],
)
async def test_what_is_not_found_is_an_os_error(
    answer: list[str] | Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, answer).open.set()
    with pytest.raises(OSError, match=text):
        await NameLookup().addresses("nats-1", 4222)


async def test_who_gave_up_leaves_one_thread_that_the_next_one_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(monkeypatch, ["10.0.0.1"])
    names = NameLookup()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(names.addresses("nats-1", 4222), 0.01)
    last = asyncio.create_task(names.addresses("nats-1", 4222))
    await eventually(lambda: service.asked)
    service.open.set()
    assert await last == ["10.0.0.1"]
    assert service.asked == ["nats-1"]
    assert names._pending == {}


def test_a_loop_ends_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(monkeypatch, OSError("late"))

    async def give_up() -> None:
        await asyncio.wait_for(NameLookup().addresses("nats-1", 4222), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())  # it would wait for its own threads
    service.open.set()
    for thread in threading.enumerate():
        if thread.name == "catga-names":
            thread.join(20.0)
            assert not thread.is_alive()
