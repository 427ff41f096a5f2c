"""A history over what is stored, joined with what it left behind: the effects, the dead letters. Pure."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.history import Fault, Witness
from tests.chaos.stored.history import Begun, Counts, Ended, Hit, Kept, Owned, Record, Sent, Settled, in_order
from tests.chaos.story import Window


@dataclass(frozen=True, slots=True)
class Effect:
    """A row that a handler wrote, in the order of commits."""

    place: int
    t: float
    """When it was written, just before its commit."""

    op: str
    execution: str
    key: str
    value: int
    domain: str
    partition: int
    epoch: int
    node: str
    pid: int


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter."""

    message_id: str
    key: str | None
    reason: str
    attempts: int
    error: str


@dataclass(frozen=True)
class Remains:
    """What is left of a run."""

    records: Sequence[Record]
    effects: Mapping[str, Sequence[Effect]]
    """By service, in the order of their commits."""

    letters: Mapping[str, Sequence[Letter]]
    """By service."""

    left: Mapping[str, int]
    """Messages that were still not handled when the run was given up, by stream."""


@dataclass
class Message:
    """One message: how it was sent, and what became of it in one service or all."""

    sent: Sent
    settled: list[Settled] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    effects: list[tuple[str, Effect]] = field(default_factory=list)
    """Each with its service."""

    letters: list[tuple[str, Letter]] = field(default_factory=list)

    @property
    def op(self) -> str:
        """Which it is."""
        return self.sent.op

    @property
    def is_accepted(self) -> bool:
        """Whether its producer was told that it is stored, or done."""
        return any(one.outcome in ("ok", "refused", "failed") for one in self.settled)

    @property
    def is_doomed(self) -> bool:
        """Whether it is meant to become a dead letter."""
        return self.sent.work.fails >= MAX_ATTEMPTS or self.sent.work.kills


MAX_ATTEMPTS = 3

LOSING = frozenset({"kill", "freeze", "die"})
"""Kinds of faults after which others take over what a node has."""


@dataclass
class Story:
    """A history, joined."""

    services: tuple[str, ...]
    messages: dict[str, Message] = field(default_factory=dict)
    """By operation, in the order in which they were sent."""

    effects: Mapping[str, Sequence[Effect]] = field(default_factory=dict)
    letters: Mapping[str, Sequence[Letter]] = field(default_factory=dict)
    owned: list[Owned] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    """What belongs to no message that was sent."""

    counts: dict[int, Counter[str]] = field(default_factory=dict)
    """The last statistics of each process."""

    seen: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Instants of the lines of each node process, in order."""

    left: Mapping[str, int] = field(default_factory=dict)

    def takers(self, message: Message) -> tuple[str, ...]:
        """Return the services that are to handle a message."""
        return (message.sent.service,) if message.sent.service else self.listeners

    listeners: tuple[str, ...] = ()
    """The services that handle events."""


def tell(remains: Remains, listeners: Sequence[str] = ()) -> Story:
    """Join what is left of a run.

    Args:
        remains: Of the run.
        listeners: The services that handle events.
    """
    story = Story(tuple(remains.effects), effects=remains.effects, letters=remains.letters, left=remains.left)
    story.listeners = tuple(listeners)
    windows: dict[str, Window] = {}
    ops: dict[str, str] = {}  # of message ids
    kept: list[Kept] = []
    for record in in_order(remains.records):
        match record:
            case Sent():
                story.messages[record.op] = Message(record)
            case Fault(edge="begin"):
                window = Window(record.name, record.kind, record.target, record.pid, record.t, record.delay)
                windows[record.name] = window
                story.windows.append(window)
            case Fault():
                windows[record.name].end = record.t
            case Witness():
                windows[record.name].saw.update(record.saw)
            case Owned():
                story.owned.append(record)
                story.seen[record.pid].append(record.t)
            case Hit():
                story.hits.append(record)
            case Counts():
                story.counts[record.pid] = Counter(record.counts)
                story.seen[record.pid].append(record.t)
            case Kept():
                kept.append(record)
                story.seen[record.pid].append(record.t)
            case Settled() | Begun() | Ended():
                _add(story, record, ops)
    for one in kept:
        message = story.messages.get(ops.get(one.message_id, ""))
        if message is not None:
            message.kept.append(one)
    _add_remains(story, ops)
    return story


def _add(story: Story, record: Settled | Begun | Ended, ops: dict[str, str]) -> None:
    if not isinstance(record, Settled):
        story.seen[record.pid].append(record.t)
    message = story.messages.get(record.op)
    match record:
        case _ if message is None:
            story.strays.append(f"{type(record).__name__} of {record.op}, which nobody sent")
        case Settled():
            message.settled.append(record)
        case Begun():
            ops[record.message_id] = record.op
            message.begun.append(record)
        case Ended():
            message.ended.append(record)


def _add_remains(story: Story, ops: Mapping[str, str]) -> None:
    for service, effects in story.effects.items():
        for effect in effects:
            message = story.messages.get(effect.op)
            if message is None:
                story.strays.append(f"an effect of {effect.op} in {service}, which nobody sent")
            else:
                message.effects.append((service, effect))
    for service, letters in story.letters.items():
        for letter in letters:
            message = story.messages.get(ops.get(letter.message_id, ""))
            if message is None:
                story.strays.append(f"a dead letter in {service} of a message that never ran: {letter}")
            else:
                message.letters.append((service, letter))


def began_at(window: Window, story: Story) -> float:
    """Return when a fault bit: at the point at which the process did it to itself, or when the rig began."""
    hits = [hit.t for hit in story.hits if hit.pid == window.pid and hit.t <= window.end]
    return max(hits, default=window.begin) if window.kind in LOSING else window.begin


def lost_partitions(window: Window, story: Story) -> set[tuple[str, str, int]]:
    """Return what the process that a fault hit owned then: service, domain and partition."""
    at = began_at(window, story)
    last: dict[tuple[str, str, int], Owned] = {}
    for one in story.owned:
        if one.t <= at and one.step in ("granted", "released"):
            last[one.service, one.domain, one.partition] = one
    return {place for place, one in last.items() if one.pid == window.pid and one.step == "granted"}
