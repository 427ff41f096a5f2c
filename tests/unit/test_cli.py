import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from catga_bus.cli import main
from catga_bus.cli.exits import ExitCode, exit_code_of, facts_of, text_of
from catga_bus.cli.root import catga
from catga_bus.errors import (
    AuthenticationError,
    BusStateError,
    CatgaError,
    ConfigurationError,
    DeadlineExceededError,
    DisconnectedError,
    NoHandlerError,
    PermissionDeniedError,
    Refused,
    RegistrationError,
)

COMMANDS = sorted(catga.commands)
WAYS: dict[str, click.Command] = {  # every command with those inside it: "dlq ls"
    f"{name} {inner}" if inner else name: command
    for name in COMMANDS
    for inner, command in [("", catga.commands[name]), *getattr(catga.commands[name], "commands", {}).items()]
}


def run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys) == (0, f"catga {version('catga-bus')}\n", "")


def test_the_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(["--help"], capsys)
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in text
    for exit_code in (0, 1, 2, 3, 70, 130):
        assert f"\n    {exit_code:>3}  " in text


@pytest.mark.parametrize("command", WAYS)
def test_the_help_of_a_command_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run([*command.split(), "--help"], capsys)
    assert code == 0
    assert "Examples:" in text
    assert f"\n    catga {command}" in text


@pytest.mark.parametrize("command", [name for name in WAYS if name not in ("run", "dlq", "events")])
def test_every_command_that_prints_data_can_print_json(command: str) -> None:
    assert "--json" in [name for option in WAYS[command].params for name in option.opts]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["send"], "Missing argument 'TYPE'"),
        (["send", "Quote", "{}", "--timeout", "0"], "Invalid value for '--timeout'"),
        (["send", "Quote", "{}", "--nope"], "No such option"),
        (["up", "--port", "70000"], "Invalid value for '--port'"),
        (["run"], "Missing argument 'MODULE:BUS'"),
        (["run", "x:bus", "--log-level", "loud"], "Invalid value for '--log-level'"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_hint(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(arguments, capsys)
    assert code == 2
    assert out == ""
    assert reason in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["send", "Quote", "{"], "bad JSON at line 1, column 2"),
        (["send", "Quote", "{}", "--namespace", "a.b"], "namespace must be 1 to 64"),
        (["send", "Quote", "{}", "--url", "http://x"], "scheme must be nats:// or tls://"),
        (["send", "Quote", "{}", "-m", "no_such_module_at_all"], "there is no module"),
        (["broadcast", "Quote", "{}", "--url", " , "], "url must name a server"),
        (["run", "no_such_module_at_all:bus"], "there is no module 'no_such_module_at_all'"),
        (["run", "json:bus"], "module 'json' has no 'bus'"),
        (["run", "json:loads"], "'json:loads' is not a Bus, it is of type 'function'"),
        (["run", "catga_bus.bus:Bus"], "is not a Bus, it is the class Bus itself"),
    ],
)
def test_a_wrong_configuration_ends_with_2_and_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(arguments, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "send", "Quote", "{"], ["send", "Quote", "{", "--debug"]):
        code, _, err = run(arguments, capsys)
        assert code == 2
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1].startswith("error: bad JSON")


def test_a_bug_ends_with_70_and_says_how_to_see_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise KeyError("what")

    monkeypatch.setitem(catga.commands, "up", click.Command("up", callback=broken))
    code, _, err = run(["up"], capsys)
    assert code == 70
    assert err == "error: KeyError: 'what' (a bug: run again with --debug)\n"


def test_an_interruption_ends_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(catga.commands, "up", click.Command("up", callback=interrupted))
    assert run(["up"], capsys) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), ExitCode.USAGE),
        (RegistrationError("x"), ExitCode.USAGE),
        (BusStateError("x"), ExitCode.USAGE),
        (AuthenticationError("x"), ExitCode.UNREACHABLE),
        (DisconnectedError("x"), ExitCode.UNREACHABLE),
        (NoHandlerError("x"), ExitCode.FAILED),
        (DeadlineExceededError("x"), ExitCode.FAILED),
        (Refused("NO", "x"), ExitCode.FAILED),
        (PermissionDeniedError("x"), ExitCode.FAILED),
    ],
)
def test_every_error_has_its_exit_code(error: CatgaError, code: ExitCode) -> None:
    assert exit_code_of(error) is code


def test_a_failed_call_says_its_code_and_outcome() -> None:
    assert text_of(Refused("NO", "not today")) == "NO: not today (refused)"
    assert text_of(DisconnectedError("no server at x")) == "no server at x"


def test_the_json_of_a_failed_call_has_every_fact() -> None:
    assert facts_of(Refused("NO", "not today", {"a": 1}, node="n-1")) == {
        "ok": False,
        "code": "NO",
        "message": "not today",
        "details": {"a": 1},
        "outcome": "refused",
        "retryable": False,
        "attempts": 0,
        "node": "n-1",
    }


@pytest.mark.parametrize("library", ["click", "rich"])
def test_without_its_extra_the_command_says_how_to_get_it(library: str) -> None:
    program = (
        f"import sys; sys.modules[{library!r}] = None\nfrom catga_bus.cli import main; sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "catga needs its extra: pip install 'catga-bus[cli]'\n"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m catga_bus --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
