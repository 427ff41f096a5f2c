"""What the page on guarantees shows is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT.joinpath("docs/guarantees.md").read_text()
PROGRAMS = {
    name: text
    for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for name in re.findall(r"^# (\w+\.py)\n", text)
}


@pytest.mark.parametrize(("name", "printed"), [("ledger.py", ["-500"]), ("fence.py", ["paid", "refused"])])
def test_the_programs_print_what_the_page_says(tmp_path: Path, name: str, printed: list[str]) -> None:
    tmp_path.joinpath(name).write_text(PROGRAMS[name])
    ran = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.split()) == (0, printed), ran.stderr


def test_every_link_within_the_page_leads_somewhere() -> None:
    titles = [re.sub(r"[^a-z -]", "", title.lower()) for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)]
    assert set(re.findall(r"\]\(#([a-z-]+)\)", PAGE)) == {title.replace(" ", "-") for title in titles}


def test_every_program_is_run() -> None:
    assert sorted(PROGRAMS) == ["fence.py", "ledger.py"]
    assert PAGE.count("```python") == 2
