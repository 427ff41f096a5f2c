"""What must hold over what is stored. Pure: a story in, violations out; linear in it (the faults are few).

A check for every promise of DESIGN section 2, and a planted violation for every check (`test_stored_checker.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from tests.chaos import evidence
from tests.chaos.stored.history import Begun
from tests.chaos.stored.story import LOSING, MAX_ATTEMPTS, Effect, Message, Story, began_at, lost_partitions
from tests.chaos.story import EVERYBODY, Window

SETTLING = evidence.SETTLING

HARMLESS = frozenset({"roll"})
"""Kinds of faults that are no excuse for a second execution."""

LOSES_ACKS = 0.5
"""Seconds before a fault within which what was committed may not be known to be acknowledged: order of magnitude."""


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What a scenario promises. Checks without a field here hold always."""

    faults: tuple[str, ...] = ()
    """Kinds that must have happened, each as often as it is here, and must have bitten."""

    listeners: tuple[str, ...] = ()
    """The services that handle events."""

    only_ok: bool = False
    """Whether no producer may be told of a failure, or that the outcome is unknown."""

    lost_answers: bool = False
    """Whether the result of a command may be lost on its way, so that its producer is told that it is unknown. Answers
    are not stored: a server that dies takes those with it that it has not delivered."""

    repeats: int | None = None
    """How many messages may be executed again; None leaves it to what the faults excuse."""

    longest_gap: float | None = None
    """Seconds between two effects at most: an order of magnitude."""

    longest_takeover: float | None = None
    """Seconds from a kill to the first new effect in a partition: an order of magnitude."""

    sees: dict[str, int] = field(default_factory=dict)
    """What must have been seen, at least so often: see `sights`."""

    most: dict[str, int] = field(default_factory=dict)
    """What may be seen, at most so often."""


Check: TypeAlias = Callable[[Story, Expect], Iterator[str]]


def nothing_accepted_is_lost(story: Story, _: Expect) -> Iterator[str]:
    """What a producer was told is stored has its effect, or its dead letter, in every service that takes it."""
    yield from story.strays
    for stream, count in story.left.items():
        yield f"{count} messages are still not handled in {stream}"
    for message in story.messages.values():
        if message.is_accepted:
            ends = {service for service, _ in [*message.effects, *message.letters]}
            for service in story.takers(message):
                if service not in ends:
                    yield f"{message.op} ({message.sent.key} {message.sent.value}) was accepted, and {service} lost it"


def not_run_did_not_run(story: Story, _: Expect) -> Iterator[str]:
    """What is called `not_run` was never stored, neither before nor after."""
    for message in story.messages.values():
        if any(one.outcome == "not_run" for one in message.settled) and (message.begun or message.effects):
            yield f"{message.op} ended as not_run ({message.settled[0].code}), and ran"


def every_message_settles(story: Story, expect: Expect) -> Iterator[str]:
    """Every message has exactly one outcome; where a scenario says so, it is a good one."""
    for message in story.messages.values():
        if len(message.settled) != 1:
            yield f"{message.op} has {len(message.settled)} outcomes"
        elif expect.only_ok and message.settled[0].outcome != "ok" and not message.is_doomed:
            end = message.settled[0]
            if expect.lost_answers and message.sent.waits and end.outcome == "unknown" and message.effects:
                continue
            yield f"{message.op} ended with {end.code} {end.outcome} after {end.t - message.sent.t:.2f} s"


def results_are_true(story: Story, _: Expect) -> Iterator[str]:
    """The result of a command is that of the one execution that had an effect, which was committed before."""
    for message in story.messages.values():
        if not message.sent.waits or not message.settled:
            continue
        end = message.settled[0]
        effects = [effect for _, effect in message.effects]
        if end.outcome == "ok" and not any(effect.execution == end.answer and effect.t <= end.t for effect in effects):
            ran = [(effect.execution, round(effect.t, 3)) for effect in effects]
            yield f"{message.op} was answered by {end.answer} at {end.t:.3f}, and its effects are {ran}"
        if end.code == "DEAD_LETTERED" and not message.letters:
            yield f"{message.op} was called a dead letter, and there is none"


def effects_are_never_doubled(story: Story, _: Expect) -> Iterator[str]:
    """A message has at most one effect in a service."""
    for message in story.messages.values():
        for service, count in Counter(service for service, _ in message.effects).items():
            if count > 1:
                who = [(effect.node, effect.epoch) for _, effect in message.effects]
                yield f"{message.op} has {count} effects in {service}, by {who}"


def keys_are_in_order(story: Story, _: Expect) -> Iterator[str]:
    """The effects of a key are committed in the order in which its producer sent them."""
    for service, effects in story.effects.items():
        last: dict[str, int] = {}
        for effect in effects:
            before = last.get(effect.key, 0)
            if effect.value < before:
                yield f"{service}: {effect.key} has {effect.value} ({effect.op}) after {before}, at {effect.place}"
            last[effect.key] = max(before, effect.value)


def nothing_passes_what_is_given_up(story: Story, _: Expect) -> Iterator[str]:
    """What comes behind a dead letter of its key runs only after its last attempt: a failing message holds its key."""
    effects: dict[tuple[str, str], list[Effect]] = defaultdict(list)
    for service, rows in story.effects.items():
        for effect in rows:
            effects[service, effect.key].append(effect)
    for message in story.messages.values():
        for service, _letter in message.letters:
            given_up = _given_up(message, service)
            for effect in effects[service, message.sent.key]:
                if effect.value > message.sent.value and effect.t < given_up:
                    yield f"{service}: {effect.op} had its effect before {message.op} of its key was given up"
                    break


def _given_up(message: Message, service: str) -> float:
    """Return when a message was given up first. Its dead letter is no mark in the inbox: it may be run once more."""
    last = [one.t for one in message.begun if one.service == service and one.attempt == MAX_ATTEMPTS]
    return min(last, default=0.0)


def keys_run_one_at_a_time(story: Story, _: Expect) -> Iterator[str]:
    """In one process no two executions of a key overlap."""
    for (service, key, pid), runs in _runs(story).items():
        for (first, end), (second, _) in pairwise(runs):
            if end > second.t and first.epoch == second.epoch:
                yield f"{service}: {second.op} of {key} began in process {pid} while {first.op} ran"


def _runs(story: Story) -> dict[tuple[str, str, int], list[tuple[Begun, float]]]:
    runs: dict[tuple[str, str, int], list[tuple[Begun, float]]] = defaultdict(list)
    for message in story.messages.values():
        ends: dict[tuple[str, int], list[float]] = defaultdict(list)
        for one in message.ended:
            ends[one.service, one.pid].append(one.t)
        for begun in message.begun:
            own = ends[begun.service, begun.pid]
            end = min((t for t in own if t >= begun.t), default=begun.t)
            runs[begun.service, begun.key, begun.pid].append((begun, end))
    for one in runs.values():
        one.sort(key=lambda run: run[0].t)
    return runs


def epochs_never_fall(story: Story, _: Expect) -> Iterator[str]:
    """In the order of commits the epochs of a partition never fall: no effect of a former owner comes late."""
    for service, effects in story.effects.items():
        highest: dict[tuple[str, int], int] = {}
        for effect in effects:
            place = (effect.domain, effect.partition)
            before = highest.get(place, 0)
            if effect.epoch < before:
                yield (
                    f"{service}: {effect.op} was committed by {effect.node} in partition {effect.domain}."
                    f"{effect.partition} with epoch {effect.epoch}, after one with {before}"
                )
            highest[place] = max(before, effect.epoch)


def an_epoch_has_one_owner(story: Story, _: Expect) -> Iterator[str]:
    """An epoch is granted to one life of one node, whatever happens; all its effects are that one's."""
    owners: dict[tuple[str, str, int, int], int] = {}
    named = [
        (one.service, one.domain, one.partition, one.epoch, one.pid) for one in story.owned if one.step == "written"
    ]
    named += [
        (service, one.domain, one.partition, one.epoch, one.pid)
        for service, effects in story.effects.items()
        for one in effects
    ]
    for *place, pid in named:
        key = (place[0], place[1], place[2], place[3])
        if owners.setdefault(key, pid) != pid:  # type: ignore[arg-type]
            yield f"epoch {place[3]} of {place[0]} {place[1]}.{place[2]} is both of {owners[key]} and of {pid}"  # type: ignore[index]


def a_consumer_has_one_epoch(story: Story, _: Expect) -> Iterator[str]:
    """No consumer serves two epochs: what a former owner acknowledges reaches nobody."""
    epochs: dict[str, int] = {}
    for one in story.owned:
        if one.step == "granted" and epochs.setdefault(one.domain + one.consumer, one.epoch) != one.epoch:
            before = epochs[one.domain + one.consumer]
            yield f"the consumer {one.consumer} is that of epoch {before} and of {one.epoch}"


def grants_are_the_last_word(story: Story, _: Expect) -> Iterator[str]:
    """No work begins with an epoch before a read, made after its write, has found it to be the last word."""
    written: dict[tuple[str, str, int], list[tuple[float, int]]] = defaultdict(list)
    for one in story.owned:
        place = (one.service, one.domain, one.partition)
        if one.step == "written":
            written[place].append((one.t, one.epoch))
        elif one.step == "granted":
            who = f"{one.node} began {one.domain}.{one.partition} with epoch {one.epoch} at {one.t:.3f}"
            for t, epoch in written[place]:
                if epoch > one.epoch and t < one.read_at:
                    yield f"{who}, and {epoch} was written at {t:.3f}"
                elif epoch == one.epoch and t > one.read_at:
                    yield f"{who}, and has not looked since it wrote that at {t:.3f}"


def dead_letters_are_exact(story: Story, _: Expect) -> Iterator[str]:
    """What fails every time has one dead letter, after all its attempts, and no effect; nothing else has one."""
    for message in story.messages.values():
        work = message.sent.work
        for service in story.takers(message):
            letters = [letter for taker, letter in message.letters if taker == service]
            if not message.is_doomed:
                if letters:
                    yield f"{message.op} is a dead letter of {service}: {letters[0].reason}: {letters[0].error}"
                continue
            if any(taker == service for taker, _ in message.effects):
                yield f"{message.op} always fails, and has an effect in {service}"
            if message.is_accepted and len(letters) != 1:
                yield f"{message.op} always fails, and has {len(letters)} dead letters in {service}"
            for letter in letters:
                yield from _letter_faults(message, service, letter.reason, letter.attempts, kills=work.kills)


def _letter_faults(message: Message, service: str, reason: str, attempts: int, *, kills: bool) -> Iterator[str]:
    expected = "killer" if kills else "attempts"
    if reason != expected:
        yield f"{message.op} is a dead letter of {service} because of {reason}, not of {expected}"
    runs = [one for one in message.begun if one.service == service]
    if kills:
        if len(runs) < 2:
            yield f"{message.op} is called a killer in {service} after {len(runs)} executions"
    elif attempts != MAX_ATTEMPTS or max((one.attempt for one in runs), default=0) != MAX_ATTEMPTS:
        yield f"{message.op} was given up in {service} after {attempts} attempts ({len(runs)} executions)"


def executions_are_excused(story: Story, expect: Expect) -> Iterator[str]:
    """A message runs again only after a failed attempt, or if a fault hit its first process before it was done.

    In a rolling deploy nothing runs twice.
    """
    repeated = 0
    for message in story.messages.values():
        for service in story.takers(message):
            runs = [one for one in message.begun if one.service == service]
            again = False
            for first, second in pairwise(runs):
                if first.pid == second.pid and second.attempt == first.attempt + 1:
                    continue
                again = True
                if not _is_excused(story, message, first, second):
                    yield (
                        f"{message.op} ran on {first.node} at {first.t:.3f} (attempt {first.attempt}) and again on "
                        f"{second.node} at {second.t:.3f} (attempt {second.attempt}), and nothing had happened"
                    )
            repeated += again
    if expect.repeats is not None and repeated > expect.repeats:
        yield f"{repeated} messages were executed again, {expect.repeats} may"


def _is_excused(story: Story, message: Message, first: Begun, second: Begun) -> bool:
    if first.pid == second.pid and any(
        one.how in ("fenced", "failed") and one.pid == first.pid and first.t <= one.t <= second.t
        for one in message.kept
    ):
        return True
    for window in story.windows:
        if window.kind in HARMLESS or window.begin > second.t or window.end < first.t - SETTLING:
            continue
        if window.pid is None or window.target == EVERYBODY or window.pid in (first.pid, second.pid):
            return True
    return False


def done_is_done(story: Story, _: Expect) -> Iterator[str]:
    """What is known to be done is not run again: the inbox is asked before.

    A process that stands still between the question and the start does not know of it; its effects are refused.
    """
    frozen = [window for window in story.windows if window.kind == "freeze"]
    for message in story.messages.values():
        for service in story.takers(message):
            done = min(
                (one.t for one in message.kept if one.service == service and one.how in ("committed", "repeated")),
                default=None,
            )
            if done is None:
                continue
            for one in message.begun:
                if one.service == service and one.t > done + SETTLING:
                    if any(
                        window.pid == one.pid and window.begin <= one.t <= window.end + SETTLING for window in frozen
                    ):
                        continue
                    yield f"{message.op} was run by {one.node} {one.t - done:.3f} s after it was done in {service}"


def effects_go_on(story: Story, expect: Expect) -> Iterator[str]:
    """The longest time without an effect is bounded while messages are sent, and there are effects after the faults."""
    times = sorted(effect.t for effects in story.effects.values() for effect in effects)
    sent = [message.sent.t for message in story.messages.values()]
    if expect.longest_gap is not None and sent:
        inside = [t for t in times if min(sent) <= t <= max(sent)]
        for before, after in pairwise([min(sent), *inside, max(sent)]):
            if after - before > expect.longest_gap:
                yield f"no effect for {after - before:.3f} s, from {before:.3f}"
    over = max((window.end for window in story.windows), default=0.0)
    if not any(t > over for t in times):
        yield f"no effect after the last fault, which was over at {over:.3f}"
    if expect.longest_takeover is not None:
        for kind, seconds, place in takeovers(story):
            if kind == "kill" and seconds > expect.longest_takeover:
                yield f"{place} had no new effect for {seconds:.3f} s after the kill of its owner"


def takeovers(story: Story) -> Iterator[tuple[str, float, str]]:
    """Yield for each partition that a dead or frozen owner had: the fault, the seconds to another's effect, and which.

    A partition in which nothing was sent meanwhile has none.
    """
    by_place: dict[tuple[str, str, int], list[tuple[float, int]]] = defaultdict(list)
    for service, effects in story.effects.items():
        for effect in effects:
            by_place[service, effect.domain, effect.partition].append((effect.t, effect.pid))
    for window in story.windows:
        if window.kind not in LOSING:
            continue
        at = began_at(window, story)
        for place in sorted(lost_partitions(window, story)):
            after = [t for t, pid in by_place[place] if t > at and pid != window.pid]
            if after:
                yield window.kind, min(after) - at, f"{place[0]} {place[1]}.{place[2]}"


def hand_overs(story: Story) -> Iterator[float]:
    """Yield for each hand-over the seconds from the old owner's last pull to the new one's grant."""
    draining: dict[tuple[str, str, int], float] = {}
    released: set[tuple[str, str, int]] = set()
    for one in story.owned:
        place = (one.service, one.domain, one.partition)
        if one.step == "draining":
            draining[place] = one.t
        elif one.step == "released":
            released.add(place)
        elif one.step == "granted":
            began = draining.pop(place, None)
            if began is not None and place in released:
                yield one.t - began
            released.discard(place)


def sights(story: Story) -> Counter[str]:
    """Return what was to be seen of the machinery: a run in which nothing happened proves nothing.

    takeover    a claim on what its owner had not released
    hand_over   a release, and a claim after it
    fenced      an effect that the store refused, because its epoch was stale
    repeated    an execution whose effects were forgotten, because another one had been faster
    known       a message that came again and was not run, because it was done
    redelivery  a message that a second process got: it ran again, or was known
    executed    a message that ran again in another process
    killer      a frame that was found to have killed its process
    reclaim     a new epoch of a partition that was owned already
    kill@POINT, freeze@POINT    a process that it hit there
    letter      a dead letter
    run again   a message that was given up, and ran once more because its process was lost before it was acknowledged
    lost answer a result that is not known to who waited for it, although there is an effect
    unknown     an outcome that nobody knows
    """
    seen: Counter[str] = Counter()
    for one in story.owned:
        seen["takeover"] += one.step == "granted" and one.takes_over
    seen["hand_over"] += sum(1 for _ in hand_overs(story))
    for message in story.messages.values():
        seen.update(one.how for one in message.kept)
        pids = {(one.service, one.pid) for one in [*message.begun, *message.kept]}
        again = len(pids) > len({service for service, _ in pids})
        seen["redelivery"] += again
        seen["executed"] += again and len({(one.service, one.pid) for one in message.begun}) > len(
            {one.service for one in message.begun}
        )
        seen["letter"] += len(message.letters)
        for service, _ in message.letters:
            last = {one.pid for one in message.begun if one.service == service and one.attempt == MAX_ATTEMPTS}
            seen["run again"] += len(last) > 1
        is_unknown = any(one.outcome == "unknown" for one in message.settled)
        seen["lost answer"] += is_unknown and message.sent.waits and bool(message.effects)
        seen["unknown"] += is_unknown
    for counts in story.counts.values():
        seen["reclaim"] += counts["reclaims"]
        seen["killer"] += counts["killers"]
    seen.update(f"{hit.action}@{hit.point}" for hit in story.hits)
    return seen


def faults_happened(story: Story, expect: Expect) -> Iterator[str]:
    """A run in which nothing happened proves nothing: each fault took place and bit, and had what follows from it."""
    happened = Counter(window.kind for window in story.windows)
    for kind, times in Counter(expect.faults).items():
        if happened[kind] < times:
            yield f"there was {happened[kind] or 'no'} {kind}, and {times} were meant"
    for window in story.windows:
        if doubt := _against(window, story):
            yield f"{window.kind} of {window.target} ({window.name}): {doubt}"
    seen = sights(story)
    for what, least in expect.sees.items():
        if seen[what] < least:
            yield f"{what} was seen {seen[what]} times, and at least {least} should have been"
    for what, most in expect.most.items():
        if seen[what] > most:
            yield f"{what} was seen {seen[what]} times, and at most {most} may be"


_SIGNS = {"kill_leader": {"killed"}, "delete_consumers": {"deleted"}, "delete_owners": {"deleted"}, "die": {"killed"}}


def _against(window: Window, story: Story) -> str | None:
    """Return what in the history contradicts a fault, or None if nothing does."""
    if window.kind in _SIGNS:
        return None if any(window.saw[sign] for sign in _SIGNS[window.kind]) else "the rig saw nothing of it"
    if doubt := evidence.unseen(window):
        return doubt
    lines: Sequence[float] = story.seen.get(window.pid or 0, [])
    if window.kind in ("kill", "roll"):
        after, before = window.end, float("inf")
    elif window.kind == "freeze":
        after, before = began_at(window, story) + SETTLING, window.end - SETTLING
    elif window.kind in ("restart_server", "freeze_server"):
        lines = [one.t for message in story.messages.values() for one in message.settled if one.outcome == "ok"]
        after, before = window.begin + SETTLING, window.end - SETTLING
    else:
        return None
    if window.pid is not None and (not lines or lines[0] > window.begin):
        return "the process had never run anything"
    went_on = [t for t in lines if after < t < before]
    return f"something went on at {went_on[0]:.3f}" if went_on else None


CHECKS: tuple[Check, ...] = (
    nothing_accepted_is_lost,
    not_run_did_not_run,
    every_message_settles,
    results_are_true,
    effects_are_never_doubled,
    keys_are_in_order,
    nothing_passes_what_is_given_up,
    keys_run_one_at_a_time,
    epochs_never_fall,
    an_epoch_has_one_owner,
    a_consumer_has_one_epoch,
    grants_are_the_last_word,
    dead_letters_are_exact,
    executions_are_excused,
    done_is_done,
    effects_go_on,
    faults_happened,
)


def check(story: Story, expect: Expect) -> dict[str, list[str]]:
    """Return the violations by the name of their check; empty if all is well."""
    found = {one.__name__: list(one(story, expect)) for one in CHECKS}
    return {name: texts for name, texts in found.items() if texts}
