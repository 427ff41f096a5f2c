"""How the values of options are read: each refuses what cannot be, and says what it wants."""

import argparse


def positive_integer(text: str) -> int:
    """Return a whole number above zero; underscores and commas may group its digits.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    try:
        value = int(text.replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return value


def positive_integers(text: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list, in ascending order, each once.

    Raises:
        argparse.ArgumentTypeError: One of them is not a whole number above zero.
    """
    return tuple(sorted({positive_integer(part.strip()) for part in text.split(",")}))


def positive_number(text: str) -> float:
    """Return a finite number above zero.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return value
