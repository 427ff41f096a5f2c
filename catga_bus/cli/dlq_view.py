"""What `catga dlq` shows: letters as rows, as tables and as JSON. Pure."""

import base64
import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from catga_bus.cli.nodes_view import visible
from catga_bus.codec import DECODE_ERRORS, GateError
from catga_bus.codec.walks import walk
from catga_bus.durability.letters.dead_letters import Buried
from catga_bus.durability.letters.letters import DeadLetter, Reason, decode_letter
from catga_bus.transport.jetstream import StoredMessage, StreamInfo
from catga_bus.wire import token

_MAX_STEPS = 200_000
_MAX_DEPTH = 32
_MAX_CONTAINERS = 10_000
# As the gate judges bodies before it decodes them: what lies there was refused once already, perhaps for this.

_MAX_CELL = 60  # characters of one cell of the table


class Wanted(msgspec.Struct, frozen=True):
    """Which letters are meant. Each one that is given must fit."""

    type: str | None = None
    reason: Reason | None = None
    key: str | None = None

    def fits(self, letter: DeadLetter) -> bool:
        """Whether a letter is meant."""
        return (
            self.type in (None, letter.type)
            and self.reason in (None, letter.reason)
            and (self.key is None or self.key == letter.key)
        )

    @property
    def is_all(self) -> bool:
        """Whether it leaves none out."""
        return self == Wanted()


class Deposit(msgspec.Struct, frozen=True, kw_only=True):
    """The dead letters of one service; the fields are those of `--json`."""

    service: str
    stream: str
    letters: int
    bytes: int
    oldest_utc: float | None
    newest_utc: float | None
    last: str
    """What the newest one says: type and error."""


def deposit_of(name: str, info: StreamInfo, first: StoredMessage | None, last: StoredMessage | None) -> Deposit:
    """Return what is said of a service's dead letters.

    Args:
        name: The token of the service.
        info: Of its stream.
        first: The oldest letter.
        last: The newest one.
    """
    letter = None
    if last is not None:
        with contextlib.suppress(GateError):
            letter = decode_letter(last.payload)
    return Deposit(
        service=letter.service if letter is not None and token(letter.service) == name else name,
        stream=info.config.name,
        letters=info.messages,
        bytes=info.bytes,
        oldest_utc=None if first is None else first.time,
        newest_utc=None if last is None else last.time,
        last="" if letter is None else f"{letter.type}: {letter.error}",
    )


def letter_object(buried: Buried, *, with_body: bool) -> dict[str, Any]:
    """Return a letter as the object that `--json` prints.

    Args:
        buried: The letter.
        with_body: Whether its body is in it: as JSON if it is MessagePack, else as base64.
    """
    place: dict[str, Any] = {
        "number": buried.number,
        "stored_utc": buried.stored_utc,
        "size_bytes": buried.size_bytes,
    }
    if buried.letter is None:
        return place | {"fault": buried.fault}
    facts = msgspec.structs.asdict(buried.letter)
    body = facts.pop("body")
    return place | facts | (_body_object(buried.letter.reason, body) if with_body else {})


def _body_object(reason: Reason, body: bytes) -> dict[str, Any]:
    if reason is not Reason.UNDECODABLE:
        _, fault = walk(body, _MAX_STEPS, _MAX_DEPTH, _MAX_CONTAINERS)
        if not fault:
            try:
                return {"body": msgspec.msgpack.decode(body)}
            except DECODE_ERRORS:
                pass
    return {"body_base64": base64.b64encode(body).decode()}


def letters_table(letters: Sequence[Buried]) -> Table:
    """Return the table of letters, at least one, in the order in which they are given."""
    columns: dict[str, Callable[[Buried, DeadLetter], str]] = {
        "number": lambda buried, _: str(buried.number),
        "given up (UTC)": lambda _, letter: utc_text(letter.last_utc),
        "reason": lambda _, letter: str(letter.reason),
        "type": lambda _, letter: letter.type or "-",
        "key": lambda _, letter: "-" if letter.key is None else letter.key or '""',
        "id": lambda _, letter: letter.id,
        "attempts": lambda _, letter: str(letter.attempts),
        "error": lambda _, letter: letter.error.partition("\n")[0],
    }
    table = _table(columns, {"number", "attempts"})
    for buried in letters:
        if buried.letter is None:
            table.add_row(str(buried.number), utc_text(buried.stored_utc), "no letter", *"----", _cell(buried.fault))
        else:
            table.add_row(*(_cell(column(buried, buried.letter)) for column in columns.values()))
    return table


def deposits_table(deposits: Sequence[Deposit]) -> Table:
    """Return the table of services with dead letters, at least one."""
    table = _table(("service", "letters", "size", "oldest (UTC)", "newest (UTC)", "last"), {"letters", "size"})
    for one in sorted(deposits, key=lambda one: one.service):
        table.add_row(
            _cell(one.service),
            f"{one.letters:,}",
            size_text(one.bytes),
            "-" if one.oldest_utc is None else utc_text(one.oldest_utc),
            "-" if one.newest_utc is None else utc_text(one.newest_utc),
            _cell(one.last or "-"),
        )
    return table


def _table(columns: Sequence[str] | dict[str, Any], numbers: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def _cell(text: str) -> Text:
    shown = visible(text)
    return Text(shown if len(shown) <= _MAX_CELL else f"{shown[: _MAX_CELL - 1]}…")


def size_text(size: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> size_text(999), size_text(1_500_000), size_text(2**30)
        ('999 B', '1.5 MB', '1.1 GB')
    """
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1_000:
            break
        amount, unit = amount / 1_000, larger
    return f"{amount:,.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:,.1f} {unit}"


def utc_text(seconds: float) -> str:
    """Return an instant for people: date and time to the second, UTC.

    Example:
        >>> utc_text(1764072000.25)
        '2025-11-25 12:00:00'
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"  # whoever wrote it has no clock
