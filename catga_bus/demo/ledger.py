"""The execution log: one line per execution, from which the verdict is computed.

What a node holds in memory proves nothing about a bus: it dies with the node, and a request that
ran on two nodes is in two memories. So each execution appends one line to a file that all nodes
share, and only these lines are counted.

The line is what the handler does to the world, and it comes before the answer. So whenever a node is
killed: before its line, the request has not run there and counts where it runs next; after it, the
line stays, and if the answer did not leave, the next node writes a second line under the same id,
which is counted as a request that ran twice. An answer without a line would be a lie; the report
looks for those.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from catga_bus.demo.data import Figures, Flight, figures_of

LINE_BYTES = 256
"""Length of every line, padded with spaces.

Linux lets SIGKILL cut a write short between two pages of memory: of 200 processes that only wrote lines
of 100 bytes and were killed, 4 left a torn one. Lines of a length that divides a page never lie across
two of them, so a killed node leaves a whole line or none (0 of 200).
"""


class LedgerError(Exception):
    """The execution log cannot be written or read; the text names the file and the line."""


class Execution(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One run of the handler of `RecordFlight`; a JSON array and a line of the log."""

    message_id: str
    """The same for every run of one request."""

    node: str
    row: int
    """Place of the flight in the file, counted from 0."""

    dep_delay: int | None
    """As the handler received it: so the verdict also covers what the wire did to the values."""

    distance: int


class ExecutionLog:
    """Appends executions to a file that several processes share.

    Each line is one `os.write` of `LINE_BYTES` to a file opened with `O_APPEND`: the kernel puts it at
    the end in one piece, whoever else writes and whatever kills this process meanwhile or afterwards.
    Close it, or use it in a `with` statement.

    Args:
        path: The file; made if it is not there.

    Raises:
        LedgerError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encode = msgspec.json.Encoder().encode
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be opened: {error.strerror}") from error

    def append(self, execution: Execution) -> None:
        """Write one line.

        Raises:
            LedgerError: It did not reach the file in one piece, or is longer than `LINE_BYTES`.
        """
        line = self._encode(execution).ljust(LINE_BYTES - 1) + b"\n"
        if len(line) != LINE_BYTES:
            raise LedgerError(f"{self._path}: a line of {len(line)} bytes; at most {LINE_BYTES} stay in one piece")
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise LedgerError(f"{self._path}: cannot be written: {error.strerror}") from error
        if written != len(line):
            raise LedgerError(f"{self._path}: {written} of {len(line)} bytes of a line were written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> "ExecutionLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_executions(path: Path) -> list[Execution]:
    """Read all lines of an execution log.

    Raises:
        LedgerError: The file cannot be read, or a line is not an execution.
    """
    decode = msgspec.json.Decoder(Execution).decode
    executions: list[Execution] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    executions.append(decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise LedgerError(f"{path}, line {number}: not an execution: {error}") from error
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    return executions


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the executions add up to the flights of the file."""

    expected: Figures
    """Computed directly from the file."""

    counted: Figures
    """Computed from the lines of the execution log, each message id once."""

    executions: int
    """Lines of the log."""

    ran_twice: int
    """Message ids that have more than one line."""

    missing_rows: int
    """Rows of the file that nobody executed."""

    doubled_rows: int
    """Rows that were executed under more than one message id, and so counted more than once."""

    foreign_rows: int
    """Message ids that stand for a row which the file does not have."""

    per_node: dict[str, Figures]
    """What the lines of each node add up to, every execution counted."""

    @property
    def is_equal(self) -> bool:
        """Whether each row ran under exactly one message id and the figures are the file's."""
        return (
            self.counted == self.expected and not self.missing_rows and not self.doubled_rows and not self.foreign_rows
        )


def judge(executions: Iterable[Execution], flights: Sequence[Flight]) -> Verdict:
    """Compare executions with the file; each message id counts once, by its first line."""
    counted = Figures()
    per_node: dict[str, Figures] = {}
    runs: Counter[str] = Counter()
    rows: Counter[int] = Counter()
    for execution in executions:
        node = per_node.get(execution.node, Figures())
        per_node[execution.node] = node.plus(execution.dep_delay, execution.distance)
        runs[execution.message_id] += 1
        if runs[execution.message_id] == 1:
            counted = counted.plus(execution.dep_delay, execution.distance)
            rows[execution.row] += 1
    known = range(len(flights))
    return Verdict(
        expected=figures_of(flights),
        counted=counted,
        executions=runs.total(),
        ran_twice=sum(count > 1 for count in runs.values()),
        missing_rows=sum(row not in rows for row in known),
        doubled_rows=sum(count > 1 for count in rows.values()),
        foreign_rows=sum(row not in known for row in rows),
        per_node=per_node,
    )


def ran_twice_on(executions: Iterable[Execution], nodes: Collection[str]) -> int:
    """Return how many message ids have more than one line, at least one of them by one of these nodes."""
    runs: Counter[str] = Counter()
    there: set[str] = set()
    for execution in executions:
        runs[execution.message_id] += 1
        if execution.node in nodes:
            there.add(execution.message_id)
    return sum(runs[message_id] > 1 for message_id in there)
