"""Runs the type checkers over `api.py`: what users write must infer, and what they get wrong must be found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 300.0  # a checker without its cache, on a busy machine of two cores


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_mypy_strict_accepts_the_api_and_finds_its_misuse() -> None:
    # silent: the package itself is checked by `mypy` alone; here only what its users see counts.
    done = run("mypy", "--strict", "--follow-imports=silent", str(HERE / "api.py"))

    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_strict_accepts_the_api_and_finds_its_misuse() -> None:
    if (probe := run("pyright", "--version")).returncode != 0:
        reason = f"pyright does not run here (it needs node): {probe.stderr.strip()[-300:]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    done = run("pyright", "--project", str(HERE), "--pythonpath", sys.executable)

    assert done.returncode == 0, done.stdout + done.stderr
