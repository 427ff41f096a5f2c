"""What the README shows is run."""

import contextlib
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT.joinpath("README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
FILES = {
    match.group(1): block
    for language, block in BLOCKS
    if language == "python" and (match := re.match(r"# (\w+\.py)\n", block))
}


def catga(*arguments: str, url: str, at: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "catga_bus", *arguments],
        cwd=at,
        env={"CATGA_URL": url, "PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(at)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run(program: str, *, url: str, at: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, program],
        cwd=at,
        env={"CATGA_URL": url, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the README, as a reader would type them."""
    for name, text in FILES.items():
        tmp_path.joinpath(name).write_text(text)
    return tmp_path


def test_every_python_block_is_a_file_that_the_tests_below_run() -> None:
    assert sorted(FILES) == ["ask.py", "billing.py", "more.py", "pay.py", "shop.py"]
    assert sum(language == "python" for language, _ in BLOCKS) == len(FILES)


@pytest.mark.nats
def test_the_first_service_answers_as_shown(folder: Path, server_url: str) -> None:
    node = subprocess.Popen(
        [sys.executable, "-m", "catga_bus", "run", "shop:bus", "--url", server_url],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30  # for the node to be there; a reader would look at its terminal
        sent = catga("send", "Quote", '{"sku": "sku-9"}', url=server_url, at=folder)
        while sent.returncode and time.monotonic() < deadline:
            sent = catga("send", "Quote", '{"sku": "sku-9"}', url=server_url, at=folder)
        assert (sent.returncode, sent.stdout.strip()) == (0, "1250"), sent.stderr
        asked = run("ask.py", url=server_url, at=folder)
        assert (asked.returncode, asked.stdout.strip()) == (0, "12.50"), asked.stderr
    finally:
        node.terminate()
        assert node.wait(30) == 0


@pytest.mark.nats
def test_commands_are_paid_as_shown(folder: Path, server_url: str) -> None:
    billing, store = folder / "billing.py", folder / "billing.db"
    small = "command_max_bytes=16_777_216, event_max_bytes=16_777_216, dead_letter_max_bytes=16_777_216"
    billing.write_text(billing.read_text().replace('sqlite:///tmp/billing.db"', f'sqlite://{store}", {small}'))
    node = subprocess.Popen(
        [sys.executable, "-m", "catga_bus", "run", "billing:bus", "--url", server_url],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        paid = run("pay.py", url=server_url, at=folder)
        while paid.returncode and time.monotonic() < deadline:
            paid = run("pay.py", url=server_url, at=folder)
        first, second = paid.stdout.splitlines()
        assert (first[:7], second) == ("record ", "Ok(value=700)"), paid.stderr
        with contextlib.closing(sqlite3.connect(store)) as database:
            rows = database.execute("SELECT account, cents FROM debits ORDER BY rowid").fetchall()
        assert rows == [("a-1", 500), ("a-1", 700)]
    finally:
        node.terminate()
        assert node.wait(60) == 0


async def test_the_longer_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("CATGA_URL", "memory://readme")
    import more  # type: ignore[import-not-found]

    async with more.bus as bus:
        assert len((await bus.send(more.Order("sku-9"))).unwrap()) > 16
        assert (await bus.send(more.Report("Monday"))).unwrap() == f"Monday at {bus.node_id}"
        await bus.broadcast(more.Closing())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert ROOT.joinpath(link).exists()


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`([a-z_]+/[a-z_]*\.py|[a-z_]+\.py|[a-z]+/)`", README))))
def test_places_that_are_named_exist(place: str) -> None:
    assert ROOT.joinpath("catga_bus", place).exists() or ROOT.joinpath(place).exists()
