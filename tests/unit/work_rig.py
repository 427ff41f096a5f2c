"""A workshop with handlers as users write them, a keeper played by hand, and everything that leaves the room kept."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from catga_bus import Command, Context, Event, Fence, RetryOptions, Router
from catga_bus.clock import monotonic
from catga_bus.codec import Gate
from catga_bus.dispatch.deliveries import Delivery
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.dispatch.stations import build_station
from catga_bus.dispatch.threads import HandlerThreads
from catga_bus.durability.inbox.base import FencedError, InboxError, Recorded
from catga_bus.durability.letters.letters import DeadLetter
from catga_bus.durability.working.worker import Worker
from catga_bus.durability.working.workshop import HANDLER_SECONDS, Workshop
from catga_bus.effects import Outbound, Transaction
from catga_bus.errors import CatgaError
from catga_bus.pulse import Pulse
from catga_bus.requests.answers import Answers
from catga_bus.requests.inboxes import Inboxes
from catga_bus.requests.kept import KeptBatches
from catga_bus.testing import RecordedEvents, eventually
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.coalescer import Coalescer
from catga_bus.transport.jetstream import DeliveredMessage
from catga_bus.transport.memory import MemoryTransport
from catga_bus.wire import Fault, Kind, Names, Status, join_batch

INBOX = "_INBOX.sender"
STREAM = "catga-cmd-shop"
QUICK = RetryOptions(first=0.002, longest=0.01)
_encode = msgspec.msgpack.Encoder().encode


class Debit(Command[int], partition_by="account"):
    """Takes money."""

    account: str
    cents: int = 0


class Close(Command[None], partition_by="account"):
    """Closes an account: another type with the same keys."""

    account: str


class Debited(Event, partition_by="account"):
    """Money was taken."""

    account: str


class Keeper:
    """Keeps a partition as the test says."""

    def __init__(self) -> None:
        self.fence = Fence(3, 7)
        self.is_careful = False
        self.acked: list[int] = []
        self.losses: list[int] = []
        self.marks: list[tuple[int, int] | None] = []
        self.mark_error: Exception | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_done: Callable[[int], None] = lambda _: None

    def done(self, sequence: int) -> None:
        """Note that a record is to be acknowledged."""
        self.acked.append(sequence)
        self.on_done(sequence)

    def lost(self, epoch: int = 0) -> None:
        """Note that the fence refused an effect, and the epoch that the store has seen."""
        self.losses.append(epoch)
        self.on_lost()

    async def mark(self, sequence: int, index: int) -> None:
        """Write a mark, or fail."""
        await asyncio.sleep(0)
        if self.mark_error is not None:
            raise self.mark_error
        self.marks.append((sequence, index))

    async def unmark(self) -> None:
        """Take the mark back."""
        await asyncio.sleep(0)
        self.marks.append(None)


class Letters:
    """Dead letters, stored when the test lets them."""

    def __init__(self) -> None:
        self.buried: list[DeadLetter] = []
        self.tries = 0
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def bury(self, letter: DeadLetter) -> None:
        """Store a letter, after as many failures as were ordered."""
        self.tries += 1
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise CatgaError("the stream is full")
        self.buried.append(letter)


class Unit:
    """One execution in the fake inbox."""

    def __init__(self, inbox: "FakeInbox", message_id: str, fence: Fence) -> None:
        self.inbox, self.message_id, self.fence = inbox, message_id, fence
        self.written: list[str] = []
        self.outbound: list[Outbound] = []
        self.failure: InboxError | None = None

    async def transaction(self) -> Transaction:
        """Return itself: what is executed is kept until the commit."""
        return self

    async def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> int:
        """Write a line."""
        self.written.append(sql)
        return 1

    async def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Write nothing."""
        return 0

    async def fetch(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Read nothing."""
        return []

    def send(self, outbound: Outbound) -> None:
        """Send with the commit."""
        self.outbound.append(outbound)

    async def commit(self, result: Recorded) -> Recorded:
        """Commit, check the fence, and judge duplicates."""
        inbox = self.inbox
        await inbox.gate.wait()
        if inbox.commit_errors:
            error = inbox.commit_errors.pop(0)
            self.failure = error if isinstance(error, InboxError) else None
            raise error
        if self.fence.epoch < inbox.highest:
            raise FencedError(f"epoch {self.fence.epoch} is below {inbox.highest}", inbox.highest)
        if (known := inbox.done.get(self.message_id)) is not None and known.status != Status.FAILED:
            return known
        inbox.highest = self.fence.epoch
        inbox.done[self.message_id] = result
        inbox.effects += self.written
        inbox.order.append(f"commit {self.message_id}")
        return result

    async def rollback(self) -> None:
        """Forget what was written."""
        await asyncio.sleep(0)
        self.inbox.rolled_back.append(self.message_id)
        self.written.clear()


class FakeInbox:
    """An inbox in a dictionary."""

    store_id = "fake"
    retention = 3_600.0

    def __init__(self) -> None:
        self.done: dict[str, Recorded] = {}
        self.effects: list[str] = []
        self.rolled_back: list[str] = []
        self.order: list[str] = []
        self.highest = 0
        self.looks = 0
        self.find_errors = 0
        self.commit_errors: list[Exception] = []
        self.unit_errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self) -> None:
        """Do nothing."""

    async def find(self, service: str, message_id: str) -> Recorded | None:
        """Look for one."""
        return self.done.get(message_id)

    async def find_many(self, service: str, message_ids: Sequence[str]) -> dict[str, Recorded]:
        """Look for many, after as many failures as were ordered."""
        await asyncio.sleep(0)
        self.looks += 1
        if self.find_errors:
            self.find_errors -= 1
            raise CatgaError("the store is locked")
        return {one: self.done[one] for one in message_ids if one in self.done}

    def unit(self, service: str, message_id: str, fence: Fence) -> Unit:
        """Begin an execution."""
        if self.unit_errors:
            raise self.unit_errors.pop()
        return Unit(self, message_id, fence)

    async def unsent(self, service: str, fence: Fence, limit: int) -> list[Outbound]:
        """Nothing is sent."""
        return []

    async def sent(self, service: str, message_ids: Sequence[str]) -> None:
        """Nothing is sent."""

    async def sweep(self, now_utc: float) -> int:
        """Forget nothing."""
        return 0

    async def close(self) -> None:
        """Do nothing."""


class Rig:
    """One partition, or several."""

    def __init__(
        self,
        router: Router,
        *,
        inbox: FakeInbox | None = None,
        unroutable_after: float = 60.0,
        kept: KeptBatches | None = None,
    ) -> None:
        self.router = router
        self._kept = kept
        self.inbox = inbox
        self.letters = Letters()
        self.answers: list[tuple[str, Status, Any]] = []
        self.order: list[str] = getattr(inbox, "order", [])
        self.asked: list[str] = []
        self.hands_over = False
        self.on_answer: Callable[[], None] = lambda: None
        self.utc = 1_000_000.0
        self._unroutable_after = unroutable_after
        self._threads: list[HandlerThreads] = []
        self._sequences: dict[int, int] = {}
        self._ids = 0
        self._partitions = 0

    async def start(self) -> "Rig":
        """Build the room and one worker."""
        self.transport = MemoryTransport(ConnectionOptions(urls=(f"memory://{uuid4().hex}",)), RecordedEvents())
        await self.transport.connect()
        self.transport.publish = self._publish(self.transport.publish)  # type: ignore[method-assign]
        coalescer = self._coalescer = Coalescer(
            self.transport, max_frames=64, max_bytes=262_144, max_held_bytes=1_000_000
        )
        self.dispatcher = Dispatcher(
            self._context,
            pulse=Pulse(monotonic, lambda _: None),
            clock=monotonic,
            intake=100,
            intake_bytes=1_000_000,
        )
        self.workshop = Workshop(
            self.dispatcher,
            Gate(),
            Answers(coalescer, Inboxes(["_INBOX"], Names()), "node", self._kept),
            self.letters,
            self.inbox,
            service="shop",
            node_id="node",
            max_payload=lambda: self.transport.max_payload,
            unroutable_after=self._unroutable_after,
            clock=monotonic,
            utc=lambda: self.utc,
            rng=random.Random(1),
        )
        collected = self.router._collected
        for entry in (*collected.registry.commands(), *collected.registry.events()):
            for handler in entry.handlers:
                middleware = (*collected.inbound, *handler.middleware)
                station, threads = build_station(
                    handler, entry.message_type, self.dispatcher, middleware, HANDLER_SECONDS
                )
                self._threads += [threads] if threads is not None else []
                self.workshop.add(station, handler.options)
        self.keeper, self.worker = self.partition()
        return self

    async def stop(self) -> None:
        """End everything."""
        await self.workshop.close()
        await self.dispatcher.close()
        for threads in self._threads:
            threads.close()
        await self._coalescer.close()
        await self.transport.close()

    def partition(
        self,
        number: int | None = None,
        *,
        by_type: bool = False,
        open: bool = True,  # noqa: A002
    ) -> tuple[Keeper, Worker]:
        """Return another keeper and its worker: of another partition, unless its number is given."""
        keeper = Keeper()
        if number is None:
            number = self._partitions = self._partitions + 1
        worker = self.workshop.worker(keeper, STREAM, number, self._unknown, by_type=by_type)
        keeper.on_done = lambda sequence: self.order.append(f"done {sequence}")
        if open:
            worker.resume()
        return keeper, worker

    def _unknown(self, type_name: str) -> bool:
        self.asked.append(type_name)
        return self.hands_over

    def _context(self, delivery: Delivery) -> Context:
        return Context(
            None,  # type: ignore[arg-type]
            monotonic,
            message_id=delivery.id,
            message_type=delivery.station.type_name,
            key=delivery.key,
            attempt=delivery.attempt,
            node="node",
            sender=delivery.sender,
            trace=delivery.trace,
            deadline=delivery.deadline,
            stake=delivery.stake,
        )

    def _publish(self, publish: Callable[..., None]) -> Callable[..., None]:
        """Take down answers the moment that they leave."""

        def noting(subject: str, payload: bytes, **options: Any) -> None:
            for frame in Gate().answers(payload).frames if subject == INBOX else ():
                status = Status(frame.status)
                body = msgspec.msgpack.decode(frame.body, type=Any if status is Status.OK else Fault)
                self.answers.append((frame.id, status, body))
                self.order.append(f"answer {frame.id}")
                self.on_answer()
            publish(subject, payload, **options)

        return noting

    # -- records ---------------------------------------------------------------------------------------------

    def frame(self, message: Any, *, message_id: str = "", waits: bool = False, body: bytes | None = None) -> bytes:
        """Return an encoded frame; its id is a number, counted from 1, unless it is given."""
        self._ids += 1
        name = type(message).__name__ if not isinstance(message, str) else message
        key = getattr(message, "account", None)
        raw = msgspec.Raw(body if body is not None else _encode(message))
        return _encode((message_id or str(self._ids), name, key, 1_000 if waits else None, 1, None, raw))

    def record(
        self, *frames: bytes, worker: Worker | None = None, subject: str = "catga.cmd.shop.3", sequence: int = 0
    ) -> DeliveredMessage:
        """Return a record; its sequence is the next one of its partition."""
        payload = join_batch(Kind.MESSAGES, ("sender", INBOX, 0), frames)
        return self.raw_record(payload, worker=worker, subject=subject, sequence=sequence)

    def raw_record(
        self, payload: bytes, *, worker: Worker | None = None, subject: str = "catga.cmd.shop.3", sequence: int = 0
    ) -> DeliveredMessage:
        """Return a record of any bytes."""
        which = id(worker or self.worker)
        self._sequences[which] = number = sequence or self._sequences.get(which, 0) + 1
        return DeliveredMessage(subject, payload, None, f"ack.{number}", number, number, 1, 0, self.utc)

    def take(self, *messages: Any, waits: bool = False, worker: Worker | None = None, **options: Any) -> int:
        """Have the worker take a record of these messages; return its sequence."""
        frames = [one if isinstance(one, bytes) else self.frame(one, waits=waits) for one in messages]
        record = self.record(*frames, worker=worker)
        (worker or self.worker).take(record, **options)
        return record.sequence

    async def acked(self, *sequences: int) -> None:
        """Wait until these records, and no others, are acknowledged."""
        await eventually(lambda: len(self.keeper.acked) >= len(sequences), what=f"{sequences} acknowledged")
        assert sorted(self.keeper.acked) == sorted(sequences)


Start = Callable[..., Coroutine[Any, Any, Rig]]
"""Starts a rig that is stopped when its test is over."""


class Desk:
    """Handlers that note what they see, and do what is told for a key."""

    def __init__(self, **options: Any) -> None:
        self.seen: list[tuple[str, int]] = []
        self.attempts: list[int] = []
        self.failing: dict[str, int] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.router = Router()
        self.router.handler(**{"retry": QUICK, **options})(self.debit)
        self.router.handler(self.close)

    async def debit(self, command: Debit, ctx: Context) -> int:
        """Take money."""
        self.seen.append((command.account, command.cents))
        self.attempts.append(ctx.attempt)
        if (gate := self.gates.get(command.account)) is not None:
            await gate.wait()
        if self.failing.get(command.account, 0) > 0:
            self.failing[command.account] -= 1
            raise ValueError("no money")
        return command.cents

    async def close(self, command: Close) -> None:
        """Close an account."""
        self.seen.append((command.account, -1))

    def of(self, key: str) -> list[int]:
        """What was seen of a key."""
        return [cents for account, cents in self.seen if account == key]
