"""The demo as people run it: real processes, a real server, and nothing left behind."""

import asyncio
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from catga_bus.bus import Bus
from catga_bus.clock import monotonic
from catga_bus.demo.board import DeparturesBoard
from catga_bus.demo.cleanup import remove_streams
from catga_bus.demo.data import SHIPPED
from catga_bus.demo.effects import create_effect_log, read_effects
from catga_bus.demo.ledger import ExecutionLog, read_executions
from catga_bus.demo.node import SERVICE, open_desk
from catga_bus.demo.options import BUS_OPTIONS, inbox_at
from catga_bus.embedded import EmbeddedServer
from catga_bus.transport.carriers import make_jetstream

pytestmark = pytest.mark.nats

PATIENCE = 120.0  # seconds until a run counts as hanging; a good one takes five, with faults about fifteen


class Demo:
    """One run of the demo in a process of its own."""

    def __init__(self, directory: Path, *words: str, program: str = "") -> None:
        self.kept = directory / "kept"
        start = ["-c", program] if program else ["-m", "catga_bus.demo"]
        environment = {**os.environ, "TMPDIR": str(directory)}
        self.process = subprocess.Popen(
            [sys.executable, *start, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.family: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remember the processes that belong to the run now."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self.family.update((child.pid, child) for child in children)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended too early: {self.process.communicate()}"
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.02)
        self.look()

    def wait_for_executions(self, count: int) -> None:
        log = self.kept / "executions.jsonl"
        self.wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= count)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def survivors(self) -> list[psutil.Process]:
        """Return what is left of the run, after giving it time to end."""
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=20)
        return alive

    def close(self) -> None:
        for process in [*self.family.values(), self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if not self.process.stdout.closed:
            self.process.communicate(timeout=PATIENCE)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    runs: list[Demo] = []

    def start(*words: str, program: str = "", keep: bool = True) -> Demo:
        kept = ["--keep", str(tmp_path / "kept")] if keep else []
        runs.append(Demo(tmp_path, *words, *kept, program=program))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first 1,500 flights."""
    path = tmp_path_factory.mktemp("data") / "flights.csv"
    path.write_bytes(b"".join(gzip.decompress(SHIPPED.read_bytes()).splitlines(True)[:1_501]))
    return str(path)


def changed(change: str) -> str:
    """Return a program that runs the demo with one thing in it changed."""
    return f"""
import sys
from catga_bus.demo import __main__, app
real_effects, real_read, real_command = app.read_effects, app.read_executions, app.command
{change}
sys.exit(__main__.main())
"""


def test_three_nodes_have_every_effect_once_and_in_order(demo, small):
    run = demo("--data", small, "--rate", "0", "--json")
    run.wait_for_executions(1)
    code, out, err = run.end()
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["success"] is True
    assert report["flights"] == report["stored"] == 1_500
    verdict = report["verdict"]
    assert verdict["effects"] == {"written": 1_500, "lost": 0, "out_of_order": 0, "doubled": 0, "foreign": 0}
    assert verdict["counted"] == verdict["expected"]
    assert verdict["expected"] == {"flights": 1_500, "cancelled": 12, "delay_minutes": 17_657, "miles": 1_587_584}
    assert report["announcements"]["written"] == report["late_flights"] == 98
    assert {node["node"] for node in report["nodes"]} == {f"flight-desk-{n}" for n in (1, 2, 3)}
    assert len(report["owners"]) == 16
    assert set(report["owners"]) <= {node["node"] for node in report["nodes"]}  # shares may still be on their way
    assert sum(node["effects"] for node in report["nodes"]) == len(read_effects(run.kept / "effects.db")) == 1_500
    assert report["runs"]["executions"] == len(read_executions(run.kept / "executions.jsonl"))
    assert run.survivors() == []


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 3])
def test_a_node_is_killed_one_frozen_one_rolled_and_no_effect_is_lost_doubled_or_out_of_order(demo, small, nodes):
    run = demo("--data", small, "--rate", "120", "--nodes", str(nodes), "--json")
    code, out, err = run.end()
    report = json.loads(out)
    assert (report["problems"], code, err) == ([], 0, "")
    assert report["verdict"]["effects"] == {
        "written": 1_500, "lost": 0, "out_of_order": 0, "doubled": 0, "foreign": 0,
    }  # fmt: skip
    assert report["announcements"] == {"written": 98, "lost": 0, "out_of_order": 0, "doubled": 0, "foreign": 0}
    killed, frozen, rolled = report["faults"]
    assert (killed["kind"], frozen["kind"], rolled["kind"]) == ("killed", "frozen", "rolled")
    assert killed["node"] not in (frozen["node"], rolled["node"])
    # Orders of magnitude only: a second and a half is aimed at, and this machine may be busy.
    assert killed["noticed_after"] < 3
    assert frozen["noticed_after"] < 3 <= frozen["mended_after"]
    assert all(0 < seconds < 10 for fault in report["faults"][:2] for seconds in fault["moved"])
    assert [one["node"] for one in report["newcomers"]] == [f"flight-desk-{nodes + n}" for n in (1, 2)]
    effects = {node["node"]: node["effects"] for node in report["nodes"]}
    assert effects[killed["node"]] > 0
    assert effects[report["newcomers"][0]["node"]] > 0
    assert report["moves"] >= len(killed["moved"]) + len(frozen["moved"]) + len(rolled["moved"])
    assert rolled["node"] not in report["owners"]
    assert run.survivors() == []


async def test_a_paced_run_on_a_running_server_tells_its_progress_and_leaves_nothing_there(demo, small, make_transport):
    async with EmbeddedServer() as server:
        run = demo("--data", small, "--rate", "500", "--nodes", "2", "--no-faults", "--url", server.url, keep=False)
        code, out, err = await asyncio.to_thread(run.end)
        assert await streams_at(make_transport, server.url) == []
    assert code == 0
    assert out.splitlines()[-1] == "verdict: 1,500 effects, 0 lost, 0 out of order per aircraft, 0 doubled"
    assert " of 1,500 " in err
    assert re.search(r"\[[12·]{4} [12·]{4} [12·]{4} [12·]{4}\]", err)
    assert not list(run.kept.parent.glob("catga-demo-*"))


async def streams_at(make_transport, url: str) -> list[str]:
    transport, _ = make_transport(url)
    await transport.connect()
    jetstream = make_jetstream(transport, monotonic)
    try:
        return await jetstream.stream_names()
    finally:
        await jetstream.close()


async def test_the_streams_of_one_run_are_removed_and_no_others(make_transport, tmp_path):
    async with EmbeddedServer() as server:
        for namespace in ("one", "other"):
            create_effect_log(tmp_path / f"{namespace}.db")
            desk = Bus(
                SERVICE,
                url=server.url,
                namespace=namespace,
                inbox=inbox_at(tmp_path / f"{namespace}.db"),
                **BUS_OPTIONS,
            )
            with ExecutionLog(tmp_path / "log") as log:
                open_desk(desk, log)
                async with desk, DeparturesBoard(server.url, namespace, tmp_path / f"{namespace}-board.db").bus:
                    pass
        before = await streams_at(make_transport, server.url)
        assert await remove_streams(server.url, "one") == len(before) / 2
        left = await streams_at(make_transport, server.url)
        assert sorted(left) == sorted(name for name in before if "other" in name)
        assert await remove_streams(server.url, "one") == 0


@pytest.mark.parametrize(
    ("change", "problem", "verdict"),
    [
        ("[:-1]", "1 flights have no effect", "1,499 effects, 1 lost, 0 out of order per aircraft, 0 doubled: WRONG"),
        (
            "[:1] + real_effects(path)",
            "1 effects are of flights that had one",
            "1,501 effects, 0 lost, 0 out of order per aircraft, 1 doubled: WRONG",
        ),
    ],
)
def test_a_spoiled_effect_log_ends_with_1_and_names_the_evidence(demo, small, change, problem, verdict):
    program = changed(f"app.read_effects = lambda path: real_effects(path){change}")
    run = demo("--data", small, "--rate", "0", program=program)
    code, out, err = run.end()
    assert code == 1
    assert f"problem: {problem}" in out
    assert out.splitlines()[-1] == f"verdict: {verdict}"
    assert str(run.kept / "flight-desk-1.log") in err
    assert str(run.kept / "effects.db") in err
    assert str(run.kept / "executions.jsonl") in err


def test_effects_in_another_order_end_with_1(demo, small):
    program = changed("app.read_effects = lambda path: real_effects(path)[::-1]")
    code, out, _ = demo("--data", small, "--rate", "0", program=program).end()
    assert code == 1
    assert re.search(r"verdict: 1,500 effects, 0 lost, [1-9]\d* out of order per aircraft, 0 doubled: WRONG", out)


def test_a_damaged_line_in_the_log_ends_with_1(demo, small):
    program = changed("app.read_executions = lambda path: (path.open('a').write('garbage\\n'), real_read(path))[1]")
    code, _, err = demo("--data", small, "--rate", "0", program=program).end()
    assert code == 1
    assert "line 1501: not an execution" in err


def test_a_node_that_does_not_start_ends_with_3_and_shows_what_it_said(demo, small):
    program = changed("app.command = lambda *_: [sys.executable, '-c', 'raise SystemExit(\"no luck\")']")
    run = demo("--data", small, program=program)
    code, _, err = run.end()
    assert code == 3
    assert "error: node flight-desk-1 ended before it was ready" in err
    assert str(run.kept / "flight-desk-1.log") in err
    assert "no luck" in err


def test_a_server_that_is_not_there_ends_with_3_and_the_address(demo, small):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    run = demo("--data", small, "--url", f"nats://{address}")
    code, out, err = run.end()
    assert (code, out) == (3, "")
    assert address in err
    assert "Traceback" not in err
    assert run.survivors() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere.csv"], "nowhere.csv: cannot be read: No such file or directory"),
        (["--rate", "-1"], "rate must be 0 (flat out) to 1,000,000 flights per second, got -1.0"),
        (["--nodes", "0"], "nodes must be 1 to 64, got 0"),
        (["--in-flight", "5000"], "in_flight must be 1 to 4,096, got 5000"),
        (
            ["--faults", "--rate", "0"],
            "faults need a rate above 0 and 2 nodes or more, got rate 0.0 and 3 nodes; or say --no-faults",
        ),
        (
            ["--faults", "--nodes", "1"],
            "faults need a rate above 0 and 2 nodes or more, got rate 2000.0 and 1 nodes; or say --no-faults",
        ),
    ],
)
def test_bad_input_ends_with_2_and_one_line(demo, words, said):
    code, out, err = demo(*words).end()
    assert (code, out) == (2, "")
    assert err == f"error: {said}\n"


def test_a_bad_field_ends_with_2_and_its_place(demo, tmp_path):
    path = tmp_path / "flights.csv"
    head = gzip.decompress(SHIPPED.read_bytes()).splitlines(keepends=True)[:3]
    path.write_bytes(b"".join(head).replace(b",1416", b",far"))
    code, _, err = demo("--data", str(path)).end()
    assert code == 2
    assert f"{path}, line 3, column distance: expected whole miles" in err


def test_a_directory_that_is_not_empty_is_not_overwritten(demo, small, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "executions.jsonl").write_text("[]")
    code, _, err = demo("--data", small).end()
    assert code == 2
    assert "is not empty" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_behind(demo, number):
    run = demo("--rate", "300")
    run.wait_for_executions(50)
    assert len(run.family) >= 5  # three nodes, the server and its supervisor
    run.process.send_signal(number)
    code, out, err = run.end()
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: server and nodes have been ended"
    assert run.survivors() == []


def test_a_run_that_is_interrupted_while_a_node_is_frozen_leaves_no_process_behind(demo, small):
    run = demo("--data", small, "--rate", "200")
    run.wait_for_executions(50)
    run.wait_until(lambda: any(is_stopped(process) for process in run.family.values()))
    run.process.send_signal(signal.SIGTERM)
    code, out, _ = run.end()
    assert (code, out) == (130, "")
    assert run.survivors() == []


def is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:  # killed, as one of them is
        return False


def test_a_killed_run_leaves_no_process_behind(demo):
    run = demo("--rate", "300")
    run.wait_for_executions(50)
    run.process.kill()
    assert run.survivors() == []


def test_a_node_that_dies_is_told_and_the_run_still_ends(demo, small):
    run = demo("--data", small, "--rate", "500", "--no-faults")
    run.wait_for_executions(100)
    victim = next(p for p in run.family.values() if "flight-desk-2" in p.cmdline())
    victim.kill()
    code, out, err = run.end()
    assert code == 1
    assert "problem: node flight-desk-2 did not tell its totals" in out
    assert "verdict: 1,500 effects, 0 lost, 0 out of order per aircraft, 0 doubled: see the problems" in out
    assert str(run.kept / "flight-desk-2.log") in err
    assert run.survivors() == []
