"""How subjects with wildcards meet subjects, and each other; shared by what stands in for a server."""

from collections.abc import Sequence


def covers(pattern: Sequence[str], subject: Sequence[str]) -> bool:
    """Return whether a pattern matches a subject, both cut into tokens.

    Example:
        >>> covers(["a", "*"], ["a", "b"]), covers(["a", ">"], ["a"]), covers(["a", ">"], ["a", "b", "c"])
        (True, False, True)
    """
    if pattern[-1] == ">":
        if len(subject) < len(pattern):
            return False
        pattern = pattern[:-1]
    elif len(subject) != len(pattern):
        return False
    # Not strict: `>` has left the pattern shorter than the subject.
    return all(wanted in ("*", got) for wanted, got in zip(pattern, subject, strict=False))


def collide(one: str, other: str) -> bool:
    """Return whether some subject is matched by both patterns.

    Example:
        >>> collide("a.*", "a.b"), collide("a.*.c", "a.b.>"), collide("a.b", "a.c"), collide("a", "a.>")
        (True, True, False, False)
    """
    first, second = one.split("."), other.split(".")
    for mine, its in zip(first, second, strict=False):
        if mine == ">" or its == ">":
            return True
        if mine != its and "*" not in (mine, its):
            return False
    return len(first) == len(second)


def is_within(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Return whether everything that one pattern matches is matched by another, both cut into tokens.

    Example:
        >>> is_within(["a", "b"], ["a", "*"]), is_within(["a", "*"], ["a", "b"]), is_within(["a", ">"], ["a", "*"])
        (True, False, False)
    """
    if part[-1] == ">" and whole[-1] != ">":
        return False
    return covers(whole, part)
