"""The command line as a shell uses it: real processes, signals and a real server."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from catga_bus.embedded import EmbeddedServer
from tests.commands import DEADLINE, Catga, catga, end_all, wait_until

pytestmark = pytest.mark.nats

leftovers = pytest.fixture(autouse=True)(end_all)

SHOP = """
import asyncio, os
from pathlib import Path
from catga_bus import Bus, Context, Err, Event, Request

bus = Bus("shop", namespace="cli-test")
LOG = Path("seen.log")


def note(text):
    with LOG.open("a") as log:
        log.write(text + "\\n")


class Quote(Request[dict[str, int | str]]):
    sku: str
    count: int = 1


class Slow(Request[str]):
    pass


class Tick(Event, durable=False):
    n: int



@bus.handler
async def quote(request: Quote, ctx: Context) -> dict[str, int | str] | Err:
    if request.sku == "none":
        return Err("OUT_OF_STOCK", "none left", {"sku": "none"})
    if request.sku == "bug":
        raise KeyError("bug")
    return {"cents": 120 * request.count, "node": ctx.node}


@bus.handler
async def slow(request: Slow) -> str:
    note("slow began")
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    return "done"


@bus.handler
async def tick(event: Tick, ctx: Context) -> None:
    note(f"{ctx.node} tick {event.n}")
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with EmbeddedServer() as server:
        yield server.url


@contextlib.contextmanager
def serving(cwd: Path, url: str, *arguments: str) -> Iterator[Catga]:
    node = Catga(cwd, "run", "shop:bus", "--url", url, *arguments)
    try:
        node.until("serves")
        yield node
    finally:
        if node.process.poll() is None:
            code, _, err = node.end(signal.SIGTERM)
            assert code == 0, err


def seen(cwd: Path) -> list[str]:
    log = cwd / "seen.log"
    return sorted(log.read_text().splitlines()) if log.exists() else []


NAMESPACE = ("--namespace", "cli-test")


async def test_a_request_is_answered_with_and_without_its_class(shop: Path, url: str) -> None:
    with serving(shop, url, "--node-id", "shop-1"):
        to = ("--url", url, *NAMESPACE)
        for module in ((), ("-m", "shop")):
            code, out, err = catga(shop, "send", "Quote", '{"sku": "a", "count": 2}', *to, *module)
            assert (code, err) == (0, "")
            assert json.loads(out) == {"cents": 240, "node": "shop-1"}
            assert out.count("\n") > 1, "indented, for people"
            code, out, err = catga(shop, "send", "Quote", '{"sku": "a"}', *to, *module, "--json")
            assert (code, err) == (0, "")
            assert json.loads(out) == {"ok": True, "value": {"cents": 120, "node": "shop-1"}}
            assert out.count("\n") == 1


async def test_json_comes_from_stdin_for_a_dash(shop: Path, url: str) -> None:
    with serving(shop, url):
        code, out, _ = catga(shop, "send", "Quote", "-", "--url", url, *NAMESPACE, stdin='{"sku":\n"a"}\n')
        assert code == 0
        assert json.loads(out)["cents"] == 120


async def test_a_refusal_ends_with_1_and_says_why(shop: Path, url: str) -> None:
    with serving(shop, url):
        to = ("--url", url, *NAMESPACE)
        for module in ((), ("-m", "shop")):
            code, out, err = catga(shop, "send", "Quote", '{"sku": "none"}', *to, *module)
            assert (code, out) == (1, "")
            assert err.startswith("error: OUT_OF_STOCK: none left (refused")
            code, out, err = catga(shop, "send", "Quote", '{"sku": "none"}', *to, *module, "--json")
            assert (code, err) == (1, "")
            facts = json.loads(out)
            assert facts["ok"] is False
            assert facts["code"] == "OUT_OF_STOCK"
            assert facts["details"] == {"sku": "none"}
            assert facts["outcome"] == "refused"


async def test_a_handler_that_raises_ends_the_call_with_1(shop: Path, url: str) -> None:
    with serving(shop, url):
        to = ("--url", url, *NAMESPACE, "--json")
        for module in ((), ("-m", "shop")):
            code, out, _ = catga(shop, "send", "Quote", '{"sku": "bug"}', *to, *module)
            assert code == 1
            assert json.loads(out)["code"] == "HANDLER_ERROR"
            assert json.loads(out)["outcome"] == "failed"


async def test_a_message_that_does_not_fit_its_class_names_the_field(shop: Path, url: str) -> None:
    to = ("--url", url, *NAMESPACE)
    code, _, err = catga(shop, "send", "Quote", '{"sku": 7}', *to, "-m", "shop")
    assert code == 2
    assert err == "error: the JSON is no Quote: field `sku`: expected `str`, got `int`\n"
    with serving(shop, url):
        code, _, err = catga(shop, "send", "Quote", '{"sku": 7}', *to)
        assert code == 1
        assert err.startswith("error: INVALID_MESSAGE: ")
        assert "expected `str`, got `int`" in err


async def test_a_message_that_no_gate_would_let_in_does_not_leave(shop: Path, url: str) -> None:
    body = '{"sku": "a", "more": [' + "[]," * 20_000 + "[]]}"
    code, _, err = catga(shop, "send", "Quote", "-", "-m", "shop", "--url", url, *NAMESPACE, stdin=body)
    assert code == 2
    assert "20003 arrays and objects; the limit is 10000" in err


async def test_a_request_that_nobody_handles_ends_with_1(shop: Path, url: str) -> None:
    for module in ((), ("-m", "shop")):
        code, out, _ = catga(shop, "send", "Quote", '{"sku": "a"}', "--url", url, *NAMESPACE, *module, "--json")
        assert code == 1
        assert json.loads(out)["code"] == "NO_HANDLER"
        assert json.loads(out)["outcome"] == "not_run"


async def test_an_answer_that_does_not_come_ends_with_1(shop: Path, url: str) -> None:
    with serving(shop, url):
        for module in ((), ("-m", "shop")):
            to = ("--url", url, *NAMESPACE, *module)
            code, out, _ = catga(shop, "send", "Slow", "--timeout", "0.3", "--json", *to)
            assert code == 1
            assert json.loads(out)["code"] == "TIMEOUT"
        (shop / "go").touch()


async def test_a_server_that_is_not_there_ends_with_3_and_its_address(shop: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        url = f"nats://127.0.0.1:{unused.getsockname()[1]}"
        commands = [
            ("send", "Quote", '{"sku": "a"}'),
            ("send", "Quote", '{"sku": "a"}', "-m", "shop"),
            ("publish", "Tick", '{"n": 1}'),
            ("broadcast", "Tick", '{"n": 1}', "-m", "shop"),
            ("run", "shop:bus"),
        ]
        started = [Catga(shop, *command, "--url", url) for command in commands]
        for process in started:
            code, out, err = process.end()
            assert (code, out) == (3, "")
            last = err.splitlines()[-1]
            assert last.startswith("error: ")
            assert url.removeprefix("nats://") in last
            assert "Traceback" not in err
            if process.arguments[0] != "run":
                assert err.count("\n") == 1


async def test_the_address_comes_from_the_environment(shop: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "catga_bus", "send", "Quote", '{"sku": "a"}'],
        cwd=shop,
        env=os.environ | {"CATGA_URL": url},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: NO_HANDLER: nobody handles Quote")


async def test_a_tick_reaches_one_node_and_a_broadcast_reaches_all(shop: Path, url: str) -> None:
    to = ("--url", url, *NAMESPACE)
    with serving(shop, url, "--node-id", "n1"), serving(shop, url, "--node-id", "n2"):
        assert catga(shop, "broadcast", "Tick", '{"n": 1}', *to)[0] == 0
        assert catga(shop, "broadcast", "Tick", '{"n": 2}', *to, "-m", "shop")[0] == 0
        wait_until(lambda: len(seen(shop)) == 4, "both broadcasts at both nodes")
        assert seen(shop) == ["n1 tick 1", "n1 tick 2", "n2 tick 1", "n2 tick 2"]
        code, out, _ = catga(shop, "publish", "Tick", '{"n": 3}', *to, "--json")
        assert code == 0
        assert json.loads(out) == {"ok": True, "type": "Tick", "subject": "cli-test.tick.Tick"}
        code, out, _ = catga(shop, "publish", "Tick", '{"n": 4}', *to, "-m", "shop")
        assert code == 0
        assert out == "published Tick; nobody confirms that it was handled\n"
        wait_until(lambda: len(seen(shop)) == 6, "each tick at one node")
        assert sorted(line.split()[-1] for line in seen(shop)) == ["1", "1", "2", "2", "3", "4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_node_finish_what_runs(shop: Path, url: str, number: signal.Signals) -> None:
    with serving(shop, url) as node:
        asking = Catga(shop, "send", "Slow", "--url", url, *NAMESPACE, "--timeout", "30")
        wait_until(lambda: seen(shop) == ["slow began"], "the request runs")
        node.process.send_signal(number)
        node.until("draining")
        (shop / "go").touch()
        assert asking.end()[:2] == (0, '"done"\n')
        assert node.end()[0] == 0


async def test_a_second_signal_ends_a_node_at_once(shop: Path, url: str) -> None:
    with serving(shop, url) as node:
        asking = Catga(shop, "send", "Slow", "--url", url, *NAMESPACE, "--timeout", "1")
        wait_until(lambda: seen(shop) == ["slow began"], "the request runs")
        node.process.send_signal(signal.SIGTERM)
        node.until("draining")
        code, _, err = node.end(signal.SIGTERM)
        assert code == 1  # something was left unfinished
        assert "second signal" in err
        assert asking.end()[0] == 1


async def test_ctrl_c_ends_a_waiting_call_with_130(shop: Path, url: str) -> None:
    with serving(shop, url):
        for module in ((), ("-m", "shop")):
            (shop / "seen.log").unlink(missing_ok=True)
            asking = Catga(shop, "send", "Slow", "--url", url, *NAMESPACE, "--timeout", "30", *module)
            wait_until(lambda: seen(shop) == ["slow began"], "the request runs")
            assert asking.end(signal.SIGINT) == (130, "", "\ninterrupted\n")
        (shop / "go").touch()


async def test_run_says_where_an_import_fails(shop: Path) -> None:
    (shop / "broken.py").write_text("import shop\nshop.bus.handler(lambda: None)\n")
    code, out, err = catga(shop, "run", "broken:bus")
    assert (code, out) == (2, "")
    assert err.startswith("error: 'broken' cannot be imported: broken.py:2: ")
    assert err.count("\n") == 1
    code, _, err = catga(shop, "run", "broken:bus", "--debug")
    assert code == 2
    assert "Traceback" in err


async def test_run_names_the_bus_that_was_meant(shop: Path) -> None:
    code, _, err = catga(shop, "run", "shop:quote")
    assert code == 2
    assert "'shop:quote' is not a Bus, it is of type 'function'; the module has shop:bus" in err


async def test_run_refuses_a_url_or_a_node_id_that_no_bus_takes(shop: Path) -> None:
    for option, value in (("--url", " , "), ("--node-id", ""), ("--node-id", "n" * 1_000)):
        code, out, err = catga(shop, "run", "shop:bus", option, value)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1


async def test_run_logs_what_is_asked_for(shop: Path, url: str) -> None:
    node = Catga(shop, "run", "shop", "--url", url, "--log-level", "error")
    to = ("--url", url, *NAMESPACE)
    wait_until(lambda: catga(shop, "send", "Quote", '{"sku": "a"}', *to)[0] == 0, "it serves")
    assert node.end(signal.SIGTERM) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_up_serves_until_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    server = Catga(tmp_path, "up", "--port", "0", "--json", "--store", "data")
    assert server.process.stdout is not None
    facts = json.loads(server.process.stdout.readline())
    assert facts["store"] == str(tmp_path / "data")
    assert facts["temporary"] is False
    code, _, err = catga(tmp_path, "publish", "Tick", "--url", facts["url"])
    assert (code, err) == (0, "")
    assert server.end(number) == (0, "", "")
    wait_until(lambda: not Path(f"/proc/{facts['pid']}").exists(), "the server ends")


async def test_up_says_how_to_connect(tmp_path: Path) -> None:
    server = Catga(tmp_path, "up", "--port", "0")
    assert server.process.stdout is not None
    lines = [server.process.stdout.readline() for _ in range(5)]
    url = lines[0].split()[4]
    assert lines[0].startswith(f"nats-server is up at {url} (process ")
    assert lines[1:] == [
        "  store      temporary, removed at the end\n",
        f'  your code  Bus("my-service", url="{url}")\n',
        f"  the shell  export CATGA_URL={url}\n",
        "Ctrl-C ends it\n",
    ]
    code, out, err = server.end(signal.SIGINT)
    assert (code, out, err) == (0, "ended\n", "")


async def test_up_on_a_port_that_is_taken_ends_with_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = catga(tmp_path, "up", "--port", str(port))
    assert code == 2
    assert err.startswith(f"error: port {port} of 127.0.0.1 is already in use")


async def test_up_on_a_store_that_is_served_names_its_server(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "data") as server:
        code, _, err = await asyncio.to_thread(catga, tmp_path, "up", "--port", "0", "--store", "data")
        assert code == 2
        assert f"is already served at {server.url}" in err


async def test_up_ends_with_3_when_its_server_dies(tmp_path: Path) -> None:
    server = Catga(tmp_path, "up", "--port", "0", "--json")
    assert server.process.stdout is not None
    facts = json.loads(server.process.stdout.readline())
    os.kill(facts["pid"], signal.SIGKILL)
    code, _, err = server.end()
    assert code == 3
    assert err == "error: the server has ended by itself\n"


async def test_up_without_a_binary_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATGA_NATS_SERVER", str(tmp_path / "gone"))
    code, _, err = catga(tmp_path, "up", "--port", "0")
    assert code == 2
    assert "is not there; name one in CATGA_NATS_SERVER" in err


async def test_a_run_with_an_embedded_store_is_found_by_send(shop: Path) -> None:
    url = f"embedded://{shop / 'data'}"
    with serving(shop, url):
        code, out, _ = catga(shop, "send", "Quote", '{"sku": "a"}', "--url", url, *NAMESPACE)
        assert code == 0
        assert json.loads(out)["cents"] == 120


async def test_demo_passes_its_options_on(tmp_path: Path) -> None:
    code, out, err = catga(tmp_path, "demo", "--data", "nothing.csv")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "nothing.csv" in err
    assert catga(tmp_path, "demo", "--nodes", "0")[0] == 2
