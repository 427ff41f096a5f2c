"""The execution log: one line per run of a handler, which tells how often the bus had to run one again.

A bus that survives the death of nodes runs some handlers twice; what must not happen twice are the effects. So each
run appends one line to a file that all nodes share, before it does anything else and outside of any transaction: the
line stays whatever becomes of the run. An effect without a line would be a lie; the report looks for those.
"""

import os
from pathlib import Path
from types import TracebackType

import msgspec

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
    """The same for every run of one command."""

    node: str
    row: int
    """Place of the flight in the schedule, counted from 0."""

    partition: int
    epoch: int
    """Of the partition, when the run began."""


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
