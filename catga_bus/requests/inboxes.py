"""Where answers may go: only under an inbox root, so that no request can make a node write somewhere else."""

from collections.abc import Iterable

from catga_bus.errors import ConfigurationError
from catga_bus.transport.validation import checked_subject
from catga_bus.wire import Names


class Inboxes:
    """The reply subjects that a node answers to.

    Args:
        roots: Prefixes of inboxes, without the dot, such as `_INBOX`.
        names: The namespace, into which no answer goes even if a root should contain it.
    """

    def __init__(self, roots: Iterable[str], names: Names) -> None:
        self._names = names
        self._prefixes = tuple(f"{checked_subject(root)}." for root in roots)

    def allow(self, subject: str) -> bool:
        """Whether an answer may be sent to this subject."""
        if not subject.startswith(self._prefixes) or subject.startswith("$") or self._names.owns(subject):
            return False
        try:
            checked_subject(subject)
        except ConfigurationError:
            return False
        return True
