"""Which subjects and headers may go on the wire; shared by all carriers.

The client library checks less than it seems: `publish("a..b")` vanishes without an error, wildcards pass, and one
subject longer than the server's control line closes the connection for good.
"""

import re
from functools import lru_cache

from catga_bus.errors import ConfigurationError

MAX_SUBJECT_BYTES = 1_024
# A quarter of the server's default control line (4 KiB), which holds subject, reply and sizes together.

_PLAIN = re.compile(r"[!-)+-\-/-=?-~]+(?:\.[!-)+-\-/-=?-~]+)*")
# Printable ASCII without wildcards in tokens that are not empty.

_BAD_CHARACTER = re.compile("[\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]")  # halves of surrogate pairs have no UTF-8
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# The token of RFC 7230, as the client library has it; anything else could end the header line.
_BAD_IN_HEADER_VALUE = re.compile("[\x00\r\n\ud800-\udfff]")


def is_plain(subject: str) -> bool:
    """Return whether a subject is of the common kind that may be sent; of the others `checked_subject` knows.

    One look costs a tenth of the whole check: for subjects that are used once, as those that acknowledge are.
    """
    return len(subject) <= MAX_SUBJECT_BYTES and _PLAIN.fullmatch(subject) is not None


@lru_cache(maxsize=4_096)
def checked_subject(subject: str, *, wildcards: bool = False) -> str:
    """Return the subject if it may be sent.

    Args:
        subject: What to check.
        wildcards: Whether `*` and a final `>` are allowed as whole tokens (for subscriptions).

    Raises:
        ConfigurationError: It may not; the text says why.
    """
    if not subject:
        raise ConfigurationError("a subject must not be empty")
    if len(subject.encode("utf-8", "surrogatepass")) > MAX_SUBJECT_BYTES:
        raise ConfigurationError(f"subject {subject[:40]!r}... is longer than {MAX_SUBJECT_BYTES} bytes")
    if _BAD_CHARACTER.search(subject):
        raise ConfigurationError(f"subject {subject!r} holds a space, a control character or half a surrogate pair")
    tokens = subject.split(".")
    for place, part in enumerate(tokens):
        if not part:
            raise ConfigurationError(f"subject {subject!r} has an empty token")
        if "*" in part or ">" in part:
            whole = part == "*" or (part == ">" and place == len(tokens) - 1)
            if not (wildcards and whole):
                raise ConfigurationError(f"subject {subject!r} holds the wildcard {part!r} where none may be")
    return subject


def check_header(name: str, value: str) -> None:
    """Refuse a header that cannot be sent.

    Raises:
        ConfigurationError: Its name is no token of RFC 7230, or its value could end the line; the text names it.
    """
    if not _HEADER_NAME.fullmatch(name):
        raise ConfigurationError(f"header {name!r} cannot be sent: a name is letters, digits and !#$%&'*+-.^_`|~")
    if _BAD_IN_HEADER_VALUE.search(value):
        raise ConfigurationError(
            f"header {name!r} cannot be sent: its value {value!r} holds a line break, NUL or half a surrogate pair"
        )
