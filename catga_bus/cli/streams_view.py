"""What `catga streams` shows: one row for each stream of a namespace. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from catga_bus.cli.dlq_view import size_text
from catga_bus.cli.nodes_view import visible
from catga_bus.transport.jetstream import StreamInfo
from catga_bus.wire import Names, token

_NEARLY_FULL = 0.8


class StreamRow(msgspec.Struct, frozen=True, kw_only=True):
    """One stream; the fields are those of `--json`."""

    name: str
    what: str
    """`commands`, `delayed` (commands that wait for their time), `events`, `dead letters`, `owners` or `routes`."""

    service: str
    """Token of the service that it belongs to; empty for those that all share."""

    partitions: int | None
    """P; None where there are none."""

    storage: str
    replicas: int
    leader: str
    """Server that leads it; empty if the server did not say, as without a cluster."""

    messages: int
    bytes: int
    max_bytes: int
    """-1: no limit."""

    max_age: float
    """Seconds; 0.0: for ever."""

    discard: str
    """What goes when it is full: `old`, or `new`, which is refused then."""

    consumers: int
    first_sequence: int
    last_sequence: int
    troubles: tuple[str, ...] = ()
    """What is wrong with it."""


def kind_of(stream: str, names: Names) -> tuple[str, str] | None:
    """Return what a stream is for, and the token of its service; None if it is none of the namespace."""
    shared = {
        names.event_stream(): "events",
        f"KV_{names.owners_bucket()}": "owners",
        f"KV_{names.routes_bucket()}": "routes",
    }
    if stream in shared:
        return shared[stream], ""
    for made, what in (
        (names.command_stream(""), "commands"),
        (names.schedule_stream(""), "delayed"),
        (names.dead_letter_stream(""), "dead letters"),
    ):
        prefix = made[: -len(token(""))]
        if stream.startswith(prefix) and len(stream) > len(prefix):
            return what, stream.removeprefix(prefix)
    return None


def row_of(info: StreamInfo, names: Names) -> StreamRow | None:
    """Return the row of a stream; None if it is none of the namespace."""
    kind = kind_of(info.config.name, names)
    if kind is None:
        return None
    config = info.config
    partitions = config.metadata.get("catga.partitions", "")
    return StreamRow(
        name=config.name,
        what=kind[0],
        service=kind[1],
        partitions=int(partitions) if partitions.isascii() and partitions.isdigit() else None,
        storage=config.storage,
        replicas=config.replicas,
        leader=str(_cluster(info).get("leader") or ""),
        messages=info.messages,
        bytes=info.bytes,
        max_bytes=config.max_bytes,
        max_age=config.max_age,
        discard=config.discard,
        consumers=info.consumers,
        first_sequence=info.first_sequence,
        last_sequence=info.last_sequence,
        troubles=tuple(troubles_of(info)),
    )


def _cluster(info: StreamInfo) -> Mapping[str, Any]:
    cluster = info.raw.get("cluster")
    return cluster if isinstance(cluster, Mapping) else {}


def troubles_of(info: StreamInfo) -> Iterable[str]:
    """Yield what is wrong with a stream."""
    cluster = _cluster(info)
    if cluster and not cluster.get("leader"):
        yield "no leader"
    replicas = cluster.get("replicas") or ()
    offline = [str(one.get("name")) for one in replicas if one.get("offline")]
    behind = [str(one.get("name")) for one in replicas if not one.get("offline") and not one.get("current")]
    if offline:
        yield f"offline: {', '.join(offline)}"
    if behind:
        yield f"behind: {', '.join(behind)}"
    limit = info.config.max_bytes
    if limit > 0 and info.config.discard == "new" and info.bytes >= _NEARLY_FULL * limit:
        yield f"{info.bytes / limit:.0%} full: what does not fit is refused"


_NUMBERS = frozenset({"P", "replicas", "messages", "size", "consumers"})


def streams_table(rows: Sequence[StreamRow]) -> Table:
    """Return the table of streams, at least one."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = ("stream", "what", "P", "storage", "replicas", "messages", "size", "limits", "consumers", "troubles")
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    for row in ordered(rows):
        table.add_row(
            Text(visible(row.name)),
            row.what,
            "-" if row.partitions is None else str(row.partitions),
            row.storage,
            str(row.replicas),
            f"{row.messages:,}",
            size_text(row.bytes),
            limits_text(row),
            str(row.consumers),
            Text(visible("; ".join(row.troubles)) or "-", style="red" if row.troubles else ""),
        )
    return table


def ordered(rows: Iterable[StreamRow]) -> list[StreamRow]:
    """Return the rows by service, those that all share at the end."""
    return sorted(rows, key=lambda row: (not row.service, row.service, row.name))


def limits_text(row: StreamRow) -> str:
    """Return the limits of a stream for people."""
    limits = []
    if row.max_bytes > 0:
        limits.append(size_text(row.max_bytes))
    if row.max_age > 0:
        limits.append(age_text(row.max_age))
    if not limits:
        return "none"
    return f"{', '.join(limits)}; {'full: refused' if row.discard == 'new' else 'full: the oldest go'}"


def age_text(seconds: float) -> str:
    """Return a duration for people, in its largest unit that is a whole.

    Example:
        >>> age_text(0.25), age_text(75), age_text(7_200), age_text(604_800)
        ('0.2 s', '1 min', '2 h', '7 d')
    """
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
