"""Decides from facts about JetStream what is wrong with it, and what "accepted" means there. Pure."""

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from catga_bus.cli.checks import ServerSettings
from catga_bus.cli.findings import Finding, Level
from catga_bus.cli.streams_view import age_text, kind_of, row_of, troubles_of
from catga_bus.transport.jetstream import StreamInfo
from catga_bus.wire import Names

_DELAYS: Final = 2  # API level of nats-server 2.12
_DISK_ERRORS: Final = 4  # of 2.14
_VERSIONS: Final = {0: "2.10", 1: "2.11", 2: "2.12", 3: "2.13", 4: "2.14", 5: "2.15"}
_MAJORITY: Final = 3  # replicas of which one may be lost

_MAX_SHOWN: Final = 5


class StoreFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was learnt of JetStream."""

    state: Literal["on", "off", "refused", "silent"]
    """`refused`: this user may not ask; `silent`: there is no answer."""

    text: str = ""
    """The server's words, if it is off."""

    level: int = 0
    """Of its API."""

    streams: tuple[StreamInfo, ...] = ()
    """Those of the namespace."""

    may_list: bool = True
    """Whether this user may ask for streams."""

    unheard: bool = False
    """Whether some of them could not be read."""


def check_store(
    facts: StoreFacts,
    settings: Sequence[ServerSettings],
    names: Names,
    *,
    needs: bool,
    missing: str,
) -> list[Finding]:
    """Judge JetStream: whether it is there, what it can do, and what it keeps.

    Args:
        facts: What was learnt.
        settings: What the servers say of themselves, if they were heard.
        names: The namespace.
        needs: Whether the examined bus handles commands or durable events.
        missing: What to do to hear of the settings.
    """
    if facts.state != "on":
        return [_not_on(facts, needs=needs)]
    findings = [Finding("jetstream", Level.OK, "JetStream is on"), _check_level(facts.level)]
    if not facts.may_list:
        what = "which streams there are is not known"
        fix = "allow publish '$JS.API.STREAM.NAMES' and '$JS.API.STREAM.INFO.*' to the user"
        return [*findings, Finding("stored", Level.UNKNOWN, what, "this user may not ask", fix)]
    if facts.unheard:
        why = "a cluster that has just started, or has lost its majority, has no leader"
        fix = "try again in ten seconds, then look at /healthz"
        findings.append(Finding("stored", Level.UNKNOWN, "some streams could not be looked at", why, fix))
    if not facts.streams:
        what = f"nothing is stored in namespace {names.namespace}"
        return [*findings, Finding("stored", Level.OK, what), *_check_sync(settings, missing)]
    findings += _check_streams(facts.streams, names)
    findings += _check_sync(settings, missing)
    findings.append(_check_grade(facts.streams, settings))
    findings += _check_letters(facts.streams, names)
    return findings


def _not_on(facts: StoreFacts, *, needs: bool) -> Finding:
    if facts.state == "refused":
        what = "whether JetStream is on is not known"
        return Finding(
            "jetstream", Level.UNKNOWN, what, "this user may not ask", "allow publish '$JS.API.INFO' to the user"
        )
    if facts.state == "silent":
        why = "a cluster that has just started, or has lost its majority, has no leader"
        fix = "try again in ten seconds, then look at /healthz"
        return Finding("jetstream", Level.FAILED if needs else Level.UNKNOWN, "JetStream does not answer", why, fix)
    what = f"JetStream is off ({facts.text})" if facts.text else "JetStream is off"
    fix = "`jetstream {}` in the configuration of the server, and for the account; see deploy/nats"
    if needs:
        return Finding("jetstream", Level.FAILED, what, "this bus handles commands or durable events", fix)
    return Finding("jetstream", Level.OK, f"{what}: requests work, commands and durable events do not")


def _check_level(level: int) -> Finding:
    version = _VERSIONS.get(level, "2.15") if level <= max(_VERSIONS) else "newer than 2.15"
    text = f"the API has level {level}, that of nats-server {version}"
    lacks = []
    if level < _DELAYS:
        lacks.append("2.12 adds delayed commands (delay=, at=)")
    if level < _DISK_ERRORS:
        lacks.append("2.14 stops a stream whose disk fails, and says so in /healthz")
    if not lacks:
        return Finding("features", Level.OK, f"{text}: all that the bus can use is there")
    return Finding("features", Level.OK, f"{text}, which is enough; {'; '.join(lacks)}")


def _check_streams(streams: Sequence[StreamInfo], names: Names) -> list[Finding]:
    findings = []
    for info in streams:
        for trouble in troubles_of(info):
            level = Level.FAILED if trouble == "no leader" else Level.WARNING
            why = "nothing can be stored there until the server is back or another one takes its place"
            fix = f"`catga streams`, the log of the servers, `nats stream info {info.config.name}`"
            findings.append(Finding("stream", level, f"stream {info.config.name}: {trouble}", why, fix))
    in_cluster = [info for info in streams if info.raw.get("cluster", {}).get("name")]
    single = [info.config.name for info in in_cluster if info.config.replicas < _MAJORITY]
    if single:
        what = f"{_listed(single)} of this cluster {'has' if len(single) == 1 else 'have'} fewer than 3 replicas"
        why = "it stands still while one server is down, and is lost with its disk"
        fix = "stream_replicas=3, then `catga streams apply`"
        findings.append(Finding("replicas", Level.WARNING, what, why, fix))
    elif in_cluster:
        least = min(info.config.replicas for info in in_cluster)
        findings.append(Finding("replicas", Level.OK, f"all {len(streams)} streams have {least} replicas or more"))
    else:
        what = f"all {len(streams)} streams are on one server"
        findings.append(Finding("replicas", Level.OK, f"{what}: what they hold is lost with its disk"))
    alone = {row.storage for info in streams if (row := row_of(info, names)) is not None}
    if "memory" in alone and len(alone) > 1:
        mixed = [info.config.name for info in streams if info.config.storage == "memory"]
        what = f"{_listed(mixed)} {'is' if len(mixed) == 1 else 'are'} in memory, the other streams in files"
        findings.append(Finding("storage", Level.WARNING, what, "it ends with the server", "stream_storage="))
    return findings


def _check_sync(settings: Sequence[ServerSettings], missing: str) -> list[Finding]:
    stores = [server for server in settings if server.sync_interval is not None]
    if not stores:
        what = "how often the servers bring what they store to the disk (sync_interval) is not known"
        return [Finding("sync", Level.UNKNOWN, what, "only their monitoring says it", missing)]
    findings = []
    for server in stores:
        if server.sync_always:
            text = f"server {server.name} brings everything to the disk before it acknowledges (sync_interval: always)"
        else:
            text = f"server {server.name} brings what it stores to the disk every {age_text(server.sync_interval or 0)}"
        findings.append(Finding("sync", Level.OK, text))
    if len({(server.sync_always, server.sync_interval) for server in stores}) > 1:
        what = "servers differ in their sync_interval"
        findings.append(
            Finding("sync", Level.WARNING, what, "one of them is weaker than the others", "make it the same")
        )
    return findings


def _check_grade(streams: Sequence[StreamInfo], settings: Sequence[ServerSettings]) -> Finding:
    """Name what "accepted" means: the weakest of all streams counts."""
    if any(info.config.storage == "memory" for info in streams):
        what = "durability grade: memory. What was accepted ends with the servers"
        fix = "stream_storage='file', for streams that are made anew"
        return Finding("grade", Level.WARNING, what, "a restart of all servers loses it", fix)
    stores = [server for server in settings if server.sync_interval is not None]
    is_replicated = all(info.config.replicas >= _MAJORITY for info in streams)
    is_synced = bool(stores) and all(server.sync_always for server in stores)
    grades = [name for name, is_so in (("replicated", is_replicated), ("fsynced", is_synced)) if is_so]
    interval = max((server.sync_interval or 0.0 for server in stores), default=None)
    recent = "the last seconds or minutes" if interval is None else f"the last {age_text(interval)}"
    if not grades:
        what = f"durability grade: one copy. A crash of its system or a power failure loses {recent}"
        fix = "three servers and stream_replicas=3, or sync_interval: always in `jetstream {}` of the server"
        level = Level.UNKNOWN if not stores else Level.WARNING
        why = "whether it brings everything to the disk at once is not known" if not stores else "accepted may be lost"
        return Finding("grade", level, what, why, fix)
    text = f"durability grade: {' and '.join(grades)}."
    if is_replicated and not is_synced:
        text += f" A power failure of a majority of servers at once can lose {recent}"
    elif is_synced and not is_replicated:
        text += " What is accepted is lost with the disk of its one server"
    else:
        text += " What is accepted survives a power failure of all servers, and the loss of a minority of disks"
    return Finding("grade", Level.OK, text)


def _check_letters(streams: Sequence[StreamInfo], names: Names) -> Iterable[Finding]:
    for info in streams:
        kind = kind_of(info.config.name, names)
        if kind is not None and kind[0] == "dead letters" and info.messages:
            what = f"service {kind[1]} has given up {info.messages:,} message{'s' if info.messages > 1 else ''}"
            yield Finding(
                "dead letters",
                Level.WARNING,
                what,
                "they wait for somebody to look at them",
                f"`catga dlq ls {kind[1]}`, then retry or drop them",
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_SHOWN])
    return (
        f"stream {shown}" if len(names) == 1 else f"{len(names)} streams ({shown}{', ...' * (len(names) > _MAX_SHOWN)})"
    )
