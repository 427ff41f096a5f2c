"""Decides from facts about servers and streams what is wrong with them. Pure; `examination` gathers the facts."""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from catga_bus.cli.findings import Finding, Level

_FLOORS: Final = {(2, 12): (2, 12, 12), (2, 14): (2, 14, 3)}
_FLOOR: Final = (2, 12, 12)
# Below these the server has published holes (advisories.nats.io, 2026-16, -18 and -26).

_LONGEST_EVICTION: Final = 30.0
# Seconds. Callers avoid a frozen node by themselves; but foreign clients do not, and each of their requests that the
# queue group gives to it is lost. deploy/nats has 15.

_SHORTEST_EVICTION: Final = 2.0
# Seconds that an event loop may be blocked: a long garbage collection or a large answer takes a few tenths.

_BATCH_BYTES: Final = 262_144  # of the bus's default; it takes at most half of what the server does
_CROWDED: Final = 0.8
_MAX_SHOWN: Final = 5  # names in one line

_PING_FIX: Final = 'ping_interval: "5s" and ping_max: 2, as in deploy/nats/common.conf'


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was learnt of the server that the examination is connected to."""

    url: str
    """Without credentials."""

    max_payload: int
    """Bytes."""

    round_trip: float
    """Seconds."""

    is_loopback: bool
    is_tls: bool


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What one server says of itself, in its monitoring."""

    name: str
    version: str
    ping_interval: float
    """Seconds."""

    ping_max: int
    auth_required: bool
    connections: int
    max_connections: int
    slow_consumers: int
    """Since its start."""

    sync_interval: float | None = None
    """Seconds after which it brings what it stores to the disk; None if it stores nothing."""

    sync_always: bool = False
    """Whether it does so before it acknowledges."""


def check_server(facts: ServerFacts) -> list[Finding]:
    """Judge the connection: that there is one, what it takes, and whether others can read it."""
    findings = [Finding("server", Level.OK, f"{facts.url} answers in {facts.round_trip * 1000:.1f} ms")]
    text = f"messages of up to {facts.max_payload:,} bytes are taken"
    if facts.max_payload < 2 * _BATCH_BYTES:
        why = f"batches are bounded by half of that, instead of {_BATCH_BYTES:,}: fewer messages share one"
        findings.append(Finding("max_payload", Level.WARNING, text, why, "max_payload: 1MB"))
    else:
        findings.append(Finding("max_payload", Level.OK, text))
    if not facts.is_loopback and not facts.is_tls:
        why = "passwords and messages cross the network readable"
        fix = "a tls block for the server and tls:// for the buses; see deploy/nats/README.md"
        findings.append(Finding("tls", Level.WARNING, "the connection is not encrypted", why, fix))
    return findings


def check_settings(servers: Sequence[ServerSettings], missing: str = "") -> list[Finding]:
    """Judge what servers say of themselves.

    Args:
        servers: One entry for each that was heard; the same server may be there twice.
        missing: What to do to hear of them; said if there are none.
    """
    if not servers:
        what = "ping settings, versions and connections of the servers are not known"
        return [Finding("settings", Level.UNKNOWN, what, "this user may not ask for them", missing)]
    by_name = {server.name: server for server in sorted(servers, key=lambda server: server.name)}
    findings = [finding for server in by_name.values() for finding in _check_one(server)]
    for what, values in (
        ("versions", {server.version for server in by_name.values()}),
        ("ping settings", {f"{one.ping_interval:g} s x {one.ping_max}" for one in by_name.values()}),
    ):
        if len(values) > 1:
            text = f"servers differ in their {what}: {', '.join(sorted(values))}"
            why = "what happens to a client depends on where it is connected"
            findings.append(Finding("settings", Level.WARNING, text, why, "give all servers the same"))
    return findings


def _check_one(server: ServerSettings) -> list[Finding]:
    return [_check_version(server), _check_pings(server), *_check_clients(server)]


def _check_version(server: ServerSettings) -> Finding:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", server.version)
    text = f"server {server.name} is nats-server {server.version}"
    if numbers is None:
        return Finding("version", Level.UNKNOWN, text, "its version is no number", "look whether it is a release")
    major, minor, patch = map(int, numbers.groups())
    floor = _FLOORS.get((major, minor), _FLOOR)
    if (major, minor, patch) >= floor:
        return Finding("version", Level.OK, text)
    fix = f"{'.'.join(map(str, floor))} or newer"
    return Finding("version", Level.WARNING, text, "it has published holes (advisories.nats.io)", fix)


def _check_pings(server: ServerSettings) -> Finding:
    least = server.ping_interval * server.ping_max
    most = server.ping_interval * (server.ping_max + 1)
    text = f"server {server.name} cuts a frozen client off after {least:g} to {most:g} s"
    if most > _LONGEST_EVICTION:
        why = (
            "until then the queue groups go on giving requests to a frozen node, and those of foreign clients are lost"
        )
        return Finding("pings", Level.WARNING, text, why, _PING_FIX)
    if least < _SHORTEST_EVICTION:
        why = f"a node whose event loop is blocked for {least:g} s loses its connection, and what it was answering"
        return Finding("pings", Level.WARNING, text, why, _PING_FIX)
    return Finding("pings", Level.OK, text)


def _check_clients(server: ServerSettings) -> list[Finding]:
    findings = []
    text = f"server {server.name} has {server.connections:,} of {server.max_connections:,} connections"
    if server.max_connections and server.connections > _CROWDED * server.max_connections:
        why = "a node that comes back after a failure of another server may find no room"
        findings.append(Finding("connections", Level.WARNING, text, why, "raise max_connections, or add a server"))
    else:
        findings.append(Finding("connections", Level.OK, text))
    if server.slow_consumers:
        text = f"server {server.name} has cut off {server.slow_consumers:,} clients that read too slowly"
        why = "what was on its way to them is lost"
        fix = "look in its log for `Slow Consumer`: a blocked event loop, or a subscriber that is too slow"
        findings.append(Finding("slow consumers", Level.WARNING, text, why, fix))
    if not server.auth_required:
        text = f"server {server.name} asks nobody for credentials"
        why = "whoever reaches it may do everything, reading all messages included"
        fix = "accounts and users, as in deploy/nats; with `catga up` on one machine this is meant so"
        findings.append(Finding("credentials", Level.WARNING, text, why, fix))
    return findings


def check_capture(streams: Sequence[str] | None, subjects: Sequence[str], *, is_permitted: bool = True) -> Finding:
    """Judge which streams store requests.

    Args:
        streams: Their names; None if the server did not say.
        subjects: The subjects of requests.
        is_permitted: Whether this user may ask.
    """
    shown = " or ".join(subjects)
    if streams is None:
        what = f"whether a stream captures {shown} is not known"
        if is_permitted:
            why = "JetStream does not answer: a cluster that has just started, or has lost its majority, has no leader"
            return Finding("streams", Level.UNKNOWN, what, why, "try again in ten seconds, then look at /healthz")
        fix = "allow publish '$JS.API.STREAM.NAMES' to the user"
        return Finding("streams", Level.UNKNOWN, what, "this user may not ask", fix)
    if not streams:
        return Finding("streams", Level.OK, f"no stream captures {shown}")
    return Finding(
        "streams",
        Level.FAILED,
        f"{_listed(streams)} captures requests ({shown})",
        "the stream's acknowledgement reaches a foreign client first, as if it were the answer",
        f"take {shown} out of the subjects of that stream",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(set(names))[:_MAX_SHOWN])
    return f"stream {shown}" if len(names) <= _MAX_SHOWN else f"{len(names)} streams ({shown}, ...)"
