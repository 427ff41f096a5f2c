"""Every option of a bus, with unit, default and bound; checked when the bus is made."""

import os
from typing import Any, Literal

import msgspec

from catga_bus.errors import ConfigurationError
from catga_bus.resilience.circuit_breaker import BreakerOptions
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_servers import parse_server, redacted
from catga_bus.transport.validation import checked_subject
from catga_bus.wire import MAX_ID, MAX_METADATA, Names

DEFAULT_URL = "nats://127.0.0.1:4222"


class BusConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `Bus(service, **options)`. Times are seconds."""

    namespace: str = "catga"
    """First token of every subject, stream and bucket: environments that share a server differ in it."""

    send_timeout: float = 5.0
    """How long `send` waits unless it is told. 0.001 to 86,400."""

    attempt_timeout: float = 0.25
    """How long an attempt may go without a sign of life before another node is tried; a node that has a request says
    so within some 10 ms. Shorter fails over sooner, and more often for nothing. 0.05 to 60."""

    breaker: BreakerOptions | None = BreakerOptions()
    """When calls to a type or a node that fails are held back for a while; None: never."""

    event_timeout: float = 30.0
    """How long one handler of an event may take unless its `timeout` says otherwise. 0.001 to 86,400."""

    intake: int = 4_096
    """Messages admitted and not settled in this node; over it callers are answered busy. What waits for one of several
    handlers takes at most half of it. 1 to 1,000,000."""

    intake_bytes: int = 33_554_432
    """Bytes of them. 65,536 to 17,179,869,184."""

    max_batch_frames: int = 64
    """Messages that may travel together; a batch goes to one node. 1 to 1,024."""

    max_batch_bytes: int = 262_144
    """Bytes of them; a larger message travels alone. 1,024 to 67,108,864."""

    max_held_bytes: int = 8_388_608
    """Bytes that wait while the connection is behind, before refusals are dropped. 65,536 to 1,073,741,824."""

    kept_bytes: int = 8_388_608
    """Bytes of answers that a node keeps for 10 s, for callers whose answer was lost on the way. 0 to
    1,073,741,824."""

    drain_timeout: float = 25.0
    """How long a leaving node waits for what runs. 0 to 86,400."""

    heartbeat_interval: float = 0.25
    """How often this node says that it lives; less often while more than 100 nodes do. 0.05 to 60."""

    heartbeat_timeout: float = 1.0
    """After how much silence a node is taken for dead. At least twice `heartbeat_interval`; 0.1 to 600."""

    stall_timeout: float = 0.5
    """How late the event loop may be before this node says that it is not ready. 0.05 to 600."""

    disconnect_events: str | None = None
    """Subject on which the account gets the server's disconnect events, such as `$SYS.ACCOUNT.APP.DISCONNECT` where
    it imports them: a node that is gone is asked for at once. None where it does not."""

    reply_roots: tuple[str, ...] = ("_INBOX",)
    """Roots of inboxes that this node answers to, beside its own `inbox_prefix`. Neither may begin with `$` or lie in
    the namespace: no answer goes there."""

    # What is stored: the streams of the service, and calls that wait for them.
    partitions: int = 64
    """Partitions of the service's commands: how many nodes can share them. Fixed for good when its work queue is
    created; of the log of events, when the first service creates that. 1 to 1,024."""

    stream_replicas: int | None = None
    """Servers that hold each stream; None: three, or as many as there are. 1 to 5."""

    stream_storage: Literal["file", "memory"] = "file"
    """Where the server keeps streams; what is in memory ends with it. Fixed when they are created."""

    command_max_bytes: int = 1_073_741_824
    """Bytes of commands that may wait in the work queue; over it callers are told `OVERLOADED`. 65,536 to 2**50."""

    event_max_bytes: int = 4_294_967_296
    """Bytes of events that are kept in the log; over it the oldest go. The same for all services. 65,536 to 2**50."""

    event_max_age: float = 604_800.0
    """For how long events are kept. The same for all services. 300 to 315,360,000 (ten years)."""

    dead_letter_max_bytes: int = 1_073_741_824
    """Bytes of dead letters that are kept; over it the oldest go. 65,536 to 2**50."""

    dead_letter_max_age: float = 2_592_000.0
    """For how long dead letters are kept. 300 to 315,360,000."""

    manage_streams: Literal["create", "verify"] = "create"
    """Whether the start creates streams that are missing, or only compares: where nodes may not create streams,
    `catga streams apply` does it. Neither changes a stream that is there."""

    store_timeout: float = 15.0
    """How long `enqueue` and `publish` wait until a message is stored. A cluster that loses a leader takes 4 to 9 s to
    elect another. 0.001 to 86,400."""

    unroutable_after: float = 60.0
    """How long a stored message of a type that no node of the service handles waits for one that does, before it is a
    dead letter. 1 to 86,400."""

    # How to reach the server: see ConnectionOptions, which documents each.
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey_seed: str | None = None
    credentials: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_hostname: str | None = None
    inbox_prefix: str = "_INBOX"
    connect_timeout: float = 5.0
    reconnect_delay: float = 0.1
    ping_interval: float = 5.0
    write_limit_bytes: int = 1_048_576

    def connection(self, urls: tuple[str, ...], name: str) -> ConnectionOptions:
        """Return the options of a connection."""
        shared = {field: getattr(self, field) for field in ConnectionOptions.__struct_fields__ if hasattr(self, field)}
        return ConnectionOptions(urls=urls, name=name, **shared)


_MAX_INBOX_PREFIX = 128  # it travels in the head of every batch, see wire.BATCH_OVERHEAD

_BOUNDS: dict[str, tuple[float, float]] = {
    "send_timeout": (0.001, 86_400),
    "attempt_timeout": (0.05, 60),
    "event_timeout": (0.001, 86_400),
    "intake": (1, 1_000_000),
    "intake_bytes": (65_536, 17_179_869_184),
    "max_batch_frames": (1, 1_024),
    "max_batch_bytes": (1_024, 67_108_864),
    "max_held_bytes": (65_536, 1_073_741_824),
    "kept_bytes": (0, 1_073_741_824),
    "drain_timeout": (0, 86_400),
    "heartbeat_interval": (0.05, 60),
    "heartbeat_timeout": (0.1, 600),
    "stall_timeout": (0.05, 600),
    "partitions": (1, 1_024),
    "stream_replicas": (1, 5),
    "command_max_bytes": (65_536, 2**50),
    "event_max_bytes": (65_536, 2**50),
    "event_max_age": (300, 315_360_000),
    "dead_letter_max_bytes": (65_536, 2**50),
    "dead_letter_max_age": (300, 315_360_000),
    "store_timeout": (0.001, 86_400),
    "unroutable_after": (1, 86_400),
    "connect_timeout": (0.1, 300),
    "reconnect_delay": (0.01, 60),
    "ping_interval": (0.1, 600),
    "write_limit_bytes": (65_536, 67_108_864),
}


def checked_config(config: BusConfig | None, options: dict[str, Any]) -> BusConfig:
    """Return a configuration with options laid over it.

    Raises:
        ConfigurationError: An option is unknown, of the wrong type or out of its bounds; the text names it.
    """
    known = BusConfig.__struct_fields__
    for name in options:
        if name not in known:
            raise ConfigurationError(f"unknown option {name!r}; the options of a bus are {', '.join(known)}")
    merged = {name: getattr(config or BusConfig(), name) for name in known} | options
    try:
        checked = msgspec.convert(merged, BusConfig)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"an option has the wrong type: {error}") from error
    for name, (low, high) in _BOUNDS.items():
        value = getattr(checked, name)
        if value is not None and not low <= value <= high:
            raise ConfigurationError(f"{name} must be {low:,} to {high:,}, got {value!r}")
    if checked.heartbeat_timeout < 2 * checked.heartbeat_interval:
        raise ConfigurationError(
            f"heartbeat_timeout must be at least twice heartbeat_interval, which is {checked.heartbeat_interval!r}; "
            f"got {checked.heartbeat_timeout!r}"
        )
    if checked.disconnect_events is not None:
        checked_subject(checked.disconnect_events, wildcards=True)
    if len(checked.inbox_prefix.encode()) > _MAX_INBOX_PREFIX:
        raise ConfigurationError(
            f"inbox_prefix must be at most {_MAX_INBOX_PREFIX} bytes, got {checked.inbox_prefix!r}"
        )
    names = Names(checked.namespace)
    _check_inbox_root("inbox_prefix", checked.inbox_prefix, names)
    for root in checked.reply_roots:
        _check_inbox_root("reply_roots", root, names)
    return checked


def _check_inbox_root(option: str, root: str, names: Names) -> None:
    try:
        checked_subject(root)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option}: {root!r} cannot be the root of inboxes: {error}") from error
    if root.startswith("$"):
        raise ConfigurationError(f"{option}: {root!r} begins with $, where the server's own subjects are; take another")
    if names.owns(root):
        raise ConfigurationError(
            f"{option}: {root!r} lies in the namespace {names.namespace!r}, where no answer goes; take another"
        )


def server_urls(url: str | None) -> tuple[str, ...]:
    """Return the addresses in a comma-separated list; without one, those of CATGA_URL, NATS_URL or the default.

    Raises:
        ConfigurationError: There is no address in it, or one that cannot be used; the text shows no credentials.
    """
    text = url if url is not None else os.environ.get("CATGA_URL") or os.environ.get("NATS_URL") or DEFAULT_URL
    if not isinstance(text, str):
        raise ConfigurationError(f"url must be text, such as {DEFAULT_URL!r}, got {text!r}")
    urls = tuple(part.strip() for part in text.split(",") if part.strip())
    if not urls:
        raise ConfigurationError(f"url must name a server, such as {DEFAULT_URL!r}, got {text!r}")
    alone = next((one for one in urls if one.startswith(_ALONE)), None)
    if alone is None:
        for one in urls:
            parse_server(one)
    elif len(urls) > 1:
        shown = ",".join(redacted(one) for one in urls)
        raise ConfigurationError(
            f"url {shown!r}: {alone!r} stands by itself; only addresses of NATS servers make lists"
        )
    elif alone == "memory://":
        raise ConfigurationError("url 'memory://' names no broker; write memory://name")
    return urls


_ALONE = ("memory://", "embedded://")


_MAX_NAME = 200  # bytes of a service or a node: they travel in the head of every batch


def check_name(option: str, value: object) -> None:
    """Refuse what cannot name a service or a node.

    Raises:
        ConfigurationError: It is not text, empty or too long.
    """
    size = len(value.encode("utf-8", "replace")) if isinstance(value, str) else 0
    if not 0 < size <= _MAX_NAME or str(value).encode("utf-8", "replace").decode() != value:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}... ({size:,} bytes)"
        raise ConfigurationError(f"{option} must be 1 to {_MAX_NAME} bytes of text, got {shown}")


def checked_metadata(metadata: object) -> dict[str, str]:
    """Return a copy of the metadata of a node; of None an empty one.

    Raises:
        ConfigurationError: It holds something other than text, or too much of it.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ConfigurationError(f"metadata must be a dictionary of text, got {metadata!r}")
    if len(metadata) > MAX_METADATA:
        raise ConfigurationError(
            f"metadata must have at most {MAX_METADATA} entries, got {len(metadata)}: it is in every heartbeat"
        )
    for key, value in metadata.items():
        if not (_is_text(key) and _is_text(value)):
            raise ConfigurationError(f"metadata must be a dictionary of text, got {value!r} for {key!r}")
        for text in (key, value):
            if len(text) > MAX_ID:
                shown = f"got {len(text):,} in {key[:40]!r}"
                raise ConfigurationError(f"keys and values of metadata must be at most {MAX_ID} characters, {shown}")
    return dict(metadata)


def check_text(option: str, value: object) -> None:
    """Refuse what is not text.

    Raises:
        ConfigurationError: It is not, or too long; the text names the option.
    """
    if not isinstance(value, str) or not _is_text(value):
        raise ConfigurationError(f"{option} must be text, got {value!r}")
    if len(value) > MAX_ID:
        raise ConfigurationError(f"{option} must be at most {MAX_ID} characters, got {len(value):,}")


def _is_text(value: object) -> bool:
    """Whether a value is text that can be sent: half a surrogate pair has no UTF-8."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value
