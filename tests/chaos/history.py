"""The history of a run: what every process saw, as JSON lines on one clock.

Each process appends to a file of its own, `<directory>/<who>-<pid>.jsonl`. `t` is CLOCK_MONOTONIC in seconds, which all
processes of a machine share, so that lines of different processes can be compared and merged by it.

A line is one `os.write` to a file opened with `O_APPEND`, made when the thing happens: what was written is the
kernel's and survives SIGKILL of the writer (not a crash of the machine, which no run here makes). A writer that is
killed inside that call may leave a torn last line, which readers drop: so at most one line is lost, and never somebody
else's, because nobody shares a file.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from catga_bus.clock import Clock, monotonic


class Invoke(msgspec.Struct, tag="invoke", frozen=True):
    """A caller makes a call."""

    t: float
    op: str
    """`<caller>-<count>`: which call of a run this is. It travels in the request."""

    caller: str
    request: str
    """Name of the request's class."""

    timeout: float
    node: str | None = None
    """The one node that was asked, or None for any."""

    work: float = 0.0
    """Seconds that the handler will take."""


class Done(msgspec.Struct, tag="done", frozen=True):
    """A call has ended."""

    t: float
    op: str
    code: str
    """`ok`, or the code of the error."""

    outcome: str
    """`ok`, or whether it ran: `not_run`, `refused`, `failed`, `unknown`."""

    latency: float
    """Seconds since its `Invoke`."""

    node: str | None = None
    """Who answered, or None if the caller does not know."""

    attempts: int = 1


class Start(msgspec.Struct, tag="start", frozen=True):
    """A node starts an execution: the first line of the handler."""

    t: float
    op: str
    message_id: str
    node: str
    pid: int
    attempt: int
    remaining: float
    """Seconds that the node believes are left until the caller's deadline."""


class End(msgspec.Struct, tag="end", frozen=True):
    """A node has finished an execution: the last line of the handler, before the answer."""

    t: float
    op: str
    node: str
    pid: int


class Fault(msgspec.Struct, tag="fault", frozen=True):
    """The rig begins or ends a fault. Instants enclose it: begun before the deed, ended after it was undone."""

    t: float
    name: str
    """Which fault of the run it is; the same at the beginning and at the end."""

    kind: str
    target: str
    """A node, a caller, `server` or `load`."""

    edge: Literal["begin", "end"]
    pid: int | None = None
    """Of the process that it hit; None for a link or the load."""

    delay: float = 0.0
    """Seconds that it adds in each direction."""


class Witness(msgspec.Struct, tag="witness", frozen=True):
    """What the rig saw of a fault that it made, just before it undid it."""

    t: float
    name: str
    """Of the fault."""

    saw: dict[str, int]
    """How often it saw what: `stopped` processes, bytes that were `held`, connections that were `refused`, ..."""


class View(msgspec.Struct, tag="view", frozen=True):
    """A caller's view of a node changes."""

    t: float
    observer: str
    node: str
    change: str
    """`joined`, `faulted`, `recovered`, `draining`, `left`, ..."""


Record: TypeAlias = Invoke | Done | Start | End | Fault | Witness | View


class HistoryError(Exception):
    """A history cannot be read; the text names the file and the line."""


class Recorder:
    """Appends records to the file of one process.

    Args:
        directory: Of the history; it exists.
        who: The process.
        clock: Where `t` comes from.
    """

    def __init__(self, directory: Path, who: str, clock: Clock = monotonic) -> None:
        self.clock = clock
        self._encode = msgspec.json.Encoder().encode
        self.path = directory / f"{who}-{os.getpid()}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, record: msgspec.Struct) -> None:
        """Append one line; returns when the kernel has it."""
        os.write(self._file, self._encode(record) + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_history(directory: Path) -> list[Record]:
    """Return the records of all processes in the order of their instants.

    Raises:
        HistoryError: A line that is not the torn last one of its file cannot be read.
    """
    records = [record for path in sorted(directory.glob("*.jsonl")) for record in read_file(path)]
    return in_order(records)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Return the records in the order of their instants; equal ones as they came."""
    return sorted(records, key=lambda record: record.t)


_decoder = msgspec.json.Decoder(Record)


def read_file(path: Path, decoder: msgspec.json.Decoder[Any] = _decoder) -> list[Any]:
    """Return the records of one process, which may still be writing, in the order written; raises as `read_history`."""
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    lines = enumerate(whole.splitlines(), start=1)
    return [_decoded(line, decoder, f"{path}, line {number}") for number, line in lines]


def read_tail(path: Path, size: int = 65_536, decoder: msgspec.json.Decoder[Any] = _decoder) -> list[Any]:
    """Return the last records of one process, some `size` bytes of them; raises as `read_history`."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(start)
        whole, _, _torn = file.read().rpartition(b"\n")
    return [_decoded(line, decoder, f"{path}, near its end") for line in whole.splitlines()[start > 0 :]]


def _decoded(line: bytes, decoder: msgspec.json.Decoder[Any], where: str) -> Any:
    try:
        return decoder.decode(line)
    except msgspec.DecodeError as error:
        raise HistoryError(f"{where}: not a record: {error}") from error
