"""What is asked of the broker about a partition: for how long, and what an answer that does not come means."""

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

from catga_bus.partition import broker
from catga_bus.partition.broker import Broker
from catga_bus.partition.protocol import Done, Operation, Outcome, Read, Unknown, Write, known
from catga_bus.partition.records import Domain, Held, OwnerRecord
from catga_bus.wire import Names
from tests.unit.fake_streams import FakeStreams

DOMAIN = Domain(names=Names("catga"), service="shop")


class Bucket:
    """The owners, who answer after a while."""

    def __init__(self) -> None:
        self.silent = 0
        self.seconds = 0.0
        self.reads = 0

    async def read(self, key: str) -> tuple[bytes | None, int]:
        self.reads += 1
        if self.silent:
            self.silent -= 1
            await asyncio.Event().wait()
        await asyncio.sleep(self.seconds)
        return None, 7

    async def write(self, key: str, value: bytes, last: int) -> int:
        await asyncio.sleep(self.seconds)
        return last + 1

    async def create(self, first_sequence: int) -> None:
        raise NotImplementedError


async def nothing(*_: Any) -> None:
    """No deliveries are wanted."""


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def asked(bucket: Bucket) -> Broker:
    return Broker(FakeStreams(), bucket, DOMAIN, 3, nothing)


def reading() -> Generator[Operation, Outcome, Held]:
    outcome = yield from known(Read())
    assert isinstance(outcome, Done)
    held: Held = outcome.value
    return held


async def test_a_read_that_nobody_answers_is_asked_again_soon(
    bucket: Bucket, asked: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "READ_PATIENCE", 0.01)
    bucket.silent = 3
    held = await asyncio.wait_for(asked.drive(reading()), 10.0)
    assert (held.revision, bucket.reads) == (7, 4)


async def test_a_server_that_is_slow_has_the_time_that_it_takes(
    bucket: Bucket, asked: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "READ_PATIENCE", 0.01)
    monkeypatch.setattr(broker, "LAST_PAUSE", 0.01)
    bucket.seconds = 0.1
    held = await asyncio.wait_for(asked.drive(reading()), 10.0)
    assert (held.revision, bucket.reads) == (7, broker.HASTY_READS + 1)


async def test_what_changes_something_is_not_given_up_early(bucket: Bucket, asked: Broker) -> None:
    bucket.seconds = 0.05
    record = OwnerRecord(node="a", incarnation=(1, 1), nonce="nonce", epoch=1)
    assert await asked.perform(Write(record, 7), 0.01) == Done(8)
    assert await asked.perform(Read(), 0.01) == Unknown()
