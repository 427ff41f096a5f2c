"""Options that several commands share, and what they set."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

ClickCommand = TypeVar("ClickCommand", bound=Callable[..., Any])


class Session(msgspec.Struct):
    """What one run of `catga` knows besides the arguments of its command."""

    debug: bool = False
    """Whether errors are shown with their tracebacks."""


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's own order
    if value:
        context.ensure_object(Session).debug = True


def debug_option(command: ClickCommand) -> ClickCommand:
    """Add `--debug`, which is taken before and after the name of a command."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show tracebacks instead of one line.",
    )(command)


def keep_quiet() -> None:
    """Let a bus log nothing, unless `--debug` was given: it would stand before the one line that says how it ended."""
    if not click.get_current_context().ensure_object(Session).debug:
        logging.basicConfig(handlers=[logging.NullHandler()])


def url_option(command: ClickCommand) -> ClickCommand:
    """Add `--url`."""
    return click.option(
        "--url",
        metavar="URL",
        help="The server, or several separated by commas. [default: $CATGA_URL, $NATS_URL, nats://127.0.0.1:4222]",
    )(command)


def namespace_option(command: ClickCommand) -> ClickCommand:
    """Add `--namespace`."""
    return click.option(
        "--namespace",
        metavar="NAME",
        default="catga",
        show_default=True,
        help="First token of all names on the server.",
    )(command)


def json_option(command: ClickCommand) -> ClickCommand:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")(command)
