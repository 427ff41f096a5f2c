"""The workshop: the workers of a node, one for each partition that it keeps, and the handlers that they share.

workshop.add(station, handler.options)                  # for each command type and durable event type
worker = workshop.worker(keeping, stream, unknown, by_type=False)
await workshop.close()                                  # before the dispatcher is closed
"""

import random
from collections.abc import Callable
from typing import Final

from catga_bus.clock import Clock
from catga_bus.codec import Gate
from catga_bus.dispatch.deliveries import Station
from catga_bus.dispatch.dispatcher import Dispatcher
from catga_bus.durability.inbox.base import Inbox
from catga_bus.durability.inbox.outbox import Relay
from catga_bus.durability.working.jobs import Bench, Place
from catga_bus.durability.working.results import Results
from catga_bus.durability.working.shop import DeadLetters, Shop, WaitingKey, WorkStatistics
from catga_bus.durability.working.worker import Worker
from catga_bus.handlers.registry import HandlerOptions
from catga_bus.partition.work import Keeping
from catga_bus.requests.answers import Answers
from catga_bus.transport.base import Transport

HANDLER_SECONDS: Final = 30.0
"""How long a handler of commands or durable events may take if it does not say."""

UNROUTABLE_AFTER: Final = 60.0
"""Seconds for which a message waits for a node that handles its type: longer than a roll of a few nodes takes."""


class Workshop:
    """Runs what is stored, in one node.

    Args:
        dispatcher: Runs the handlers.
        gate: Takes records apart.
        answers: The ways back to senders.
        letters: Where dead letters go.
        inbox: Knows what is done, so that effects happen once; None: they may happen again.
        relay: Publishes what was committed for sending; None if nothing is.
        service: The service that this node belongs to.
        node_id: The id of this node.
        max_payload: Returns how many bytes the server takes.
        unroutable_after: Seconds after which a message that no node of the service handles is a dead letter.
        clock: Monotonic seconds.
        utc: Seconds since 1970.
        rng: Draws the pauses between attempts.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        gate: Gate,
        answers: Answers,
        letters: DeadLetters,
        inbox: Inbox | None = None,
        relay: Relay | None = None,
        *,
        service: str,
        node_id: str,
        max_payload: Callable[[], int],
        unroutable_after: float = UNROUTABLE_AFTER,
        clock: Clock,
        utc: Clock,
        rng: random.Random,
    ) -> None:
        self._dispatcher = dispatcher
        self._shop = Shop(
            dispatcher,
            gate,
            answers,
            letters,
            inbox,
            relay,
            service=service,
            node_id=node_id,
            max_payload=max_payload,
            unroutable_after=unroutable_after,
            clock=clock,
            utc=utc,
            rng=rng,
        )
        self._benches: dict[object, Bench] = {}
        self._workers: dict[tuple[str, int], Worker] = {}  # the last one of each partition

    def add(self, station: Station, options: HandlerOptions) -> None:
        """Take on a command type or a durable event type.

        Args:
            station: Made for this room alone, with `HANDLER_SECONDS` unless the handler says otherwise.
            options: Of the handler.
        """
        bench = self._benches.get(station.slots)
        if bench is None:
            bench = self._benches[station.slots] = Bench(options)
        self._shop.places[station.type_name] = Place(station, bench)
        self._dispatcher.add(station)

    @property
    def types(self) -> tuple[str, ...]:
        """The types that are handled here."""
        return tuple(self._shop.places)

    def worker(
        self, keeping: Keeping, stream: str, partition: int, unknown: Callable[[str], bool], *, by_type: bool
    ) -> Worker:
        """Return the work of one tenure of a partition, paused; that of an earlier one is dropped.

        Args:
            keeping: The keeper of the partition.
            stream: Where its records lie.
            partition: Which.
            unknown: Told of a type that nobody here handles (empty: of a wire version that nobody here reads); returns
                whether the partition is about to be handed to a node that does.
            by_type: Whether the subjects of the stream name the type: those of the event log do.
        """
        worker = Worker(self._shop, keeping, stream, unknown, by_type=by_type)
        before = self._workers.get((stream, partition))
        if before is not None:
            worker.succeed(before)
        self._workers[stream, partition] = worker
        return worker

    def results(self, transport: Transport, subject: str) -> Results:
        """Return what says results once more, not started."""
        return Results(self._shop, transport, subject)

    def statistics(self) -> WorkStatistics:
        """Return the counts so far."""
        counts, workers = self._shop.counts, list(self._workers.values())
        oldest: WaitingKey | None = None
        for worker in workers:
            waiting = worker.oldest()
            if waiting is not None and (oldest is None or waiting.seconds > oldest.seconds):
                oldest = waiting
        return WorkStatistics(
            handled=counts.handled,
            refused=counts.refused,
            retries=counts.retries,
            dead_letters=dict(counts.dead_letters),
            duplicates=counts.duplicates,
            repeated=counts.repeated,
            fenced=counts.fenced,
            delayed=counts.delayed,
            stuck=counts.stuck,
            partitions=sum(worker.is_open for worker in workers),
            records=sum(worker.records for worker in workers),
            frames=sum(worker.frames for worker in workers),
            waiting_keys=sum(worker.waiting_keys for worker in workers),
            oldest=oldest,
        )

    async def close(self) -> None:
        """Drop everything, and end what is under way beside the handlers."""
        for worker in self._workers.values():
            worker.drop()
        await self._shop.close()
