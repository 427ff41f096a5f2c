"""catga_bus of another revision: the side of the present one, which proves first that it runs the other."""

from pathlib import Path

import catga_bus
from benchmarks.sides import catga


class _WrongRevisionError(Exception):
    """The package was not imported from where it should have been; what would be measured is another one."""


def _check(tree: str) -> None:
    found = Path(catga_bus.__file__).resolve()
    if Path(tree).resolve() not in found.parents:
        raise _WrongRevisionError(f"catga_bus was imported from {str(found)!r}, not from {tree!r}")


class Worker(catga.Worker):
    """A node with one handler.

    Args:
        url: Where the server is.
        namespace: Keeps this run apart from everything else on the server.
        tree: Where the package must come from.
    """

    def __init__(self, url: str, namespace: str, tree: str) -> None:
        _check(tree)
        super().__init__(url, namespace)


class Client(catga.Client):
    """A bus without handlers, which asks.

    Args:
        url: Where the server is.
        namespace: The worker's.
        tree: Where the package must come from.
    """

    def __init__(self, url: str, namespace: str, tree: str) -> None:
        _check(tree)
        super().__init__(url, namespace)
