"""Inboxes by address, and whether one remembers for long enough."""

from urllib.parse import parse_qsl, unquote, urlsplit

from catga_bus.durability.inbox.base import Inbox
from catga_bus.durability.inbox.memory_inbox import MemoryInbox
from catga_bus.durability.inbox.sqlite_file import Synchronous
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.errors import ConfigurationError

CLOCK_MARGIN = 3_600.0
"""Seconds by which an inbox remembers longer than a stream keeps: the clocks of two machines may differ by as much."""

_EXAMPLE = "such as 'sqlite:///var/lib/billing/inbox.db' or 'memory://'"

_LEVELS: dict[str, Synchronous] = {"normal": "normal", "full": "full"}


def make_inbox(address: str | Inbox) -> Inbox:
    """Return the inbox at an address, not yet open; an inbox is returned as it is.

    Args:
        address: `sqlite:///path`, the path beginning at the root of the file system, with `?synchronous=full` and
            `?create=no` as in `SqliteInbox`; or `memory://`, which is a new one each time.

    Raises:
        ConfigurationError: It is no such address; the text names what is wrong with it.

    Example:
        >>> make_inbox("sqlite:///var/lib/billing/inbox.db?synchronous=full")
        <SqliteInbox /var/lib/billing/inbox.db>
    """
    if not isinstance(address, str):
        return address
    parts = urlsplit(address)
    if parts.scheme == "memory":
        if address != "memory://":
            raise ConfigurationError(f"inbox: {address!r} names nothing that could be shared; give 'memory://'")
        return MemoryInbox()
    if parts.scheme != "sqlite":
        raise ConfigurationError(f"inbox: {address!r} is no address of an inbox; give one {_EXAMPLE}")
    path = unquote(parts.path)
    if parts.netloc or path in ("", "/"):
        raise ConfigurationError(f"inbox: {address!r} has no path from the root; it begins sqlite:///, {_EXAMPLE}")
    synchronous, create = _options(address, parts.query)
    return SqliteInbox(path, synchronous=synchronous, create=create)


def _options(address: str, query: str) -> tuple[Synchronous, bool]:
    synchronous: Synchronous = "normal"
    create = True
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "synchronous" and value in _LEVELS:
            synchronous = _LEVELS[value]
        elif name == "create" and value in ("yes", "no"):
            create = value == "yes"
        else:
            raise ConfigurationError(
                f"inbox: {name}={value} in {address!r} is no option; they are synchronous=normal|full and create=yes|no"
            )
    return synchronous, create


def check_retention(inbox: Inbox, stream: str, max_age: float) -> None:
    """Refuse an inbox that forgets sooner than a stream may deliver again.

    A message that arrived after its mark has gone would be done a second time.

    Args:
        inbox: The inbox.
        stream: Name of the stream, for the text.
        max_age: Seconds for which the stream keeps messages; 0 for ever. A stream that keeps them for ever is let pass:
            its worker gives up what `is_too_old`, and does not run it.

    Raises:
        ConfigurationError: It does; the text names both figures.
    """
    if max_age and inbox.retention < max_age + CLOCK_MARGIN:
        raise ConfigurationError(
            f"the inbox keeps results for {_days(inbox.retention)} and the stream {stream} keeps messages for "
            f"{_days(max_age)}: one that is delivered again later would be done twice. Keep results for at least "
            f"{_days(max_age + CLOCK_MARGIN)} (retention={max_age + CLOCK_MARGIN:.0f}), or messages for less"
        )


def is_too_old(inbox: Inbox, stored_utc: float, now_utc: float) -> bool:
    """Whether a message may have been done and forgotten since it was stored, so that it must not run.

    A little sooner than the retention ends: the clock that stored it may differ from the one that swept.

    Args:
        inbox: The inbox.
        stored_utc: When the stream stored it: seconds since 1970.
        now_utc: Now, by the clock of this machine.
    """
    return now_utc - stored_utc > inbox.retention - min(CLOCK_MARGIN, inbox.retention / 8)


def _days(seconds: float) -> str:
    if seconds < 2 * 86_400:
        return f"{seconds:,.0f} s"
    return f"{seconds / 86_400:.4g} days"
