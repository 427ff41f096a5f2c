"""What commands print on stdout."""

import sys
from typing import Any

import click
import msgspec
import rich.console

_WIDTH = 200  # columns where there is no terminal: nothing is cut off in files and pipes


def table_console() -> rich.console.Console:
    """Return what prints tables on stdout."""
    return rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, for machines."""
    click.echo(_encoded(value).decode())


def print_value(value: Any) -> None:
    """Print a value as JSON for people: indented, and in colours on a terminal."""
    text = msgspec.json.format(_encoded(value), indent=2).decode()
    console = rich.console.Console()
    if console.is_terminal:
        console.print_json(text)
    else:
        click.echo(text)


def _encoded(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)  # str: details may hold what JSON has no word for
