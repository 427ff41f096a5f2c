import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from catga_bus.cli.loading import find_message_class, load_attribute, load_module
from catga_bus.errors import ConfigurationError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def error_of(target: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_attribute(target, "bus")
    return str(caught.value)


def test_a_module_of_the_working_directory_is_found(project: Path) -> None:
    (project / "cli_a.py").write_text("bus = 1\nother = 2\n")
    assert load_attribute("cli_a", "bus") == 1
    assert load_attribute("cli_a:other", "bus") == 2


def test_a_module_in_a_package_and_a_dotted_attribute_are_found(project: Path) -> None:
    (project / "cli_shop").mkdir()
    (project / "cli_shop" / "__init__.py").touch()
    (project / "cli_shop" / "app.py").write_text("class things:\n    bus = 3\n")
    assert load_attribute("cli_shop.app:things.bus", "bus") == 3


def test_a_module_that_is_not_there_is_named_with_its_neighbours(project: Path) -> None:
    (project / "cli_billing.py").touch()
    text = error_of("cli_biling:bus")
    assert text.startswith(f"there is no module 'cli_biling', neither in {project} nor installed")
    assert text.endswith("; did you mean 'cli_billing'?")


def test_a_missing_part_of_a_package_is_the_one_that_is_named(project: Path) -> None:
    (project / "cli_part").mkdir()
    (project / "cli_part" / "__init__.py").touch()
    assert error_of("cli_part.app").startswith("there is no module 'cli_part.app'")


def test_a_path_is_answered_with_the_name_that_was_meant(project: Path) -> None:
    assert "did you mean 'shop.app'?" in error_of("shop/app.py:bus")
    assert "did you mean 'app'?" in error_of("./app.py")
    assert "is not the name of a module" in error_of("")
    assert "is not the name of a module" in error_of("a b")


def test_an_import_error_inside_the_module_shows_its_real_line(project: Path) -> None:
    (project / "cli_outer.py").write_text("import cli_inner\n")
    (project / "cli_inner.py").write_text("x = 1\n\nimport nothing_of_that_name\n")
    assert error_of("cli_outer") == (
        "'cli_outer' cannot be imported: cli_inner.py:3: `import nothing_of_that_name`: "
        "ModuleNotFoundError: No module named 'nothing_of_that_name'"
    )


def test_any_error_inside_the_module_shows_its_real_line(project: Path) -> None:
    (project / "cli_raises.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
    expected = "cli_raises.py:2: `return 1 / 0`: ZeroDivisionError: division by zero"
    assert expected in error_of("cli_raises")


def test_an_error_of_the_bus_is_placed_at_the_line_that_caused_it(project: Path) -> None:
    (project / "cli_typo.py").write_text(
        "from catga_bus.messages import Event\n\n\nclass Tick(Event, durible=False):\n    n: int\n"
    )
    text = error_of("cli_typo")
    assert "cli_typo.py:4: `class Tick(Event, durible=False):`" in text
    assert "unknown option 'durible'" in text


def test_a_syntax_error_shows_its_line(project: Path) -> None:
    (project / "cli_syntax.py").write_text("x = 1\nif x\n    y = 2\n")
    text = error_of("cli_syntax")
    assert "cli_syntax.py:2: `if x`: SyntaxError: expected ':'" in text


def test_a_module_that_ends_the_program_does_not_end_ours(project: Path) -> None:
    (project / "cli_exits.py").write_text("import sys\nsys.exit(4)\n")
    text = error_of("cli_exits")
    assert "cli_exits.py:2: `sys.exit(4)`: it ended the program (exit code 4)" in text


def test_a_missing_attribute_is_named_with_its_neighbours(project: Path) -> None:
    (project / "cli_attr.py").write_text("orders_bus = 1\n")
    text = error_of("cli_attr:order_bus")
    assert text == "module 'cli_attr' has no 'order_bus'; did you mean 'orders_bus'?"
    assert error_of("cli_attr:zzz") == "module 'cli_attr' has no 'zzz'"


def test_a_message_is_found_by_its_wire_name_or_its_class(project: Path) -> None:
    (project / "cli_messages.py").write_text(
        "from catga_bus.messages import Event, Request\n"
        "class Quote(Request[int]):\n    sku: str\n"
        "class Tick(Event, type_name='ticks.v2'):\n    n: int\n"
    )
    module = load_module("cli_messages")
    assert find_message_class("cli_messages", "Quote") is module.Quote
    assert find_message_class("cli_messages", "ticks.v2") is module.Tick
    assert find_message_class("cli_messages", "Tick") is module.Tick
    with pytest.raises(ConfigurationError, match="has no message 'Quot'; it has Quote, Tick"):
        find_message_class("cli_messages", "Quot")
    (project / "cli_none.py").touch()
    with pytest.raises(ConfigurationError, match="it has none at all"):
        find_message_class("cli_none", "Quote")
