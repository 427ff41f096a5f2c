"""What the memory broker does beside the contract of all carriers."""

import asyncio
import logging
import random
import secrets
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from catga_bus.errors import BusStateError, ConfigurationError, DisconnectedError, TooLargeError
from catga_bus.testing import Received, RecordedEvents, broker_of, eventually
from catga_bus.transport import memory, memory_broker
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.memory import MemoryTransport


class Connections:
    """Makes transports of one broker and closes them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.name = f"unit-{secrets.token_hex(4)}"
        self._stack = stack

    def build(
        self, *, name: str = "", inbox_prefix: str = "_INBOX", **arguments: Any
    ) -> tuple[MemoryTransport, RecordedEvents]:
        events = RecordedEvents()
        options = ConnectionOptions(
            urls=(f"memory://{name or self.name}",),
            inbox_prefix=inbox_prefix,
            write_limit_bytes=65_536,
        )
        transport = MemoryTransport(options, events, **arguments)
        self._stack.push_async_callback(transport.close)
        return transport, events

    async def connect(self, **arguments: Any) -> tuple[MemoryTransport, RecordedEvents]:
        transport, events = self.build(**arguments)
        await transport.connect()
        return transport, events


@pytest.fixture
async def connections() -> AsyncIterator[Connections]:
    async with AsyncExitStack() as stack:
        yield Connections(stack)


async def listen(transport: MemoryTransport, subject: str, queue: str = "") -> Received:
    received = Received()
    await transport.subscribe(subject, received, queue=queue)
    return received


async def test_transports_of_one_name_meet_and_others_do_not(connections: Connections) -> None:
    one, _ = await connections.connect()
    two, _ = await connections.connect()
    stranger, _ = await connections.connect(name="unit-elsewhere")
    heard, unheard = await listen(two, "a"), await listen(stranger, "a")
    one.publish("a", b"1")
    await heard.wait(1)
    assert len(unheard) == 0
    assert one.url == f"memory://{connections.name}" == broker_of(one.url).url


async def test_the_broker_lives_from_the_first_connect_to_the_last_close(
    connections: Connections,
) -> None:
    one, _ = connections.build()
    with pytest.raises(ConfigurationError, match=f"memory://{connections.name}"):
        broker_of(connections.name)
    await one.connect()
    broker = broker_of(connections.name)
    two, _ = await connections.connect()
    await one.close()
    assert broker_of(connections.name) is broker
    await two.close()
    await two.close()
    with pytest.raises(ConfigurationError):
        broker_of(connections.name)
    await connections.connect()
    assert broker_of(connections.name) is not broker


async def test_a_broker_that_was_cut_is_made_anew_after_the_last_close(
    connections: Connections,
) -> None:
    one, _ = await connections.connect()
    broker_of(connections.name).cut()
    await one.close()
    two, _ = await connections.connect()
    assert two.is_connected


@pytest.mark.parametrize("urls", [(), ("",), ("memory://",), ("nats://127.0.0.1:4222",)])
async def test_an_address_that_is_not_of_memory_is_refused(urls: tuple[str, ...]) -> None:
    transport = MemoryTransport(ConnectionOptions(urls=urls), RecordedEvents())
    with pytest.raises(ConfigurationError, match="memory://name"):
        await transport.connect()
    await transport.close()


@pytest.mark.parametrize("prefix", ["", "_INBOX.", "_INBOX.*", "in box"])
async def test_an_inbox_prefix_that_is_no_subject_is_refused(connections: Connections, prefix: str) -> None:
    transport, _ = connections.build(inbox_prefix=prefix)
    with pytest.raises(ConfigurationError):
        await transport.connect()


async def test_a_transport_connects_once(connections: Connections) -> None:
    transport, _ = await connections.connect()
    with pytest.raises(BusStateError, match="connects once"):
        await transport.connect()
    await transport.close()
    with pytest.raises(BusStateError, match="connects once"):
        await transport.connect()


async def test_connecting_to_a_broker_that_was_cut_fails_and_works_once_it_is_healed(
    connections: Connections,
) -> None:
    await connections.connect()
    broker = broker_of(connections.name)
    broker.cut()
    late, events = connections.build()
    with pytest.raises(DisconnectedError, match=f"memory://{connections.name}"):
        await late.connect()
    broker.heal()
    await late.connect()
    assert late.is_connected
    assert events.reconnected == []


async def test_subscribing_without_ever_connecting_is_refused(connections: Connections) -> None:
    transport, _ = connections.build()
    with pytest.raises(DisconnectedError, match="not connected"):
        await transport.subscribe("a", Received())


async def test_a_cut_loses_what_is_on_its_way(connections: Connections) -> None:
    transport, events = await connections.connect()
    received = await listen(transport, "a")
    broker = broker_of(connections.name)
    transport.publish("a", b"queued")
    broker.cut()
    broker.heal()
    broker.stall()
    transport.publish("a", b"waiting")
    broker.cut("cable pulled")
    broker.heal()
    transport.publish("a", b"after")
    await received.wait(1)
    await eventually(lambda: len(events.reconnected) == 2)
    assert received.payloads == [b"after"]
    assert events.disconnected == ["the memory broker was cut", "cable pulled"]
    assert events.reconnected == [transport.url] * 2


async def test_what_the_broker_is_already_it_does_not_become_twice(
    connections: Connections,
) -> None:
    transport, events = await connections.connect()
    broker = broker_of(connections.name)
    broker.heal()
    broker.resume()
    assert (broker.is_up, broker.is_stalled) == (True, False)
    broker.stall()
    assert broker.is_stalled
    broker.cut()
    broker.cut()
    assert (broker.is_up, broker.is_stalled) == (False, False)
    broker.stall()
    assert not broker.is_stalled
    broker.heal()
    broker.heal()
    await eventually(lambda: events.reconnected)
    assert (len(events.disconnected), len(events.reconnected)) == (1, 1)
    assert transport.is_connected


async def test_flush_notices_that_the_connection_was_lost_even_if_it_is_back(
    connections: Connections,
) -> None:
    transport, _ = await connections.connect()
    broker = broker_of(connections.name)
    broker.stall()
    flushing = asyncio.ensure_future(transport.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    broker.cut()
    broker.heal()
    with pytest.raises(DisconnectedError, match="was lost"):
        await flushing
    await transport.flush()


async def test_a_stalled_broker_takes_what_waited_in_order(connections: Connections) -> None:
    sender, _ = await connections.connect()
    receiver, _ = await connections.connect()
    received = await listen(receiver, "a")
    broker = broker_of(connections.name)
    sender.publish("a", b"0")
    broker.stall()
    for number in range(1, 10):
        sender.publish("a", b"%d" % number)
    waiters = [asyncio.ensure_future(sender.flush()) for _ in range(3)]
    await received.wait(1)
    await asyncio.sleep(0)
    assert received.payloads == [b"0"]
    broker.resume()
    await asyncio.gather(*waiters)
    await received.wait(10)
    assert received.payloads == [b"%d" % number for number in range(10)]


async def test_closing_says_nothing_to_the_owner(connections: Connections) -> None:
    transport, events = await connections.connect()
    await connections.connect()
    broker = broker_of(connections.name)
    broker.cut()
    await transport.close()
    broker.heal()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (events.disconnected, events.reconnected) == ([], [])


async def test_over_the_bound_the_newest_messages_are_dropped_and_reported_once(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_broker, "MAX_QUEUED_MESSAGES", 10)
    transport, events = await connections.connect()
    received = await listen(transport, "a")
    for number in range(13):
        transport.publish("a", b"%d" % number)
    await received.wait(10)
    await eventually(lambda: events.errors)
    assert received.payloads == [b"%d" % number for number in range(10)]
    assert len(events.errors) == 1
    assert "3 messages dropped" in events.errors[0]
    transport.publish("a", b"after")
    await received.wait(11)
    assert received.payloads[-1] == b"after"
    assert len(events.errors) == 1


async def test_bytes_are_bounded_too_and_each_receiver_for_itself(
    connections: Connections,
) -> None:
    sender, sender_events = await connections.connect()
    receiver, receiver_events = await connections.connect()
    twice = [await listen(receiver, "a"), await listen(receiver, "a")]
    once = await listen(sender, "a")
    largest = bytes(memory.MAX_PAYLOAD_BYTES)
    fitting = memory_broker.MAX_QUEUED_BYTES // memory.MAX_PAYLOAD_BYTES
    for _ in range(fitting):
        sender.publish("a", largest)
    await once.wait(fitting)
    await eventually(lambda: receiver_events.errors)
    assert sum(map(len, twice)) == fitting
    assert sender_events.errors == []


async def test_one_message_larger_than_the_bound_is_carried(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_broker, "MAX_QUEUED_BYTES", 10)
    transport, events = await connections.connect()
    received = await listen(transport, "a")
    transport.publish("a", bytes(11))
    await received.wait(1)
    assert events.errors == []


async def test_a_burst_leaves_turns_of_the_loop_to_others(connections: Connections) -> None:
    transport, _ = await connections.connect()
    received = await listen(transport, "a")
    for _ in range(5_000):
        transport.publish("a", b"")
    turns = 0
    while len(received) < 5_000:
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 5


async def test_a_sustained_rate_is_not_dropped_however_many_come_in_a_turn(
    connections: Connections,
) -> None:
    transport, events = await connections.connect()
    received = await listen(transport, "a")
    for _ in range(20):
        for _ in range(5_000):
            transport.publish("a", b"")
        await asyncio.sleep(0)
    await received.wait(100_000)
    assert events.errors == []


async def test_the_choice_of_a_member_repeats_with_the_seed(connections: Connections) -> None:
    choices = []
    for _ in range(2):
        transport, _ = await connections.connect(rng=random.Random(7))
        members = [await listen(transport, "a", queue="workers") for _ in range(3)]
        for number in range(30):
            transport.publish("a", b"%d" % number)
        await eventually(lambda members=members: sum(map(len, members)) == 30)
        choices.append([member.payloads for member in members])
        await transport.close()
    assert choices[0] == choices[1]


async def test_the_503_goes_to_the_one_who_asked_and_only_once(connections: Connections) -> None:
    asker, _ = await connections.connect()
    other, _ = await connections.connect()
    mine = [await listen(asker, "answers.>"), await listen(asker, "answers.1")]
    grouped = await listen(asker, "answers.1", queue="workers")
    theirs = await listen(other, "answers.1")
    asker.publish("nobody", b"", reply="answers.1")
    await eventually(lambda: sum(map(len, mine)) == 1)
    await asker.flush()
    assert sum(map(len, mine)) == 1
    assert (len(grouped), len(theirs)) == (0, 0)


async def test_headers_cannot_be_changed_by_a_receiver_and_are_trimmed_as_on_the_wire(
    connections: Connections,
) -> None:
    transport, _ = await connections.connect()
    received = await listen(transport, "a")
    transport.publish("a", b"", headers={"A": "  1\t"})
    transport.publish("a", b"", headers={})
    await received.wait(2)
    headers: Any = received.messages[0][3]
    assert headers == {"A": "1"}
    with pytest.raises(TypeError):
        headers["A"] = "2"
    assert received.messages[1][3] is None


async def test_max_payload_may_be_set(connections: Connections) -> None:
    transport, _ = await connections.connect(max_payload=30)
    assert transport.max_payload == 30
    transport.publish("a", bytes(30))
    # 12 bytes of frame and 4 of the line, as the client of NATS writes them.
    transport.publish("a", bytes(30 - 12 - 4 - 3), headers={"A": "bc"})
    with pytest.raises(TooLargeError, match="31 bytes"):
        transport.publish("a", bytes(30 - 12 - 4 - 2), headers={"A": "bc"})


async def test_a_payload_that_may_change_is_copied_and_text_is_refused(
    connections: Connections,
) -> None:
    transport, _ = await connections.connect()
    received = await listen(transport, "a")
    changing: Any = bytearray(b"before")
    transport.publish("a", changing)
    changing[:] = b"after."
    text: Any = "text"
    with pytest.raises(TypeError, match="bytes-like"):
        transport.publish("a", text)
    await received.wait(1)
    assert received.payloads == [b"before"]


async def test_a_sink_that_is_cancelled_or_fails_is_logged_with_its_subject(
    connections: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    transport, _ = await connections.connect()

    def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    await transport.subscribe("wild.*", cancelled)
    after = await listen(transport, "wild.*")
    transport.publish("wild.card", b"")
    await after.wait(1)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("catga_bus.transport", logging.ERROR)
    assert "wild.card" in record.getMessage()
    assert transport.sink_errors == 1


async def test_subjects_without_end_do_not_grow_the_broker(connections: Connections) -> None:
    transport, _ = await connections.connect()
    broker = broker_of(connections.name)
    received = await listen(transport, "answers.*")
    for number in range(10_000):
        transport.publish(f"answers.{number}", b"")
    assert len(broker._routes) <= memory_broker._MAX_ROUTES
    await received.wait(10_000)
    await transport.close()
    assert not broker._exact
    assert not broker._patterns
    assert not broker._links


class OtherLoop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="other loop")
        self.thread.start()

    async def run(self, coroutine: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def other_loop() -> Any:
    other = OtherLoop()
    yield other
    if not other.loop.is_closed():
        other.stop()


async def test_messages_cross_between_event_loops_in_order_and_arrive_on_the_right_one(
    connections: Connections, other_loop: OtherLoop
) -> None:
    here, _ = await connections.connect()
    there, _ = connections.build()
    await other_loop.run(there.connect())
    answers = await listen(here, "answers")
    received = Received()

    def answer(subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        received(subject, payload, reply, headers)
        there.publish("answers", payload)

    await other_loop.run(there.subscribe("requests", answer))
    for number in range(2_000):
        here.publish("requests", b"%d" % number)
        if number % 100 == 0:
            await asyncio.sleep(0)
    await answers.wait(2_000)
    assert answers.payloads == received.payloads == [b"%d" % number for number in range(2_000)]
    assert answers.threads == {threading.get_ident()}
    assert received.threads == {other_loop.thread.ident}
    await other_loop.run(there.close())


async def test_cut_and_heal_from_another_thread_tell_each_transport_on_its_own_loop(
    connections: Connections, other_loop: OtherLoop
) -> None:
    here, here_events = await connections.connect()
    there, there_events = connections.build()
    await other_loop.run(there.connect())
    broker = broker_of(connections.name)
    broker.stall()
    here.publish("a", bytes(100_000))
    waiting = asyncio.ensure_future(here.wait_writable())
    await asyncio.sleep(0)
    await asyncio.to_thread(broker.resume)
    await asyncio.wait_for(waiting, 5.0)
    await asyncio.to_thread(broker.cut)
    await asyncio.to_thread(broker.heal)
    await eventually(lambda: here_events.reconnected and there_events.reconnected)
    assert here_events.threads == {threading.get_ident()}
    assert there_events.threads == {other_loop.thread.ident}
    await other_loop.run(there.close())


async def test_a_transport_whose_loop_was_closed_is_forgotten(connections: Connections, other_loop: OtherLoop) -> None:
    here, _ = await connections.connect()
    dead = MemoryTransport(ConnectionOptions(urls=(here.url,)), RecordedEvents())
    await other_loop.run(dead.connect())
    await other_loop.run(dead.subscribe("a", Received(), queue="workers"))
    alive = await listen(here, "a", queue="workers")
    other_loop.stop()
    broker = broker_of(connections.name)
    while len(broker._links) > 1:
        # Until the draw falls on the dead member, which is then found out.
        here.publish("a", b"1")
    for _ in range(20):
        here.publish("a", b"2")
    await eventually(lambda: alive.payloads.count(b"2") == 20)
    await here.close()
    with pytest.raises(ConfigurationError):
        broker_of(connections.name)


async def test_a_name_left_behind_by_a_closed_loop_is_free_again(
    connections: Connections, other_loop: OtherLoop
) -> None:
    dead, _ = connections.build()
    await other_loop.run(dead.connect())
    left_behind = broker_of(connections.name)
    left_behind.cut()
    other_loop.stop()
    fresh, _ = await connections.connect()
    assert fresh.is_connected
    assert broker_of(connections.name) is not left_behind
