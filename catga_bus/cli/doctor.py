"""`catga doctor`: what is wrong with the servers, the permissions and the nodes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import click
import msgspec

from catga_bus.bus import Bus
from catga_bus.cli.checks import ServerSettings, check_capture, check_server, check_settings
from catga_bus.cli.connection import COMMAND_KEY, CONNECT_TIMEOUT, inbox_of, user_of
from catga_bus.cli.examination import (
    Refusals,
    captured_by,
    permissions_of,
    server_facts,
    settings_by_monitoring,
    settings_by_question,
    try_needs,
)
from catga_bus.cli.exits import ExitCode, text_of
from catga_bus.cli.findings import Finding, Level, count_levels
from catga_bus.cli.node_checks import check_nodes
from catga_bus.cli.node_examination import examine_nodes
from catga_bus.cli.options import Session, debug_option, json_option, namespace_option, url_option
from catga_bus.cli.output import print_json
from catga_bus.cli.permissions import STREAM_NAMES, Use, check_needs, needs_of
from catga_bus.cli.run import load_bus
from catga_bus.cli.stored_checks import check_store
from catga_bus.cli.stored_examination import store_facts
from catga_bus.config import BusConfig, server_urls
from catga_bus.errors import AuthenticationError, ConfigurationError, DisconnectedError
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.transport.nats_servers import redacted
from catga_bus.wire import Names

_NAME = "catga-doctor"

_SETTINGS_FIX = (
    "give the monitoring of each server, --monitor http://127.0.0.1:8222, "
    "or a user of the system account, --system-url nats://monitor:...@host"
)

_COLORS = {Level.OK: "green", Level.UNKNOWN: "cyan", Level.WARNING: "yellow", Level.FAILED: "red"}

_EXAMPLES = """\b
Examples:
  catga doctor
  catga doctor shop.app:bus --asks Quote
  catga doctor --url nats://operator:...@nats-1 --monitor http://127.0.0.1:8222
  catga doctor --json --strict | jq '.findings[] | select(.level != "ok")'

\b
Ends with 0 if nothing failed (with --strict: and nothing is to be warned of), 1 if something did,
2 for wrong usage, 3 if there is no server to examine.
"""


class Patient(msgspec.Struct, frozen=True):
    """What is examined: where a bus would connect and how, and what that bus does."""

    urls: tuple[str, ...]
    config: BusConfig
    use: Use


@click.command(short_help="Say what is wrong with servers, permissions and nodes.", epilog=_EXAMPLES)
@click.argument("target", metavar="[MODULE:BUS]", required=False)
@url_option
@namespace_option
@click.option("--asks", metavar="TYPE", multiple=True, help="A request type that the bus sends; may be repeated.")
@click.option("--publishes", metavar="TYPE", multiple=True, help="An event type that it publishes.")
@click.option("--broadcasts", metavar="TYPE", multiple=True, help="An event type that it broadcasts.")
@click.option("--monitor", metavar="URL", multiple=True, help="Monitoring of a server, http://host:8222.")
@click.option(
    "--system-url",
    metavar="URL",
    envvar="CATGA_SYSTEM_URL",
    help="A user of the system account, who may ask all servers for their settings. [env: CATGA_SYSTEM_URL]",
)
@click.option("--strict", is_flag=True, help="Let warnings count as failures.")
@json_option
@debug_option
def doctor(
    *,
    target: str | None,
    url: str | None,
    namespace: str,
    asks: tuple[str, ...],
    publishes: tuple[str, ...],
    broadcasts: tuple[str, ...],
    monitor: tuple[str, ...],
    system_url: str | None,
    strict: bool,
    as_json: bool,
) -> int:
    """Examine the servers and nodes that a bus would work with, and say what to do about what is wrong.

    With MODULE:BUS it connects as that bus does and checks whether all it handles is permitted; without,
    as a bus that handles nothing, at --url. For a second or two it is a node among the others, which it
    hears and asks. Nothing is changed, and no message is taken away from anybody.

    A node that was frozen or killed before that is silent, and cannot be found: compare with the nodes
    that should be there, or let `catga nodes --watch` run.
    """
    if not click.get_current_context().ensure_object(Session).debug:
        logging.basicConfig(handlers=[logging.NullHandler()])  # each refusal would stand in the log as well
    patient = _bus_of(target, url) if target is not None else _nobody(url, namespace)
    use = msgspec.structs.replace(patient.use, asks=asks, publishes=publishes, broadcasts=broadcasts)
    patient = msgspec.structs.replace(patient, use=use)
    try:
        findings = asyncio.run(_examine(patient, monitor, system_url))
    except (DisconnectedError, AuthenticationError) as error:
        _show([_unreachable(patient, error)], as_json=as_json)
        return ExitCode.UNREACHABLE
    _show(findings, as_json=as_json)
    counts = count_levels(findings)
    bad = counts[Level.FAILED] + (counts[Level.WARNING] if strict else 0)
    return ExitCode.FAILED if bad else ExitCode.OK


def _unreachable(patient: Patient, error: DisconnectedError | AuthenticationError) -> Finding:
    where = ", ".join(redacted(one) for one in patient.urls)
    fix = "start one (catga up), or give its address or the right credentials with --url"
    return Finding("server", Level.FAILED, f"no server at {where} can be used", text_of(error), fix)


def _nobody(url: str | None, namespace: str) -> Patient:
    """Return a bus that handles nothing, as whom the URL says."""
    urls = server_urls(url)
    _check_urls(urls)
    config = _config(urls, namespace)
    # A user named after its service is how deploy/nats has it; without one any name will do.
    service = user_of(urls[0]) or _NAME
    return Patient(urls, config, Use(service, _NAME, config.inbox_prefix))


def _bus_of(target: str, url: str | None) -> Patient:
    """Return the bus of a module."""
    bus = load_bus(target)
    bus.override(url=url)
    _check_urls(bus.urls)
    config = msgspec.structs.replace(bus.config, connect_timeout=CONNECT_TIMEOUT)
    use = Use(
        bus.service,
        bus.node_id,
        bus.config.inbox_prefix,
        handles=tuple(entry.type_name for entry in bus.registry.requests()),
        hears=tuple(entry.type_name for entry in bus.registry.events()),
        stores=stored_types(bus),
        disconnect_events=config.disconnect_events,
    )
    return Patient(bus.urls, config, use)


def stored_types(bus: Bus) -> tuple[str, ...]:
    """Return the types of commands and durable events that a bus handles."""
    entries = (*bus.registry.commands(), *bus.registry.events())
    return tuple(entry.type_name for entry in entries if entry.options.durable)


def _config(urls: tuple[str, ...], namespace: str = "catga") -> BusConfig:
    """Return how to connect as whom the first URL says."""
    return BusConfig(namespace=namespace, inbox_prefix=inbox_of(urls[0]), connect_timeout=CONNECT_TIMEOUT)


def _options(config: BusConfig, urls: tuple[str, ...]) -> ConnectionOptions:
    return config.connection(urls, f"catga/{_NAME}")


def _system(url: str) -> ConnectionOptions:
    urls = server_urls(url)
    return _options(_config(urls), urls)


def _check_urls(urls: Sequence[str]) -> None:
    if urls[0].startswith(("memory://", "embedded://")):
        raise ConfigurationError(f"{urls[0]!r} is nobody else's server; doctor examines one that is running: --url")


@asynccontextmanager
async def _connected(options: ConnectionOptions) -> AsyncIterator[tuple[NatsTransport, Refusals]]:
    refusals = Refusals()
    transport = NatsTransport(options, refusals)
    try:
        await transport.connect()
        yield transport, refusals
    finally:
        await transport.close()


async def _examine(patient: Patient, monitors: Sequence[str], system_url: str | None) -> list[Finding]:
    names = Names(patient.config.namespace)
    async with _connected(_options(patient.config, patient.urls)) as (transport, refusals):
        findings = check_server(await server_facts(transport))
        settings, told = await _examine_settings(transport, refusals, monitors, system_url)
        findings += told
        needs = needs_of(patient.use, names)
        permissions = await permissions_of(transport)
        tried = [] if permissions is not None else await try_needs(transport, refusals, needs)
        findings += check_needs(needs, permissions, tried)
        requests = (names.all_requests(), names.all_directed())
        streams = await captured_by(transport, requests)
        may_ask = STREAM_NAMES not in refusals.subjects
        findings.append(check_capture(streams, requests, is_permitted=may_ask))
        store = await store_facts(transport, refusals, names)
        findings += check_store(store, settings, names, needs=bool(patient.use.stores), missing=_SETTINGS_FIX)
        findings += check_nodes(await examine_nodes(_witness(patient), transport, refusals, names), names)
    return findings


def _witness(patient: Patient) -> Bus:
    """Return a bus that hears what the examined one would: it handles nothing, and has an id of its own."""
    metadata = {COMMAND_KEY: "doctor"}
    return Bus(patient.use.service, url=",".join(patient.urls), config=patient.config, metadata=metadata)


async def _examine_settings(
    transport: NatsTransport, refusals: Refusals, monitors: Sequence[str], system_url: str | None
) -> tuple[list[ServerSettings], list[Finding]]:
    """Read the settings of the servers in whatever way was given; without one, ask as the user that we are.

    Returns:
        What the servers say, and what is wrong with it.
    """
    settings: list[ServerSettings] = []
    findings: list[Finding] = []
    for url in monitors:
        try:
            settings.append(await settings_by_monitoring(url))
        except ConfigurationError as error:
            fix = "give the address that `http` of the server's configuration says, from where it can be reached"
            findings.append(Finding("settings", Level.FAILED, str(error), "", fix))
    if system_url is not None:
        try:
            async with _connected(_system(system_url)) as (system, denied):
                settings += await settings_by_question(system, denied)
        except (DisconnectedError, AuthenticationError) as error:
            fix = "give --system-url a user of the account that the configuration names as system_account"
            findings.append(Finding("settings", Level.FAILED, text_of(error), "", fix))
    elif not monitors:
        settings += await settings_by_question(transport, refusals)
    if not settings and findings:
        return settings, findings
    return settings, [*findings, *check_settings(settings, _SETTINGS_FIX)]


def _show(findings: Sequence[Finding], *, as_json: bool) -> None:
    counts = count_levels(findings)
    if as_json:
        print_json({"ok": not counts[Level.FAILED], "counts": counts, "findings": findings})
        return
    checks = max(len(finding.check) for finding in findings)
    for finding in findings:
        level = click.style(f"{finding.level:<8}", fg=_COLORS[finding.level], bold=finding.level is Level.FAILED)
        click.echo(f"{level} {finding.check:<{checks}}  {finding.what}")
        for label, text in (("why", finding.why), ("fix", finding.fix)):
            if text:
                click.echo(f"{'':<8} {'':<{checks}}  {click.style(label, dim=True)} {text}")
    click.echo(", ".join(f"{count} {level}" for level, count in counts.items()))
