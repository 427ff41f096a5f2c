"""The command line `catga`. Thin: parse, call the bus, print."""

import sys
from collections.abc import Sequence

_EXTRA = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises what a user can do wrong.

    Args:
        arguments: What stands after `catga`; by default those of this process.
    """
    try:
        from catga_bus.cli.root import run_command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        print("catga needs its extra: pip install 'catga-bus[cli]'", file=sys.stderr)
        return 2
    return run_command(sys.argv[1:] if arguments is None else arguments)
