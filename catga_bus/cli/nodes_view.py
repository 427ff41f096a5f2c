"""What `catga nodes` shows: one row for each node, as a table, as JSON, and as lines of text. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from catga_bus.cluster.records import NodeInfo, NodeStatus


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One node as it is seen from here; the fields are those of `--json`."""

    status: str
    service: str
    node: str
    incarnation: tuple[int, int]
    """Which life of its id this is: a number that grows, and random bits."""

    is_ready: bool
    version: str
    zone: str | None
    region: str | None
    types: tuple[str, ...]
    """Request types that it handles; none for a client."""

    commands: tuple[str, ...] = ()
    """Command types that it handles."""

    events: tuple[str, ...] = ()
    """Types of durable events that it handles."""

    partitions: dict[int, int] = {}
    """Partitions of its service's work queue that it owns, each with its epoch."""

    event_partitions: dict[int, int] = {}
    """Partitions of the event log that it owns for its service, each with its epoch."""

    store: str = ""
    """Id of the store of its inbox; empty without one."""

    metadata: dict[str, str]
    in_flight: int
    """Messages whose handlers run."""

    intake: int
    """Messages that were taken in and are not settled, the ones in flight included."""

    cpu: float
    """Share of one core, 0 to 1 for each that is busy."""

    memory_bytes: int
    stall: float
    """Seconds that its event loop has been blocked or late; 0 when it runs as it should."""

    beat_age: float
    """Seconds since its last heartbeat."""

    requests_per_second: float | None
    """Messages that it settled between its last two heartbeats, by the second; None until there have been two."""

    breakers: tuple[str, ...]
    """Its circuit breakers that are not closed: the request types and the nodes that it keeps calls from."""

    is_evicted: bool
    """Whether the server says that nobody listens for it any more: it has ended, or lost its connection."""


def row_of(node: NodeInfo, now: float, requests_per_second: float | None) -> NodeRow:
    """Return the row of a node.

    Args:
        node: What is known of it.
        now: The present instant, on the clock of its `last_beat`.
        requests_per_second: What `Rates` says; not shown of a dead node, whose last one was some time ago.
    """
    load = node.load
    return NodeRow(
        status=str(node.status),
        service=node.service,
        node=node.id,
        incarnation=node.incarnation,
        is_ready=node.is_ready,
        version=node.version,
        zone=node.zone,
        region=node.region,
        types=node.types,
        commands=node.commands,
        events=node.events,
        partitions=dict(node.partitions),
        event_partitions=dict(node.event_partitions),
        store=node.store,
        metadata=dict(node.metadata),
        in_flight=load.in_flight,
        intake=load.intake,
        cpu=load.cpu,
        memory_bytes=load.memory_bytes,
        stall=node.stall,
        beat_age=max(0.0, now - node.last_beat),
        requests_per_second=None if node.status is NodeStatus.FAULTED else requests_per_second,
        breakers=node.breakers,
        is_evicted=node.evicted,
    )


class Rates:
    """Requests per second of each node, from a count that its heartbeats carry."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, int, float]] = {}
        self._rates: dict[str, float] = {}

    def observe(self, node: str, incarnation: object, handled: int, beat_at: float) -> float | None:
        """Take what one heartbeat said, and return the requests per second since the one before it.

        Args:
            node: Id of the node.
            incarnation: Its life; a new one begins to count anew.
            handled: Messages that it had settled by then.
            beat_at: When the heartbeat came, in seconds of any clock. The same heartbeat may be given
                again: its rate stays.

        Returns:
            None until two heartbeats of one life have been seen.
        """
        before = self._seen.get(node)
        if before is None or before[0] != incarnation:
            self._rates.pop(node, None)
            self._seen[node] = (incarnation, handled, beat_at)
        elif beat_at > before[2]:
            self._rates[node] = max(0, handled - before[1]) / (beat_at - before[2])
            self._seen[node] = (incarnation, handled, beat_at)
        return self._rates.get(node)

    def keep(self, nodes: Iterable[str]) -> None:
        """Forget all nodes but these."""
        for gone in self._seen.keys() - set(nodes):
            del self._seen[gone]
            self._rates.pop(gone, None)


class Departures:
    """Keeps the rows of nodes that are gone for a while, so that people see who left.

    Args:
        seconds: For how long; 0 for not at all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._present: dict[str, NodeRow] = {}
        self._gone: dict[str, tuple[NodeRow, float]] = {}

    def observe(self, rows: Sequence[NodeRow], now: float) -> list[NodeRow]:
        """Return the rows of one look, then as `left` those that looks of the last seconds had and this one has not.

        Args:
            rows: All nodes that are there.
            now: The present instant, in seconds of a monotonic clock.
        """
        before, self._present = self._present, {row.node: row for row in rows}
        self._gone |= {node: (row, now) for node, row in before.items() if node not in self._present}
        self._gone = {
            node: (row, since)
            for node, (row, since) in self._gone.items()
            if now - since < self._seconds and node not in self._present
        }
        return [*rows, *(_left(row, now - since) for row, since in self._gone.values())]


def _left(row: NodeRow, ago: float) -> NodeRow:
    return msgspec.structs.replace(row, status="left", beat_age=row.beat_age + ago, requests_per_second=None)


_STYLES = {"online": "green", "suspect": "yellow", "draining": "cyan", "faulted": "bold red", "left": "dim"}
_NUMBERS = frozenset({"owns", "load", "CPU", "memory", "stall", "beat", "requests/s"})
_LEFT_OUT = ("memory", "CPU", "version", "zone", "service", "stall", "load")
# In this order, where a terminal is too narrow: what says least about whether a node is well goes first.


def nodes_table(rows: Sequence[NodeRow], width: int, caption: str | None = None) -> Table:
    """Return the table of all nodes, sorted by service and id.

    Args:
        rows: The nodes, at least one.
        width: Columns of the terminal; what does not fit is left out by whole columns.
        caption: A line to stand below.
    """
    lines = [_cells(row) for row in ordered(rows)]
    if not any(row.partitions or row.event_partitions for row in rows):
        for line in lines:
            del line["owns"]
    columns = _fitting(lines, width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    table.caption, table.caption_justify, table.caption_style = caption, "left", "yellow"
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(line[column] for column in columns))
    return table


_GAP = 2  # spaces between two columns
_STALL_SHOWN = 0.005  # seconds: what would be drawn as 0.00 is the usual jitter of an event loop


def _fitting(lines: Sequence[dict[str, Text]], width: int) -> list[str]:
    widths = {column: max(len(column), *(line[column].cell_len for line in lines)) for column in lines[0]}
    for column in _LEFT_OUT:
        if sum(widths.values()) + _GAP * (len(widths) - 1) <= width:
            break
        widths.pop(column, None)
    return list(widths)


def ordered(rows: Iterable[NodeRow]) -> list[NodeRow]:
    """Return the rows sorted by service and id."""
    return sorted(rows, key=lambda row: (row.service, row.node))


def _cells(row: NodeRow) -> dict[str, Text]:
    """Return what each column says of a node; `owns` is partitions of the work queue and of the event log."""
    # An online node that is not ready gets no calls: that is the more important thing to know.
    status = row.status if row.is_ready or row.status != "online" else "not ready"
    texts = {
        "service": row.service,
        "node": row.node,
        "owns": f"{len(row.partitions)}+{len(row.event_partitions)}",
        "load": f"{row.in_flight:,}/{row.intake:,}",
        "CPU": f"{row.cpu:.0%}",
        "memory": f"{row.memory_bytes / 1e6:,.0f} MB",
        "stall": f"{row.stall:.2f} s" if row.stall >= _STALL_SHOWN else "-",
        "version": row.version,
        "zone": row.zone or "-",
        "beat": f"{row.beat_age:.1f} s",
        "requests/s": "-" if row.requests_per_second is None else f"{row.requests_per_second:,.0f}",
        "open breakers": ", ".join(row.breakers) or "-",
    }
    shown = {column: Text(visible(text)) for column, text in texts.items()}
    return {"status": Text(status, style=_STYLES.get(status, "yellow")), **shown}


def visible(text: str) -> str:
    """Return a text without what could move the cursor of a terminal: any node may call itself anything."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def change_text(kind: str, row: NodeRow | None, missed: int = 0) -> str:
    """Return a change as one line.

    Args:
        kind: What happened.
        row: The node that it happened to; None if changes were missed.
        missed: How many were.
    """
    if row is None:
        return f"{kind:<10}{missed:,} changes, which came faster than they were read"
    return visible(f"{kind:<10}{row.status:<10}{row.service}  {row.node}")


def change_object(kind: str, row: NodeRow | None, missed: int = 0) -> dict[str, Any]:
    """Return a change as the object that `--json --watch` prints; the arguments are those of `change_text`."""
    return {"kind": kind, "node": msgspec.to_builtins(row), "missed": missed}


def nodes_object(rows: Sequence[NodeRow]) -> dict[str, Any]:
    """Return all nodes as the object that `--json` prints."""
    return {"nodes": msgspec.to_builtins(ordered(rows))}


def silence_text(seconds: float) -> str:
    """Return what is said when nothing is heard, for how many seconds."""
    return f"nothing has been heard for {seconds:,.0f} s, this node's own heartbeats included: is the server there?"


def nothing_text(namespace: str, service: str | None, status: str | None) -> str:
    """Return what is said when there are no nodes to show."""
    what = f"{status} nodes" if status else "nodes"
    where = f"of service {service} in namespace {namespace}" if service else f"in namespace {namespace}"
    return f"no {what} {where}; a node is a bus that has started, as `catga run` starts one"
