"""What commands print on stdout."""

from typing import Any

import click
import msgspec
import rich.console


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
