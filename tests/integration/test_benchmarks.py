"""Short runs of every benchmark: they work and measure something. How much is for the benchmarks to say."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvloop

from benchmarks.load import LoadClient
from benchmarks.processes import RoleProcess

ROOT = Path(__file__).parents[2]


def run_benchmark(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def measured(tmp_path, *arguments):
    file = tmp_path / "raw.json"
    done = run_benchmark(*arguments, "--quick", "--json", file)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.nats
def test_requests_are_measured_for_every_side_and_number_in_flight(tmp_path):
    text, raw = measured(tmp_path, "requests", "--seconds", "0.05", "--in-flight", "1,16")

    sides = ["catga", "bare", "faststream", "faststream-64"]
    rows = {(row["side"], row["in_flight"]): row for row in raw["measurements"]}
    assert sorted(rows) == sorted((side, level) for side in sides for level in (1, 16))
    assert all(row["requests_per_second"] > 0 for row in rows.values())
    assert all(row["others_percent"] >= 0 for row in rows.values())
    assert len(raw["busy_percent_before_round"]) == 1
    assert all(row["requests"] >= 4 * row["in_flight"] for row in rows.values())
    for side in sides:
        assert 0 < rows[side, 1]["p50_microseconds"] <= rows[side, 1]["p99_microseconds"]
    for title in ("one at a time, p50", "one at a time, p99", "1 in flight", "16 in flight", "best of"):
        assert sum(line.startswith(f"| {title}") for line in text.splitlines()) == 1
    assert "catga_bus / bare nats-py" in text
    assert "catga_bus / FastStream" in text
    assert raw["machine"]["nats_server"] in text
    assert raw["machine"]["loop"] == "uvloop"


@pytest.mark.nats
def test_commands_are_measured_beside_the_reference_of_each_comparison(tmp_path):
    sides = "send-16,enqueue-1,handled-16,faststream-handled"
    text, raw = measured(tmp_path, "commands", "--seconds", "0.05", "--only", sides)

    found = {name: {row["side"] for row in one["measurements"]} for name, one in raw["comparisons"].items()}
    assert found == {
        "result": {"request", "send-16"},
        "accepted": {"publish-async", "enqueue-1"},
        "handled": {"bare-handled", "faststream-handled", "handled-16"},
    }
    rates = [row["requests_per_second"] for one in raw["comparisons"].values() for row in one["measurements"]]
    assert all(rate > 0 for rate in rates)
    assert "send, 16 partitions / bare nats-py request, not stored" in text
    assert "Streams on 1 server, not written through to the disk." in text


@pytest.mark.nats
def test_commands_are_measured_on_servers_that_replicate(tmp_path):
    text, raw = measured(
        tmp_path, "commands", "--seconds", "0.05", "--only", "enqueue-16", "--replicas", "3", "--synced"
    )

    assert list(raw["comparisons"]) == ["accepted"]
    assert raw["settings"]["replicas"] == 3
    assert "Streams on 3 servers, written through to the disk." in text


@pytest.mark.nats
def test_events_are_measured_until_every_service_has_handled_them(tmp_path):
    text, raw = measured(tmp_path, "events", "--seconds", "0.05", "--services", "1,2", "--in-flight", "16")

    for services in ("1", "2"):
        rates = {row["side"]: row["requests_per_second"] for row in raw["services"][services]["measurements"]}
        assert sorted(rates) == [f"bare-{services}", f"catga-{services}"]
        assert all(rate > 0 for rate in rates.values())
    assert "services that handle every event" in text


@pytest.mark.nats
def test_takeovers_and_hand_overs_are_timed_and_all_effects_counted(tmp_path):
    text, raw = measured(tmp_path, "takeover", "--only", "kills,rolls")

    kills, rolls = raw["parts"]["kills"], raw["parts"]["rolls"]
    assert {move["kind"] for move in kills["moves"]} == {"kill", "hand-over"}
    assert {move["kind"] for move in rolls["moves"]} == {"hand-over"}
    for part in (kills, rolls):
        assert part["count"]["effects"] > 0
        assert not any(part["count"][name] for name in ("lost", "doubled", "out_of_order", "falls", "foreign"))
    assert "killed (SIGKILL), from the signal" in text
    assert "handed over in a rolling restart" in text


@pytest.mark.nats
def test_a_backlog_is_stored_and_worked_off(tmp_path):
    text, raw = measured(tmp_path, "backlog", "--commands", "5000")

    assert 0 < raw["first_handled_seconds"] <= raw["seconds"]
    assert raw["peak_rss_bytes"] >= raw["rss_bytes_before_start"] > 0
    assert "a node in front of 5,000 stored commands" in text


def test_a_warm_up_whose_time_is_over_before_it_begins_still_tells_a_rate():
    class Client(LoadClient):
        async def call(self):
            await asyncio.sleep(0)

    # A process that is not scheduled for a while finds its timer due when its tasks start; uvloop runs it first.
    assert uvloop.run(Client().calibrate(in_flight=4, seconds=0.0)) > 0


class Talker:
    """A role with much to say."""

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def talk(self, size_bytes):
        return bytes(size_bytes)


def test_what_a_role_returns_may_be_larger_than_the_buffer_of_a_pipe():
    with RoleProcess(f"{Talker.__module__}:Talker") as talker:
        assert len(talker.call("talk", timeout=30, size_bytes=10_000_000)) == 10_000_000


@pytest.mark.nats
def test_only_the_sides_asked_for_are_measured(tmp_path):
    text, raw = measured(
        tmp_path, "requests", "--seconds", "0.05", "--in-flight", "4", "--only", "bare", "--rounds", "2"
    )

    assert [row["round"] for row in raw["measurements"]] == [1, 2]
    assert {row["side"] for row in raw["measurements"]} == {"bare"}
    assert not any("FastStream" in line for line in text.splitlines() if line.startswith("|"))


@pytest.mark.nats
def test_memory_is_measured_in_five_parts(tmp_path):
    text, raw = measured(tmp_path, "memory", "--requests", "2,000")

    assert len(raw["samples"]) == 5
    assert all(sample["node_rss_bytes"] > 0 < sample["caller_rss_bytes"] for sample in raw["samples"])
    assert "Growth from" in text


@pytest.mark.nats
def test_an_idle_node_is_watched_beside_a_bare_connection(tmp_path):
    text, raw = measured(tmp_path, "idle", "--seconds", "0.2")

    assert [sample["process"] for sample in raw["samples"]] == [
        "node of catga_bus",
        "bare nats-py, for comparison",
    ]
    assert all(sample["rss_bytes"] > 0 <= sample["cpu_percent"] for sample in raw["samples"])
    assert "% of a core" in text


@pytest.mark.nats
def test_every_caller_of_an_overloaded_node_is_accounted_for(tmp_path):
    text, raw = measured(tmp_path, "overload", "--seconds", "1")

    flood = raw["flood"]
    assert flood["hanging"] == 0
    assert flood["sent"] == sum(flood["outcomes"].values()) > 0
    assert flood["outcomes"]["ok"] > 0
    assert raw["peak_rss_bytes"] >= raw["base_rss_bytes"] > 0
    assert "hanging" in text


@pytest.mark.nats
@pytest.mark.slow
def test_a_kill_a_freeze_and_a_rolling_restart_are_carried_out_and_seen(tmp_path):
    text, raw = measured(tmp_path, "failover", "--only", "kills,busy-freezes,rolls", "--rate", "50")

    assert list(raw["outages"]) == ["kill", "freeze, busy"]
    [kill], [freeze] = raw["outages"].values()
    assert freeze["on_node"]
    for fault in (kill, freeze):
        assert 0 < fault["suspect_seconds"] <= fault["faulted_seconds"]
        assert fault["calls"] > 0 < fault["p99_first"]
    assert list(raw["tolls"]) == ["kill", "freeze, busy", "rolling restart"]
    assert all(toll["calls"] == sum(toll["ends"].values()) > 0 for toll in raw["tolls"].values())
    assert len(raw["rolls"]["drain_seconds"]) == 3
    assert "kill: out of every live view" in text
    assert "calls on the node" in text


@pytest.mark.nats
@pytest.mark.slow
def test_the_server_is_killed_and_a_bare_queue_group_carries_the_load_too(tmp_path):
    text, raw = measured(tmp_path, "failover", "--only", "server,group", "--rate", "50")

    assert raw["server_restarts"]["nodes"] == 3
    assert all(seconds > 0 for seconds in raw["server_restarts"]["first_answer_seconds"])
    # One of three members stands still, and nobody takes the calls from it.
    assert 0 < raw["bare_queue_group_share_failed"][0] < 1
    assert list(raw["tolls"]) == ["server killed", "bare queue group, freeze"]
    assert "Bare queue group" in text


@pytest.mark.nats
def test_heartbeats_are_measured_by_the_number_of_nodes(tmp_path):
    text, raw = measured(tmp_path, "heartbeats", "--nodes", "1,5")

    assert [sample["nodes"] for sample in raw["samples"]] == [1, 5]
    alone, five = raw["samples"]
    assert 0 < alone["heard_per_second"] < five["heard_per_second"]
    assert all(sample["loop_cpu_percent"] > 0 < sample["beats_cpu_percent"] for sample in raw["samples"])
    assert "beats heard/s" in text


@pytest.mark.nats
def test_the_hot_path_is_measured_beside_another_commit(tmp_path):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode != 0:
        pytest.skip("this is no git repository")

    # The commit itself: a clone need not have the earlier ones.
    text, raw = measured(tmp_path, "hot-path", "--before", "HEAD", "--seconds", "0.05", "--in-flight", "1,16")

    assert {row["side"] for row in raw["measurements"]} == {"now", "no-breaker", "before"}
    assert all(row["requests_per_second"] > 0 for row in raw["measurements"])
    assert f"at {raw['settings']['before'][:8]}" in text


def test_without_a_server_a_run_fails_within_seconds_and_names_the_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_benchmark("requests", "--url", f"nats://{address}", "--quick", timeout=30)

    assert done.returncode == 2
    assert address in done.stderr
    assert "docker compose up" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_a_nats_server_is_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # A run that never connects must fail this test, not hold it up.
        listener.settimeout(30)

        def greet():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        greeter = threading.Thread(target=greet)
        greeter.start()
        port = listener.getsockname()[1]
        done = run_benchmark("idle", "--url", f"nats://127.0.0.1:{port}", "--quick", timeout=30)
        greeter.join()

    assert done.returncode == 2
    assert "no NATS server" in done.stderr
    assert "SSH-2.0" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["requests", "--only", "catga,kafka"], "'kafka' is none of catga, bare"),
        (["requests", "--in-flight", "1,0"], "'0' is not a whole number above zero"),
        (["requests", "--seconds", "-1"], "'-1' is not a number above zero"),
        (["requests", "--url", "memory://x"], "'memory://x' is not an address like nats://"),
        (["requests", "--url", "nats://here:port"], "has no usable port"),
        (["failover", "--only", "kills,floods"], "'floods' is none of kills, freezes"),
        (["failover", "--kills", "0"], "'0' is not a whole number above zero"),
        (["heartbeats", "--nodes", "3,none"], "'none' is not a whole number above zero"),
        (["hot-path", "--before", "no-such-commit"], "--before: "),
        (["hot-path", "--before=--output=x"], "--before: "),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_options_that_cannot_be_are_refused_with_what_is_wanted(arguments, said):
    done = run_benchmark(*arguments, timeout=30)

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
