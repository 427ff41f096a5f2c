"""A history, joined: calls with their executions, and the faults. Pure."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.chaos.history import Done, End, Fault, Invoke, Record, Start, View, Witness, in_order

EVERYBODY = "server"
"""The target whose fault is everybody's."""


@dataclass
class Call:
    """One call: how it ended, and where it ran."""

    invoke: Invoke
    ends: list[Done] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    finishes: list[End] = field(default_factory=list)

    @property
    def op(self) -> str:
        """Which call it is."""
        return self.invoke.op

    @property
    def is_ok(self) -> bool:
        """Whether it ended well."""
        return bool(self.ends) and self.ends[0].code == "ok"

    @property
    def deadline(self) -> float:
        """The instant after which nobody waits for it."""
        return self.invoke.t + self.invoke.timeout

    @property
    def ended(self) -> float:
        """The instant of its end; infinite if it has none."""
        return self.ends[0].t if self.ends else math.inf


@dataclass
class Window:
    """One fault, from its beginning to its end."""

    name: str
    kind: str
    target: str
    pid: int | None
    begin: float
    delay: float = 0.0
    end: float = math.inf
    saw: Counter[str] = field(default_factory=Counter)
    """What the rig saw of it."""

    def hits(self, call: Call, first: Start, second: Start) -> bool:
        """Whether it may have made a call run a second time.

        A process loses what it is executing, and no more: what it thaws with it must not repeat. A link or the server
        loses what is on its way, and may give it back later: a request that lay there is executed although the caller
        has asked another node meanwhile.
        """
        if self.begin > min(second.t, call.ended):
            return False
        if self.pid is not None:
            return (self.target, self.pid) == (first.node, first.pid) and self.end >= first.t
        return self.target in (EVERYBODY, call.invoke.caller, first.node, second.node) and self.end >= call.invoke.t


@dataclass
class Story:
    """A history, joined."""

    calls: dict[str, Call] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    """In the order of their beginnings."""

    views: list[View] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    """Ends and executions of calls that nobody made."""

    seen: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Instants of the lines of each node process, in order."""


def tell(records: Iterable[Record]) -> Story:
    """Join the records of a run."""
    story = Story()
    windows: dict[str, Window] = {}
    for record in in_order(records):
        match record:
            case Invoke():
                story.calls[record.op] = Call(record)
            case Fault(edge="begin"):
                window = Window(record.name, record.kind, record.target, record.pid, record.t, record.delay)
                windows[record.name] = window
                story.windows.append(window)
            case Fault():
                windows[record.name].end = record.t
            case Witness():
                windows[record.name].saw.update(record.saw)
            case View():
                story.views.append(record)
            case _:
                _add_to_call(story, record)
    return story


def _add_to_call(story: Story, record: Done | Start | End) -> None:
    if not isinstance(record, Done):
        story.seen[record.pid].append(record.t)
    call = story.calls.get(record.op)
    match record:
        case _ if call is None:
            story.strays.append(f"{type(record).__name__} of {record.op}, which nobody called")
        case Done():
            call.ends.append(record)
        case Start():
            call.starts.append(record)
        case End():
            call.finishes.append(record)
