"""Health: whether a node lives and takes work, as values. A pure function of facts and limits decides.

Two questions that must not be mixed. *Live*: would a restart help? Only of a process that is over, or whose event loop
has stood still for so long that it will not go on. A lost connection, a full intake or short memory are none of that:
a restart of all nodes because a server is away makes a small trouble a big one. *Ready*: may work be sent here? A
roll-out waits for it, and a balancer looks elsewhere while it is not so.
"""

from enum import StrEnum
from typing import TypeAlias

import msgspec

from catga_bus.vitals import VitalSigns


class BusState(StrEnum):
    """Where a bus stands in its life."""

    NEW = "new"
    STARTING = "starting"
    STARTED = "started"
    DRAINING = "draining"
    CLOSED = "closed"


class CheckStatus(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    """Worth a look; work is taken."""

    FAIL = "fail"
    """No work should be sent here."""


CheckValue: TypeAlias = bool | int | float | str | None


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    name: str
    status: CheckStatus
    value: CheckValue
    """Seconds, bytes, a number of messages or a share of 1.0, as `text` says; None where the system does not tell."""

    limit: CheckValue
    """Where it fails, or warns if it never fails; None where there is none."""

    text: str
    """For people."""


class Health(msgspec.Struct, frozen=True):
    """Whether a bus lives and takes work, and what that rests on."""

    live: bool
    """Whether a restart would not help: the bus is not closed, and its event loop has not stood still for 30 s."""

    ready: bool
    """Whether work may be sent here: no check failed."""

    checks: tuple[Check, ...]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What health is judged from: a snapshot."""

    state: BusState
    is_connected: bool = False
    is_subscribed: bool = False
    """Whether the server has confirmed the subscriptions, since the last reconnect as well."""

    is_replaced: bool = False
    """Whether another process has taken the id of this node."""

    stall: float = 0.0
    """Seconds for which the event loop is overdue; 0.0 as long as it is not measured."""

    in_flight: int = 0
    intake: int = 0
    intake_bytes: int = 0
    signs: VitalSigns | None = None
    """None as long as they are not read."""


class HealthLimits(msgspec.Struct, frozen=True, kw_only=True):
    """From where on something counts. Each says whether it fails or only warns, and why."""

    stall: float = 0.5
    """Seconds; fails. `stall_timeout` of the bus, so that a balancer and the other nodes say the same."""

    dead_stall: float = 30.0
    """Seconds; not live. Chosen: a handler that blocks the loop for seconds is a fault that passes, and a restart would
    lose what waits behind it; after half a minute every caller with the default timeout has given up six times over."""

    memory_warn: float = 0.85
    """Share of the memory limit; warns."""

    memory_fail: float = 0.95
    """Share of the limit of the control group; fails: one burst from there the kernel kills the process, and what runs
    with it. The memory of a machine without such a limit only warns: it is mostly that of others, whom it does not help
    when this node gets no work."""

    memory_stall: float = 0.1
    """Share of the last 10 s in which something waited for memory; warns. What matters of it shows as a stall."""

    gc: float = 0.2
    """Share of the last 10 s that went into garbage collection; warns: the node is slower, but it works."""

    full: float = 0.8
    """Share of the intake; warns, and a full intake only warns as well. A full node answers `busy` within milliseconds
    and callers go elsewhere; taken out, it would hand its share to the others, which are then full, too."""

    intake: int = 4_096
    """Messages; the option of the bus."""

    intake_bytes: int = 33_554_432
    """The option of the bus."""


def assess(facts: Facts, limits: HealthLimits) -> Health:
    """Return the health that facts amount to."""
    checks = (
        _state(facts),
        _must("connection", "connected", "there is no connection to a server", holds=facts.is_connected),
        _must("subscriptions", "confirmed", "not confirmed by the server, or taken back", holds=facts.is_subscribed),
        _must("node id", "its own", "taken by another process: restart this one", holds=not facts.is_replaced),
        _stall(facts.stall, limits),
        *_signs(facts.signs, limits),
        Check("in flight", CheckStatus.OK, facts.in_flight, None, f"{facts.in_flight:,} messages in handlers"),
        _filled("intake", facts.intake, limits.intake, "messages", limits.full),
        _filled("intake bytes", facts.intake_bytes, limits.intake_bytes, "bytes", limits.full),
    )
    return Health(
        live=facts.state is not BusState.CLOSED and facts.stall <= limits.dead_stall,
        ready=all(check.status is not CheckStatus.FAIL for check in checks),
        checks=checks,
    )


def _state(facts: Facts) -> Check:
    state = facts.state
    status = CheckStatus.OK if state is BusState.STARTED else CheckStatus.FAIL
    return Check("state", status, state.value, BusState.STARTED.value, f"the bus is {state}")


def _must(name: str, good: str, bad: str, *, holds: bool) -> Check:
    return Check(name, CheckStatus.OK if holds else CheckStatus.FAIL, holds, None, good if holds else bad)


def _stall(stall: float, limits: HealthLimits) -> Check:
    if stall > limits.stall:
        text = f"the event loop has been blocked for {stall:.1f} s; after {limits.dead_stall:g} s it counts as dead"
        return Check("stall", CheckStatus.FAIL, stall, limits.stall, text)
    return Check("stall", CheckStatus.OK, stall, limits.stall, "the event loop keeps up")


def _signs(signs: VitalSigns | None, limits: HealthLimits) -> tuple[Check, Check, Check]:
    stalled = signs.memory_stall if signs is not None else None
    collecting = signs.gc if signs is not None else None
    return (
        _memory(signs, limits),
        _share("memory stall", stalled, limits.memory_stall, "of the last 10 s something waited for memory"),
        _share("gc", collecting, limits.gc, "of the last 10 s went into garbage collection"),
    )


def _memory(signs: VitalSigns | None, limits: HealthLimits) -> Check:
    use = signs.memory if signs is not None else None
    if use is None:
        return _untold("memory", limits.memory_fail)
    whose = "the control group's limit" if use.is_group else "the machine's memory"
    text = f"{use.share:.0%} of {whose} of {use.limit_bytes / 1_048_576:,.0f} MiB is used"
    if use.is_group and use.share >= limits.memory_fail:
        return Check("memory", CheckStatus.FAIL, use.share, limits.memory_fail, text)
    status = CheckStatus.WARN if use.share >= limits.memory_warn else CheckStatus.OK
    return Check("memory", status, use.share, limits.memory_fail if use.is_group else limits.memory_warn, text)


def _share(name: str, share: float | None, limit: float, what: str) -> Check:
    if share is None:
        return _untold(name, limit)
    return Check(name, CheckStatus.WARN if share >= limit else CheckStatus.OK, share, limit, f"{share:.1%} {what}")


def _filled(name: str, value: int, limit: int, unit: str, full: float) -> Check:
    status = CheckStatus.WARN if value >= full * limit else CheckStatus.OK
    return Check(name, status, value, limit, f"{value:,} of {limit:,} {unit} taken in and not settled")


def _untold(name: str, limit: float) -> Check:
    return Check(name, CheckStatus.OK, None, limit, "not told by the system, or not read yet")
