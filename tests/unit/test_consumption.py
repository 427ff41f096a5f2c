"""A consumer at work: what is asked for, what is counted, and what the server's words change."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from catga_bus.clock import monotonic
from catga_bus.testing import eventually
from catga_bus.transport.jetstream import DeliveredMessage
from catga_bus.transport.nats_jetstream import NatsJetStream
from tests.unit.played_server import PlayedServer

NEXT = "$JS.API.CONSUMER.MSG.NEXT.s.c"


class Work:
    """A consumption, its server, and what reached the sinks."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.server = PlayedServer()
        self.jetstream = NatsJetStream(self.server, lambda: self.now)
        self.messages: list[DeliveredMessage] = []
        self.statuses: list[tuple[int, str]] = []

    async def start(self) -> "Work":
        self.consumption = await self.jetstream.consume(
            "s", "c", self.messages.append, lambda code, text: self.statuses.append((code, text)), idle=5.0
        )
        return self

    @property
    def batches(self) -> list[int]:
        return [each.json["batch"] for each in self.server.published if each.subject == NEXT]

    def deliver(self, count: int = 1) -> None:
        for _ in range(count):
            number = len(self.messages) + 1
            reply = f"$JS.ACK.s.c.1.{number}.{number}.1700000000000000000.0"
            self.server.say(self.server.published[-1].reply, b"x", subject="s.0", reply=reply)

    def status(self, code: int, text: str, *, left: int | None = None, place: int = -1) -> None:
        headers = {"Status": str(code), "Description": text}
        if left is not None:
            headers["Nats-Pending-Messages"] = str(left)
            headers["Nats-Pending-Bytes"] = "0"
        self.server.say(self.server.published[place].reply, headers=headers)


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    work = await Work().start()
    yield work
    await work.jetstream.close()
    assert not work.server.subscriptions


async def test_a_pull_says_how_many_for_how_long_and_how_often_to_speak(work: Work) -> None:
    work.consumption.pull(256)
    (request,) = work.server.published
    assert request.subject == NEXT
    assert request.json == {"batch": 256, "expires": 30_000_000_000, "idle_heartbeat": 5_000_000_000}
    assert work.consumption.credit == 256


async def test_a_long_silence_makes_longer_pulls() -> None:
    work = Work()
    consumption = await work.jetstream.consume("s", "c", work.messages.append, lambda _, __: None, idle=20.0)
    consumption.pull(1)
    assert work.server.published[0].json["expires"] == 40_000_000_000
    await work.jetstream.close()


async def test_every_message_takes_one_off_the_credit(work: Work) -> None:
    work.consumption.pull(3)
    work.now += 7.0
    work.deliver(2)
    assert (work.consumption.credit, work.consumption.heard_at, work.batches) == (1, 1_007.0, [3])
    assert work.messages[1] == DeliveredMessage(
        "s.0", b"x", None, "$JS.ACK.s.c.1.2.2.1700000000000000000.0", 2, 2, 1, 0, 1_700_000_000.0
    )


async def test_little_requests_go_out_together_when_they_are_an_eighth(work: Work) -> None:
    work.consumption.pull(80)
    for _ in range(9):
        work.consumption.pull(1)
    assert (work.batches, work.consumption.credit) == ([80], 89)
    work.consumption.pull(1)
    assert (work.batches, work.consumption.credit) == ([80, 10], 90)


async def test_what_is_owed_goes_out_when_little_is_left_to_come(work: Work) -> None:
    work.consumption.pull(80)
    work.consumption.pull(2)
    work.deliver(63)
    assert work.batches == [80]
    work.deliver()
    assert (work.batches, work.consumption.credit) == ([80, 2], 18)


async def test_an_expired_pull_is_asked_again_with_what_was_left(work: Work) -> None:
    work.consumption.pull(10)
    work.deliver(4)
    work.status(408, "Request Timeout", left=6)
    assert (work.batches, work.consumption.credit) == ([10, 6], 6)
    assert work.statuses == [(408, "Request Timeout")]


@pytest.mark.parametrize(("code", "text"), [(409, "Consumer Deleted"), (409, "Leadership Change")])
async def test_a_consumer_that_is_gone_has_ended_every_pull(work: Work, code: int, text: str) -> None:
    work.consumption.pull(10)
    work.consumption.pull(10)
    work.deliver(3)
    work.status(code, text, place=0)
    assert (work.batches, work.consumption.credit) == ([10, 10], 0)
    work.status(code, text, place=1)
    assert (work.consumption.credit, work.statuses) == (0, [(code, text)] * 2)


async def test_a_conflict_that_says_what_was_left_ends_no_more(work: Work) -> None:
    work.consumption.pull(10)
    work.consumption.pull(10)
    work.status(409, "Message Size Exceeds MaxBytes", left=10)
    assert (work.batches, work.consumption.credit) == ([10, 10], 10)


async def test_no_messages_ends_the_pull_that_it_is_about(work: Work) -> None:
    work.consumption.pull(10)
    work.consumption.pull(5)
    work.status(404, "No Messages", place=1)
    assert (work.consumption.credit, work.statuses) == (10, [(404, "No Messages")])


async def test_nobody_there_ends_the_pull_that_reached_nobody(work: Work) -> None:
    work.consumption.pull(10)
    work.consumption.pull(5)
    work.now += 2.0
    work.server.say_nobody(1)
    assert (work.consumption.credit, work.statuses) == (10, [(503, "")])


async def test_nobody_there_within_the_first_second_is_asked_again(work: Work) -> None:
    work.consumption.pull(10)
    work.server.say_nobody()
    assert (work.consumption.credit, work.statuses) == (10, [])
    work.consumption.pull(5)
    assert work.batches == [10]
    await eventually(lambda: work.batches == [10, 15])
    work.now += 2.0
    work.server.say_nobody()
    assert (work.consumption.credit, work.statuses) == (0, [(503, "")])


async def test_a_heartbeat_changes_nothing_but_when_it_was_heard(work: Work) -> None:
    work.consumption.pull(10)
    work.now += 5.0
    work.status(100, "Idle Heartbeat", left=10)
    assert (work.consumption.credit, work.consumption.heard_at) == (10, 1_005.0)
    assert work.statuses == [(100, "Idle Heartbeat")]


async def test_a_header_of_a_message_that_reads_like_a_status_is_none(work: Work) -> None:
    work.consumption.pull(10)
    reply = "$JS.ACK.s.c.1.1.1.1700000000000000000.0"
    work.server.say(work.server.published[0].reply, b"", subject="s.0", reply=reply, headers={"Status": "409"})
    assert (work.consumption.credit, work.statuses, len(work.messages)) == (9, [], 1)


async def test_what_nobody_understands_changes_nothing(work: Work) -> None:
    work.consumption.pull(10)
    for headers in (None, {}, {"Status": "many"}):
        work.server.say(work.server.published[0].reply, headers=headers)
    assert (work.consumption.credit, work.statuses, work.messages) == (10, [], [])


async def test_credit_never_falls_below_nothing(work: Work) -> None:
    work.consumption.pull(1)
    work.deliver(3)
    assert work.consumption.credit == 0
    work.status(408, "Request Timeout", left=7)
    assert (work.consumption.credit, work.batches) == (0, [1])
    work.consumption.pull(4)
    assert work.consumption.credit == 4


async def test_without_a_connection_nothing_is_asked_nor_owed(work: Work) -> None:
    work.consumption.pull(10)
    work.server.is_connected = False
    work.jetstream.disconnected()
    assert work.consumption.credit == 0
    work.consumption.pull(10)
    assert (work.batches, work.consumption.credit) == ([10], 0)
    work.server.is_connected = True
    work.consumption.pull(7)
    assert (work.batches, work.consumption.credit) == ([10, 7], 7)


async def test_a_connection_that_is_lost_while_a_pull_expires_is_survived(work: Work) -> None:
    work.consumption.pull(10)
    work.server.is_connected = False
    work.status(408, "Request Timeout", left=10)
    assert work.consumption.credit == 0


async def test_a_lost_connection_ends_the_wait_for_a_new_consumer(work: Work) -> None:
    work.consumption.pull(10)
    work.server.say_nobody()
    work.jetstream.disconnected()
    await asyncio.sleep(0.1)
    assert work.batches == [10]


async def test_nothing_reaches_the_sinks_of_a_closed_one(work: Work) -> None:
    work.consumption.pull(10)
    (subscription,) = work.server.subscriptions
    await work.consumption.close()
    subscription.sink("_INBOX.2.1.10", b"", "", {"Status": "409"})
    work.consumption.pull(1)
    assert (work.statuses, work.batches, work.consumption.credit) == ([], [10], 0)


async def test_a_closed_one_is_forgotten() -> None:
    server = PlayedServer()
    jetstream = NatsJetStream(server, monotonic)
    for _ in range(3):
        consumption = await jetstream.consume("s", "c", lambda _: None, lambda _, __: None)
        await consumption.close()
    assert not server.subscriptions
    assert not jetstream._consumptions
    await jetstream.close()


async def test_a_second_word_about_pulls_that_are_over_ends_no_new_one(work: Work) -> None:
    work.consumption.pull(10)
    work.consumption.pull(10)
    work.status(409, "Leadership Change", place=0)
    work.consumption.pull(7)
    work.status(409, "Leadership Change", place=1)
    assert (work.batches, work.consumption.credit) == ([10, 10, 7], 7)
    work.status(409, "Leadership Change", place=2)
    assert work.consumption.credit == 0


async def test_pulls_from_before_a_lost_connection_are_neither_counted_nor_asked_again(work: Work) -> None:
    work.consumption.pull(10)
    work.jetstream.disconnected()
    work.consumption.pull(7)
    work.status(408, "Request Timeout", left=10, place=0)
    work.status(408, "Request Timeout", left=0, place=0)
    assert (work.batches, work.consumption.credit) == ([10, 7], 7)
    assert work.statuses == [(408, "Request Timeout")] * 2
