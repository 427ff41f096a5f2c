"""Handles on processes, tried on small programs instead of nodes."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from catga_bus.demo import processes
from catga_bus.demo.processes import NodeProcess, running

UNTIL_EOF = "import sys; print('up', flush=True); sys.stdin.read()"
STUBBORN = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);print('up', flush=True); time.sleep(600)"
)


@pytest.fixture
def make(tmp_path: Path) -> Iterator:
    made = []

    def node(program: str, name: str = "desk-1") -> NodeProcess:
        log = tmp_path / f"{name}.log"
        made.append(NodeProcess(name, [sys.executable, "-c", program], os.environ, log))
        return made[-1]

    yield node
    for process in made:
        process.kill()
        process.wait(10)


def wait_until(condition, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def is_up(node: NodeProcess) -> bool:
    return "up" in node.log.read_text()


def test_a_process_runs_between_start_and_terminate(make):
    node = make(UNTIL_EOF)
    assert (node.is_running, node.pid, node.exit_code) == (False, None, None)
    node.start()
    wait_until(lambda: is_up(node))
    assert node.is_running
    node.terminate()
    assert node.wait(10)
    assert (node.is_running, node.exit_code) == (False, -15)


def test_a_killed_process_can_be_started_again_and_its_output_is_kept(make):
    node = make(UNTIL_EOF)
    node.start()
    wait_until(lambda: is_up(node))
    first = node.pid
    node.kill()
    assert node.wait(10)
    assert node.exit_code == -9
    node.start()
    assert node.pid != first
    wait_until(lambda: node.log.read_text().count("up") == 2)


def test_a_running_process_is_not_started_twice(make):
    node = make(UNTIL_EOF)
    node.start()
    with pytest.raises(RuntimeError, match="desk-1 is running already"):
        node.start()


def test_a_frozen_process_lives_and_goes_on_when_thawed(make):
    node = make(UNTIL_EOF)
    node.start()
    node.freeze()
    process = psutil.Process(node.pid)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
    assert node.is_running
    node.thaw()
    wait_until(lambda: process.status() != psutil.STATUS_STOPPED)


def test_the_system_says_whether_a_process_stands_still(make):
    node = make(UNTIL_EOF)
    assert not node.is_stopped
    node.start()
    wait_until(lambda: is_up(node))
    assert not node.is_stopped
    node.freeze()
    wait_until(lambda: node.is_stopped)
    assert node.is_stopped  # to look does not take it away
    assert node.is_running
    node.thaw()
    wait_until(lambda: not node.is_stopped)
    node.freeze()
    wait_until(lambda: node.is_stopped)
    node.kill()
    assert node.wait(10)
    assert not node.is_stopped
    assert node.exit_code == -9


def test_a_frozen_process_is_terminated_too(make):
    node = make(UNTIL_EOF)
    node.start()
    node.freeze()
    node.terminate()
    assert node.wait(10)


def test_signals_to_a_process_that_is_not_running_are_ignored(make):
    node = make("pass")
    node.kill()
    node.start()
    assert node.wait(10)
    node.kill()
    node.freeze()
    node.thaw()
    node.terminate()
    assert node.exit_code == 0


def test_what_a_process_prints_is_in_its_log(make):
    node = make("import sys; print('one'); print('two', file=sys.stderr)")
    node.start()
    assert node.wait(10)
    assert sorted(node.log.read_text().split()) == ["one", "two"]


def test_leaving_the_block_ends_all_processes_even_stubborn_ones(make, monkeypatch):
    monkeypatch.setattr(processes, "END_TIMEOUT", 0.2)
    nodes = [make(UNTIL_EOF, "desk-1"), make(STUBBORN, "desk-2")]
    with running(nodes):
        wait_until(lambda: all(is_up(node) for node in nodes))
    assert [node.exit_code for node in nodes] == [-15, -9]


def test_a_spare_is_not_started_but_ended_if_somebody_has(make):
    node, spare, unused = make(UNTIL_EOF, "desk-1"), make(UNTIL_EOF, "desk-2"), make(UNTIL_EOF, "desk-3")
    with running([node], [spare, unused]):
        assert not spare.is_running
        spare.start()
        wait_until(lambda: is_up(spare))
    assert [node.exit_code, spare.exit_code, unused.exit_code] == [-15, -15, None]


def test_an_error_in_the_block_ends_all_processes(make):
    node = make(UNTIL_EOF)
    with pytest.raises(KeyboardInterrupt), running([node]):
        raise KeyboardInterrupt
    assert not node.is_running


def test_an_interrupt_while_processes_are_ending_kills_them(make):
    node = make(STUBBORN)
    ticks = 0

    def clock() -> float:
        nonlocal ticks
        ticks += 1
        if ticks == 2:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt), running([node], clock=clock):
        wait_until(lambda: is_up(node))
    assert node.exit_code == -9


def test_a_process_that_cannot_be_started_ends_those_that_were(make, tmp_path):
    good = make(UNTIL_EOF)
    bad = NodeProcess("desk-2", [str(tmp_path / "nowhere")], os.environ, tmp_path / "log")
    with pytest.raises(FileNotFoundError), running([good, bad]):
        pass
    assert good.exit_code is not None


def test_processes_end_when_their_parent_is_killed(make, tmp_path):
    parent = make(
        "import os, sys, time; from pathlib import Path;"
        "from catga_bus.demo.processes import NodeProcess;"
        f"child = NodeProcess('c', [sys.executable, '-c', {UNTIL_EOF!r}],"
        f" os.environ, Path({str(tmp_path / 'child.log')!r}));"
        "child.start(); print(child.pid, flush=True); time.sleep(600)"
    )
    parent.start()
    wait_until(lambda: parent.log.read_text().endswith("\n"))
    child = psutil.Process(int(parent.log.read_text()))
    parent.kill()
    assert parent.wait(10)
    assert child.wait(10) is None or not child.is_running()
