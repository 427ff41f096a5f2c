"""Options of this room are checked where they are given: a wrong one names itself, its bounds and its value."""

from typing import Any

from catga_bus.errors import ConfigurationError


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number from `low` to `high`.

    Raises:
        ConfigurationError: It is not; NaN and booleans are not either.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        raise ConfigurationError(f"{name} must be {low:,} to {high:,}, got {value!r}")


def check_count(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is no integer from `low` to `high`.

    Raises:
        ConfigurationError: It is not; booleans are not either.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigurationError(f"{name} must be an integer from {low:,} to {high:,}, got {value!r}")
