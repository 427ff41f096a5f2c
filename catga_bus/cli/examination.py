"""Gathers the facts that `catga doctor` judges: asks servers, and tries what a user may do.

Nothing here does harm: what is published to try a permission is a payload of a kind that does not exist, which nodes
count and leave, and no queue group is joined, because its members would miss what comes meanwhile.
"""

import asyncio
import contextlib
import ipaddress
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Final
from urllib.parse import urlsplit

import msgspec

from catga_bus.cli.checks import ServerFacts, ServerSettings
from catga_bus.cli.permissions import STREAM_NAMES, USER_INFO, Need, Permissions
from catga_bus.clock import monotonic
from catga_bus.codec import DECODE_ERRORS
from catga_bus.errors import ConfigurationError
from catga_bus.transport.asking import Reply, ask
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.wire import PREFIX

_ASK_SECONDS: Final = 0.5
# A server answers in milliseconds; one whose user may not ask does not answer at all.

_GATHER_SECONDS: Final = 0.5
# How long answers of all nodes or servers are waited for; a node answers in milliseconds unless its loop is blocked.

_MAX_ANSWERS: Final = 10_000
_MAX_PAGE_BYTES: Final = 8_388_608  # of monitoring; a server's own page is 20 KiB
_PAGE_SECONDS: Final = 2.0

_VARZ: Final = "$SYS.REQ.SERVER.PING.VARZ"
_NOTHING: Final = PREFIX + b"\x93\x7f\x91\xaccatga-doctor\x90"  # kind 127, sent by catga-doctor, no frames


class Refusals:
    """Keeps what the server refuses. The events of a transport."""

    def __init__(self) -> None:
        self.subjects: list[str] = []

    def on_disconnected(self, reason: str) -> None:
        """The next question fails by itself."""

    def on_reconnected(self, url: str) -> None:
        """Nothing waits."""

    def on_denied(self, subject: str, text: str) -> None:
        """Keep the subject."""
        del text
        self.subjects.append(subject)

    def on_error(self, text: str) -> None:
        """The next question fails by itself."""


class _UserInfo(msgspec.Struct):
    class _Data(msgspec.Struct):
        permissions: Permissions | None = None

    data: _Data


class _Store(msgspec.Struct):
    sync_interval: int = 0
    """Nanoseconds."""

    sync_always: bool = False


class _JetStream(msgspec.Struct):
    config: _Store | None = None


class _Varz(msgspec.Struct):
    server_name: str
    version: str
    ping_interval: int
    """Nanoseconds."""

    ping_max: int
    connections: int = 0
    max_connections: int = 0
    slow_consumers: int = 0
    auth_required: bool = False
    jetstream: _JetStream | None = None

    def settings(self) -> ServerSettings:
        store = None if self.jetstream is None else self.jetstream.config
        return ServerSettings(
            name=self.server_name,
            version=self.version,
            ping_interval=self.ping_interval * 1e-9,
            ping_max=self.ping_max,
            auth_required=self.auth_required,
            connections=self.connections,
            max_connections=self.max_connections,
            slow_consumers=self.slow_consumers,
            sync_interval=None if store is None else store.sync_interval * 1e-9,
            sync_always=store is not None and store.sync_always,
        )


class _VarzAnswer(msgspec.Struct):
    data: _Varz


class _StreamNames(msgspec.Struct):
    streams: list[str] | None = None


async def server_facts(transport: NatsTransport) -> ServerFacts:
    """Measure the connection."""
    asked = monotonic()
    await transport.flush()
    return ServerFacts(
        url=transport.url,
        max_payload=transport.max_payload,
        round_trip=monotonic() - asked,
        is_loopback=_is_loopback(urlsplit(transport.url).hostname or ""),
        is_tls=transport.is_encrypted,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def permissions_of(transport: NatsTransport) -> Permissions | None:
    """Ask the server what this user may do; None if it may not ask that."""
    reply = await ask(transport, USER_INFO, b"", _ASK_SECONDS)
    if reply is None or reply.is_no_responders:
        return None
    try:
        info = msgspec.json.decode(reply.payload, type=_UserInfo)
    except DECODE_ERRORS:
        return None
    return info.data.permissions or Permissions()


async def try_needs(transport: NatsTransport, refusals: Refusals, needs: Sequence[Need]) -> list[tuple[Need, bool]]:
    """Try what can be tried without harm; return what was tried, and whether the server let it pass."""
    tried = []
    for need in needs:
        if need.queue or need.is_response:
            continue
        before = len(refusals.subjects)
        if need.verb == "publish":
            transport.publish(need.subject, _NOTHING)
            await transport.flush()
        else:
            subscription = await transport.subscribe(need.subject, _ignore)
            await transport.flush()
            await subscription.close()
        tried.append((need, need.subject not in refusals.subjects[before:]))
    return tried


def _ignore(subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
    """Take no notice."""


async def settings_by_question(transport: NatsTransport, refusals: Refusals) -> list[ServerSettings]:
    """Ask all servers of a cluster for their settings, as a user of the system account; empty if none may be heard."""
    settings = []
    for payload in await gather(transport, refusals, _VARZ) or ():
        try:
            settings.append(msgspec.json.decode(payload, type=_VarzAnswer).data.settings())
        except DECODE_ERRORS:
            continue  # an error instead of data: this server does not say
    return settings


async def settings_by_monitoring(url: str) -> ServerSettings:
    """Read the settings of one server from its monitoring endpoint.

    Args:
        url: `http://host:port`.

    Raises:
        ConfigurationError: The address cannot be read, or what is there is no nats-server.
    """
    address = url if "://" in url else f"http://{url}"
    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigurationError(f"monitoring is at http:// or https://, got {url!r}")
    try:
        page = await asyncio.to_thread(_read_page, f"{address.rstrip('/')}/varz")
        return msgspec.json.decode(page, type=_Varz).settings()
    except (OSError, ValueError, HTTPException) as error:
        raise ConfigurationError(f"no monitoring of a nats-server at {url!r}: {error}") from error


def _read_page(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_PAGE_SECONDS) as answer:
        page: bytes = answer.read(_MAX_PAGE_BYTES)
    return page


async def captured_by(transport: NatsTransport, subjects: Sequence[str]) -> list[str] | None:
    """Return the streams that store any of these subjects; None if this user may not ask, or nobody answers."""
    streams: list[str] = []
    for subject in subjects:
        reply = await ask(transport, STREAM_NAMES, msgspec.json.encode({"subject": subject}), _ASK_SECONDS)
        if reply is None:
            return None
        if reply.is_no_responders:
            return []  # a server without a store
        try:
            streams += msgspec.json.decode(reply.payload, type=_StreamNames).streams or []
        except DECODE_ERRORS:
            return None
    return streams


async def gather(transport: NatsTransport, refusals: Refusals, subject: str) -> list[bytes] | None:
    """Ask everybody who listens to a subject, and return the answers that come within half a second.

    Returns:
        None if this user may not ask.
    """
    answers: list[bytes] = []
    nobody = asyncio.Event()

    def sink(_: str, payload: bytes, __: str, headers: Mapping[str, str] | None) -> None:
        if Reply(payload, headers or {}).is_no_responders:
            nobody.set()
        elif len(answers) < _MAX_ANSWERS:
            answers.append(payload)

    before = len(refusals.subjects)
    inbox = transport.new_inbox()
    subscription = await transport.subscribe(inbox, sink)
    try:
        transport.publish(subject, b"", reply=inbox)
        await transport.flush()
        if subject in refusals.subjects[before:]:
            return None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(nobody.wait(), _GATHER_SECONDS)
        return answers
    finally:
        await subscription.close()
