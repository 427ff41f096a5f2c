"""`catga run`: one node of a service, from a module."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

import click

from catga_bus.bus import Bus
from catga_bus.cli.exits import ExitCode, exit_code_of
from catga_bus.cli.leaving import LastExit
from catga_bus.cli.loading import load_attribute, load_module
from catga_bus.cli.options import debug_option
from catga_bus.errors import CatgaError, ConfigurationError
from catga_bus.http import HealthServer

TOKEN_VARIABLE = "CATGA_HEALTH_TOKEN"
"""Names the token that `/health` asks for. No option: what stands on a command line, all users see."""

_LEVELS = ("debug", "info", "warning", "error")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


_RUN_EXAMPLES = """\b
Examples:
  catga run shop.app:bus
  catga run shop.app --url nats://nats-1:4222,nats://nats-2:4222
  catga run shop.app:bus --node-id shop-1 --log-level debug
  catga run shop.app:bus --health 127.0.0.1:8080

\b
--health serves, on a thread of its own, for GET and HEAD:
  /livez   200 while a restart would not help, a lost server included;
           503 once the event loop has been blocked for 30 s, or the bus is closed
  /readyz  200 while work may be sent here: started, connected, subscriptions
           confirmed, event loop in time, memory left; 503 from the first signal on
  /health  why, as JSON: if CATGA_HEALTH_TOKEN is set, for who sends the header
           `Authorization: Bearer $CATGA_HEALTH_TOKEN`; if not, for who asks from
           this machine, which includes all whom a proxy on it lets through
"""


@click.command(short_help="Run a node of your service.", epilog=_RUN_EXAMPLES)
@click.argument("target", metavar="MODULE:BUS")
@click.option(
    "--url",
    metavar="URL",
    help="The server, or several separated by commas; goes over what the module says.",
)
@click.option("--node-id", metavar="ID", help="The id of this node. [default: drawn]")
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="What is logged to stderr.",
)
@click.option(
    "--health",
    metavar="HOST:PORT",
    help="Serve /livez, /readyz and /health here; [::1]:8080 for IPv6, port 0 for one that is free.",
)
@debug_option
def run(*, target: str, url: str | None, node_id: str | None, log_level: str, health: str | None) -> int:
    """Import MODULE and run its BUS until SIGTERM or Ctrl-C, then drain: finish and answer what runs.

    A second signal ends it at once; the exit code is 1 if something was left unfinished. Handlers and
    threads that cannot be ended do not keep the process. The working directory comes first in the search for
    modules; MODULE alone means MODULE:bus. Uses uvloop where it is installed.
    """
    logging.basicConfig(level=log_level.upper(), format=_FORMAT)
    bus = load_bus(target)
    bus.override(url=url, node_id=node_id)
    last_exit = LastExit()
    with _health_server(health, bus), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            code = ExitCode.OK if runner.run(bus.run()) else ExitCode.FAILED
        except BaseException as error:
            last_exit.begin(_code_of(error), f"{type(error).__name__}: {error}")
            raise
        last_exit.begin(code)
    return code


def _code_of(error: BaseException) -> ExitCode:
    if isinstance(error, CatgaError):
        return exit_code_of(error)
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.BUG


@contextlib.contextmanager
def _health_server(address: str | None, bus: Bus) -> Iterator[None]:
    """Serve the health of a bus, if that is asked for, and print where."""
    if address is None:
        yield
        return
    with HealthServer(address, bus.health, os.environ.get(TOKEN_VARIABLE) or None) as server:
        click.echo(f"health at {server.url}")
        sys.stdout.flush()  # whoever waits for the port may read a pipe
        yield


def load_bus(target: str) -> Bus:
    """Import the bus that MODULE:BUS names.

    Raises:
        ConfigurationError: It cannot be imported, or is none.
    """
    found = load_attribute(target, default="bus")
    if isinstance(found, Bus):
        return found
    what = "the class Bus itself" if found is Bus else f"of type {type(found).__name__!r}"
    module = target.partition(":")[0]
    buses = [name for name, value in vars(load_module(module)).items() if isinstance(value, Bus)]
    hint = f"; the module has {', '.join(f'{module}:{name}' for name in buses)}" if buses else ""
    raise ConfigurationError(f"{target!r} is not a Bus, it is {what}{hint}")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
