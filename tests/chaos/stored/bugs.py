"""Bugs that a process of the rig can be given: what the checkers, or the simulation, must find. By name; see `BUGS`."""

from collections.abc import Callable

BUGS: dict[str, Callable[[], None]] = {}


def plant(name: str) -> None:
    """Give this process a bug; an empty name gives it none."""
    if name:
        BUGS[name]()
