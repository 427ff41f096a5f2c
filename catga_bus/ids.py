"""Message ids: 96 random bits, drawn once per start, and a counter."""

import base64
import itertools
import secrets
from collections.abc import Callable, Iterator

_ENTROPY_BYTES = 12  # 96 bits: two of a billion starts share a prefix with probability 6e-12 (birthday bound)


class MessageIds:
    """Gives ids that no other start of any bus gives.

    An id is 16 characters of URL-safe base64 (the random bits) and the count in hexadecimal. It says nothing about who
    made it, and cannot be guessed from another start's ids.

    Args:
        entropy: The random bits; drawn from the system when None.
    """

    __slots__ = ("prefix", "take")

    def __init__(self, entropy: bytes | None = None) -> None:
        drawn = secrets.token_bytes(_ENTROPY_BYTES) if entropy is None else entropy
        self.prefix = base64.urlsafe_b64encode(drawn).decode().rstrip("=")
        self.take: Callable[[], str] = _count(self.prefix).__next__
        """Returns the next id. In one thread: that of the event loop."""


def _count(prefix: str) -> Iterator[str]:
    """Give a prefix and a count, two digits at least. It costs a third of formatting each number, for every call."""
    digits = [f"{low:02x}" for low in range(256)]
    for high in itertools.count():
        start = f"{prefix}{high:x}" if high else prefix
        for low in digits:
            yield start + low


def new_node_id(service: str) -> str:
    """Return a node id: the service, a dash, and 10 base32 characters (50 random bits)."""
    alphabet = "abcdefghijklmnopqrstuvwxyz234567"
    return f"{service}-{''.join(secrets.choice(alphabet) for _ in range(10))}"
