"""The group of all commands, and the edge where errors become one line and an exit code."""

import os
import sys
import traceback
from collections.abc import Sequence

import click

from catga_bus.cli.calls import broadcast, enqueue, publish, send
from catga_bus.cli.demo import demo
from catga_bus.cli.dlq import dlq
from catga_bus.cli.doctor import doctor
from catga_bus.cli.events import events
from catga_bus.cli.exits import EXIT_CODES_HELP, ExitCode, exit_code_of, text_of
from catga_bus.cli.nodes import nodes
from catga_bus.cli.options import Session, debug_option
from catga_bus.cli.partitions import partitions
from catga_bus.cli.run import run
from catga_bus.cli.streams import streams
from catga_bus.cli.up import up
from catga_bus.errors import CatgaError
from catga_bus.version import __version__

_EXAMPLES = """\b
Try it on this machine, in three terminals:
  catga up                                  a server
  catga run shop.app:bus                    a node of your service
  catga send Quote '{"sku": "sku-9"}'       a request to it

\b
Or see a month of flights replayed through three nodes:
  catga demo

"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXAMPLES + EXIT_CODES_HELP,
)
@click.version_option(__version__, message="catga %(version)s")
@debug_option
def catga() -> None:
    """Typed messages between Python processes, over NATS."""


for command in (
    *(up, run, send, enqueue, publish, broadcast),
    *(nodes, partitions, streams, dlq, events, doctor, demo),
):
    catga.add_command(command)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: What stands after `catga`.
    """
    session = Session()
    try:
        code = _run(arguments, session)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has what it wanted, as in `catga send ... | head`. Without this the interpreter would complain
        # when it flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    return code


def _run(arguments: Sequence[str], session: Session) -> int:
    try:
        code = catga.main(list(arguments), prog_name="catga", standalone_mode=False, obj=session)
    except SystemExit as ended:  # completion in the shell, or a reader that left while help was printed
        return ended.code if isinstance(ended.code, int) else ExitCode.FAILED
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        raise
    except CatgaError as error:
        _show(error, text_of(error), session)
        return exit_code_of(error)
    except Exception as error:
        text = f"{type(error).__name__}: {error} (a bug: run again with --debug)"
        _show(error, text, session)
        return ExitCode.BUG
    return code if isinstance(code, int) else ExitCode.OK


def _show(error: Exception, text: str, session: Session) -> None:
    if session.debug:
        traceback.print_exception(error)
    line = " ".join(text.split())
    click.echo(f"{click.style('error:', fg='red')} {line}", err=True)
