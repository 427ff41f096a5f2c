"""What `catga partitions` shows: who owns each partition, and what waits in it. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec
from rich.table import Table
from rich.text import Text

from catga_bus.cli.nodes_view import visible
from catga_bus.cli.streams_view import age_text
from catga_bus.cluster.records import NodeInfo, NodeStatus
from catga_bus.partition.records import CAREFUL_FROM, Held

Domain = Literal["cmd", "evt"]
Place = tuple[str, Domain, int]
"""Token of the service, domain and partition."""


class Waiting(msgspec.Struct, frozen=True):
    """What waits in a partition."""

    pending: int | None
    """Records that are stored and not acknowledged, those in flight among them; None if nobody can tell."""

    in_flight: int | None
    """Records that its owner has."""

    oldest_utc: float | None
    """When the oldest was stored; None if none waits."""

    has_consumer: bool = True
    """Whether the consumer of its epoch is there."""


class PartitionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One partition; the fields are those of `--json`."""

    service: str
    """Its token in subjects."""

    domain: Domain
    """`cmd`: the work queue of the service; `evt`: its position in the log of events."""

    partition: int
    owner: str | None
    """Id of the node; None if nobody owns it."""

    owner_status: str | None
    """As its heartbeats say; None if it is not heard."""

    epoch: int
    """0 if it never had an owner."""

    is_announced: bool
    """Whether the owner says in its heartbeats that it owns it, with this epoch."""

    pending: int | None
    """Records that wait, those in flight included; None if there is no consumer that could tell."""

    in_flight: int | None
    oldest_age: float | None
    """Seconds since the oldest that waits was stored; None if none does."""

    deaths: int
    """Owners in a row that were lost at the same record."""

    moves: int
    """Changes of owners while somebody watched."""

    troubles: tuple[str, ...]


def row_of(
    place: Place,
    held: Held | None,
    waiting: Waiting,
    nodes: Mapping[str, NodeInfo],
    *,
    now_utc: float,
    moves: int = 0,
) -> PartitionRow:
    """Return the row of a partition.

    Args:
        place: Which.
        held: What the bucket says; None if it was never claimed.
        waiting: What waits.
        nodes: The nodes that are heard, by id.
        now_utc: Seconds since 1970.
        moves: Changes of owners that were seen.
    """
    record = held.record if held is not None else None
    owner = record.node if record is not None and record.state == "owned" else None
    node = nodes.get(owner) if owner is not None else None
    if node is not None and record is not None and node.incarnation != record.incarnation:
        node = None  # a later life of the id has not claimed it
    epoch = held.epoch if held is not None else 0
    announced = {} if node is None else node.partitions if place[1] == "cmd" else node.event_partitions
    return PartitionRow(
        service=place[0],
        domain=place[1],
        partition=place[2],
        owner=owner,
        owner_status=None if node is None else str(node.status),
        epoch=epoch,
        is_announced=announced.get(place[2]) == epoch,
        pending=waiting.pending,
        in_flight=waiting.in_flight,
        oldest_age=None if waiting.oldest_utc is None else max(0.0, now_utc - waiting.oldest_utc),
        deaths=record.deaths if record is not None else 0,
        moves=moves,
        troubles=tuple(_troubles(held, owner, node, waiting)),
    )


def _troubles(held: Held | None, owner: str | None, node: NodeInfo | None, waiting: Waiting) -> Iterable[str]:
    if held is None:
        yield "never claimed"
    elif owner is None:
        yield "no owner"
    elif node is None:
        yield "its owner is not heard"
    elif node.status not in (NodeStatus.ONLINE, NodeStatus.DRAINING):
        yield f"its owner is {node.status}"
    if owner is not None and not waiting.has_consumer:
        yield "no consumer"
    record = held.record if held is not None else None
    if record is not None and record.deaths >= CAREFUL_FROM:
        yield f"{record.deaths} owners died at the same record: one message at a time"


class Moves:
    """Counts how often partitions have changed hands, from looks at them."""

    def __init__(self) -> None:
        self._owners: dict[Place, str] = {}
        self._moves: dict[Place, int] = {}

    def observe(self, place: Place, held: Held | None) -> int:
        """Take what one look says, and return how often the owner has changed since the first one."""
        record = held.record if held is not None else None
        if record is not None and record.state == "owned":
            before = self._owners.get(place)
            if before is not None and before != record.node:
                self._moves[place] = self._moves.get(place, 0) + 1
            self._owners[place] = record.node
        return self._moves.get(place, 0)


def changes_between(before: Sequence[PartitionRow], after: Sequence[PartitionRow]) -> list[dict[str, Any]]:
    """Return what `--watch --json` prints: an object for each partition whose owner or epoch is another."""
    known = {(row.service, row.domain, row.partition): row for row in before}
    changes = []
    for row in after:
        old = known.get((row.service, row.domain, row.partition))
        if old is None or (old.owner, old.epoch) != (row.owner, row.epoch):
            change = msgspec.to_builtins(row) | {"from": old.owner if old is not None else None}
            changes.append(change)
    return changes


def change_text(change: Mapping[str, Any]) -> str:
    """Return a change as one line."""
    before, after = change["from"] or "nobody", change["owner"] or "nobody"
    what = f"{change['service']} {_DOMAINS[change['domain']]} {change['partition']}"
    return visible(f"{what}: {before} -> {after}, epoch {change['epoch']}")


class OwnerRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one node owns of one domain; the fields are those of `--owners --json`."""

    service: str
    domain: Domain
    owner: str | None
    partitions: tuple[int, ...]
    pending: int | None
    """None if that is not known of one of them."""

    in_flight: int | None
    oldest_age: float | None
    moves: int
    troubles: tuple[str, ...]


def owners_of(rows: Iterable[PartitionRow]) -> list[OwnerRow]:
    """Put the partitions of each owner together."""
    groups: dict[tuple[str, Domain, str | None], list[PartitionRow]] = {}
    for row in ordered(rows):
        groups.setdefault((row.service, row.domain, row.owner), []).append(row)
    return [
        OwnerRow(
            service=service,
            domain=domain,
            owner=owner,
            partitions=tuple(row.partition for row in group),
            pending=_sum(row.pending for row in group),
            in_flight=_sum(row.in_flight for row in group),
            oldest_age=max((row.oldest_age for row in group if row.oldest_age is not None), default=None),
            moves=sum(row.moves for row in group),
            troubles=tuple(dict.fromkeys(trouble for row in group for trouble in row.troubles)),
        )
        for (service, domain, owner), group in sorted(
            groups.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or "")
        )
    ]


def _sum(counts: Iterable[int | None]) -> int | None:
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


_NUMBERS = frozenset({"partition", "epoch", "pending", "in flight", "oldest", "moves", "count"})
_DOMAINS = {"cmd": "commands", "evt": "events"}


def partitions_table(rows: Sequence[PartitionRow]) -> Table:
    """Return the table of partitions, at least one."""
    table = _table(
        "service", "of", "partition", "owner", "epoch", "pending", "in flight", "oldest", "moves", "troubles"
    )
    for row in ordered(rows):
        table.add_row(
            Text(visible(row.service)),
            _DOMAINS[row.domain],
            str(row.partition),
            _owner(row.owner, row.owner_status),
            str(row.epoch) if row.epoch else "-",
            _count(row.pending),
            _count(row.in_flight),
            "-" if row.oldest_age is None else age_text(row.oldest_age),
            str(row.moves),
            _trouble(row.troubles),
        )
    return table


def owners_table(rows: Sequence[PartitionRow]) -> Table:
    """Return the table of owners; there is at least one partition."""
    table = _table(
        "service", "of", "owner", "count", "partitions", "pending", "in flight", "oldest", "moves", "troubles"
    )
    statuses = {row.owner: row.owner_status for row in rows}
    for one in owners_of(rows):
        table.add_row(
            Text(visible(one.service)),
            _DOMAINS[one.domain],
            _owner(one.owner, statuses[one.owner]),
            str(len(one.partitions)),
            ranges_text(one.partitions),
            _count(one.pending),
            _count(one.in_flight),
            "-" if one.oldest_age is None else age_text(one.oldest_age),
            str(one.moves),
            _trouble(one.troubles),
        )
    return table


def ordered(rows: Iterable[PartitionRow]) -> list[PartitionRow]:
    """Return the rows by service, domain and number."""
    return sorted(rows, key=lambda row: (row.service, row.domain, row.partition))


def ranges_text(numbers: Iterable[int]) -> str:
    """Return numbers for people.

    Example:
        >>> ranges_text((0, 1, 2, 5, 7, 8))
        '0-2 5 7-8'
    """
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def summary_text(rows: Sequence[PartitionRow]) -> str:
    """Return one line about all partitions."""
    owners = {row.owner for row in rows if row.owner is not None}
    homeless = sum(row.owner is None for row in rows)
    pending = sum(row.pending or 0 for row in rows)
    untold = sum(row.pending is None for row in rows)
    oldest = max((row.oldest_age for row in rows if row.oldest_age is not None), default=None)
    age = "" if oldest is None else f", the oldest for {age_text(oldest)}"
    nobody = f", {homeless:,} without" if homeless else ""
    more = f", and more in {untold:,} that nobody reads" if untold else ""
    return f"{len(rows):,} partitions, {len(owners):,} owners{nobody}; {pending:,} records wait{more}{age}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        is_long = column == "partitions"
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=not is_long)
    return table


def _owner(owner: str | None, status: str | None) -> Text:
    if owner is None:
        return Text("-", style="bold red")
    style = {"online": "", "draining": "cyan", "suspect": "yellow"}.get(status or "", "bold red")
    return Text(visible(owner), style=style)


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _trouble(troubles: Sequence[str]) -> Text:
    return Text(visible("; ".join(troubles)) or "-", style="red" if troubles else "")
