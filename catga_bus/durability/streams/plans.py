"""How the streams of a service are meant to be, and how they differ from what is there. Pure."""

from typing import Any, Final, Literal

import msgspec

from catga_bus.config import BusConfig
from catga_bus.durability.routes.routes import PARTITIONS_KEY
from catga_bus.transport.jetstream import StreamConfig
from catga_bus.wire import Names

DUPLICATE_WINDOW: Final = 120.0
"""Seconds for which streams recognise a record that they have: several times what an election takes."""


class Difference(msgspec.Struct, frozen=True):
    """One field of a stream that is not as it is configured."""

    stream: str
    field: str
    there: Any
    wanted: Any
    can_change: bool
    """Whether `catga streams apply` can bring it in line."""

    def __str__(self) -> str:
        fix = "run `catga streams apply`, or configure what is there" if self.can_change else _FIXES[self.field]
        return f"stream {self.stream}: {self.field} is {self.there!r} and configured is {self.wanted!r}: {fix}"


_FIXES: Final = {
    "partitions": (
        "the number of partitions never changes; configure what is there (partitions=), or drain the service, delete "
        "the stream and start again"
    ),
    "storage": "the server cannot change it; configure what is there (stream_storage=), or delete the empty stream",
    "retention": "this stream was not made by the bus; delete it, or take another namespace",
    "allow_schedules": "the server does not change it on this stream; delete it when nothing waits in it",
}

_COMPARED: Final = (
    ("retention", False),
    ("storage", False),
    ("subjects", True),
    ("replicas", True),
    ("max_bytes", True),
    ("max_age", True),
    ("discard", True),
    ("duplicate_window", True),
    ("max_messages_per_subject", True),
    ("allow_schedules", False),
)

_COMPARED_OF_BUCKET: Final = frozenset({"retention", "subjects", "max_age"})
# What could make its keys vanish; the rest is its operator's choice.


class Change(msgspec.Struct, frozen=True):
    """What `catga streams apply` does about one stream."""

    stream: str
    kind: Literal["create", "update", "refuse", "keep"]
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        what = "; ".join(str(one) for one in self.differences)
        return f"{self.kind} {self.stream}" + (f" ({what})" if what else "")


def wanted_streams(
    names: Names,
    service: str,
    config: BusConfig,
    *,
    commands: bool,
    events: bool,
    schedules: bool,
    log_partitions: int,
) -> list[StreamConfig]:
    """Return the streams of a service as they are configured; of replicas one where that is left open."""
    shared: dict[str, Any] = {
        "storage": config.stream_storage,
        "replicas": config.stream_replicas or 1,
        "duplicate_window": DUPLICATE_WINDOW,
    }
    partitions = {PARTITIONS_KEY: str(config.partitions)}
    wanted: list[StreamConfig] = []
    if commands:
        queue = StreamConfig(
            name=names.command_stream(service),
            subjects=(names.commands(service),),
            retention="workqueue",
            discard="new",
            max_bytes=config.command_max_bytes,
            metadata=partitions,
            **shared,
        )
        wanted.append(queue)
    if commands and schedules:
        waiting = StreamConfig(
            name=names.schedule_stream(service),
            subjects=(names.schedules(service), names.all_due(service)),
            retention="workqueue",
            allow_schedules=True,
            allow_rollup=True,
            metadata=partitions,
            **shared,
        )
        wanted.append(waiting)
    if events:
        event_log = StreamConfig(
            name=names.event_stream(),
            subjects=(names.events(),),
            max_bytes=config.event_max_bytes,
            max_age=config.event_max_age,
            metadata={PARTITIONS_KEY: str(log_partitions)},
            **shared,
        )
        wanted.append(event_log)
    if commands or events:
        letters = StreamConfig(
            name=names.dead_letter_stream(service),
            subjects=(names.dead_letters(service),),
            max_bytes=config.dead_letter_max_bytes,
            max_age=config.dead_letter_max_age,
            **shared,
        )
        wanted.append(letters)
    return wanted


def with_metadata(config: StreamConfig) -> StreamConfig:
    """Return a configuration that says in its metadata what the bus has asked for."""
    asked = {
        "catga.replicas": str(config.replicas),
        "catga.storage": config.storage,
        "catga.max_bytes": str(config.max_bytes),
        "catga.max_age": f"{config.max_age:g}",
    }
    return msgspec.structs.replace(config, metadata={**config.metadata, **asked})


def differences(there: StreamConfig, wanted: StreamConfig) -> list[Difference]:
    """Return every field that matters and differs."""
    found: list[Difference] = []
    have, want = there.metadata.get(PARTITIONS_KEY), wanted.metadata.get(PARTITIONS_KEY)
    if have != want:
        found.append(Difference(there.name, "partitions", _number(have), _number(want), can_change=False))
    is_bucket = wanted.name.startswith("KV_")
    for field, can_change in _COMPARED:
        if is_bucket and field not in _COMPARED_OF_BUCKET:
            continue
        have, want = getattr(there, field), getattr(wanted, field)
        same = set(have) == set(want) if field == "subjects" else have == want
        if not same:
            found.append(Difference(there.name, field, have, want, can_change))
    return found


def _number(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text
