"""The broker of the simulations: the pure model of JetStream, and the operations of an ownership on it."""

from typing import Any

from catga_bus.partition.protocol import (
    CreateBucket,
    CreateConsumer,
    DeleteConsumer,
    Done,
    FindFirst,
    ListConsumers,
    Operation,
    Outcome,
    Pull,
    Read,
    ReadPosition,
    Refused,
    Unknown,
    Write,
)
from catga_bus.partition.records import Domain, Held, read_record, write_record
from catga_bus.transport.jetstream import (
    ConsumerConfig,
    JetStreamRefusedError,
    JetStreamUnknownError,
    StreamConfig,
)
from catga_bus.transport.jetstream_model import JetStreamModel

BUCKET = "KV_owners"


def bucket_config(first_sequence: int = 0) -> StreamConfig:
    return StreamConfig(
        name=BUCKET, subjects=("$KV.owners.>",), max_messages_per_subject=1, first_sequence=first_sequence
    )


def bucket_subject(domain: Domain, partition: int) -> str:
    return f"$KV.owners.{domain.key(partition)}"


class SimulatedBroker:
    """One server."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.model = JetStreamModel()
        self.model.create_stream(0.0, bucket_config(100))
        retention = "limits" if domain.is_log else "workqueue"
        subjects = (domain.names.events() if domain.is_log else domain.names.commands(domain.service),)
        self.model.create_stream(0.0, StreamConfig(name=domain.stream, subjects=subjects, retention=retention))

    def perform(self, now: float, partition: int, operation: Operation) -> Outcome:
        """Carry out an operation; `Pull` is the business of whoever listens."""
        try:
            return Done(self._value(now, partition, operation))
        except JetStreamRefusedError as error:
            return Refused(error.code, error.text)
        except JetStreamUnknownError:
            return Unknown()

    def held(self, now: float, partition: int) -> Held:
        message = self.model.last_message(now, BUCKET, bucket_subject(self.domain, partition))
        return Held(None, 0) if message is None else Held(read_record(message.payload or None), message.sequence)

    def consumers(self, now: float) -> list[str]:
        return self.model.consumer_names(now, self.domain.stream)

    def _value(self, now: float, partition: int, operation: Operation) -> Any:
        model, domain = self.model, self.domain
        match operation:
            case Read():
                return self.held(now, partition)
            case Write(record, last):
                subject = bucket_subject(domain, partition)
                return model.publish(now, subject, write_record(record), expected_last=last).sequence
            case CreateBucket(first_sequence):
                model.create_stream(now, bucket_config(first_sequence))
            case ListConsumers():
                return self.consumers(now)
            case ReadPosition(consumer):
                info = model.consumer(now, domain.stream, consumer)
                return 0 if info is None else max(info.ack_floor + 1, info.config.start_sequence)
            case FindFirst(start):
                found = [model.next_message(now, domain.stream, each, start) for each in domain.filters(partition)]
                return min((message.sequence for message in found if message is not None), default=0)
            case DeleteConsumer(consumer):
                return model.delete_consumer(now, domain.stream, consumer)
            case CreateConsumer(consumer, start):
                model.create_consumer(now, domain.stream, consumer_config(domain, partition, consumer, start))
            case Pull():
                pass
        return None


def consumer_config(domain: Domain, partition: int, consumer: str, start: int) -> ConsumerConfig:
    return ConsumerConfig(
        name=consumer,
        filters=domain.filters(partition),
        max_ack_pending=domain.window,
        deliver="by_start_sequence" if domain.is_log else "all",
        start_sequence=start if domain.is_log else 0,
    )
