"""Did a fault bite? What a history must show if a fault was real; pure.

The rig writes down what it did, and that proves little: a signal may miss, a proxy may forward all the same. So each
kind of fault names what the rig must have seen of it before it undid it, and must not (a process that stands still,
bytes that were lost), and what cannot be in a history in which it was real: lines of a process that was dead, answers
over a link that was cut. A fault of which nothing is to be seen did not happen. A kind without an entry here is a
mistake in the rig.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from catga_bus.errors import Code
from tests.chaos.story import EVERYBODY, Call, Story, Window

SETTLING = 0.3
"""Seconds that a fault may take to bite, and that its undoing may come before the rig writes down its end."""

SHORTEST = 0.7
"""Seconds that a fault must last: over twice `SETTLING`, so that there is a time in which it can be contradicted."""

INSTANT = frozenset({"kill", "poison", "roll"})
"""Kinds of faults that end a process: they last for good, however short the deed."""

Signs: TypeAlias = Callable[[Window], str | None]
"""Returns what the rig saw, or did not see, that speaks against a fault; or None."""

Evidence: TypeAlias = Callable[[Window, Story], str | None]
"""Returns what in the history speaks against a fault, or None."""


def against(window: Window, story: Story) -> str | None:
    """Return what in the history contradicts a fault, or None if nothing does."""
    return unseen(window) or _EVIDENCE[window.kind](window, story)


def unseen(window: Window) -> str | None:
    """Return why nothing can be said about a fault, or what the rig did not see of it; or None."""
    if window.end == math.inf:
        return "it never ended"
    if window.kind not in INSTANT and window.end - window.begin < SHORTEST:
        return f"it lasted {window.end - window.begin:.3f} s, and nothing can be said about less than {SHORTEST} s"
    return _SIGNS[window.kind](window)


# -- what the rig saw --------------------------------------------------------------------------------------


def _saw(*signs: str) -> Signs:
    """Return what objects to a fault of which the rig saw none of these signs, or other ones as well."""

    def object_to(window: Window) -> str | None:
        return None if window.saw.total() and set(+window.saw) <= set(signs) else _told(window)

    return object_to


def _saw_some(*signs: str) -> Signs:
    """Return what objects to a fault of which the rig saw none of these signs."""
    return lambda window: None if any(window.saw[sign] for sign in signs) else _told(window)


def _one_way(window: Window) -> str | None:
    """One direction is held and passes nothing; the other passes."""
    up, down = ({fate for fate in ("held", "passed") if window.saw[f"{fate} {way}"]} for way in ("up", "down"))
    return None if (up, down) in (({"held"}, {"passed"}), ({"passed"}, {"held"})) else _told(window)


def _told(window: Window) -> str:
    return f"the rig saw {dict(window.saw) or 'nothing of it'}"


# -- what the history says ---------------------------------------------------------------------------------


def _died(window: Window, story: Story) -> str | None:
    lines = story.seen.get(window.pid or 0, [])
    if not lines or lines[0] > window.begin:
        return "the process had never run anything"
    return _first(lines, window.end, math.inf, "the process went on at {:.3f}")


def _stood_still(window: Window, story: Story) -> str | None:
    lines = story.seen.get(window.pid or 0, [])
    if not lines or lines[0] > window.begin:
        return "the process had never run anything"
    return _first(lines, window.begin + SETTLING, window.end - SETTLING, "the process went on at {:.3f}")


def _refused(window: Window, story: Story) -> str | None:
    during = (call for call in story.calls.values() if window.begin <= call.invoke.t <= window.end)
    if any(end.code == Code.OVERLOADED for call in during for end in call.ends):
        return None
    return "nobody was refused as busy"


def _was_silent(window: Window, story: Story) -> str | None:
    """No answer gets over it: none to the caller, none from the node, none at all past the server."""
    answers = (
        end.t
        for call in story.calls.values()
        for end in call.ends
        if end.code == "ok"
        and call.invoke.t >= window.begin
        and window.target in (EVERYBODY, call.invoke.caller, end.node)
    )
    return _first(answers, window.begin + SETTLING, window.end - SETTLING, "a call succeeded at {:.3f}")


def _was_cut(window: Window, story: Story) -> str | None:
    """No answer gets over it, and no new call gets to the node."""
    began = window.begin + SETTLING
    arrivals = (
        start.t
        for call in story.calls.values()
        for start in call.starts
        if start.node == window.target and call.invoke.t > began
    )
    return _was_silent(window, story) or _first(arrivals, began, window.end - SETTLING, "a new call was run at {:.3f}")


def _was_slow(window: Window, story: Story) -> str | None:
    over = [
        end.latency
        for call in _through(window, story)
        for end in call.ends
        if end.code == "ok" and end.t < window.end
    ]  # fmt: skip
    if not over:
        return "no call went over it"
    return _first(over, 0.0, window.delay, "a call took only {:.3f} s")


def _through(window: Window, story: Story) -> Iterator[Call]:
    """Yield the calls that were made after a fault of a link had begun, and went over that link."""
    for call in story.calls.values():
        if window.begin + SETTLING < call.invoke.t and (
            window.target == call.invoke.caller or any(end.node == window.target for end in call.ends)
        ):
            yield call


def _first(instants: Iterable[float], after: float, before: float, text: str) -> str | None:
    return next((text.format(instant) for instant in instants if after < instant < before), None)


_SIGNS: dict[str, Signs] = {
    "kill": _saw("killed"),
    "poison": _saw("killed"),
    "freeze": _saw("stopped"),
    "roll": _saw("left"),
    "overload": lambda _: None,  # what was refused is in the history
    "restart_server": _saw("refused"),
    "freeze_server": _saw("stopped"),
    "cut": _saw_some("reset", "refused"),
    "half_open": _saw("lost up", "lost down"),
    "one_way": _one_way,
    "unplug": _saw("unplugged"),
    "delay": _saw_some("delayed up", "delayed down"),
}

_EVIDENCE: dict[str, Evidence] = {
    "kill": _died,
    "poison": _died,
    "freeze": _stood_still,
    "roll": _died,
    "overload": _refused,
    "restart_server": _was_silent,
    "freeze_server": _was_silent,
    "cut": _was_cut,
    "half_open": _was_cut,
    "one_way": _was_silent,
    "unplug": _was_cut,
    "delay": _was_slow,
}

KINDS = frozenset(_EVIDENCE)
"""Kinds of faults that can be judged."""
