"""What a bus needs to be permitted, and whether a server's list of permissions permits it. Pure."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from catga_bus.cli.findings import Finding, Level
from catga_bus.wire import QUEUE_RPC, Names, service_subjects, token

USER_INFO = "$SYS.REQ.USER.INFO"
"""Where a server says who the asking user is and what it may do."""

STREAM_NAMES = "$JS.API.STREAM.NAMES"


class Rules(msgspec.Struct, frozen=True):
    """One half of a user's permissions: patterns of subjects, in subscriptions perhaps followed by a queue group."""

    allow: tuple[str, ...] | None = None
    """None or empty: everything that is not denied."""

    deny: tuple[str, ...] | None = None

    def permit(self, subject: str, queue: str = "") -> bool:
        """Whether a subject, which may hold wildcards, may be used by itself or in a queue group."""
        if self.deny and any(_covers(rule, subject, queue) for rule in self.deny):
            return False
        return not self.allow or any(_covers(rule, subject, queue) for rule in self.allow)


class Permissions(msgspec.Struct, frozen=True):
    """What a user may do; a half that is missing permits everything."""

    publish: Rules = Rules()
    subscribe: Rules = Rules()
    responses: "Responses | None" = None
    """Whether it may answer where it was asked to; None for no."""


class Responses(msgspec.Struct, frozen=True):
    """How a user may answer questions, beside what it may publish anyway."""

    max: int = 0
    """Answers to each; below 1 for any number."""


def _covers(rule: str, subject: str, queue: str) -> bool:
    pattern, _, group = rule.partition(" ")
    if group and not (queue and is_within(queue, group.strip())):
        return False  # the rule speaks of a queue group alone
    return is_within(subject, pattern)


def is_within(subject: str, pattern: str) -> bool:
    """Whether a pattern matches everything that a subject, itself perhaps a pattern, matches.

    Example:
        >>> is_within("catga.to.shop.>", "catga.to.*.>"), is_within("catga.>", "catga.*")
        (True, False)
    """
    parts, wanted = subject.split("."), pattern.split(".")
    for place, token_wanted in enumerate(wanted):
        if token_wanted == ">":
            return len(parts) > place
        if place >= len(parts) or parts[place] == ">":
            return False
        if token_wanted != "*" and token_wanted != parts[place]:
            return False
    return len(parts) == len(wanted)


class Need(msgspec.Struct, frozen=True):
    """One thing that a bus has to be permitted."""

    verb: Literal["publish", "subscribe"]
    subject: str
    purpose: str
    """What the bus does with it."""

    queue: str = ""
    level: Level = Level.FAILED
    """How bad it is without."""

    rule: str = ""
    """What to allow, where that is more than the subject."""

    is_response: bool = False
    """Whether the permission to answer where one was asked is enough."""


class Use(msgspec.Struct, frozen=True):
    """What a bus is and does: enough to know its subjects."""

    service: str
    node_id: str
    inbox_prefix: str = "_INBOX"
    handles: tuple[str, ...] = ()
    """Request types that it handles."""

    hears: tuple[str, ...] = ()
    """Event types that it handles."""

    stores: tuple[str, ...] = ()
    """Command types and types of durable events that it handles."""

    asks: tuple[str, ...] = ()
    """Request types that it sends."""

    publishes: tuple[str, ...] = ()
    """Event types that it publishes without storing them."""

    broadcasts: tuple[str, ...] = ()
    """Event types that it broadcasts."""

    disconnect_events: str | None = None
    """Where it hears of ended connections, if it does."""


def needs_of(use: Use, names: Names) -> list[Need]:
    """Return everything that a bus has to be permitted, in the order in which it would miss it."""
    return [*_every_bus(use, names), *_calls(use, names), *_handlers(use, names)]


def _every_bus(use: Use, names: Names) -> list[Need]:
    service, node = use.service, use.node_id
    ping = names.node_ping(service, node)
    needs = [
        Need("subscribe", f"{use.inbox_prefix}.>", "gets answers"),
        Need("subscribe", ping, "is asked whether it lives", rule=pings_of(service, node, names)),
        _answers("says that it lives when it is asked", is_response=True),
        Need("subscribe", names.heartbeats(), "sees other nodes"),
        Need("publish", names.heartbeat(node), "is seen by other nodes", rule=names.heartbeats()),
        _directed(use, ping, "asks whether a node lives"),
    ]
    if use.disconnect_events is not None:
        purpose = "learns at once that a node may be gone"
        needs.append(Need("subscribe", use.disconnect_events, purpose, level=Level.WARNING))
    return needs


def _answers(purpose: str, *, is_response: bool) -> Need:
    """Return the need to write to inboxes, tried on one that nobody has.

    It looks as those of users of their own do, `_INBOX.<user>.<random>.<number>.<number>`: who may write to no others
    answers no requests, but pings.
    """
    subject = "_INBOX.catga-doctor.0.0.0" if is_response else "_INBOX.catga-doctor"
    return Need("publish", subject, purpose, rule="_INBOX.>", is_response=is_response)


def pings_of(service: str, node_id: str, names: Names) -> str:
    """Return where nodes of a service are asked whether they live; more of what is sent to them no caller needs."""
    return names.node_ping(service, node_id).replace(f".{token(node_id)}.ping", ".*.ping")


def _of_all_nodes(use: Use, names: Names) -> str:
    return names.node(use.service, use.node_id).replace(f".{token(use.node_id)}.", ".")


def _directed(use: Use, subject: str, purpose: str) -> Need:
    """Return the need to send to any node; tried on the bus itself, which needs no other to be there."""
    rule = subject.replace(f".{token(use.service)}.{token(use.node_id)}.", ".*.*.")
    return Need("publish", subject, purpose, rule=rule)


def _calls(use: Use, names: Names) -> list[Need]:
    service, node = use.service, use.node_id
    needs = []
    if use.asks:
        cancel = names.node_cancel(service, node)
        needs.append(_directed(use, cancel, "cancels what it has asked of somebody else"))
        needs.append(_directed(use, names.node_status(service, node), "asks what became of a request"))
    for name in use.asks:
        needs.append(Need("publish", names.request(name), f"asks {name}"))
        purpose = f"asks {name} of one node, as every second attempt does"
        needs.append(_directed(use, names.node_request(service, node, name), purpose))
    needs += [Need("publish", names.tick(name), f"publishes {name}") for name in use.publishes]
    needs += [Need("publish", names.broadcast(name), f"broadcasts {name}") for name in use.broadcasts]
    return needs


def _handlers(use: Use, names: Names) -> list[Need]:
    needs = [Need("subscribe", names.request(name), f"handles {name}", QUEUE_RPC) for name in use.handles]
    for name in use.hears:
        needs.append(Need("subscribe", names.tick(name), f"handles {name}", token(use.service)))
        needs.append(Need("subscribe", names.broadcast(name), f"handles {name} broadcast"))
    if use.handles:
        service, node, own = use.service, use.node_id, _of_all_nodes(use, names)
        needs += [
            _answers("answers requests", is_response=False),
            Need("subscribe", names.node_requests(service, node), "is asked by itself", rule=own),
            Need("subscribe", names.node_status(service, node), "is asked what became of a request", rule=own),
            Need("subscribe", names.node_cancel(service, node), "is told what it need not start", rule=own),
        ]
        needs.append(Need("publish", STREAM_NAMES, "looks for streams that capture requests", level=Level.WARNING))
    if needs:
        needs += [
            Need("subscribe", subject, "is seen by `nats micro`", level=Level.WARNING)
            for verb in ("PING", "INFO", "STATS")
            for subject in service_subjects(verb, use.service, use.node_id)
        ]
    return needs


def check_needs(
    needs: Sequence[Need], permissions: Permissions | None, tried: Iterable[tuple[Need, bool]]
) -> list[Finding]:
    """Say what of that which is needed is refused.

    Args:
        needs: What is needed.
        permissions: What the server says is permitted; None if it does not say.
        tried: Where it does not say: what was tried, and whether it was permitted.
    """
    verdicts = dict(tried)
    if permissions is None:
        needs = [need for need in needs if not need.is_response]  # nobody asks, so it cannot be tried
    if permissions is not None:
        for need in needs:
            rules = permissions.publish if need.verb == "publish" else permissions.subscribe
            may_respond = need.is_response and permissions.responses is not None
            verdicts[need] = may_respond or rules.permit(need.subject, need.queue)
    refused = [_refused(need) for need in needs if verdicts.get(need) is False]
    granted = sum(verdicts.get(need) is True for need in needs)
    findings = [Finding("permissions", Level.OK, f"{granted} of {len(needs)} subjects in use are permitted")]
    if refused:
        findings = refused
    if unknown := [need for need in needs if need not in verdicts]:
        findings.append(_untried(unknown))
    return findings


def _refused(need: Need) -> Finding:
    where = f"{need.subject!r}" + (f" in the queue group {need.queue!r}" if need.queue else "")
    pattern = f"{need.subject} {need.queue}" if need.queue else need.rule or need.subject
    return Finding(
        "permissions",
        need.level,
        f"this user may not {need.verb}{' to' if need.verb == 'subscribe' else ' on'} {where}",
        f"with it a bus {need.purpose}",
        f"allow {need.verb} {pattern!r} to the user, as deploy/nats/users does",
    )


def _untried(needs: Sequence[Need]) -> Finding:
    shown = ", ".join(sorted({f"{need.subject} {need.queue}".strip() for need in needs})[:5])
    return Finding(
        "permissions",
        Level.UNKNOWN,
        f"{len(needs)} subjects were not tried, among them {shown}",
        "who joins a queue group to try it takes messages away from its members",
        f"allow publish {USER_INFO!r} to the user: then the server says what is permitted",
    )
