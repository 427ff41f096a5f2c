"""Where nodes note which handlers they started: a file each, which survives the kill of its process."""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.outages import Execution

_ENTRY = struct.Struct("<qd")


class ExecutionLog:
    """Notes executions of one process.

    Args:
        directory: Holds the files of all processes of a run.
    """

    def __init__(self, directory: str) -> None:
        # Unbuffered: what was written is the system's, whatever happens to the process.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(Path(directory) / f"{os.getpid()}.executions", flags, 0o600)

    def note(self, order: int) -> None:
        """Note that the handler of an order starts now."""
        os.write(self._file, _ENTRY.pack(order, time.monotonic()))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_executions(directory: Path) -> Iterator[Execution]:
    """Return what all processes of a run have noted, one process after the other."""
    for file in sorted(directory.glob("*.executions")):
        content = file.read_bytes()
        whole = len(content) - len(content) % _ENTRY.size
        for order, started in _ENTRY.iter_unpack(content[:whole]):
            yield Execution(order, started, int(file.stem))
