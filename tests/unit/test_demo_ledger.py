"""The execution log: written in whole lines by many, and read strictly."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catga_bus.demo.ledger import (
    LINE_BYTES,
    Execution,
    ExecutionLog,
    LedgerError,
    read_executions,
)

EXECUTIONS = [Execution(f"id-{row}", f"desk-{row % 3}", row, row % 16, 7) for row in range(200)]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "executions.jsonl"
    with ExecutionLog(path) as log:
        for execution in EXECUTIONS:
            log.append(execution)
    assert read_executions(path) == EXECUTIONS


def test_each_execution_is_one_write_of_one_line(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "write", lambda _, line: written.append(line) or len(line))
    with ExecutionLog(tmp_path / "log") as log:
        log.append(Execution("id-1", "desk-1", 7, 15, 100))
    assert [line.rstrip() for line in written] == [b'["id-1","desk-1",7,15,100]']


def test_no_line_lies_across_two_pages_of_memory(tmp_path):
    path = tmp_path / "log"
    with ExecutionLog(path) as log:
        log.append(Execution("id", "desk", 0, 0, 1))
        log.append(Execution("i" * 64, "d" * 64, 999_999, 1_023, 1 << 53))
    assert [len(line) for line in path.read_bytes().splitlines(keepends=True)] == [LINE_BYTES, LINE_BYTES]
    assert mmap.PAGESIZE % LINE_BYTES == 0


def test_a_line_that_is_too_long_to_stay_whole_is_refused(tmp_path):
    with ExecutionLog(tmp_path / "log") as log, pytest.raises(LedgerError, match="at most 256 stay in one piece"):
        log.append(Execution("i" * 256, "desk", 0, 0, 1))
    assert (tmp_path / "log").read_bytes() == b""


def test_a_writer_that_is_killed_leaves_whole_lines(tmp_path):
    path = tmp_path / "executions.jsonl"
    program = (
        "import itertools, sys; from pathlib import Path;"
        "from catga_bus.demo.ledger import Execution, ExecutionLog;"
        "log = ExecutionLog(Path(sys.argv[1]));"
        "[log.append(Execution(f'id-{n}', 'desk', n, n, n)) for n in itertools.count()]"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    deadline = time.monotonic() + 60
    try:
        while not (path.exists() and path.stat().st_size > 100 * LINE_BYTES):
            assert writer.poll() is None
            assert time.monotonic() < deadline
    finally:
        writer.kill()
        writer.wait(60)
    rows = [execution.row for execution in read_executions(path)]
    assert rows == list(range(len(rows)))
    assert len(rows) > 100


def test_processes_that_write_at_the_same_time_tear_no_line(tmp_path):
    path = tmp_path / "executions.jsonl"
    program = (
        "import sys; from pathlib import Path;"
        "from catga_bus.demo.ledger import Execution, ExecutionLog;"
        "log = ExecutionLog(Path(sys.argv[1]));"
        "[log.append(Execution(f'{sys.argv[2]}-{n}', sys.argv[2], n, n, n)) for n in range(2000)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), f"desk-{number}"]) for number in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    executions = read_executions(path)
    assert len({execution.message_id for execution in executions}) == len(executions) == 4_000


def test_a_line_that_was_written_in_part_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda _, line: len(line) - 1)
    with ExecutionLog(tmp_path / "log") as log, pytest.raises(LedgerError, match="of a line"):
        log.append(Execution("id", "desk", 0, 0, 1))


def test_a_full_disk_is_an_error_that_names_the_file():
    with ExecutionLog(Path("/dev/full")) as log, pytest.raises(LedgerError, match="/dev/full"):
        log.append(Execution("id", "desk", 0, 0, 1))


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(LedgerError, match="cannot be opened: No such file"):
        ExecutionLog(tmp_path / "nowhere" / "log")


@pytest.mark.parametrize(
    "line",
    [b'["id","desk",1,2', b'["id","desk","1",2,3]', b'["id","desk",1,2,3,4]', b"\xff\xfe", b""],
)
def test_a_damaged_line_is_an_error_that_names_the_line(tmp_path, line):
    path = tmp_path / "log"
    path.write_bytes(b'["id","desk",1,2,3]\n' + line + b"\n")
    with pytest.raises(LedgerError, match="line 2: not an execution"):
        read_executions(path)


def test_a_missing_log_is_an_error(tmp_path):
    with pytest.raises(LedgerError, match="cannot be read"):
        read_executions(tmp_path / "log")
