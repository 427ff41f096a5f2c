"""Claim: whether the id of a node that starts is free. Nobody there is certain at once; silence only after a while."""

SILENT_STRIDE = 2**20
"""How far above what was heard the number of an incarnation is that took the id of one who was silent: its number is
not known, and it is to find the new one higher when it goes on."""


class Claim:
    """What is known of whoever may have the id: by service, because that is where an id is asked.

    Args:
        timeout: Seconds for which somebody who is there and silent may still answer.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._doubts: dict[str, float] = {}  # since when each service is in doubt
        self._services: dict[int, str] = {}  # which one a question asked

    def asked(self, now: float, service: str, number: int) -> None:
        """A question is on its way; the number may be used again for the same service."""
        self._doubts.setdefault(service, now)
        self._services[number] = service

    def nobody(self, number: int) -> None:
        """The server says that nobody was there to be asked."""
        service = self._services.pop(number, None)
        if service is not None:
            self._doubts.pop(service, None)

    @property
    def is_doubted(self) -> bool:
        """Whether somebody may be there who is silent."""
        return bool(self._doubts)

    def is_free(self, now: float) -> bool:
        """Whether nobody is there, or has been silent for the timeout."""
        return all(now - since >= self._timeout for since in self._doubts.values())
